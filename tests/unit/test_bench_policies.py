"""The simulator: its optimum is one, and it reads what was recorded."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.policies.__main__ import main
from bench.policies.recorded import RECORD, load
from bench.policies.replay import optimum, replay, replay_planned, replay_tiers
from bench.policies.traces import Trace, generate, small_files
from cachefs.block.eviction import LruPolicy
from cachefs.block.policies.epoch import EpochPolicy
from tests.support.programs import REPOSITORY


def best(reads: tuple[int, ...], room: int) -> int:
    """The most hits that any eviction reaches, by trying all."""

    @functools.cache
    def hits(at: int, held: frozenset[int]) -> int:
        if at == len(reads):
            return 0
        if reads[at] in held:
            return 1 + hits(at + 1, held)
        if len(held) < room:
            return hits(at + 1, held | {reads[at]})
        return max(hits(at + 1, held - {one} | {reads[at]}) for one in held)

    return hits(0, frozenset())


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    names = small_files("a", 6)
    reads = tuple(draw.randrange(6) for _ in range(24))
    trace = Trace("t", "t", [names[one] for one in reads], 300, dict.fromkeys(names, 100), (24,))
    assert round(optimum(trace).hits[0] * 24) == best(reads, 3)
    assert replay(trace, LruPolicy()).hits[0] <= optimum(trace).hits[0]
    assert replay_planned(trace, LruPolicy()).hits[0] <= optimum(trace).hits[0]


def test_traces_are_the_same_each_time() -> None:
    for make in generate(320):
        first, second = make(), make()
        assert (first.keys, first.sizes, first.phases) == (second.keys, second.sizes, second.phases)
        assert first.phases[-1] == len(first.keys)
        assert set(first.sizes) >= set(first.keys)


def test_two_tiers_hold_what_one_does() -> None:
    trace = generate(640)[1]()
    outcome = replay_tiers(trace, EpochPolicy)
    assert outcome.hits[0] == 0
    assert min(outcome.hits[1:]) > 0.4
    assert outcome.written_per_read < 0.25


def test_recorded_traces_are_read(tmp_path: Path) -> None:
    names = small_files("a", 3)
    text = tmp_path / "reads.csv"
    text.write_text(f"time,key,size\n0.5,{names[0].hex()},100\n0.6,train/a.jpg,7\n# pause\n0.7,train/a.jpg,7\n")
    trace = load(text, 1000)
    assert trace.keys[0] == names[0]
    assert trace.keys[1] == trace.keys[2] != names[0]
    assert trace.sizes[trace.keys[1]] == 7
    binary = tmp_path / "reads.bin"
    binary.write_bytes(b"".join(RECORD.pack(number, name, 5) for number, name in enumerate(names)))
    assert list(load(binary, 1000).keys) == names
    for content in (b"", b"short"):
        binary.write_bytes(content)
        with pytest.raises(ValueError, match=r"reads\.bin"):
            load(binary, 1000)
    text.write_text("0.5,only\n")
    with pytest.raises(ValueError, match="line 1"):
        load(text, 1000)


def test_the_command_writes_figures_and_a_chart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.policies", "--files", "320", "--only", "workers", "--output", str(tmp_path)]
    subprocess.run(
        command, cwd=REPOSITORY, check=True, timeout=60, capture_output=True
    )  # matplotlib keeps its fonts open
    both = json.loads((tmp_path / "policies.json").read_text())
    [figures], [ahead] = both["policies"], both["prefetch"]
    assert ahead["hits"]["with"] >= ahead["hits"]["without"]
    assert figures["later"]["epoch"] > figures["later"]["lru"]
    assert (tmp_path / "policies.svg").read_text().startswith("<?xml")
    assert CliRunner().invoke(main, ["--files", "320", "--only", "nothing"]).exit_code == 1
