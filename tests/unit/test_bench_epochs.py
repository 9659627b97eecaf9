"""The bench of epochs: its reader notices wrong bytes and deals batches in turn; targets are judged."""

import json
import os
from pathlib import Path

import pytest

from bench.epochs import orders
from bench.epochs.dataset import EpochFiles, generate
from bench.epochs.reader import share_of
from bench.epochs.report import EpochResults, full_text, judge, write_files
from bench.scenarios import ScenarioFailed, run_program
from bench.targets import Verdict

MACHINE = {"date": "2026-11-23T00:00:00", "cpus": 2, "cpu_model": "a CPU", "kernel": "6.18"}
FILES = {"count": 20, "folders": 4, "bytes": 110_000, "large_bytes": 1 << 20}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> EpochFiles:
    return generate(tmp_path_factory.mktemp("epochs"), small_count=20, folders=4, large_bytes=1 << 20)


def read(files: EpochFiles, order: orders.Order, tmp_path: Path, workers: int = 1) -> dict[str, object]:
    paths = orders.write(order, tmp_path / "order.json")
    spec = {"action": "epoch", "root": str(files.root), "sums": str(files.sums()), "paths": paths, "workers": workers}
    return run_program("bench.epochs.reader", spec | {"batch": 3})


@pytest.mark.parametrize("workers", [1, 4])
def test_an_epoch_reads_every_file_once(files: EpochFiles, tmp_path: Path, workers: int) -> None:
    outcome = read(files, orders.shuffled(files.tree(), 1), tmp_path, workers)
    assert (outcome["count"], outcome["bytes"]) == (20, 20 * files.small_bytes)


def test_wrong_bytes_end_the_run(files: EpochFiles, tmp_path: Path) -> None:
    order = orders.listed(files.directory())
    swapped = [(order[1][0], order[0][1]), *order[1:]]
    with pytest.raises(ScenarioFailed, match="wrong bytes"):
        read(files, swapped, tmp_path, workers=2)


def test_a_missing_file_ends_the_run(files: EpochFiles, tmp_path: Path) -> None:
    with pytest.raises(ScenarioFailed, match="No such file"):
        read(files, [("tree/none", 0)], tmp_path)


def test_batches_are_dealt_in_turn() -> None:
    dealt = [share_of(list(range(11)), worker, 3, 2) for worker in range(3)]
    assert dealt == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10]]


def test_the_tree_has_the_bytes_of_the_directory(files: EpochFiles) -> None:
    assert len({os.path.dirname(path) for path in files.tree()}) == 4
    for flat, foldered in zip(files.directory(), files.tree(), strict=True):
        assert (files.root / flat).read_bytes() == (files.root / foldered).read_bytes()
    assert sum((files.root / name).stat().st_size for name in files.names()) == files.total_bytes


def test_orders_are_the_same_each_time(files: EpochFiles) -> None:
    first, again, other = (orders.shuffled(files.tree(), seed) for seed in (5, 5, 6))
    assert first == again != other
    assert sorted(first) == sorted(other) == orders.listed(files.tree())


def test_the_best_cache_of_half_the_files_hits_half_of_each_later_epoch() -> None:
    runs = [orders.shuffled([str(number) for number in range(2000)], seed) for seed in range(3)]
    first, *later = orders.best_shares(runs, 100, 2000 * 50)
    assert first == 0
    assert later == pytest.approx([0.5, 0.5], abs=0.01)


def measured(ours: float, best: float) -> EpochResults:
    results = EpochResults(MACHINE, FILES, {"cachefs": "cachefs", "juicefs": "JuiceFS", "seaweedfs": "SeaweedFS"})
    for system, rate in (("cachefs", ours), ("juicefs", best), ("seaweedfs", 2 * best), ("obstore", 2 * ours)):
        results.add("listing", system, rate)
    return results


def test_targets_compare_with_the_best_peer(tmp_path: Path) -> None:
    judged = {one.text: one for one in judge(measured(900, 300))}
    title = "first epoch, one reader, one directory, in listing order: "
    assert judged[title + "against the best peer that reads S3"].reached == "3 x"
    assert judged[title + "against the best of all"].verdict is Verdict.MISSED
    assert judged[title + "of the server's own rate"].verdict is Verdict.REACHED
    assert judged["prefetched in vain, on a mix"].verdict is Verdict.UNMEASURED


def test_hits_of_later_epochs_the_scan_and_the_plan_are_judged() -> None:
    results = measured(900, 300)
    best = [0.0, 0.5, 0.5, 0.5]
    results.larger = {
        "epoch": {"hits": [0.0, 0.49, 0.49, 0.5, 0.4], "best": best, "held_share": 0.5},
        "plan": {"hits": [0.0, 0.47, 0.47, 0.47], "best": best, "held_share": 0.5},
    }
    verdicts = {one.text: one.verdict for one in judge(results)}
    assert verdicts["dataset twice the cache, epochs 2 to 4: share of hits"] is Verdict.REACHED
    assert verdicts["the same with a plan: below Belady's optimum by"] is Verdict.MISSED
    assert verdicts["a scan of other files costs the next epoch, of its hits"] is Verdict.MISSED


def test_what_was_measured_is_written(tmp_path: Path) -> None:
    results = measured(900, 300)
    results.remarks.append("s3fs: not measured: it is not installed")
    paths = write_files(results, tmp_path)
    assert json.loads(paths[0].read_text())["first_epoch_files_per_s"]["listing"]["cachefs"] == [900]
    assert "s3fs: not measured" in paths[1].read_text()
    assert "900" in full_text(results)
