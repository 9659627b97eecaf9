"""The disk tier on a disk that is not its own: it leaves room, and gives room back when others need it."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from cachefs import allocation, errors
from cachefs.block import tier_growth
from cachefs.block.disk_room import reserve_bytes
from cachefs.block.lmdb_tier import TierWriter
from cachefs.types import Tier
from tests.support.blocks import KIB, MIB, contents, key, open_tier, payload, put
from tests.support.machine import detach, free, tmpfs
from tests.unit.test_block_tier import check_invariants
from tests.unit.test_block_tier_faults import fill_up

pytestmark = [
    pytest.mark.expect_warnings("may take no more", "begins anew", "not usable now"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root"),
]
SIZE = 96 * MIB


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB."""
    place = tmp_path / "disk"
    if request.param == "tmpfs":
        with tmpfs(place, f"{SIZE}"):
            yield place
        return
    image = tmp_path / "image"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(SIZE)
    for command in (["mkfs.ext4", "-q", "-m0", str(image)], ["mount", "-o", "loop", str(image), str(place)]):
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no loop file systems here: {error}")
    yield place
    detach(str(place))
    image.unlink()


def reserve(place: Path) -> int:
    room = os.statvfs(place)
    return reserve_bytes(room.f_blocks * room.f_frsize)


def fill(tier: TierWriter, first: int = 0, count: int = 1500) -> None:
    for start in range(first, first + count, 20):
        put(tier, [(key(number), payload(number)) for number in range(start, start + 20)])


def good(tier: TierWriter, count: int = 3000) -> int:
    """Return how many blocks are there, all of them right."""
    found = [number for number in range(count) if key(number) in tier]
    for number in found:
        assert contents(tier, number) == payload(number)
    return len(found)


@pytest.mark.parametrize(
    ("total", "kept"),
    [
        (16 * MIB, 4 * MIB),
        (200 * MIB, 50 * MIB),
        (1024 * MIB, 64 * MIB),
        (4096 * MIB, 204 * MIB),
        (1 << 40, 1024 * MIB),
    ],
)
def test_what_is_left_to_others(total: int, kept: int) -> None:
    assert reserve_bytes(total) // MIB == kept // MIB


def test_it_stops_growing_while_there_is_room_for_others(disk: Path) -> None:
    tier = open_tier(disk / "t", limit=512 * MIB)
    fill(tier)
    assert tier.state == "full"
    assert reserve(disk) - MIB < free(disk) < reserve(disk) + 20 * MIB
    assert good(tier) > 30 * MIB // (64 * KIB), "a small disk is used as well"
    check_invariants(tier)
    tier.close()


@pytest.mark.parametrize("leave", [0, 2 * MIB])
def test_it_gives_room_back_when_others_take_it(disk: Path, leave: int) -> None:
    tier = open_tier(disk / "t", limit=512 * MIB)
    fill(tier)
    before = good(tier)
    ballast = fill_up(disk, leave)
    tier.maintain()
    assert free(disk) >= reserve(disk) - MIB
    assert 0 < good(tier) < before, "it goes on with what is left"
    for round_ in range(4):
        fill(tier, 2000 + 200 * round_, 200)
        tier.maintain()
        assert free(disk) >= reserve(disk) - MIB
    assert contents(tier, 2799) == payload(2799)
    check_invariants(tier)
    ballast.unlink()
    tier._growth._retry_at = 0.0
    fill(tier, 0, 1500)
    assert good(tier) > before // 2
    tier.close()
    tier = open_tier(disk / "t", limit=512 * MIB)
    assert good(tier) > before // 2, "a file with holes is adopted as it is"
    tier.close()


def test_others_need_more_than_it_has(disk: Path) -> None:
    tier = open_tier(disk / "t", limit=512 * MIB)
    fill(tier, 0, 100)
    ballast = fill_up(disk, 0)
    tier.maintain()
    for number in range(200, 400):
        try:
            put(tier, [(key(number), payload(number))])
        except errors.TierUnavailable:
            continue
    tier.maintain()
    assert good(tier) < 100
    assert free(disk) > 4 * MIB, "all that it had"
    ballast.unlink()
    tier._growth._retry_at = tier._pause_until = 0.0
    fill(tier, 0, 100)
    assert good(tier) >= 100
    check_invariants(tier)
    tier.close()


def test_holes_are_not_filled_again_by_the_next_agent(disk: Path) -> None:
    tier = open_tier(disk / "t", limit=512 * MIB)
    fill(tier)
    ballast = fill_up(disk, 0)
    tier.maintain()
    tier.close()
    tier = open_tier(disk / "t", limit=512 * MIB)
    put(tier, [(key(5000), payload(1))])
    tier.maintain()
    assert free(disk) >= reserve(disk) - MIB
    ballast.unlink()
    tier.close()


def test_readers_see_no_hole(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has found a block, and reads it while it is deleted."""
    tier = open_tier(disk / "t", limit=512 * MIB)
    fill(tier)
    pread = os.pread

    def slow(*arguments: int) -> bytes:
        time.sleep(0.003)
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    ended = threading.Event()
    wrong: list[int] = []

    def read() -> None:
        while not ended.is_set():
            oldest = islice((number for number in range(1500) if key(number) in tier), 20)
            wrong.extend(number for number in oldest if contents(tier, number) not in (None, payload(number)))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(8):
        tier.give_back(3 * MIB)
        put(tier, [(key(3000 + step), payload(step))])
    ended.set()
    reader.join()
    assert wrong == []
    assert tier._counters.get("disk_corrupt") == 0
    tier.close()


GIVER = """
import sys
from cachefs.types import Tier
from tests.support.blocks import MIB, key, open_tier, payload, put
tier = open_tier(sys.argv[1], Tier.DISK, limit=512 * MIB)
print("going", flush=True)
number = int(sys.argv[2])
while True:
    put(tier, [(key(i % 1500), payload(i % 1500)) for i in range(number, number + 60)])
    tier.give_back(2 * MIB)
    number += 60
"""


def test_kill_9_while_room_is_given_back(disk: Path) -> None:
    tier = open_tier(disk / "t", limit=512 * MIB)
    fill(tier, 0, 700)
    tier.close()
    generator = random.Random(5)
    for life in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", GIVER, str(disk / "t"), str(life * 250)], stdout=subprocess.PIPE, text=True
        ) as giver:
            assert giver.stdout is not None
            assert giver.stdout.readline() == "going\n"
            time.sleep(generator.uniform(0.02, 0.4))
            giver.kill()
        tier = open_tier(disk / "t", limit=512 * MIB)
        check_invariants(tier)
        assert good(tier) > 0
        assert tier._counters.get("disk_corrupt") == 0
        tier.close()


def test_without_holes_it_begins_anew(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(allocation, "punch", refuse)
    tier = open_tier(disk / "t", limit=512 * MIB)
    fill(tier)
    ballast = fill_up(disk, 0)
    tier.maintain()
    assert free(disk) >= reserve(disk)
    assert good(tier) == 0
    assert contents(tier, 1) is None
    fill(tier, 0, 100)
    assert good(tier) > 0, "it caches again"
    ballast.unlink()
    tier.close()


def test_a_little_less_than_the_reserve_is_no_reason_to_begin_anew(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(disk / "t", limit=512 * MIB)
    put(tier, [(key(number), payload(number, 500)) for number in range(2000)])  # all in pages that they share
    fill_up(disk, reserve(disk) - MIB)
    tier._growth.trim(tier._env)  # type: ignore[arg-type]
    fill_up(disk, reserve(disk) - MIB)
    tier.maintain()
    assert sum(contents(tier, number) is not None for number in range(2000)) > 0
    tier.close()


def test_a_tier_that_holds_little_is_left_in_peace(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = open_tier(disk / "t", limit=512 * MIB)
    put(tier, [(key(1), payload(1))])
    tier._growth.trim(tier._env)  # type: ignore[arg-type]
    fill_up(disk, 0)
    for _ in range(5):
        tier.maintain()
    assert contents(tier, 1) == payload(1)
    assert tier.state == "full"
    assert len(caplog.records) == 1
    tier.close()


def test_a_tier_that_nobody_is_short_of_gives_nothing(disk: Path) -> None:
    tier = open_tier(disk / "t", limit=512 * MIB)
    fill(tier, 0, 200)
    tier.maintain()
    assert good(tier) == 200
    assert tier.state == "on"
    assert tier.give_back(0) >= 0
    assert good(tier) == 200
    tier.close()


def test_the_shm_tier_has_its_memory_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_growth, "STEP", MIB)
    with tmpfs(tmp_path / "shm", "32m") as place:
        tier = open_tier(place / "t", Tier.SHM, limit=64 * MIB)
        fill(tier, 0, 600)
        assert free(place) < 4 * MIB
        assert tier.give_back(10 * MIB) == 0
        tier.close()
