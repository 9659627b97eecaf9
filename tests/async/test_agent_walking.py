"""Walks through a volume: every file once, in order, whatever the size of the tree, and what is not there is said."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from cachefs.agent import walking
from cachefs.agent.spool import CHUNK, IN_MEMORY, Spool
from cachefs.agent.volumes import Volume
from cachefs.agent.walking import Walk
from cachefs.config import MetadataConfig
from cachefs.errors import AccessDenied, StorageUnavailable
from cachefs.store.memory import MemoryStore
from cachefs.store.port import ListPage
from cachefs.types import Consistency, Ino
from metadata.freshness import Freshness
from metadata.listing import Lister
from metadata.resolver import Resolver
from metadata.store import MetadataWriter
from tests.support.tree import IDENTITY


class Store(MemoryStore):
    """Small pages; some directories are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = ""
        self.lists: list[str] = []

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        self.lists.append(prefix)
        if self.refused and prefix == self.refused:
            raise AccessDenied(f"{prefix} is not for you")
        return super().list_page(prefix, delimiter=delimiter, token=token, limit=min(limit, 7))


async def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(call, *arguments)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture(params=list(Consistency))
async def volume(
    request: pytest.FixtureRequest, tmp_path: Path, store: Store, nursery: trio.Nursery
) -> AsyncIterator[Volume]:
    writer = MetadataWriter(str(tmp_path / "volume"), IDENTITY)
    freshness = Freshness(MetadataConfig(consistency=request.param))
    lister = Lister(writer, store, "v", freshness, in_thread, nursery)
    resolver = Resolver(writer, store, "v", freshness, in_thread, lister)
    yield cast("Volume", SimpleNamespace(writer=writer, lister=lister, resolver=resolver))
    writer.close()


class Walked:
    """What a walk has found."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.files: list[str] = []
        self.problems: list[tuple[bytes, str]] = []
        self.turns = 0

    def found(self, ino: Ino, size: int) -> None:
        key = self.volume.writer.reader.key_of(ino)
        assert size == len(key)
        self.files.append(key.removeprefix("v/"))

    async def turn(self) -> None:
        self.turns += 1
        await trio.lowlevel.checkpoint()

    async def walk(self, *paths: bytes) -> None:
        with trio.fail_after(20):
            async with Walk.opened(
                self.volume, self.found, lambda path, why: self.problems.append((path, why)), self.turn
            ) as walk:
                for path, ino in zip(paths, await walk.resolve(paths), strict=True):
                    await walk.take(path, ino)


def put(store: MemoryStore, *names: str) -> None:
    for name in names:
        store.put(f"v/{name}", bytes(len(f"v/{name}")))


async def test_a_tree_is_walked_in_the_order_of_its_keys(volume: Volume, store: Store) -> None:
    names = [f"c{n % 13:02}/d{n % 3}/f{n:03}" for n in range(200)] + ["a", "z", "c05/x"]
    put(store, *names)
    walked = Walked(volume)
    await walked.walk(b"")
    assert walked.files == sorted(names)
    assert walked.problems == []
    again = Walked(volume)
    await again.walk(b"c05", b"a", b"c05/d1", b"/z/")
    below = sorted(name for name in names if name.startswith("c05/"))
    assert again.files == [*below, "a", *(name for name in below if "/d1/" in name), "z"]


async def test_a_large_directory_comes_in_batches(
    volume: Volume, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "BATCH", 5)
    names = [f"f{n:04}" for n in range(123)]
    put(store, *names)
    walked = Walked(volume)
    await walked.walk(b"")
    assert walked.files == names
    assert walked.turns >= 123 // 5


async def test_a_deep_tree_is_no_deep_stack(volume: Volume, store: Store) -> None:
    name = "/".join("d" for _ in range(400)) + "/f"
    put(store, name)
    walked = Walked(volume)
    await walked.walk(b"d/d")
    assert walked.files == [name]


async def test_what_is_not_there_is_said_and_the_rest_comes(volume: Volume, store: Store) -> None:
    put(store, "a/1", "b/1", "c/1")
    walked = Walked(volume)
    await walked.walk(b"")
    store.refused = "v/b/"
    store.delete("v/c/1")
    walked = Walked(volume)
    await walked.walk(b"a", b"nothing", b"a/1/below", b"b", b"\xff", b"a/" + b"x" * 300)
    assert walked.files[0] == "a/1"
    said = {path for path, _ in walked.problems}
    assert {b"nothing", b"a/1/below", b"\xff", b"a/" + b"x" * 300} <= said
    assert len(walked.problems) == len(said), "once each"


async def test_the_next_directories_are_listed_ahead(volume: Volume, store: Store) -> None:
    put(store, *(f"c{n:02}/f" for n in range(30)))
    waited: list[int] = []
    walked = Walked(volume)
    found = walked.found

    def note(ino: Ino, size: int) -> None:
        waited.append(len({prefix for prefix in store.lists if prefix != "v/"}))
        found(ino, size)

    walked.found = note  # type: ignore[method-assign]
    await walked.walk(b"")
    assert len(walked.files) == 30
    assert waited[0] > 1
    assert len([prefix for prefix in store.lists if prefix == "v/c07/"]) <= 2


async def test_an_empty_volume(volume: Volume) -> None:
    walked = Walked(volume)
    await walked.walk(b"")
    assert walked.files == []


# -- the list of what was found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 5, CHUNK + 1, IN_MEMORY, IN_MEMORY + 1, 2 * IN_MEMORY + 17])
async def test_a_spool_gives_back_what_it_got(tmp_path: Path, count: int) -> None:
    with Spool(str(tmp_path)) as spool:
        for number in range(count):
            spool.append(number)
            if number % 1000 == 0:
                await spool.settle()
        assert len(spool) == count
        for _ in range(2):
            read: list[int] = []
            while chunk := await spool.read(len(read)):
                read.extend(chunk)
            assert read == list(range(count))
        if count:
            assert (await spool.read(count - 1))[0] == count - 1
    assert os.listdir(tmp_path) == [], "it has no name"


async def test_a_spool_without_room_says_so(tmp_path: Path) -> None:
    with Spool(str(tmp_path / "missing")) as spool:
        for number in range(IN_MEMORY):
            spool.append(number)
        with pytest.raises(StorageUnavailable, match="no room"):
            await spool.settle()
