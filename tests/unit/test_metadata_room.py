"""Metadata on a disk that others fill: pages promised ahead, room given back, and a clear word when there is none."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs import allocation
from cachefs.store.memory import MemoryStore
from cachefs.types import ROOT_INO
from metadata import custody, disuse
from metadata.moving import Places
from metadata.room import AHEAD, LEAST, MetadataFull
from metadata.store import MetadataWriter
from tests.support.machine import fill_up, free, tmpfs
from tests.support.tree import IDENTITY, Clock, check_invariants, list_everything, list_whole, writer_at

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 MiB."""
    with tmpfs(tmp_path / "disk", "80m") as place:
        yield place


@pytest.fixture
def store() -> MemoryStore:
    """Directories whose listings take about 10 MiB."""
    made = MemoryStore()
    for directory in range(40):
        for entry in range(300):
            made.put(f"v/d{directory}/{entry:04}-" + "n" * 220, b"x")
    return made


def test_pages_are_promised_ahead_and_given_back_at_the_end(disk: Path, store: MemoryStore) -> None:
    before = free(disk)
    with writer_at(disk / "volume") as writer:
        list_whole(writer, store, ROOT_INO, Clock())
        assert before - free(disk) > AHEAD
    assert before - free(disk) < MIB
    assert custody.closed_cleanly(str(disk / "volume"))
    with writer_at(disk / "volume") as writer:
        assert writer.set_aside is None
        check_invariants(writer)


def test_a_full_disk_does_not_stop_listings_at_once(disk: Path, store: MemoryStore) -> None:
    with writer_at(disk / "volume") as writer:
        clock = Clock()
        list_whole(writer, store, ROOT_INO, clock)
        hog = fill_up(disk)
        entries = writer.reader.scan(ROOT_INO, None, 100)
        for entry in entries[: (AHEAD - LEAST) // (600 << 10)]:  # what was promised is used first
            list_whole(writer, store, entry.ino, clock)
        with pytest.raises(MetadataFull, match="No space left"):
            list_everything(writer, store, clock)
        check_invariants(writer)
        hog.unlink()
        list_everything(writer, store, clock)
        check_invariants(writer)


def test_others_give_room_back(disk: Path, store: MemoryStore) -> None:
    asked: list[int] = []
    cache = disk / "cache"
    cache.write_bytes(bytes(30 * MIB))

    def make_room(want: int) -> int:
        asked.append(want)
        given = min(want, cache.stat().st_size)
        os.truncate(cache, cache.stat().st_size - given)
        return given

    with contextlib.closing(MetadataWriter(str(disk / "volume"), IDENTITY, make_room=make_room)) as writer:
        list_whole(writer, store, ROOT_INO, Clock())
        assert asked == []
        fill_up(disk)
        list_everything(writer, store, Clock())
        assert asked
        writer.sync_and_mark()
        fill_up(disk)
        writer.purge(time.time_ns())
        check_invariants(writer)


def test_a_file_system_that_cannot_promise(disk: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "not here")

    monkeypatch.setattr(allocation, "promise", refuse)
    with writer_at(disk / "volume") as writer:
        hog = fill_up(disk)
        with pytest.raises(MetadataFull):
            list_everything(writer, store, Clock())
        hog.unlink()
        list_everything(writer, store, Clock())
        check_invariants(writer)


@pytest.mark.expect_warnings("no room for metadata")
def test_a_new_volume_without_room_at_home(disk: Path, tmp_path: Path) -> None:
    places = Places(disk / "home", tmp_path / "shm/volumes", at_home=True)
    places.home.mkdir()
    fill_up(disk)
    with pytest.raises(MetadataFull):
        MetadataWriter(str(places.home / "new"), IDENTITY)
    with writer_at(places.begin_in_refuge("new")):
        pass
    assert not (places.home / "new").exists()


def test_what_is_not_used_for_a_month(tmp_path: Path) -> None:
    home = tmp_path / "volumes"
    names = ["0123456789abcdef", "0123456789abcdee", "0123456789abcdef.aside-1", "letters", "0123456789abcdef.txt"]
    for name in names:
        (home / name).mkdir(parents=True)
        (home / name / custody.DATA_FILE).touch()
    (tmp_path / "volumes.aside-crash").mkdir()
    (home / "0123456789abcded").symlink_to(tmp_path)
    later = time.time() + disuse.UNUSED_S + 10
    for path in (home / names[1], tmp_path):
        os.utime(path, (later, later))
    found = disuse.unused(home, later)
    assert sorted(path.name for path in found) == [names[0], names[2], "volumes.aside-crash"]
    disuse.mark_used(str(home / names[0]))
    assert not disuse.unused(home, time.time())
    for path in found:
        gone = disuse.take_out(path)
        assert gone is not None
        disuse.remove(gone)
    assert sorted(os.listdir(home)) == sorted(["0123456789abcded", names[1], *names[3:]])
    assert disuse.unused(tmp_path / "nothing", later) == {}
