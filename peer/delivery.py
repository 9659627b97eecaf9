"""The blocks of one question, in its order, from wherever they are: memory, disk, or our own sources.

    sender  (the connection's task)   block by block: from the memory map if it is there; else it wakes the provider,
                                      waits for what that finds, and says WAIT meanwhile
    provider (a task, when needed)    goes ahead of the sender: blocks of the disk tier are read in threads, what is
                                      in no tier is fetched run by run, as if a reader of this node had asked

Most often all that is missing is one range of one object, of which no tier has anything and for which there is room:
then the sender has it fetched by itself. (Tasks and threads for that cost half a millisecond per small file.)

What moves: `_found`, by number of the block. A block that is being fetched is looked for in memory every `LOOK_S`, so
the first of a range goes out while the last are still coming in.

What always holds: bytes that are held here were granted before (`Rooms`). Within one question room is taken in the
order of its blocks and given back in that order, so the block that the sender needs next always has its own: questions
cannot wait for each other in a circle. Room for a fetch is given back when its result has come, whoever still waits.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import trio

from cachefs import errors
from cachefs.types import ObjectId
from peer import wire
from peer.frames import Frames
from peer.placement import LEVELS
from peer.ports import Holdings
from peer.room import ByteRoom
from peer.wire import BatchRequest, FrameStatus, WantedBlock

LOOK_S = 0.02
AHEAD_BYTES = 4 << 20
"""How far the provider goes ahead of the sender."""
LOAD_BYTES = 1 << 20
"""Small blocks of the disk tier are read several at a time: a thread costs 100 us."""
FETCH_BYTES = 8 << 20


class Line:
    """What the questions may hold for which this node has one place in the order (`Candidates.level`)."""

    def __init__(self, questions: int, fetched_bytes: int) -> None:
        self.questions = trio.CapacityLimiter(questions)
        self.fetched = ByteRoom(fetched_bytes)


class Rooms:
    """What all questions to one server may hold together.

    What this node fetches as an owner waits for the store; what it fetches as the first of its zone waits for an owner.
    So each has room of its own: two nodes full of questions that wait for each other would wait for ever. Questions
    from within a tree (`peer.tree`) wait for those of an earlier step, and these for the ones without a step.
    """

    def __init__(self, questions: int, copied_bytes: int, fetched_bytes: int, loading: int) -> None:
        self.copied = ByteRoom(copied_bytes)
        self.loading = trio.CapacityLimiter(loading)
        most = fetched_bytes // 2
        rest = (fetched_bytes - most) // (LEVELS - 1)
        self.lines = tuple(Line(questions, rest if level else most) for level in range(LEVELS + wire.TREE_STEPS))

    @property
    def questions(self) -> int:
        """How many questions are admitted."""
        return sum(line.questions.borrowed_tokens for line in self.lines)

    @property
    def held_bytes(self) -> int:
        """What they hold."""
        return self.copied.used + sum(line.fetched.used for line in self.lines)


class _Place(enum.Enum):
    MEMORY = enum.auto()
    """It was there a moment ago."""
    COMING = enum.auto()
    """It is being fetched."""


@dataclass(frozen=True, slots=True)
class _Bytes:
    """In memory of ours."""

    payload: bytes
    room: ByteRoom


@dataclass(frozen=True, slots=True)
class _Nothing:
    """There will be none."""

    status: FrameStatus
    reason: str = ""


_Found = _Place | _Bytes | _Nothing


class Delivery:
    """The answer to one `BatchRequest`."""

    def __init__(
        self,
        request: BatchRequest,
        blocks: Sequence[WantedBlock],
        holdings: Holdings,
        rooms: Rooms,
        frames: Frames,
    ) -> None:
        """`blocks`: those of `request`."""
        self._request = request
        self._blocks = blocks
        self._holdings = holdings
        self._rooms = rooms
        self._frames = frames
        self._found: dict[int, _Found] = {}
        self._changed = trio.Event()
        self._moved = trio.Event()
        self._at = 0
        """The number of the block that the sender is at."""
        self._ends = list(itertools.accumulate(block.length for block in blocks))
        self._over = False
        self.sent_blocks = self.sent_bytes = 0

    async def run(self) -> None:
        """Send all frames. Raises ConnectionLost."""
        if await self._send_what_is_there():
            return
        line = self._line(self._blocks[self._at])
        blocks = self._admitted_at_once(line)
        if blocks:
            try:
                if self._request.only_cached:
                    self._give_up(blocks[0])
                else:
                    self._fetch(blocks, line.fetched)
                await self._send_rest()
            finally:
                self._close()
                line.questions.release_on_behalf_of(self)
            return
        trouble: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await self._work(nursery)
                except Exception as error:  # noqa: BLE001 - raised below, where the nursery does not wrap it
                    trouble = error
                nursery.cancel_scope.cancel()
        finally:  # not earlier: a provider that is cancelled may just have got something
            self._close()
        if trouble is not None:
            raise trouble

    async def _work(self, nursery: trio.Nursery) -> None:
        await self._wait_for_admission(nursery)
        nursery.start_soon(self._provide, self._at)
        await self._send_rest()

    async def _send_rest(self) -> None:
        for block in self._blocks[self._at :]:
            self._at = block.number
            self._moved.set()
            await self._send(block)

    def _close(self) -> None:
        """Nothing is sent any more."""
        self._over = True
        for number in list(self._found):
            self._drop(number)

    def _line(self, *blocks: WantedBlock) -> Line:
        """Return the line of who waits for these blocks: he may wait for all nodes that any of them waits for."""
        request, level_of = self._request, self._holdings.level
        if request.step:
            return self._rooms.lines[LEVELS - 1 + request.step]
        levels = [level_of(request.volume, ObjectId(request.runs[each.run].oid), each.index) for each in blocks]
        return self._rooms.lines[max(levels)]

    def _admitted_at_once(self, line: Line) -> Sequence[WantedBlock]:
        """Return what is left, with a place and room taken for it; nothing if that is more than one range, if some of
        it is on our disk, or if we would have to wait.
        """
        left = self._blocks[self._at :]
        size = sum(block.length for block in left)
        if left[0].run != left[-1].run or (size > FETCH_BYTES and len(left) > 1):
            return ()
        if any(self._holdings.stored(block.key) for block in left):
            return ()
        try:
            line.questions.acquire_on_behalf_of_nowait(self)
        except trio.WouldBlock:
            return ()
        if self._request.only_cached or line.fetched.take_now(size):
            return left
        line.questions.release_on_behalf_of(self)
        return ()

    async def _send_what_is_there(self) -> bool:
        """Send blocks from memory up to the first that is not there; True: that was all, as it is most often."""
        for block in self._blocks:
            self._at = block.number
            if not await self._lent(block):
                return False
        return True

    async def _lent(self, block: WantedBlock) -> bool:
        sent = await self._frames.lent(block.number, block.key, block.length, last=self._is_last(block))
        if sent:
            self.sent_blocks += 1
            self.sent_bytes += block.length
        return sent

    def _is_last(self, block: WantedBlock) -> bool:
        return block.number == len(self._blocks) - 1

    async def _wait_for_admission(self, nursery: trio.Nursery) -> None:
        """Questions that cost more than a look into the memory stand in a line."""
        admitted = trio.Event()
        first_of_runs = {block.run: block for block in reversed(self._blocks[self._at :])}
        line = self._line(*first_of_runs.values())

        async def hold_a_place() -> None:
            async with line.questions:
                admitted.set()
                await trio.sleep_forever()

        nursery.start_soon(hold_a_place)
        while not admitted.is_set():
            await self._frames.pause(admitted, self._at)

    # -- the sender ----------------------------------------------------------------------------------------------------

    async def _send(self, block: WantedBlock) -> None:
        tries = 0
        while True:
            found = self._found.get(block.number)
            if isinstance(found, _Bytes):
                last = self._is_last(block)
                await self._frames.payload(FrameStatus.OK, block.number, found.payload, last=last)
                self._drop(block.number)
                self.sent_blocks += 1
                self.sent_bytes += block.length
                return
            if isinstance(found, _Nothing):
                reason = wire.reason_bytes(found.reason)
                await self._frames.payload(found.status, block.number, reason, last=self._is_last(block))
                return
            if await self._lent(block):
                self._drop(block.number)
                return
            if found is _Place.MEMORY:
                tries += 1
                await self._look_again(block, tries)
            else:
                await self._frames.pause(self._changed, block.number, LOOK_S if found is _Place.COMING else math.inf)

    async def _look_again(self, block: WantedBlock, tries: int) -> None:
        """A block has left the memory since it was seen there: a tier below has it, or it is lost."""
        self._rooms.copied.take_over(block.length)
        payload = None
        try:
            payload = await self._load([block])
        finally:
            if payload is None or payload[0] is None:
                self._rooms.copied.give_back(block.length)
        if payload[0] is not None:
            self._found[block.number] = _Bytes(payload[0], self._rooms.copied)
        elif tries > 1:
            self._found[block.number] = _Nothing(FrameStatus.FAILED, "the block did not stay")
        else:
            await self._frames.pause(trio.Event(), block.number, LOOK_S)

    def _drop(self, number: int) -> None:
        found = self._found.pop(number, None)
        if isinstance(found, _Bytes):
            found.room.give_back(len(found.payload))

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # -- the provider --------------------------------------------------------------------------------------------------

    async def _provide(self, first: int) -> None:
        number = first
        while number < len(self._blocks):
            await self._not_too_far(number)
            group = self._absent_from_memory(number)
            if group:
                await self._take_from_disk(group)
            number = group[-1].number + 1 if group else number + 1
            self._tell()

    async def _not_too_far(self, number: int) -> None:
        while number > self._at and self._ends[number - 1] - self._ends[self._at] > AHEAD_BYTES:
            self._moved = trio.Event()
            await self._moved.wait()

    def _absent_from_memory(self, number: int) -> list[WantedBlock]:
        """Return the next blocks that have to be looked for elsewhere: as many as are read at once."""
        group: list[WantedBlock] = []
        total = 0
        for block in self._blocks[number:]:
            total += block.length
            if group and total > LOAD_BYTES:
                break
            if block.number in self._found or self._in_memory(block):
                if group:
                    break
                return []
            group.append(block)
        return group

    def _in_memory(self, block: WantedBlock) -> bool:
        with self._holdings.lend(block.key, block.length) as payload:
            if payload is None:
                return False
        self._found[block.number] = _Place.MEMORY
        return True

    async def _take_from_disk(self, group: Sequence[WantedBlock]) -> None:
        granted = sum(block.length for block in group)
        await self._rooms.copied.take(granted)  # at once: who holds a part and waits for the rest keeps others waiting
        try:
            payloads = await self._load(group)
            for block, payload in zip(group, payloads, strict=True):
                if payload is not None and block.number >= self._at:
                    granted -= block.length
                    self._found[block.number] = _Bytes(payload, self._rooms.copied)
        finally:
            self._rooms.copied.give_back(granted)
        self._tell()
        for block in group:
            if block.number not in self._found and block.number >= self._at:
                await self._fetch_from(block)

    async def _load(self, blocks: Sequence[WantedBlock]) -> list[bytes | None]:
        def load() -> list[bytes | None]:
            return [self._holdings.load(block.key, block.length) for block in blocks]

        return await trio.to_thread.run_sync(load, limiter=self._rooms.loading, abandon_on_cancel=True)

    async def _fetch_from(self, block: WantedBlock) -> None:
        """Have this block brought, and what follows it in its run."""
        if self._request.only_cached:
            self._give_up(block)
            return
        blocks: list[WantedBlock] = []
        total = 0
        for following in self._blocks[block.number :]:
            total += following.length
            if following.run != block.run or following.number in self._found or (blocks and total > FETCH_BYTES):
                break
            blocks.append(following)
        room = self._line(block).fetched
        await room.take(sum(each.length for each in blocks))
        self._fetch(blocks, room)

    def _give_up(self, block: WantedBlock) -> None:
        """Nothing is fetched for this question: whoever asks gives up at the first block that is not there."""
        for following in self._blocks[block.number :]:
            if following.run == block.run:
                self._drop(following.number)
                self._found[following.number] = _Nothing(FrameStatus.ABSENT)
        self._tell()

    def _fetch(self, blocks: Sequence[WantedBlock], room: ByteRoom) -> None:
        """Have neighbouring blocks brought; there is room for them, and each gives its part back."""
        for each in blocks:
            self._found[each.number] = _Place.COMING
        fetch = _Fetch(self, blocks, room, trio.lowlevel.current_trio_token())
        version = self._request.runs[blocks[0].run].version
        try:
            self._holdings.fetch(
                self._request.volume, version, blocks[0].index, len(blocks), fetch.called, behind=self._request.behind
            )
        except Exception as error:
            fetch.called(error)
            raise

    def brought(self, block: WantedBlock, result: Mapping[int, bytes | None] | Exception, room: ByteRoom) -> None:
        """The fetch of a block is over; its room is ours to give back."""
        payload = None if isinstance(result, Exception) else result.get(block.index)
        if payload is not None and len(payload) == block.length and block.number >= self._at and not self._over:
            self._found[block.number] = _Bytes(payload, room)
            return
        room.give_back(block.length)
        if self._over:
            return
        if isinstance(result, errors.NotFound):
            self._found[block.number] = _Nothing(FrameStatus.ABSENT, str(result))
        elif isinstance(result, Exception):
            self._found[block.number] = _Nothing(FrameStatus.FAILED, str(result))
        elif block.index in result and payload is None:
            self._found[block.number] = _Place.MEMORY
        else:
            self._found[block.number] = _Nothing(FrameStatus.FAILED, "the block was not brought")

    def brought_all(self) -> None:
        """The sender may look."""
        self._tell()


class _Fetch:
    """One call of `Holdings.fetch`: it outlives the question when the asker goes away."""

    def __init__(
        self, delivery: Delivery, blocks: Sequence[WantedBlock], room: ByteRoom, token: trio.lowlevel.TrioToken
    ) -> None:
        self._delivery = delivery
        self._blocks = blocks
        self._room = room
        self._token = token

    def called(self, result: Mapping[int, bytes | None] | Exception) -> None:
        """Any thread."""
        try:
            self._token.run_sync_soon(functools.partial(self._deliver, result))
        except trio.RunFinishedError:
            pass  # the server is closed

    def _deliver(self, result: Mapping[int, bytes | None] | Exception) -> None:
        for block in self._blocks:
            self._delivery.brought(block, result, self._room)
        self._delivery.brought_all()
