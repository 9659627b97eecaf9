"""Random reads, stats, listings, restarts and changes from outside, compared with a plain dict after every step.

Strict consistency, so that the answer is always what the bucket says now. The same operations run below FUSE (the file
system and the agent's parts in one process) and through the kernel on a mount. The store is in memory in both cases:
it behaves exactly as S3 does, where SeaweedFS keeps directories whose last key is gone.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachefs import errors
from cachefs.store.memory import MemoryStore
from cachefs.types import ROOT_INO, Consistency, Ino
from cachefs.vfs.attributes import Attributes
from cachefs.vfs.filesystem import FileSystem
from tests.fuse.memory_s3 import MemoryS3
from tests.model import reference
from tests.model.in_process import open_filesystem
from tests.model.reference import Delete, Hold, ListDirectory, Op, Put, Read, ReadHeld, Restart, Stat
from tests.support.mounts import Mount, Node
from tests.support.programs import content

DIRECTORY = -1


class Subject(Protocol):
    """What is compared with the model."""

    async def stat(self, path: str) -> int | None:
        """Return the size, DIRECTORY, or None for a name that does not exist."""
        ...

    async def listing(self, path: str) -> list[str]:
        """Return the names in a directory."""
        ...

    async def open(self, path: str) -> int:
        """Return something to read from."""
        ...

    async def read(self, handle: int, offset: int, size: int) -> bytes | None:
        """Return a piece, or None when the version is gone."""
        ...

    async def restart(self) -> None:
        """End and begin anew."""
        ...


@dataclass
class Held:
    """A file that somebody has open."""

    handle: int
    key: str
    body: bytes


@dataclass
class Game:
    """The bucket, what it must look like, and the subject. `play` makes one move and compares."""

    store: MemoryStore
    subject: Subject
    objects: dict[str, bytes] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)

    async def play(self, op: Op) -> None:
        """Make one move."""
        tree = reference.tree(self.objects)
        files = sorted(path for path, body in tree.items() if body is not None)
        match op:
            case Put(key, size, seed):
                name = reference.KEYS[key]
                self.objects[name] = content(f"{name} {seed}", size)
                self.store.put(name, self.objects[name])
            case Delete(index) if self.objects:
                name = sorted(self.objects)[index % len(self.objects)]
                del self.objects[name]
                self.store.delete(name)
            case Stat(number):
                asked = reference.PATHS[number]
                await self.settle(asked)
                assert await self.subject.stat(asked) == size_of(tree, asked)
            case ListDirectory(index):
                directories = sorted(path for path, body in tree.items() if body is None)
                directory = directories[index % len(directories)]
                await self.settle(directory)
                assert await self.subject.listing(directory) == reference.names_in(tree, directory)
            case Read(index, offset, size) if files:
                await self.compare(await self.hold(files[index % len(files)]), offset, size)
            case Hold(index) if files:
                await self.hold(files[index % len(files)])
            case ReadHeld(index, offset, size) if self.held:
                await self.compare(self.held[index % len(self.held)], offset, size)
            case Restart():
                await self.subject.restart()
            case _:
                pass  # nothing exists that it could be done with

    async def hold(self, path: str) -> Held:
        """Open a file that exists."""
        await self.settle(path)
        held = Held(await self.subject.open(path), path, self.objects[path])
        self.held.append(held)
        return held

    async def settle(self, path: str) -> None:
        """List the parent of whatever is now a directory but has been a file.

        A name that is known as a file is asked for as a file (one HEAD); that a directory of its name has appeared
        beside it, and hides it, is known with the next listing.
        """
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            ancestor = "/".join(parts[:depth])
            if ancestor in self.objects and reference.tree(self.objects)[ancestor] is None:
                await self.subject.listing("/".join(parts[: depth - 1]))

    async def compare(self, held: Held, offset: int, size: int) -> None:
        """Read a piece: what is current must be readable, what is not may be gone, and nothing may be other bytes."""
        found = await self.subject.read(held.handle, offset, size)
        if found is None:
            assert self.objects.get(held.key) != held.body, f"{held.key} is current and yet stale"
        else:
            assert found == held.body[offset : offset + size]

    async def look_at_everything(self) -> None:
        """Walk the whole tree, by names and by listings."""
        tree = reference.tree(self.objects)
        for path, body in sorted(tree.items()):
            await self.settle(path)
            if body is None:
                assert await self.subject.listing(path) == reference.names_in(tree, path)
            else:
                assert await self.subject.stat(path) == len(body)
                found = await self.subject.read(await self.subject.open(path), 0, len(body) + 1)
                assert found == body


def size_of(tree: Mapping[str, bytes | None], path: str) -> int | None:
    """Return what stat must say of a path in the model."""
    if path not in tree:
        return None
    body = tree[path]
    return DIRECTORY if body is None else len(body)


# -- below FUSE -------------------------------------------------------------------------------------------------------


class BelowFuse:
    """The file system object; a handle is an inode number, as it is for the kernel."""

    def __init__(self, directory: Path, store: MemoryStore, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._store = store
        self._stack = stack
        self._filesystem: FileSystem

    async def begin(self) -> None:
        """Open everything."""
        opened = open_filesystem(self._directory, self._store, Consistency.STRICT)
        self._filesystem = await self._stack.enter_async_context(opened)

    async def restart(self) -> None:
        """See `Subject`."""
        await self._stack.aclose()
        await self.begin()

    async def _find(self, path: str) -> Attributes | None:
        found, _ = self._filesystem.attributes(ROOT_INO)
        for part in path.split("/") if path else ():
            if not found.is_directory:
                return None
            below, _ = await self._filesystem.lookup(found.ino, part.encode())
            if below is None:
                return None
            found = below
        return found

    async def stat(self, path: str) -> int | None:
        """See `Subject`."""
        found = await self._find(path)
        return None if found is None else DIRECTORY if found.is_directory else found.size

    async def listing(self, path: str) -> list[str]:
        """See `Subject`."""
        directory = await self._find(path)
        assert directory is not None, path
        names: list[str] = []
        after: Ino | None = None
        while batch := await self._filesystem.entries(directory.ino, after, 3):
            names += [dentry.name.decode() for dentry in batch]
            after = batch[-1].ino
        return names

    async def open(self, path: str) -> int:
        """See `Subject`."""
        found = await self._find(path)
        assert found is not None, path
        return found.ino

    async def read(self, handle: int, offset: int, size: int) -> bytes | None:
        """See `Subject`."""
        try:
            return await self._filesystem.read(Ino(handle), offset, size)
        except errors.StaleObject:
            return None


async def play_below_fuse(directory: Path, ops: list[Op]) -> None:
    """Play a game on a file system of its own."""
    store = MemoryStore("bucket")
    with trio.fail_after(60):  # around everything: a restart may not happen inside of a scope of its own
        async with AsyncExitStack() as stack:
            subject = BelowFuse(directory, store, stack)
            await subject.begin()
            game = Game(store, subject)
            for op in ops:
                await game.play(op)
            await game.look_at_everything()


def run_in_directory(play: Callable[[Path, list[Op]], Coroutine[Any, Any, None]], ops: list[Op]) -> None:
    """Run one game in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="cachefs-model-") as directory:
        trio.run(play, Path(directory), ops)


@given(st.lists(reference.OPS, max_size=40))
@settings(max_examples=40)
@example([Put(0, 100, 0), Hold(0), Put(0, 100, 1), Read(0, 0, 100), ReadHeld(0, 0, 100)])
@example([Put(0, 100, 0), Hold(0), Put(7, 100, 1), Stat(0), ListDirectory(0), ReadHeld(0, 0, 100)])
@example([Put(0, 400_000, 0), Hold(0), Delete(0), Restart(), ReadHeld(0, 0, 400_000)])
@pytest.mark.expect_warnings("cannot be read", "is gone", "retry", "again")
def test_below_fuse(ops: list[Op]) -> None:
    run_in_directory(play_below_fuse, ops)


# -- through the kernel -----------------------------------------------------------------------------------------------


class ThroughKernel:
    """A strict mount; a handle is a file descriptor."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self.descriptors: list[int] = []

    async def restart(self) -> None:
        """The agent dies; the worker finds another. (Workers may only die four times a minute.)"""
        killed = self._mount.node.kill_agent()
        self._mount.node.wait_for_agent(other_than=killed)

    async def stat(self, path: str) -> int | None:
        """See `Subject`."""
        try:
            found = os.stat(self._mount.path / path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return DIRECTORY if stat.S_ISDIR(found.st_mode) else found.st_size

    async def listing(self, path: str) -> list[str]:
        """See `Subject`."""
        return os.listdir(self._mount.path / path)

    async def open(self, path: str) -> int:
        """See `Subject`."""
        self.descriptors.append(os.open(self._mount.path / path, os.O_RDONLY))
        return self.descriptors[-1]

    async def read(self, handle: int, offset: int, size: int) -> bytes | None:
        """See `Subject`."""
        pieces = []
        while size > 0:
            try:
                piece = os.pread(handle, size, offset)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                return None
            if not piece:
                break
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)


@pytest.fixture(scope="module")
def strict() -> Iterator[tuple[Mount, MemoryStore]]:
    """One strict mount for all examples: what an example leaves behind is what the next one finds."""
    with MemoryS3(page_size=5) as server, Node(server.environment, shm_size="16MiB", cache_size="16MiB") as node:
        options = ("--consistency=strict", "--block-size=64KiB")
        mount = node.mount(f"s3://{server.bucket}", f"--endpoint-url={server.endpoint_url}", *options)
        yield mount, server.store


async def play_through_kernel(strict: tuple[Mount, MemoryStore], ops: list[Op]) -> None:
    """Empty the bucket and play a game on the mount."""
    mount, store = strict
    for key in reference.KEYS:
        store.delete(key)
    subject = ThroughKernel(mount)
    game = Game(store, subject)
    try:
        for op in ops:
            await game.play(op)
        await game.look_at_everything()
    finally:
        for descriptor in subject.descriptors:
            os.close(descriptor)


@pytest.mark.fuse
@given(ops=st.lists(reference.OPS.filter(lambda op: not isinstance(op, Restart)), max_size=30))
@settings(max_examples=20)
@example(ops=[Put(0, 65_537, 0), Hold(0), Restart(), ReadHeld(0, 0, 65_537), Put(0, 1, 1), Stat(0), Restart(), Stat(0)])
@example(ops=[Put(7, 10, 0), ListDirectory(0), Delete(0), Put(0, 10, 1), Stat(0), ListDirectory(0), Read(0, 0, 10)])
def test_through_the_kernel(strict: tuple[Mount, MemoryStore], ops: list[Op]) -> None:
    trio.run(play_through_kernel, strict, ops)
