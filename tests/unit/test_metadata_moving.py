"""Metadata goes to the tmpfs and back: inode numbers survive, no number means two things, and nothing is half there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cachefs.store.memory import MemoryStore
from cachefs.types import ROOT_INO, Ino
from metadata import custody
from metadata.moving import TRIES, Places
from metadata.store import MetadataWriter
from metadata.volume import VolumeIdentity
from tests.support.tree import IDENTITY, Clock, check_invariants, list_whole, scan_all, writer_at

VOLUME = "0123456789abcdef"


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    for number in range(300):
        made.put(f"v/{number:05}", b"x")
    return made


@pytest.fixture
def full(tmp_path: Path) -> Places:
    """A home that cannot be written, and a refuge."""
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "shm/volumes").mkdir(mode=0o700, parents=True)
    os.chmod(tmp_path / "shm", 0o700)
    return Places(tmp_path / "home", tmp_path / "shm/volumes", at_home=False)


@pytest.fixture
def roomy(full: Places) -> Places:
    """The same with a home that can be written."""
    return Places(full.home, full.refuge, at_home=True)


def numbers(path: str, store: MemoryStore) -> dict[bytes, Ino]:
    """Open an environment, list everything, close it, and return what the names lead to."""
    with writer_at(path) as writer:
        assert writer.set_aside is None
        list_whole(writer, store, ROOT_INO, Clock())
        check_invariants(writer)
        return {entry.name: entry.ino for entry in scan_all(writer, ROOT_INO, 1000)}


def lineage(path: str) -> str:
    with writer_at(path) as writer:
        return writer.reader.lineage


def test_numbers_survive_the_way_there_and_back(full: Places, roomy: Places, store: MemoryStore) -> None:
    home = roomy.settle(VOLUME, IDENTITY)
    assert home == str(roomy.home / VOLUME)
    first = numbers(home, store)
    born = lineage(home)
    refuge = full.settle(VOLUME, IDENTITY)
    assert refuge == str(full.refuge / VOLUME)
    store.put("v/in-refuge", b"x")
    second = numbers(refuge, store)
    assert {name: second[name] for name in first} == first
    assert full.settle(VOLUME, IDENTITY) == refuge, "another agent goes on with it"
    assert numbers(refuge, store) == second
    assert numbers(home, store).keys() == second.keys(), "what was left at home knows nothing of that"
    assert roomy.settle(VOLUME, IDENTITY) == home
    assert numbers(home, store) == second
    assert lineage(home) == born
    assert os.listdir(full.refuge) == []
    assert sorted(path.name for path in roomy.home.iterdir()) == [VOLUME, f"{VOLUME}.aside-1"]
    assert Path(home, custody.DATA_FILE).stat().st_mode & 0o777 == 0o600


def test_a_copy_and_its_original_never_give_out_the_same_number(full: Places, store: MemoryStore) -> None:
    home = str(full.home / VOLUME)
    common = numbers(home, store)
    refuge = full.settle(VOLUME, IDENTITY)
    for number in range(50):
        store.put(f"v/one-{number}", b"x")
    one = numbers(home, store)
    for number in range(50):
        store.delete(f"v/one-{number}")
        store.put(f"v/two-{number}", b"x")
    two = numbers(refuge, store)
    new = [number for found in (one, two) for name, number in found.items() if name not in common]
    assert len(new) == len(set(new)) == 100


def test_a_volume_that_was_never_there_begins_where_it_can(full: Places, roomy: Places) -> None:
    assert full.settle(VOLUME, IDENTITY) == str(full.refuge / VOLUME)
    assert roomy.settle(VOLUME, IDENTITY) == str(roomy.home / VOLUME)
    assert os.listdir(full.refuge) == os.listdir(full.home) == []


@pytest.mark.expect_warnings("not used")
@pytest.mark.parametrize("damage", ["stamp", "records", "other volume"])
def test_what_cannot_be_trusted_is_not_copied(full: Places, store: MemoryStore, damage: str) -> None:
    home = full.home / VOLUME
    before = numbers(str(home), store)
    identity = IDENTITY
    if damage == "stamp":
        (home / custody.STAMP).write_text(json.dumps({"boot": "another", "clean": None}))
    elif damage == "records":
        os.truncate(home / custody.DATA_FILE, 3 * 4096)
    else:
        identity = VolumeIdentity("memory://", "other", "v")
    refuge = full.settle(VOLUME, identity)
    assert not Path(refuge).exists()
    assert home.exists(), "nothing at home is touched"
    writer = MetadataWriter(refuge, identity)
    writer.close()
    assert not set(before.values()) & set(numbers(str(full.refuge / "other"), store).values())


@pytest.mark.expect_warnings("not used")
def test_what_was_left_at_home_is_no_substitute_for_a_damaged_refuge(
    full: Places, roomy: Places, store: MemoryStore
) -> None:
    """The kernel may hold numbers that only the refuge knew: everything begins anew, and the mount is told so."""
    home = str(roomy.home / VOLUME)
    numbers(home, store)
    born = lineage(home)
    refuge = full.settle(VOLUME, IDENTITY)
    numbers(refuge, store)
    os.truncate(Path(refuge, custody.DATA_FILE), 3 * 4096)
    assert roomy.settle(VOLUME, IDENTITY) == home
    assert not Path(refuge).exists()
    assert lineage(home) != born


@pytest.mark.expect_warnings("finds no room")
def test_a_copy_that_does_not_fit_is_not_made(
    full: Places, roomy: Places, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, refuge = str(full.home / VOLUME), str(full.refuge / VOLUME)
    numbers(home, store)
    statvfs = os.statvfs

    class Small:
        f_bavail, f_frsize = 30, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    assert full.settle(VOLUME, IDENTITY) == refuge
    assert not Path(refuge).exists()
    assert os.listdir(full.refuge) == []
    second = numbers(refuge, store)
    assert roomy.settle(VOLUME, IDENTITY) == refuge, "no room at home either: it stays where it is"
    monkeypatch.setattr(os, "statvfs", statvfs)
    assert roomy.settle(VOLUME, IDENTITY) == home
    assert numbers(home, store) == second


@pytest.mark.expect_warnings("stays in", "cannot be copied", "cannot be moved")
def test_places_that_cannot_be_used_never_raise(full: Places, roomy: Places, store: MemoryStore) -> None:
    numbers(str(full.home / VOLUME), store)
    shutil.rmtree(full.refuge)
    full.refuge.write_text("a file")
    assert full.settle(VOLUME, IDENTITY) == str(full.refuge / VOLUME)
    assert roomy.settle(VOLUME, IDENTITY) == str(roomy.home / VOLUME)


def test_a_refuge_that_others_can_write_to_is_not_adopted(full: Places, roomy: Places, store: MemoryStore) -> None:
    """Names in /dev/shm can be guessed: somebody else may have put an environment there."""
    numbers(full.settle(VOLUME, IDENTITY), store)
    os.chmod(full.refuge, 0o777)
    assert roomy.settle(VOLUME, IDENTITY) == str(roomy.home / VOLUME)
    assert os.listdir(roomy.home) == []


@pytest.mark.expect_warnings("agents died")
def test_a_source_that_kills_is_tried_only_so_often(
    full: Places, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    numbers(str(full.home / VOLUME), store)
    script = """
import os, signal, sys
from pathlib import Path
import lmdb
from metadata import environment
from metadata.moving import Places
from tests.support.tree import IDENTITY

class Deadly:
    def __init__(self, env): self.env = env
    def __getattr__(self, name): return getattr(self.env, name)
    def copy(self, *_, **__): os.kill(os.getpid(), signal.SIGKILL)

trusted = environment._open_trusted
environment._open_trusted = lambda *a, **k: (lambda o: o._replace(env=Deadly(o.env)))(trusted(*a, **k))
environment._used_bytes = lambda opened: 0
Places(Path(sys.argv[1]), Path(sys.argv[2]), at_home=False).settle(sys.argv[3], IDENTITY)
print("lives")
"""
    for attempt in range(TRIES + 1):
        done = subprocess.run(
            [sys.executable, "-c", script, str(full.home), str(full.refuge), VOLUME],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == -signal.SIGKILL) == (attempt < TRIES), done.stderr
    assert os.listdir(full.refuge) == []
    with caplog.at_level(logging.INFO):
        assert full.settle(VOLUME, IDENTITY) == str(full.refuge / VOLUME)
    assert "goes on in" in caplog.text, "an orderly end forgets the attempts"


def test_kill_9_in_the_middle_is_made_good_by_the_next_agent(full: Places, store: MemoryStore) -> None:
    before = numbers(str(full.home / VOLUME), store)
    half = full.refuge / f"{VOLUME}.coming-1" / "copy"
    half.mkdir(parents=True)
    (half / custody.DATA_FILE).write_bytes(b"half")
    refuge = full.settle(VOLUME, IDENTITY)
    assert os.listdir(full.refuge) == [VOLUME]
    assert numbers(refuge, store) == before
