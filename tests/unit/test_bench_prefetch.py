"""The simulator with detectors: what it counts adds up, and what prefetch has to reach on the loads of jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.policies import loads
from bench.policies.__main__ import main
from bench.policies.ahead import Figures, Simulation, Timing
from bench.policies.figures import of_load
from bench.policies.loads import Load, Read, Reader
from bench.policies.recorded import is_log, load, load_readers
from bench.policies.replay import TwoTiers
from bench.policies.traces import BLOCK_BYTES, FILE_BYTES, small_files
from bench.policies.tree import FixedTree
from cachefs.block.eviction import LruPolicy
from cachefs.block.policies.epoch import EpochPolicy
from cachefs.types import ROOT_INO

FILES = 1600


def run(load: Load, *, prefetch: bool = True) -> Figures:
    return Simulation(load, EpochPolicy, timing=Timing(), prefetch=prefetch).run()


# -- the simulator itself ---------------------------------------------------------------------------------------------


def test_time_without_prefetch_is_what_the_requests_take() -> None:
    paths = {f"d/{number}": FILE_BYTES for number in range(50)}
    timing = Timing(latency_s=0.1)
    load = Load("t", "t", paths, [Reader([[Read(path) for path in paths]] * 2, compute_s=0.0)], 1 << 40)
    figures = Simulation(load, LruPolicy, timing=timing, prefetch=False).run()
    assert (figures.reads, figures.misses, figures.late) == (100, 50, 0)
    assert figures.seconds == pytest.approx(50 * timing.request_s(FILE_BYTES) + 50 * timing.here_s)


def test_two_readers_of_one_block_ask_once() -> None:
    load = Load("t", "t", {"a": 7}, [Reader([[Read("a")]]), Reader([[Read("a")]], starts_s=0.001)], 1 << 20)
    figures = run(load, prefetch=False)
    assert (figures.misses, figures.late, figures.demand_bytes) == (1, 1, 7)


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("name", ["order", "epochs-25", "shards", "mix"])
def test_what_was_brought_is_counted_once(name: str, share: float) -> None:
    [make] = [make for make in loads.generate(320) if make().name == name]
    load = make()
    simulation = Simulation(load, EpochPolicy, timing=Timing(), shm_share=share)
    figures = simulation.run()
    assert figures.issued_bytes == figures.used_bytes + figures.wasted_bytes + figures.left_bytes
    assert figures.reads == sum(len(epoch) for reader in load.readers for epoch in reader.epochs)
    for tier in (simulation._tiers.shm, simulation._tiers.disk):
        assert tier.used <= tier.capacity


def test_two_tiers_say_what_is_in_neither() -> None:
    gone: list[bytes] = []
    names = small_files("a", 30)
    tiers = TwoTiers(LruPolicy, 300, 500, dict.fromkeys(names, 100), gone.append)
    for name in names:
        assert not tiers.read(name)
        tiers.put(name)
    assert {name for name in names if name in tiers} == set(names) - set(gone)
    assert 3 <= len(names) - len(gone) <= 8


def test_listings_are_not_known_before_they_are_made() -> None:
    tree = FixedTree({"a/b/1": 5, "a/b/2": 6, "a-c": 7})
    directory = tree.inos["a/b"]
    assert tree.listed(directory) is None
    assert tree.entries(directory, b"", 9) == []
    assert tree.file(directory, b"1") is None
    tree.make_listing(directory)
    assert [entry.ino for entry in tree.entries(directory, b"1", 9)] == [tree.inos["a/b/2"]]
    assert tree.file(directory, b"1") == tree.inos["a/b/1"]
    tree.make_listing(ROOT_INO)
    assert [entry.place for entry in tree.entries(ROOT_INO, b"", 9)] == [b"a-c", b"a/"]


def test_loads_are_the_same_each_time() -> None:
    for make in loads.generate(320):
        assert make() == make()


# -- what prefetch has to reach ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "speed_up", "waste"),
    [
        (loads.in_order, 8, 0.02),
        (loads.workers_in_order, 3, 0.1),
        (lambda files: loads.shuffled(50, files), 1.25, 0.02),
        (lambda files: loads.shuffled(100, files), 3, 0.02),
        (lambda files: loads.class_folders(files // 10), 1.5, 0.1),
        (lambda files: loads.folders_in_order(files // 10), 4, 0.05),
        (loads.same_order, 3, 0.02),
        (lambda files: loads.shards(files // 16), 2, 0.05),
        (lambda files: loads.shards_in_order(files // 16), 2.5, 0.05),
        (loads.search, 0.95, 0.1),
        (lambda files: loads.mix(1000), 3, 0.1),
    ],
)
def test_prefetch_helps_and_wastes_little(make: Callable[[int], Load], speed_up: float, waste: float) -> None:
    figures = of_load(make(FILES), Timing())
    assert figures["speed_up"] >= speed_up, figures
    assert figures["waste"] <= waste, figures


def test_random_points_bring_next_to_nothing() -> None:
    load = loads.points(1000)
    figures, alone = run(load), run(load, prefetch=False)
    assert figures.excess <= 0.02
    assert figures.seconds <= 1.02 * alone.seconds


def test_a_skewed_load_is_hardly_disturbed() -> None:
    load = loads.skewed(1000)
    figures, alone = run(load), run(load, prefetch=False)
    assert figures.excess <= 0.12
    assert figures.hits >= alone.hits - 0.02


def test_a_tree_that_was_never_listed_is_listed_ahead() -> None:
    load = loads.folders_in_order(80)
    simulation = Simulation(load, EpochPolicy, timing=Timing(), listed=False)
    for path in ("", "tree", "tree/n00000"):
        simulation._tree.make_listing(simulation._tree.inos[path])
    figures = simulation.run()
    assert figures.listings >= 40
    assert figures.seconds < run(load, prefetch=False).seconds / 2


# -- recorded ---------------------------------------------------------------------------------------------------------

LOG = """# uid, gid, pid; inode, size, offset or name; path; seconds
2026-11-23 11:18:19.003330 [uid:0,gid:0,pid:7] LOOKUP (5,a.bin) train <0.000010>
2026-11-23 11:18:19.003330 [uid:0,gid:0,pid:7] READ (9,131072,0) train/a (1).bin <0.000010>
2026-11-23 11:18:19.003430 [uid:0,gid:0,pid:8] READ (9,131072,0) train/a (1).bin <0.000010>
2026-11-23 11:18:19.003530 [uid:0,gid:0,pid:7] READ (9,131072,131072) train/a (1).bin <0.000010>
# 3 lines were lost
2026-11-23 11:18:19.003630 [uid:0,gid:0,pid:7] READ (9,131072,1048576) train/a (1).bin <0.000010>
2026-11-23 11:18:19.003730 [uid:0,gid:0,pid:7] READ (3,4096,0) - <0.000010>
2026-11-23 11:18:19.003830 [uid:0,gid:0,pid:7] READ (10,1048576,524288) b <0.000010>
2026-11-23 11:18:19.0038"""


def test_an_access_log_is_a_trace_and_a_load(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    path.write_text(LOG)
    assert is_log(path)
    trace = load(path, 1 << 30)
    assert len(trace.keys) == 5, "two requests of one process for one block are one read"
    assert trace.keys[0] == trace.keys[1] != trace.keys[2]
    assert sum(trace.sizes.values()) == 1048576 + 131072 + 1572864
    readers = load_readers(path, 1 << 30)
    assert readers.files == {"train/a (1).bin": 1048576 + 131072, "b": 1572864}
    first = [Read("train/a (1).bin", 0, 262144), Read("train/a (1).bin", 1, 131072), Read("b", 0), Read("b", 1, 524288)]
    assert [list(epoch) for reader in readers.readers for epoch in reader.epochs] == [
        first, [Read("train/a (1).bin", 0, 131072)],
    ]  # fmt: skip
    assert run(readers).reads == 5
    assert BLOCK_BYTES == 1048576


def test_what_is_no_access_log_is_said(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    good = LOG.splitlines(keepends=True)
    path.write_text("".join([*good[:3], "something else\n"]))
    with pytest.raises(ValueError, match="line 4"):
        load(path, 1)
    path.write_text("".join(good[:2]))
    with pytest.raises(ValueError, match="no read"):
        load(path, 1)
    path.write_text(good[2].replace("131072,0", "131072"))
    with pytest.raises(ValueError, match="line 1"):
        load(path, 1)
    assert CliRunner().invoke(main, ["--recorded", str(path)]).exit_code == 1


def test_the_command_reads_an_access_log(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    path.write_text(LOG)
    result = CliRunner().invoke(main, ["--recorded", str(path), "--cache", "1MiB"])
    assert result.exit_code == 0, result.output
    assert result.output.count("job") == 2
