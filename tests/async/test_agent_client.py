"""Questions without a task: answered once, asked again on the next connection, given up in time."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from cachefs import errors
from cachefs.agent import framing, messages
from cachefs.agent.client import AgentClient
from cachefs.types import Ino, Tier
from cachefs.vfs.ports import FilledBlock
from tests.support.block_cache_rig import eventually

Outcome = list[FilledBlock] | errors.CachefsError


class FakeAgent:
    """The far end of every connection; what it is asked is in `asked`, and it answers when it is told to."""

    def __init__(self) -> None:
        self.far: list[socket.socket] = []
        self.asked: list[messages.Fill] = []
        self.ranges: list[messages.FetchRange] = []
        self.knows_ranges = True

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.far.append(theirs)
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return ours

    def _serve(self, connection: socket.socket) -> None:
        frames = framing.requests()
        for received in iter(lambda: self._receive(connection), b""):
            for request in frames.feed(received):
                if isinstance(request, messages.Attach):
                    known = msgspec.structs.replace(attached(request.id), ranges=self.knows_ranges)
                    connection.sendall(framing.encode(known))
                elif isinstance(request, messages.FetchRange):
                    self.ranges.append(request)
                elif isinstance(request, messages.Fill):
                    self.asked.append(request)

    @staticmethod
    def _receive(connection: socket.socket) -> bytes:
        try:
            return connection.recv(1 << 16)
        except OSError:
            return b""

    def answer(self, request: messages.Fill) -> None:
        blocks: list[tuple[int, str, bytes | None]] = [(request.first, Tier.ORIGIN.value, None)]
        self.far[-1].sendall(framing.encode(messages.Filled(id=request.id, blocks=blocks)))

    def hang_up(self) -> None:
        self.far[-1].shutdown(socket.SHUT_RDWR)


def attached(identity: int) -> messages.Attached:
    return messages.Attached(
        id=identity,
        pid=1,
        version="1",
        shm_path=None,
        metadata_path="/none",
        volume_id="v",
        endpoint="e",
        bucket="b",
        block_size=1 << 20,
    )


def introduction(identity: int) -> messages.Attach:
    return messages.Attach(
        id=identity,
        protocol=messages.PROTOCOL_VERSION,
        version="1",
        mount_id="m",
        mountpoint="/m",
        pid=1,
        volume={},
        environment={},
        check=False,
    )


@pytest.fixture
def agent() -> Iterator[FakeAgent]:
    made = FakeAgent()
    yield made
    for connection in made.far:
        connection.close()


@asynccontextmanager
async def connected(agent: FakeAgent) -> AsyncIterator[AgentClient]:
    async def on_attached(_: messages.Attached) -> None:
        return None

    client = AgentClient(agent.connect, agent.connect, introduction, on_attached, io_timeout_s=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        yield client
        nursery.cancel_scope.cancel()


async def test_a_question_of_another_thread_is_answered_in_the_trio_thread(agent: FakeAgent) -> None:
    outcomes: list[tuple[Outcome, int]] = []
    async with connected(agent) as client:

        def ask() -> None:
            for index in range(50):
                assert client.request_fill(
                    Ino(7), index, 1, lambda outcome: outcomes.append((outcome, threading.get_ident()))
                )

        await trio.to_thread.run_sync(ask)
        await eventually(lambda: len(agent.asked) == 50, timeout_s=5)
        for request in agent.asked:
            agent.answer(request)
        await eventually(lambda: len(outcomes) == 50, timeout_s=5)
        assert not client.waits
    assert [outcome for outcome, _ in outcomes] == [[FilledBlock(index, Tier.ORIGIN, None)] for index in range(50)]
    assert {thread for _, thread in outcomes} == {threading.get_ident()}


@pytest.mark.expect_warnings("looking for another")
async def test_a_question_is_asked_again_on_the_next_connection_and_answered_once(agent: FakeAgent) -> None:
    outcomes: list[Outcome] = []
    async with connected(agent) as client:
        assert client.request_fill(Ino(7), 3, 1, outcomes.append)
        await eventually(lambda: len(agent.asked) == 1, timeout_s=5)
        agent.hang_up()
        await eventually(lambda: len(agent.asked) == 2, timeout_s=5)
        assert agent.asked[0] == agent.asked[1]
        agent.answer(agent.asked[1])
        agent.answer(agent.asked[1])
        await eventually(lambda: bool(outcomes), timeout_s=5)
        await trio.sleep(0.05)
    assert outcomes == [[FilledBlock(3, Tier.ORIGIN, None)]]


async def test_a_question_that_nobody_answers_is_given_up(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Outcome] = []
    async with connected(agent) as client:
        monkeypatch.setattr(client, "_deadline_s", 0.1)
        assert client.request_fill(Ino(7), 3, 1, outcomes.append)
        client.expire()
        assert outcomes == []
        await trio.sleep(0.15)
        client.expire()
        client.expire()
        await eventually(lambda: len(agent.asked) == 1, timeout_s=5)
        agent.answer(agent.asked[0])
        await trio.sleep(0.05)
    assert [type(outcome) for outcome in outcomes] == [errors.AgentUnavailable]


async def test_without_a_connection_nothing_is_asked(agent: FakeAgent) -> None:
    async with connected(agent) as client:
        pass
    assert not client.request_fill(Ino(7), 3, 1, lambda outcome: pytest.fail(str(outcome)))


async def test_a_range_is_asked_for_and_answered(agent: FakeAgent) -> None:
    outcomes: list[bytes | errors.CachefsError] = []
    async with connected(agent) as client:
        assert client.request_range(Ino(7), 5, 3, outcomes.append)
        await eventually(lambda: len(agent.ranges) == 1, timeout_s=5)
        request = agent.ranges[0]
        assert (request.ino, request.offset, request.length) == (7, 5, 3)
        agent.far[-1].sendall(framing.encode(messages.FetchedRange(id=request.id, payload=b"abc")))
        await eventually(lambda: bool(outcomes), timeout_s=5)
    assert outcomes == [b"abc"]


async def test_an_agent_that_knows_no_ranges_is_not_asked(agent: FakeAgent) -> None:
    agent.knows_ranges = False
    async with connected(agent) as client:
        assert not client.request_range(Ino(7), 5, 3, lambda outcome: pytest.fail(str(outcome)))
        with pytest.raises(errors.Unsupported):
            await client.fetch_range(Ino(7), 5, 3)
        client.range_ahead(Ino(7), 5, 3)
        assert not client.waits


@pytest.mark.expect_warnings("looking for another")
async def test_the_next_agent_knows_no_ranges(agent: FakeAgent) -> None:
    """An older version took the place of the one that was asked."""
    outcomes: list[bytes | errors.CachefsError] = []
    async with connected(agent) as client:
        assert client.request_range(Ino(7), 5, 3, outcomes.append)
        await eventually(lambda: len(agent.ranges) == 1, timeout_s=5)
        agent.knows_ranges = False
        agent.hang_up()
        await eventually(lambda: bool(outcomes), timeout_s=5)
        assert isinstance(outcomes[0], errors.Unsupported)
        assert len(agent.ranges) == 1
        assert not client.waits
