"""How long answers are valid, in each mode."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.config import MetadataConfig
from cachefs.types import ROOT_INO, Consistency, FileKind, Ino
from metadata.freshness import FOREVER_S, Absent, Freshness, Known, remaining_s
from metadata.records import Dentry, Directory

NOW = 1_800_000_000 * 10**9
SECOND = 10**9


class Names:
    """A reader with one directory."""

    def __init__(self, dentry: Dentry | None = None, directory: Directory | None = None) -> None:
        self._dentry = dentry
        self._directory = directory

    def dentry(self, parent: Ino, name: bytes) -> Dentry | None:
        return self._dentry

    def directory(self, ino: Ino) -> Directory | None:
        return self._directory


def freshness(consistency: str = "ttl", ttl_s: float = 60.0, negative_s: float = 5.0) -> Freshness:
    return Freshness(
        MetadataConfig(consistency=Consistency(consistency), metadata_ttl_s=ttl_s, negative_ttl_s=negative_s)
    )


def dentry(age_s: float) -> Dentry:
    return Dentry(Ino(5), FileKind.FILE, b"n", 1, 1, NOW - int(age_s * SECOND), 0)


def directory(age_s: float, *, complete: bool = True) -> Directory:
    listed = NOW - int(age_s * SECOND)
    return Directory(1, listed - 100 * SECOND, complete, 0, b"", 1, 0, listed if complete else 0)


def test_a_name_is_valid_for_the_ttl():
    name = freshness().name(Names(dentry(20)), ROOT_INO, b"n", NOW)
    assert isinstance(name, Known)
    assert name.valid_s == pytest.approx(40)
    assert freshness().name(Names(dentry(60)), ROOT_INO, b"n", NOW) is None


def test_a_newer_listing_confirms_an_old_name():
    name = freshness().name(Names(dentry(500), directory(10)), ROOT_INO, b"n", NOW)
    assert isinstance(name, Known)
    assert name.valid_s == pytest.approx(50)


def test_a_newer_name_is_not_spoilt_by_an_old_listing():
    name = freshness().name(Names(dentry(1), directory(500)), ROOT_INO, b"n", NOW)
    assert isinstance(name, Known)
    assert name.valid_s == pytest.approx(59)


def test_a_date_in_the_future_is_expired():
    assert freshness().name(Names(dentry(-1), directory(-1)), ROOT_INO, b"n", NOW) is None
    assert freshness().absent_s(NOW + 1, NOW) is None


def test_a_trusted_listing_proves_absence_for_no_longer_than_the_negative_ttl():
    assert freshness().name(Names(None, directory(10)), ROOT_INO, b"n", NOW) == Absent(5.0)
    name = freshness().name(Names(None, directory(58)), ROOT_INO, b"n", NOW)
    assert isinstance(name, Absent)
    assert name.valid_s == pytest.approx(2)
    assert freshness().name(Names(None, directory(60)), ROOT_INO, b"n", NOW) is None
    assert freshness(negative_s=0).name(Names(None, directory(10)), ROOT_INO, b"n", NOW) == Absent(0)


def test_an_incomplete_listing_proves_nothing():
    assert freshness().name(Names(None, directory(1, complete=False)), ROOT_INO, b"n", NOW) is None
    assert freshness("immutable").name(Names(None, directory(1, complete=False)), ROOT_INO, b"n", NOW) is None
    assert freshness("immutable").listing(directory(1, complete=False), NOW) is None


def test_immutable_is_for_ever():
    fresh = freshness("immutable")
    assert fresh.listing(directory(10**7), NOW) == FOREVER_S
    assert fresh.name(Names(dentry(10**7)), ROOT_INO, b"n", NOW) == Known(dentry(10**7), FOREVER_S)
    assert fresh.name(Names(None, directory(10**7)), ROOT_INO, b"n", NOW) == Absent(FOREVER_S)


def test_a_ttl_that_is_forever():
    fresh = freshness(ttl_s=math.inf, negative_s=math.inf)
    assert fresh.listing(directory(10**7), NOW) == FOREVER_S
    assert fresh.absent_s(NOW - 10**16, NOW) == FOREVER_S


def test_strict_knows_nothing():
    fresh = freshness("strict")
    assert fresh.strict
    assert fresh.listing(directory(0), NOW) is None
    assert fresh.name(Names(dentry(0), directory(0)), ROOT_INO, b"n", NOW) is None
    assert fresh.absent_s(NOW, NOW) is None
    assert fresh.found_s(NOW, NOW) is None


def test_a_ttl_of_zero_trusts_nothing():
    assert freshness(ttl_s=0).name(Names(dentry(0), directory(0)), ROOT_INO, b"n", NOW) is None


@given(st.integers(0, 2**62), st.floats(0, 1e9), st.integers(0, 2**62))
def test_validity_never_outlives_the_ttl(checked: int, ttl_s: float, now: int):
    left = remaining_s(checked, ttl_s, now)
    if left is not None:
        assert 0 <= left <= min(ttl_s, FOREVER_S)
        assert (now - checked) / 1e9 + left <= ttl_s * 1.000001 + 1e-6
