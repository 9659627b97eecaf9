"""Sizes of the tiers when nobody gave any: what fits, what is said, and that a person's word is never changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.cli import room
from cachefs.cli.checks import OK, WARN, check_sizes
from cachefs.cli.load import build, fitted, load
from cachefs.cli.room import fit
from cachefs.config import GIB, MIB, CacheConfig
from cachefs.errors import ConfigError

NOBODY: frozenset[str] = frozenset()
CACHE = CacheConfig(cache_dir="/cache", shm_dir="/shm")


class Machine:
    """What this machine has, as far as `room` asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmpfs: int | None = 64 * GIB
        self.memory = 64 * GIB
        self.disk = 100 * GIB
        monkeypatch.setattr(room, "tmpfs_bytes", lambda _: self.tmpfs)
        monkeypatch.setattr(room, "memory_bytes", lambda: (self.memory, "this container"))
        monkeypatch.setattr(room, "disk_room_bytes", lambda _: self.disk)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_on_a_large_machine_the_defaults_are_the_defaults(machine: Machine) -> None:
    assert fit(CACHE, NOBODY) == (CACHE, ())
    machine.tmpfs = None  # without a limit
    assert fit(CACHE, NOBODY) == (CACHE, ())


def test_the_tmpfs_of_a_container(machine: Machine) -> None:
    machine.tmpfs = 64 * MIB
    cache, notices = fit(CACHE, NOBODY)
    assert (cache.shm_size_bytes, cache.cache_size_bytes) == (32 * MIB, 20 * GIB)
    assert notices == ("--shm-size is 32MiB here: half of /shm",)


def test_little_memory(machine: Machine) -> None:
    machine.memory = 1 * GIB + 1
    cache, notices = fit(CACHE, NOBODY)
    assert cache.shm_size_bytes == 256 * MIB
    assert notices == ("--shm-size is 256MiB here: a quarter of the memory of this container",)


def test_a_small_disk(machine: Machine) -> None:
    machine.disk = 10 * GIB
    cache, notices = fit(CACHE, NOBODY)
    assert cache.cache_size_bytes == 8 * GIB
    assert notices == ("--cache-size is 8GiB here: 80% of what is free for /cache",)


def test_a_tier_with_too_little_room_is_off(machine: Machine) -> None:
    machine.tmpfs, machine.disk = 31 * MIB, 0
    cache, notices = fit(CACHE, NOBODY)
    assert (cache.shm_size_bytes, cache.cache_size_bytes) == (0, 0)
    assert notices == (
        "the shm tier is off: half of /shm is 15MiB, and it needs 16MiB (--shm-size)",
        "the disk tier is off: 80% of what is free for /cache is 0, and it needs 16MiB (--cache-size)",
    )


def test_what_somebody_wrote_is_not_changed(machine: Machine) -> None:
    machine.tmpfs, machine.disk = 64 * MIB, 1 * GIB
    given = {"shm_size_bytes": 48 * MIB, "cache_size_bytes": 5 * GIB}
    loaded = load(given, {"CACHEFS_CACHE_DIR": "/nonexistent/cache"})
    assert (loaded.config.cache.shm_size_bytes, loaded.config.cache.cache_size_bytes) == (48 * MIB, 5 * GIB)
    assert loaded.notices == ()
    by_variable = load({"cache_size_bytes": 0}, {"CACHEFS_SHM_SIZE": "20MiB"})
    assert by_variable.config.cache.shm_size_bytes == 20 * MIB
    assert {"cache_size_bytes", "shm_size_bytes"} <= by_variable.given


def test_a_tmpfs_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/shm is nobody's wish; another one is, and then the mistake is said."""

    def missing(directory: str) -> int | None:
        raise FileNotFoundError(2, "No such file or directory", directory)

    monkeypatch.setattr(room, "tmpfs_bytes", missing)
    assert fit(CacheConfig(cache_dir="/"), NOBODY)[0].shm_size_bytes == 0
    with pytest.raises(ConfigError, match="--shm-dir /nonexistent: No such file"):
        load({"shm_dir": "/nonexistent"}, {})


def test_what_a_tier_has_taken_is_room_for_it(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    free = stat.f_bavail * stat.f_frsize
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "data.mdb").write_bytes(bytes(64 * MIB))
    taken = room.used_bytes(tmp_path / "disk")
    assert taken >= 64 * MIB
    # others write to this disk as well
    assert abs(room.disk_room_bytes(tmp_path / "not" / "made" / "yet") - free) < 1 * GIB
    stat = os.statvfs(tmp_path)
    assert abs(room.disk_room_bytes(tmp_path) - stat.f_bavail * stat.f_frsize - taken) < 32 * MIB


def test_doctor_says_it(machine: Machine) -> None:
    machine.tmpfs, machine.disk = 64 * MIB, 1 * MIB
    found = list(check_sizes(fitted(build({}, {}))))
    assert [(check.name, check.outcome) for check in found] == [("default size", OK), ("default size", WARN)]
    assert "the disk tier is off" in found[1].text
