"""The bench of clusters: what it plays on a small stage, and what it makes of figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.cluster import runs, transfer
from bench.cluster.dataset import Shape
from bench.cluster.readers import Outcome, Reader, Readers
from bench.cluster.report import ClusterResults, full_text, write_files
from bench.cluster.runs import ScenarioFailed, Stage, Terms
from bench.targets import Verdict

MIB = 1 << 20
SHAPE = Shape(large_files=2, large_bytes=5 * MIB, small_files=5)
SMALL = Terms(nodes=2, shape=SHAPE, shards=SHAPE, small=SHAPE, bytes_per_s=50_000_000)
MACHINE = {"date": "2026-01-01T00:00", "cpus": 2, "cpu_model": "any", "kernel": "6"}


def figures(**more: Any) -> dict[str, Any]:
    made = {"readers": 4, "wall_s": 10.0, "mb_per_s_each": 30.0, "origin_share": 1.02, "worst_stall_ms": 300.0}
    return made | more


def verdicts(results: ClusterResults) -> dict[str, tuple[str, Verdict]]:
    return {judged.text: (judged.reached, judged.verdict) for judged in results.judgements()}


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    assert {verdict for _, verdict in verdicts(ClusterResults(MACHINE, SMALL)).values()} == {Verdict.UNMEASURED}


def test_the_worst_round_counts(tmp_path: Path) -> None:
    results = ClusterResults(MACHINE, SMALL, failures=["join: no"])
    for wall_s, share in ((3.0, 1.01), (4.0, 1.2)):
        results.rounds.append({"alone": figures(), "together": figures(wall_s=wall_s, origin_share=share)})
    results.placement = [{"members": 1000, "lookup_us": 12.0}, {"members": 1000, "lookup_us": 60.0}]
    found = verdicts(results)
    assert found["wall time against the same without peers, shards"] == ("2.5 x", Verdict.MISSED)
    assert found["origin bytes, all nodes cold and together, per byte of dataset"] == ("1.2 x", Verdict.MISSED)
    assert found["placement among 1,000 members, per look-up"] == ("60 us", Verdict.MISSED)
    assert "join: no" in full_text(results)
    names = {path.name for path in write_files(results, tmp_path)}
    assert names == {"cluster.json", "cluster.md"}
    assert len(json.loads((tmp_path / "cluster.json").read_text())["rounds"]) == 2


def test_the_transfer_is_compared_at_the_same_number_of_connections() -> None:
    def row(kind: str, connections: int, bytes_per_s: float, *, tls: bool = False) -> dict[str, Any]:
        size = bytes_per_s / 100_000
        return {"kind": kind, "tls": tls, "connections": connections, "bytes_per_s": bytes_per_s, "blocks_per_s": size}

    rows = [row("nginx, 1 MiB", 1, 100e6), row("nginx, 1 MiB", 4, 400e6), row("nginx, 1 MiB", 1, 1e6, tls=True)]
    rows += [row("peer, 1 MiB", 1, 80e6), row("peer, 1 MiB", 4, 200e6), row("peer, 100 KB, 80 per call", 1, 500e6)]
    assert transfer.against_nginx(rows, "peer, 1 MiB", tls=False) == 0.5
    assert transfer.against_nginx(rows, "peer, 1 MiB", tls=True) is None
    assert transfer.small_blocks_per_s(rows) == 5000


def make_files(directory: Path, manifest: Path, wrong: str = "") -> Shape:
    """Write a dataset as files, with its manifest."""
    import random

    import xxhash

    shape = Shape(large_files=2, large_bytes=2 * MIB + 5, small_files=3)
    files = []
    for name, size in shape.sizes.items():
        body = random.Random(name).randbytes(size)
        sums = [xxhash.xxh3_64_intdigest(body[at : at + MIB]) for at in range(0, size, MIB)]
        files.append({"name": name, "size": size, "sums": sums})
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(body[:-1] + b"x" if name == wrong else body)
    manifest.write_text(json.dumps({"files": files}))
    return shape


def read(tmp_path: Path, **more: Any) -> Outcome:
    reader = Reader("n1", tmp_path, tmp_path / "manifest.json", tmp_path, **more)
    with Readers([reader]) as readers:
        readers.start()
        return readers.outcomes(30)["n1"]


def test_a_reader_reads_everything(tmp_path: Path) -> None:
    shape = make_files(tmp_path, tmp_path / "manifest.json")
    for more in ({}, {"seed": "x", "threads": 3}, {"evict": True, "read_bytes": 100_000}):
        outcome = read(tmp_path, **more)
        assert outcome.is_clean
        assert outcome.bytes_read == shape.total_bytes


def test_a_reader_tells_wrong_bytes_and_errors(tmp_path: Path) -> None:
    make_files(tmp_path, tmp_path / "manifest.json", wrong="shards/0001.tar")
    (tmp_path / "images/00001.jpg").unlink()
    outcome = read(tmp_path)
    assert [text.partition(":")[0] for text in outcome.wrong] == ["shards/0001.tar"]
    assert [text.partition(":")[0] for text in outcome.errors] == ["images/00001.jpg"]
    assert not outcome.is_clean


def test_stalls_are_told_from_those_before() -> None:
    stalls = [(1.0, 900.0, "early"), (4.8, 600.0, "across"), (6.0, 400.0, "late")]
    outcome = Outcome(1, 10.0, 900.0, stalls, [], [])
    assert outcome.longest_after(5.0) == 600.0
    assert outcome.longest_after(5.5) == 400.0
    assert outcome.longest_after(9.0) == 0.0


@pytest.mark.slow
def test_the_scenarios_play(tmp_path: Path) -> None:
    with Stage(SMALL, tmp_path) as stage:
        alone, together = (runs.together(stage, SHAPE, peers=peers) for peers in (False, True))
        joined = runs.join(stage)
    assert 2.0 <= alone["origin_share"] <= 2.1, "both nodes, and some heads and listings"
    assert 1.0 <= together["origin_share"] <= 1.1
    assert together["counters"]["peer_fill_bytes"] == SMALL.shape.total_bytes
    assert joined["share_from_peers"] == 1.0
    assert joined["origin_share"] < 0.05


@pytest.mark.slow
def test_a_wrong_byte_fails_a_scenario(tmp_path: Path) -> None:
    with Stage(SMALL, tmp_path) as stage:
        stage.server.client().put_object(
            Bucket=stage.buckets[SHAPE].name, Key="shards/0001.tar", Body=bytes(SHAPE.large_bytes)
        )
        with pytest.raises(ScenarioFailed, match=r"shards/0001.tar: MiB 0 is wrong"):
            runs.together(stage, SHAPE, peers=False)
