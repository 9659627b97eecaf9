"""Finding the files that somebody means by paths: files by name, directories with everything below them.

    paths -> resolver (many names at a time) -> files in the order of the paths
                                             -> directories: the lister, depth first in the order of listings,
                                                the next directories being listed ahead

INVARIANT: what is in memory is bounded: a batch of paths, a batch of entries for each level of the tree, and one
request of the lister for each directory ahead. The number of files does not matter.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

import trio

from cachefs import errors
from cachefs.agent.volumes import Volume
from cachefs.types import ROOT_INO, FileKind, Ino
from metadata.records import Dentry

BATCH = 256
"""Entries of a directory that are taken at once; between them the event loop serves readers."""
RESOLVERS = 16
"""Names that are asked for at a time."""
TURN = 32
"""Names that are looked up before readers have their turn."""
AHEAD = 8
"""Directories that are listed at a time, in front of the one that is walked."""
DIRECTORIES_KEPT = 4096
LISTING_TRIES = 3

Found = Callable[[Ino, int], None]
"""Gets a file and its size."""
Problem = Callable[[bytes, str], None]
"""Gets a path that is not what it should be, and why."""
Turn = Callable[[], Awaitable[object]]
"""Awaited every now and then, after some hundred files at the latest."""


@dataclass(slots=True)
class _Level:
    """A directory on the way down."""

    ino: Ino
    path: bytes
    entries: list[Dentry] = field(default_factory=list)
    """Those of the last batch that are still to be walked, last one first."""
    after: Ino | None = None
    begun: bool = False


class Walk:
    """One walk through one volume. Use `opened`; not for several tasks at once."""

    def __init__(self, volume: Volume, found: Found, problem: Problem, turn: Turn, nursery: trio.Nursery) -> None:
        self._volume = volume
        self._reader = volume.writer.reader
        self._found = found
        self._problem = problem
        self._turn = turn
        self._nursery = nursery
        self._ahead: dict[Ino, trio.Event] = {}
        self._directories: OrderedDict[bytes, Ino] = OrderedDict({b"": ROOT_INO})

    @classmethod
    @asynccontextmanager
    async def opened(cls, volume: Volume, found: Found, problem: Problem, turn: Turn) -> AsyncIterator[Self]:
        """A walk; what it has asked ahead is given up at the end."""
        async with trio.open_nursery() as nursery:
            yield cls(volume, found, problem, turn, nursery)
            nursery.cancel_scope.cancel()

    async def take(self, path: bytes, ino: Ino | None) -> None:
        """Walk one path that was resolved. Never raises for the sake of a path: `problem` is told, once."""
        if ino is None:
            return
        inode = None if ino == ROOT_INO else self._reader.inode(ino)
        if ino == ROOT_INO or (inode is not None and inode.kind is FileKind.DIRECTORY):
            await self._tree(ino, path)
        elif inode is not None:
            self._found(ino, inode.size)
        else:
            self._problem(path, "it vanished")

    # -- names ---------------------------------------------------------------------------------------------------------

    async def resolve(self, paths: Sequence[bytes]) -> list[Ino | None]:
        """Return what these paths are, None for those that `problem` was told of."""
        found: list[Ino | None] = [None] * len(paths)
        numbers = iter(range(len(paths)))

        async def work() -> None:
            for turn, number in enumerate(numbers):
                if turn % TURN == 0:
                    await trio.lowlevel.checkpoint()
                try:
                    found[number] = await self._ino_of(paths[number])
                except errors.CachefsError as error:
                    self._problem(paths[number], _words(error))

        async with trio.open_nursery() as nursery:
            for _ in range(min(RESOLVERS, len(paths))):
                nursery.start_soon(work)
        return found

    async def _ino_of(self, path: bytes) -> Ino:
        """Return the inode of a path. Raises NotFound and what the resolver raises."""
        above, _, name = path.strip(b"/").rpartition(b"/")
        if not name:
            return ROOT_INO
        known = self._directories.get(above)
        if known is None:
            known = await self._ino_of(above)
            self._directories[above] = known
            if len(self._directories) > DIRECTORIES_KEPT:
                self._directories.popitem(last=False)
        answer = await self._volume.resolver.resolve(known, name)
        if answer.ino is None:
            raise errors.NotFound("it does not exist")
        return answer.ino

    # -- directories ---------------------------------------------------------------------------------------------------

    async def _tree(self, ino: Ino, path: bytes) -> None:
        stack = [_Level(ino, path)]
        while stack:
            level = stack[-1]
            if not level.entries and not await self._refill(level):
                stack.pop()
                continue
            while level.entries:
                entry = level.entries.pop()
                if entry.kind is FileKind.DIRECTORY:
                    stack.append(_Level(entry.ino, level.path + b"/" + entry.name if level.path else entry.name))
                    self._look_ahead(level)
                    break
                self._found(entry.ino, entry.size)
            await self._turn()

    async def _refill(self, level: _Level) -> bool:
        """Get the next entries of a directory; returns False when there are none."""
        try:
            entries = await self._entries(level)
        except errors.CachefsError as error:
            self._problem(level.path, _words(error))
            return False
        if not entries:
            return False
        level.after = entries[-1].ino
        level.entries = entries[::-1]
        self._look_ahead(level)
        return True

    def _look_ahead(self, level: _Level) -> None:
        for entry in reversed(level.entries):
            if len(self._ahead) >= AHEAD:
                return
            if entry.kind is FileKind.DIRECTORY and entry.ino not in self._ahead:
                self._ahead[entry.ino] = over = trio.Event()
                self._nursery.start_soon(self._list_ahead, entry.ino, over)

    async def _list_ahead(self, ino: Ino, over: trio.Event) -> None:
        try:
            with contextlib.suppress(errors.CachefsError):  # who comes there asks again, and says so
                await self._volume.lister.list_directory(ino, None)
        finally:
            over.set()

    async def _entries(self, level: _Level) -> list[Dentry]:
        """Return the entries behind those that were walked; [] at the end. Raises what the lister raises."""
        await trio.lowlevel.checkpoint()
        lister = self._volume.lister
        if not level.begun:
            level.begun = True
            ahead = self._ahead.pop(level.ino, None)
            if ahead is not None:
                await ahead.wait()
            if ahead is None or self._reader.directory(level.ino) is None:
                await lister.list_directory(level.ino, None)
        in_vain = 0
        while True:
            directory, found, _own = self._reader.listing(level.ino, level.after, BATCH)
            if found or in_vain >= LISTING_TRIES or (directory is not None and directory.complete):
                return found
            progress = await lister.list_directory(level.ino, b"" if directory is None else directory.frontier)
            in_vain += progress.complete


def _words(error: errors.CachefsError) -> str:
    if isinstance(error, errors.NotFound | errors.StaleObject):
        return "it does not exist"
    return str(error) or type(error).__name__
