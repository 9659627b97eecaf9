"""Whether a store answers, as `cachefs status` says it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from cachefs.errors import AccessDenied, BucketNotFound, CachefsError, CredentialsError, NotFound, StorageUnavailable
from cachefs.store.condition import Condition
from cachefs.store.counters import StoreCounters

WELL = {"failing": False, "since": None, "failures": 0, "last_error": None, "last_error_at": None}


@pytest.fixture
def condition() -> Condition:
    times: Iterator[int] = count(100)
    return Condition(lambda: float(next(times)))


def test_a_store_that_nobody_asked_is_well(condition: Condition) -> None:
    assert condition.describe() == WELL


def test_three_in_a_row_are_an_outage_since_the_first(condition: Condition) -> None:
    for number in range(3):
        assert not condition.describe()["failing"]
        condition.failed(StorageUnavailable(f"refused {number}"))
    assert condition.describe() == {
        "failing": True, "since": 100.0, "failures": 3, "last_error": "refused 2", "last_error_at": 102.0,
    }  # fmt: skip
    condition.answered()
    assert condition.describe() == {**WELL, "last_error": "refused 2", "last_error_at": 102.0}
    condition.failed(StorageUnavailable("once more"))
    assert not condition.describe()["failing"]


@pytest.mark.parametrize("error", [CredentialsError("expired"), BucketNotFound("gone")])
def test_what_no_retry_can_help_counts_at_once(condition: Condition, error: CachefsError) -> None:
    condition.failed(error)
    assert condition.describe()["failing"]
    assert condition.describe()["failures"] == 1


def test_one_object_that_may_not_be_read_is_no_outage(condition: Condition) -> None:
    for _ in range(10):
        condition.failed(AccessDenied("this one"))
        condition.answered()
    assert not condition.describe()["failing"]


def test_a_missing_name_is_an_answer_and_patience_is_no_failure() -> None:
    counters = StoreCounters()
    for _ in range(2):
        counters.failed(StorageUnavailable("reset"), throttled=False)
    counters.failed(NotFound("no such object"), throttled=False)
    for _ in range(5):
        counters.failed(StorageUnavailable("slow down", throttled=True), throttled=True)
    counters.failed(StorageUnavailable("reset"), throttled=False)
    assert not counters.condition.describe()["failing"]
