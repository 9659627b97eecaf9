"""The eviction order against a plain list."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.block.eviction import BATCH, LruPolicy
from cachefs.types import BlockKey


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(20, "big"))


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "touch", "remove", "victim", "evict"]), st.integers(0, 12)), max_size=200
    )
)
def test_model(steps: list[tuple[str, int]]) -> None:
    policy = LruPolicy()
    model: list[BlockKey] = []
    for step, number in steps:
        name = key(number)
        match step:
            case "add" | "touch":
                if step == "add" or name in model:
                    if name in model:
                        model.remove(name)
                    model.append(name)
                policy.add(name, 1) if step == "add" else policy.touch(name)
            case "remove":
                policy.remove(name)
                if name in model:
                    model.remove(name)
            case _:
                victim = policy.victim()
                assert victim == (model[0] if model else None)
                if step == "evict" and victim is not None:
                    policy.remove(victim)
                    model.pop(0)
        assert len(policy) == len(model)
        assert (name in policy) == (name in model)
        assert policy.oldest_first() == model


def test_eviction_stays_cheap_with_holes_at_the_front() -> None:
    policy = LruPolicy()
    for number in range(100_000):
        policy.add(key(number), 1)
    start = time.perf_counter()
    for number in range(60_000):
        victim = policy.victim()
        assert victim == key(number)
        policy.remove(victim)
    assert time.perf_counter() - start < 3.0  # seconds; a walk over the holes for each victim takes minutes


@pytest.mark.slow
def test_a_million_blocks_fit_into_120_mb() -> None:
    tracemalloc.start()
    try:
        policy = LruPolicy()
        for number in range(1_000_000):
            policy.add(key(number), 1)
        for _ in range(BATCH * 3):
            policy.touch(policy.oldest_first()[0]) if _ % BATCH == 0 else policy.victim()
        assert tracemalloc.get_traced_memory()[0] < 120e6
    finally:
        tracemalloc.stop()
