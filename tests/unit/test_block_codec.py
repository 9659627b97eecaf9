"""The stored form of a block, and the counters."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import errors, metrics
from cachefs.block import codec

KEY = b"k" * 20


@given(st.binary(max_size=5000), st.binary(min_size=20, max_size=20))
def test_round_trip(payload: bytes, key: bytes) -> None:
    value = codec.encode(payload, key)
    assert len(value) == codec.HEADER_SIZE + len(payload)
    assert codec.verify(value, key, len(payload)) == payload
    assert value[codec.HEADER_SIZE :] == payload


@given(st.binary(min_size=1, max_size=300), st.data())
def test_any_changed_bit_is_noticed(payload: bytes, draw: st.DataObject) -> None:
    value = bytearray(codec.encode(payload, KEY))
    bit = draw.draw(st.integers(0, len(value) * 8 - 1))
    value[bit // 8] ^= 1 << bit % 8
    with pytest.raises(errors.CorruptBlock):
        codec.verify(value, KEY)


@given(st.binary(max_size=300), st.data())
def test_any_shortened_or_lengthened_value_is_noticed(payload: bytes, draw: st.DataObject) -> None:
    value = codec.encode(payload, KEY)
    with pytest.raises(errors.CorruptBlock):
        codec.verify(value[: draw.draw(st.integers(0, len(value) - 1))], KEY)
    with pytest.raises(errors.CorruptBlock):
        codec.verify(value + b"x", KEY)


def test_another_blocks_bytes_are_noticed() -> None:
    value = codec.encode(b"payload", KEY)
    with pytest.raises(errors.CorruptBlock, match="another block"):
        codec.verify(value, b"l" * 20)
    with pytest.raises(errors.CorruptBlock):
        codec.verify(value, KEY, expected_length=8)


def test_the_format_is_pinned() -> None:
    """This test fails when stored blocks change: then FORMAT_VERSION has to change too."""
    assert codec.HEADER_SIZE == 32
    assert codec.FORMAT_VERSION == 1
    assert codec.encode(b"abc", KEY).hex() == PINNED


PINNED = "4346534201000000030000000000000050392f89945faf7873f87e0ce8ffffb3616263"


def test_metric_names_are_unique_and_described() -> None:
    assert all(name == metric.name and metric.help.endswith(".") for name, metric in metrics.METRICS.items())
    assert {"shm_hits", "disk_hit_bytes", "origin_requests", "origin_throttled"} <= metrics.METRICS.keys()


def test_counters_lose_nothing_between_threads() -> None:
    counters = metrics.Counters()

    def count() -> None:
        for _ in range(5000):
            counters.add("shm_hits")
            counters.add("shm_hit_bytes", 2)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.snapshot() == {"shm_hits": 20_000, "shm_hit_bytes": 40_000}
    assert counters.get("shm_hits") == 20_000
    assert counters.get("never") == 0
