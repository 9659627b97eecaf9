"""Answers in frames: payloads straight from where they lie, and a sign of life while there is none to send."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import trio

from cachefs.types import BlockKey
from peer import wire
from peer.exchange import Exchange
from peer.ports import Holdings
from peer.streams import ConnectionLost, Stream
from peer.wire import Buffer, FrameStatus

Around = Callable[[memoryview], tuple[bytes, bytes]]
"""What stands before and after a payload on the wire, once it is known."""

HEAD_S = 0.05
"""How long the head of an answer waits for its first frame."""
TURN_BYTES = 1 << 20
"""After so much that the kernel took at once, others have their turn."""


async def send_lent(stream: Stream, holdings: Holdings, key: BlockKey, length: int, around: Around) -> bool:
    """Send a block from the memory map, without a copy of it; False: it is not there, and nothing was sent.

    While the other side takes no more, the map is let go; the rest is looked up again, and comes from the disk tier if
    the block was evicted meanwhile. Raises ConnectionLost, also when the rest is nowhere.
    """
    before = after = b""
    sent, total = 0, math.inf
    while True:
        with holdings.lend(key, length) as payload:
            if payload is None:
                break
            if not sent and total == math.inf:
                before, after = around(payload)
                total = len(before) + length + len(after)
            sent += stream.offer(_rest((before, payload, after), sent))
        if sent == total:
            return True
        await stream.ready()
    if total == math.inf:
        return False
    kept = await trio.to_thread.run_sync(holdings.load, key, length, abandon_on_cancel=True)
    if kept is None:
        raise ConnectionLost
    await send_pieces(stream, _rest((before, kept, after), sent))
    return True


async def send_pieces(stream: Stream, pieces: Sequence[Buffer]) -> None:
    """Send what is in memory of our own. Raises ConnectionLost."""
    sent, total = 0, sum(map(len, pieces))
    while sent < total:
        sent += stream.offer(_rest(pieces, sent))
        if sent < total:
            await stream.ready()


def _rest(pieces: Sequence[Buffer], done: int) -> list[Buffer]:
    """Return what is left of the pieces after `done` bytes."""
    left: list[Buffer] = []
    for piece in pieces:
        if done < len(piece):
            left.append(memoryview(piece)[done:] if done else piece)
        done = max(0, done - len(piece))
    return left


class Frames:
    """The frames of one answer. One task sends.

    Its head leaves with the first frame, its end with the last, if they are there at once: each packet of its own costs
    the asker a wake-up, 50 us on an idle CPU.
    """

    def __init__(self, exchange: Exchange, holdings: Holdings, head: bytes) -> None:
        """`head`: that of the answer, not sent yet."""
        self._exchange = exchange
        self._stream = exchange.stream
        self._holdings = holdings
        self._head = head
        self._said_at = trio.current_time()
        self._in_turn = 0

    async def lent(self, number: int, key: BlockKey, length: int, *, last: bool) -> bool:
        """Send a block that is in memory; False: it is not. `last`: nothing follows. Raises ConnectionLost."""

        def around(payload: memoryview) -> tuple[bytes, bytes]:
            return self._around(FrameStatus.OK, number, length, wire.checksum_of(payload), last)

        sent = await send_lent(self._stream, self._holdings, key, length, around)
        if sent:
            await self._said(length, last)
        return sent

    async def payload(self, status: FrameStatus, number: int, payload: bytes = b"", *, last: bool) -> None:
        """Send a frame. `last`: nothing follows. Raises ConnectionLost."""
        before, after = self._around(status, number, len(payload), wire.checksum_of(payload), last)
        await send_pieces(self._stream, (before, payload, after))
        await self._said(len(payload), last)

    def _around(self, status: FrameStatus, number: int, length: int, checksum: int, last: bool) -> tuple[bytes, bytes]:
        head, self._head = self._head, b""
        before, after = self._exchange.chunk(wire.FRAME_BYTES + length)
        before = head + before + wire.frame_head(status, number, length, checksum)
        return before, after + self._exchange.end() if last else after

    async def _said(self, length: int, last: bool) -> None:
        self._said_at = trio.current_time()
        self._in_turn += length
        if last:
            await self._stream.drain()
        elif self._in_turn >= TURN_BYTES:
            self._in_turn = 0
            await trio.lowlevel.checkpoint()

    async def pause(self, changed: trio.Event, number: int, at_most_s: float = math.inf) -> None:
        """Wait for `changed`, not longer than `at_most_s`, and not in silence: send the head and say WAIT when it is
        time. Raises ConnectionLost.
        """
        due = self._said_at + (HEAD_S if self._head else wire.WAIT_S)
        with trio.move_on_at(min(due, trio.current_time() + at_most_s)):
            await changed.wait()
            return
        if trio.current_time() < due:
            return
        if self._head:
            head, self._head = self._head, b""
            await self._stream.send(head)
            self._said_at = trio.current_time()
        else:
            await self.payload(FrameStatus.WAIT, number, last=False)
        await self._stream.drain()
