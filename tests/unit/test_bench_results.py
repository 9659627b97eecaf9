"""What the bench concludes and prints: medians, targets, absences."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import chart, report
from bench.results import SCENARIOS, Pass, Results, SystemRecord
from bench.targets import JUICEFS_MEMORY, TARGETS, Verdict, judge

MACHINE = {"date": "2026-11-22T00:00:00", "cpus": 2, "cpu_model": "x", "memory_bytes": 1 << 34, "kernel": "6.18"}
OPTIONS = {"small_files": 5000, "small_bytes": 110_000, "large_bytes": 1 << 30, "rounds_done": 3}


def make_results(*systems: str) -> Results:
    results = Results(dict(MACHINE), dict(OPTIONS))
    for name in systems:
        results.systems[name] = SystemRecord(name.title(), "1.0")
    return results


def verdicts(results: Results) -> dict[str, Verdict]:
    return {judgement.text: judgement.verdict for judgement in judge(results)}


def test_nothing_measured_judges_nothing() -> None:
    assert set(verdicts(make_results("cachefs")).values()) == {Verdict.UNMEASURED}


@given(ours=st.floats(1, 1e6), theirs=st.floats(1, 1e6))
def test_a_ratio_target_is_reached_exactly_at_its_bound(ours: float, theirs: float) -> None:
    results = make_results("cachefs", JUICEFS_MEMORY)
    results.add(Pass.GUARD, "cachefs", "random-shm", ours)
    results.add(Pass.GUARD, JUICEFS_MEMORY, "random-shm", theirs)
    verdict = verdicts(results)[
        "random 4 KiB shm-warm, against JuiceFS (memory cache) with the guard held for everyone"
    ]
    assert verdict is (Verdict.REACHED if ours / theirs >= 2.2 else Verdict.MISSED)


def test_several_peers_are_compared_by_their_best() -> None:
    results = make_results("cachefs", "rclone", "s3fs")
    for system, value in (("cachefs", 100.0), ("rclone", 60.0), ("s3fs", 40.0)):
        results.add(Pass.INSTALLED, system, "large-cold", value)
    assert verdicts(results)["cold sequential, against the best peer"] is Verdict.MISSED


@pytest.mark.parametrize(("requests", "verdict"), [(0, Verdict.REACHED), (1, Verdict.MISSED)])
def test_at_most_targets(requests: int, verdict: Verdict) -> None:
    results = make_results("cachefs")
    results.facts["cachefs.requests_for_listed_names"] = requests
    assert verdicts(results)["S3 requests of listed names"] is verdict


def test_medians_are_of_all_samples() -> None:
    results = make_results("cachefs")
    for value in (1.0, 100.0, 3.0):
        results.add(Pass.INSTALLED, "cachefs", "stat", value)
    assert results.median(Pass.INSTALLED, "cachefs", "stat") == 3.0
    assert results.median(Pass.GUARD, "cachefs", "stat") is None


def test_an_absent_system_is_named_with_its_reason_and_has_no_figure(tmp_path: Path) -> None:
    results = make_results("cachefs", "s3fs")
    results.systems["s3fs"].absent = "`s3fs` is not installed"
    results.add(Pass.INSTALLED, "cachefs", "small-shm", 17_430.4)
    text = report.full_text(results, judge(results))
    assert "S3Fs: absent (`s3fs` is not installed)" in text
    head = report.table(results, Pass.INSTALLED)[0]
    assert head == ["scenario", "unit", "Cachefs"]
    report.write_files(results, judge(results), tmp_path)
    document = json.loads((tmp_path / "latest.json").read_text())
    assert document["figures"] == {
        "installed": {"cachefs": {"small-shm": {"median": 17_430.4, "unit": "files/s", "samples": [17_430.4]}}}
    }
    assert document["systems"]["s3fs"]["absent"]
    assert len(document["targets"]) == len(TARGETS)


def test_markdown_rows_have_the_width_of_their_head() -> None:
    results = make_results("cachefs", "ext4")
    for scenario in SCENARIOS:
        results.add(Pass.INSTALLED, "cachefs", scenario.name, 12.0)
    for line in report.markdown(report.table(results, Pass.INSTALLED)).splitlines():
        assert line.count("|") == 4


@given(value=st.floats(0, 1e9))
def test_numbers_in_cells_keep_three_digits(value: float) -> None:
    shown = float(report.number(value).replace(",", ""))
    assert math.isclose(shown, value, rel_tol=0.006, abs_tol=0.051)


def test_what_cpu_was_spent_on_is_a_table_of_its_own() -> None:
    results = make_results("cachefs", "rclone", "obstore")
    for who, size in (("server", 1 << 30), ("own", 1 << 29)):
        results.add_cpu("cachefs", who, 1.5, size)
    results.add_cpu("obstore", "server", 1.0, 1 << 30)
    assert report.cpu_rows(results)[1:] == [["Cachefs", "1.50", "3.00"], ["Obstore", "1.00", "-"]]
    assert "CPU seconds per GiB" in report.full_markdown(results, [])
    assert results.as_plain()["systems"]["cachefs"]["large_cold_cpu_s_per_gib"] == {"server": 1.5, "own": 3.0}


def test_what_far_away_means_is_said_where_it_was_measured() -> None:
    results = make_results("cachefs")
    assert "20 ms" not in report.full_text(results, [])
    results.options["far_small_files"] = 250
    results.facts |= {"far.round_trip_ms": 20.44, "far.link_cpu_s_per_gib": 1.36}
    text = report.full_text(results, [])
    assert "S3 20 ms away: 250 of the small files" in text
    assert "20.4 ms" in text
    assert "1.4 CPU seconds per GiB" in text


def test_the_bare_client_is_the_ceiling_of_cold_reading() -> None:
    results = make_results("cachefs", "juicefs", "seaweedfs", "obstore")
    results.add(Pass.INSTALLED, "obstore", "large-cold", 1200.0)
    assert "obstore alone is" not in report.full_text(results, [])
    results.add(Pass.INSTALLED, "juicefs", "large-cold", 600.0)
    results.add(Pass.INSTALLED, "seaweedfs", "large-cold", 800.0)
    assert "obstore alone is 1.50 x as fast as the best peer" in report.full_text(results, [])


def test_the_chart_shows_every_measured_system(tmp_path: Path) -> None:
    results = make_results("cachefs", "rclone")
    assert not chart.draw(results, tmp_path / "none.svg")
    for system in ("cachefs", "rclone"):
        results.add(Pass.INSTALLED, system, "small-page", 100.0)
    results.add(Pass.GUARD, "cachefs", "small-page", 200.0)
    assert chart.bars(results, "small-page") == [
        ("cachefs", "Cachefs", 100.0, 200.0),
        ("rclone", "Rclone", 100.0, None),
    ]
    # In a process of its own: matplotlib keeps the fonts it has used open.
    (tmp_path / "results").write_bytes(pickle.dumps(results))
    code = "import pickle, sys; from pathlib import Path; from bench import chart; at = Path(sys.argv[1]);"
    code += "chart.draw(pickle.loads((at / 'results').read_bytes()), at / 'chart.svg')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "chart.svg").read_text().rstrip().endswith("</svg>")
