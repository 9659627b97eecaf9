"""Pins: kept over restarts, bounded, and over when they are over. And what the tiers are told."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import pytest

from cachefs.agent.crowd import Crowd
from cachefs.agent.guidance import Guidance
from cachefs.agent.pins import FILE, Pin, Pins
from cachefs.block.holdings import Limit
from cachefs.block.lmdb_tier import TierWriter
from cachefs.errors import StorageUnavailable, UsageError
from cachefs.types import ObjectId


class Tier:
    """Remembers what it was told."""

    limit_bytes = 1000

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def guide(self, **told: Any) -> None:
        self.told = told

    def limit_of(self, owner: int) -> Limit:
        return Limit(quota_bytes=500 if owner else 0)


def oid(number: int) -> ObjectId:
    return ObjectId(hashlib.sha256(b"%d" % number).digest()[:16])


def pin(path: bytes, *numbers: int, takes: int = 100, until: float | None = None, volume: str = "v") -> Pin:
    return Pin(volume, "/mnt", path, until, len(numbers), takes, b"".join(map(oid, numbers)))


class Rig:
    def __init__(self, place: Path) -> None:
        self.place, self.now = place, 1000.0
        self.shm, self.disk = Tier(), Tier()
        self.guidance = Guidance(cast("TierWriter", self.shm), cast("TierWriter", self.disk))

    def pins(self) -> Pins:
        return Pins(self.place, self.guidance, lambda: self.now)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_they_are_kept(rig: Rig) -> None:
    pins = rig.pins()
    await pins.add([pin(b"a", 1, 2), pin(b"b/c", 3)])
    for again in (pins, Rig(rig.place).pins()):
        await again.load()
        assert [again.covers(oid(n)) for n in range(5)] == [False, True, True, True, False]
        assert [each["path"] for each in again.listed()] == ["/mnt/a", "/mnt/b/c"]
    assert rig.disk.told["is_pinned"](oid(1))
    assert rig.shm.told == {"next_use": None, "is_pinned": None}, "what keeps blocks for long keeps them"
    await pins.add([pin(b"a", 4)])
    assert [pins.covers(oid(n)) for n in (1, 3, 4)] == [False, True, True], "in the place of what it was"
    assert [each.path for each in await pins.remove("v", [b"b"])] == [b"b/c"]
    assert await pins.remove("other", []) == []
    assert await pins.remove("v", [b"ab"]) == []
    assert len(await pins.remove("v", [b""])) == 1
    assert rig.disk.told["is_pinned"] is None


async def test_too_much(rig: Rig) -> None:
    pins = rig.pins()
    await pins.add([pin(b"a", 1, takes=500)])
    with pytest.raises(UsageError, match="900 at most"):
        await pins.add([pin(b"b", 2, takes=401)])
    assert not pins.covers(oid(2))
    await pins.add([pin(b"a", 2, takes=900)])
    assert pins.covers(oid(2))
    assert Pins(rig.place, Guidance(None, None)).most_bytes == 0


async def test_too_much_for_a_quota(rig: Rig) -> None:
    pins = rig.pins()
    await pins.add([pin(b"a", 1, takes=400)], owner=7)
    with pytest.raises(UsageError, match="450 at most"):
        await pins.add([pin(b"b", 2, takes=51)], owner=7)
    assert not pins.covers(oid(2))
    assert (pins.most_of(7), pins.most_of(0)) == (450, 900)


async def test_what_is_over_is_let_go(rig: Rig) -> None:
    pins = rig.pins()
    await pins.add([pin(b"a", 1, takes=900, until=1010.0)])
    rig.now = 1011.0
    assert pins.listed() == []
    await pins.add([pin(b"b", 2, takes=900)])
    assert [pins.covers(oid(n)) for n in (1, 2)] == [False, True]


@pytest.mark.expect_warnings("cannot be read")
@pytest.mark.parametrize("raw", [b"", b"junk", b"\x81\xa6format\x05", b"\x93\x01\x02\x03"])
async def test_a_file_that_makes_no_sense(rig: Rig, raw: bytes) -> None:
    (rig.place / FILE).write_bytes(raw)
    pins = rig.pins()
    await pins.load()
    assert pins.listed() == []
    await pins.add([pin(b"a", 1)])
    again = rig.pins()
    await again.load()
    assert again.covers(oid(1))


async def test_a_directory_that_cannot_be_written(rig: Rig) -> None:
    rig.place = rig.place / "missing"
    pins = rig.pins()
    await pins.load()
    with pytest.raises(StorageUnavailable, match="cannot be written"):
        await pins.add([pin(b"a", 1)])
    assert not pins.covers(oid(1))


async def test_several_who_tell_the_tiers_something(rig: Rig) -> None:
    crowd = Crowd(10)
    crowd.add(oid(7))
    pins = rig.pins()
    await rig.guidance.keep(crowd.__contains__)
    await pins.add([pin(b"a", 1)])
    stays = rig.disk.told["is_pinned"]
    assert [stays(oid(n)) for n in (1, 7, 8)] == [True, True, False]
    plans = {oid(1): 5, oid(2): 9}, {oid(1): 3}
    await rig.guidance.follow(plans[0].get)
    assert rig.shm.told["next_use"](oid(2)) == 9
    await rig.guidance.follow(plans[1].get)
    assert [rig.shm.told["next_use"](oid(n)) for n in (1, 2, 3)] == [3, 9, None]
    await rig.guidance.leave(plans[0].get)
    await rig.guidance.leave(plans[1].get)
    await rig.guidance.let_go(crowd.__contains__)
    assert rig.disk.told["next_use"] is None
    assert [rig.disk.told["is_pinned"](oid(n)) for n in (1, 7)] == [True, False]


def test_a_crowd_knows_its_members_and_takes_few_others_for_them() -> None:
    crowd = Crowd(5000)
    for number in range(5000):
        crowd.add(oid(number))
    assert all(oid(number) in crowd for number in range(5000))
    assert sum(oid(number) in crowd for number in range(5000, 15000)) < 60
