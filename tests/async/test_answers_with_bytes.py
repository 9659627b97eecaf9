"""Answers that carry bytes: room for them, fairness between those who wait, and the frames that leave the process."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from cachefs.agent import framing, messages
from cachefs.agent.sender import Sender
from cachefs.block.carriage import Carriage
from cachefs.block.shares import Shares

MIB = 1 << 20


class Askers:
    """Tasks that hold room until they are told to let go."""

    def __init__(self, carriage: Carriage, nursery: trio.Nursery) -> None:
        self.carriage = carriage
        self.nursery = nursery
        self.holding: list[str] = []
        self.events: dict[str, list[trio.Event]] = {}

    async def ask(self, who: str, size: int) -> trio.CancelScope:
        scope, release = trio.CancelScope(), trio.Event()
        self.events.setdefault(who, []).append(release)

        async def hold() -> None:
            with scope:
                async with self.carriage.room(who, size):
                    self.holding.append(who)
                    await release.wait()
                self.holding.remove(who)

        self.nursery.start_soon(hold)
        await trio.testing.wait_all_tasks_blocked()
        return scope

    async def release(self, who: str) -> None:
        self.events[who].pop(0).set()
        await trio.testing.wait_all_tasks_blocked()


async def test_room_is_bounded_and_one_who_holds_on_to_it_keeps_no_other_out() -> None:
    async with trio.open_nursery() as nursery:
        askers = Askers(Carriage(16), nursery)
        for _ in range(20):
            await askers.ask("greedy", 1)
        assert askers.holding == ["greedy"] * 9
        for who in ("a", "b"):
            await askers.ask(who, 1)
        assert askers.holding == ["greedy"] * 9 + ["a", "b"]
        nursery.cancel_scope.cancel()


async def test_those_who_wait_take_turns() -> None:
    async with trio.open_nursery() as nursery:
        askers = Askers(Carriage(4), nursery)
        await askers.ask("first", 4)
        for who in ("a", "a", "a", "b"):
            await askers.ask(who, 2)
        await askers.release("first")
        assert sorted(askers.holding) == ["a", "b"]
        nursery.cancel_scope.cancel()


async def test_who_gives_up_while_waiting_leaves_nothing_behind() -> None:
    async with trio.open_nursery() as nursery:
        carriage = Carriage(4)
        askers = Askers(carriage, nursery)
        await askers.ask("first", 4)
        given_up = await askers.ask("a", 3)
        await askers.ask("b", 2)
        given_up.cancel()
        await trio.testing.wait_all_tasks_blocked()
        await askers.release("first")
        assert askers.holding == ["b"]
        both = await askers.ask("a", 4)
        askers.events["b"][0].set()  # granted and cancelled in the same turn
        both.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert (carriage.held_bytes, askers.holding) == (0, [])


async def test_more_than_all_room_is_given_to_one_alone() -> None:
    async with trio.open_nursery() as nursery:
        carriage = Carriage(4)
        askers = Askers(carriage, nursery)
        await askers.ask("large", 10)
        await askers.ask("small", 1)
        assert askers.holding == ["large"]
        await askers.release("large")
        assert askers.holding == ["small"]
        await askers.ask("large", 10)
        assert askers.holding == ["small"]
        await askers.release("small")
        assert askers.holding == ["large"]
        nursery.cancel_scope.cancel()


def test_shares_leave_room_for_the_next() -> None:
    shares = Shares(1000)
    for hoarder in range(10):
        while shares.fits(hoarder, 10, greed=3.0):
            shares.take(hoarder, 10)
    assert 500 < shares.held_bytes <= 850
    for _ in range(3):
        for other in ("a", "b", "c"):
            assert shares.fits(other, 10, greed=3.0)
            shares.take(other, 10)
        for other in ("a", "b", "c"):
            shares.give_back(other, 10)


@pytest.mark.parametrize("size", [0, 5, 100_000, 4 * MIB])
def test_large_frames_are_the_same_as_others(size: int) -> None:
    message = messages.Filled(id=7, blocks=[(3, "origin", bytes(size)), (4, "shm", None), (5, "disk", b"x")])
    assert framing.encode_large(message, size + 1) == framing.encode(message)
    assert framing.encode_large(message, 0) == framing.encode(message)
    assert framing.answers().feed(framing.encode_large(message, size + 1)) == [message]


async def test_a_frame_is_delivered_when_the_other_side_has_room_for_it() -> None:
    ours, theirs = trio.socket.socketpair()
    async with trio.SocketStream(ours) as stream, trio.SocketStream(theirs) as other, trio.open_nursery() as nursery:
        sender = Sender(stream)
        nursery.start_soon(sender.run)
        delivered: list[int] = []

        async def deliver(size: int) -> None:
            await sender.deliver(bytes(size))
            delivered.append(size)

        await deliver(10)
        for size in (4 * MIB, MIB):
            nursery.start_soon(deliver, size)
            await trio.testing.wait_all_tasks_blocked()
        assert delivered == [10]
        received = 0
        while received < 10 + 5 * MIB:
            received += len(await other.receive_some(MIB))
        await trio.testing.wait_all_tasks_blocked()
        assert delivered == [10, 4 * MIB, MIB]
        nursery.start_soon(deliver, 8 * MIB)
        await trio.testing.wait_all_tasks_blocked()
        sender.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert len(delivered) == 4, "nobody waits for a stream that is over"
        nursery.cancel_scope.cancel()
