"""Reads that the shm tier cannot answer, on their way from the channel to the agent and back.

    channel thread --question on the agent's socket--> agent --answer--> trio thread: writev to the kernel

The usual miss needs no task: the channel's thread writes the question, and the loop that receives the answer sends the
bytes. A task, with its tries and its patience, takes over when there is no agent, when the block did not stay, and when
a read fails.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from cachefs import errors
from cachefs.fuse.channel import Channel
from cachefs.fuse.errno_map import to_errno
from cachefs.fuse.kernel_names import KernelNames
from cachefs.metrics import READ_MISS_SECONDS, READAHEAD_REQUESTS, Counters
from cachefs.mount.disk_reads import DiskReads, Request
from cachefs.mount.straight import Straight
from cachefs.prefetch.points import Points, is_small
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.reading import FileView

log = logging.getLogger(__name__)


class Misses:
    """Implements `cachefs.fuse.channel.MissSink`."""

    def __init__(
        self, filesystem: FileSystem, kernel_names: KernelNames, nursery: trio.Nursery, counters: Counters
    ) -> None:
        self._filesystem = filesystem
        self._kernel_names = kernel_names
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._counters = counters
        self._points = Points(filesystem.reads.block_size)
        self.straight = Straight(filesystem)
        self.channel: Channel | None = None
        self.disk = DiskReads(filesystem.reads, self.ask_ahead)

    def miss(self, unique: int, view: FileView, start: int, end: int) -> None:
        """See `MissSink.miss`."""
        began = time.monotonic()
        if self.disk.takes(view, start):
            answer = functools.partial(self._answer, unique, began)
            self.disk.read(Request(view, start, end, answer, lambda: self._ask(unique, view, start, end, began)))
        elif not self._is_point(view, start, end) or not self._ask_range(unique, view, start, end, began):
            self._ask(unique, view, start, end, began)

    def fresh(self, unique: int, view: FileView, start: int, end: int) -> None:
        """See `MissSink.fresh`."""
        began = time.monotonic()
        use = functools.partial(self._answer, unique, began)
        self.straight.read(view, start, end, use, functools.partial(self._ask_fresh, unique, view, start, end, began))

    def _ask_fresh(self, unique: int, view: FileView, start: int, end: int, began: float) -> None:
        """Ask the agent for just these bytes, from the store. Any thread."""
        use = functools.partial(self._answer, unique, began)

        def otherwise(error: errors.CachefsError | None) -> None:
            if error is None:
                self._begin(self._serve_fresh, (unique, view, start, end, began))
            else:
                self._begin(self._fail, (unique, view, began, error))

        if not self._filesystem.ranges.request(view, start, end, use, otherwise, fresh=True):
            self._soon(self._serve_fresh, unique, view, start, end, began)

    async def _serve_fresh(self, unique: int, view: FileView, start: int, end: int, began: float) -> None:
        try:
            use = functools.partial(self._answer, unique, began)
            await self._filesystem.with_fresh(view, start, end, use)
        except Exception as error:  # noqa: BLE001 - as in `_serve`
            await self._fail(unique, view, began, error)

    def _is_point(self, view: FileView, start: int, end: int) -> bool:
        """Whether the blocks of a READ are not worth being fetched. The channel's thread only."""
        points = self._points
        return (
            view.window.apart and points.may_be(view.ino, start, end, view.size) and points.take(view.ino, start, end)
        )

    def _ask_range(self, unique: int, view: FileView, start: int, end: int, began: float) -> bool:
        """Ask the agent for just these bytes; returns whether it was asked."""
        use = functools.partial(self._answer, unique, began)
        otherwise = functools.partial(self._otherwise, unique, view, start, end, began)
        return self._filesystem.ranges.request(view, start, end, use, otherwise)

    def _ask(self, unique: int, view: FileView, start: int, end: int, began: float) -> None:
        """Ask the agent for the blocks of a READ. Any thread."""
        use = functools.partial(self._answer, unique, began)
        otherwise = functools.partial(self._otherwise, unique, view, start, end, began)
        if not self._filesystem.request_blocks(view, start, end, use, otherwise):
            self._soon(self._serve, unique, view, start, end, began)

    def wish(self, view: FileView, ask: tuple[int, int]) -> None:
        """See `MissSink.wish`."""
        window, reads = view.window, self._filesystem.reads
        for start, end in (ask, *window.more()):
            first, last = start >> reads.shift, (min(end, view.size) - 1) >> reads.shift
            if window.sparse and is_small(end - start, reads.block_size):
                self._filesystem.ranges.ahead(view, start, end)
            elif last < first:
                continue
            elif self.disk.tier is None:
                self.ask_ahead(view, first, last - first + 1)
            else:
                self.disk.wish(view, first, last - first + 1)

    def ask_ahead(self, view: FileView, first: int, count: int) -> None:
        """Tell the agent what will be wanted soon. Any thread."""
        self._counters.add(READAHEAD_REQUESTS.name)
        self._filesystem.readahead(view, first, count)

    def _answer(self, unique: int, began: float, slices: list[memoryview]) -> None:
        assert self.channel is not None
        try:
            self.channel.answer(unique, slices)
        except OSError as error:
            self.channel.fail(unique, to_errno(error, "answering a read"))
        self._counters.add(READ_MISS_SECONDS.name, time.monotonic() - began)

    def _otherwise(
        self, unique: int, view: FileView, start: int, end: int, began: float, error: errors.CachefsError | None
    ) -> None:
        if error is None:
            self._begin(self._serve, (unique, view, start, end, began))
        else:
            self._begin(self._fail, (unique, view, began, error))

    def _soon(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        try:
            self._token.run_sync_soon(self._begin, work, arguments)
        except trio.RunFinishedError:
            pass  # this worker is ending: the request stays open, and the next worker gets it again

    def _begin(self, work: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        try:
            self._nursery.start_soon(work, *arguments)
        except RuntimeError:
            log.debug("a request came too late for this worker")  # the nursery is closed: as above

    async def _serve(self, unique: int, view: FileView, start: int, end: int, began: float) -> None:
        try:
            await self._filesystem.with_blocks(view, start, end, functools.partial(self._answer, unique, began))
        except Exception as error:  # noqa: BLE001 - the boundary: one request, one answer
            await self._fail(unique, view, began, error)

    async def _fail(self, unique: int, view: FileView, began: float, error: Exception) -> None:
        assert self.channel is not None
        if isinstance(error, errors.StaleObject):
            await self._kernel_names.let_go(view.ino)
        self.channel.fail(unique, to_errno(error, f"read of {self._name(view)}"))
        self._counters.add(READ_MISS_SECONDS.name, time.monotonic() - began)

    def _name(self, view: FileView) -> str:
        try:
            return self._filesystem.reads.names.key_of(view.ino)
        except Exception:  # noqa: BLE001 - only words for a log line
            return f"inode {view.ino}"
