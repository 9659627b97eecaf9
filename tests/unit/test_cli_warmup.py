"""What `cachefs warmup` shows, and how it reads lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cachefs.cli import warmup
from cachefs.cli.agent_errand import BATCH_PATHS, _batches
from cachefs.cli.progress import Progress, line
from cachefs.errors import UsageError

JOB: dict[str, Any] = {
    "job": "1-ab", "verb": "warm", "mountpoint": "/mnt", "state": "fetching", "error": None, "background": False,
    "files": 1000, "bytes": 10 << 20, "blocks": 1000, "done_bytes": 5 << 20, "there_bytes": 1 << 20,
    "fetched_bytes": 4 << 20, "peer_bytes": 1 << 20, "bytes_per_s": 2 << 20, "left_s": 2.5, "elapsed_s": 2.0,
    "problems": 0, "examples": [], "missing_blocks": 0, "missing_files": 0,
}  # fmt: skip


def test_a_line_of_progress() -> None:
    shown = line(JOB)
    assert shown == (
        "fetching [##########..........]  50% of 1,000 files, 10 MiB, 2 MiB/s, 2s left, "
        "store 3 MiB, other nodes 1 MiB, there 1 MiB"
    )
    assert line({**JOB, "state": "walking", "problems": 3}) == "listing: 1,000 files, 10 MiB, 3 problems"
    assert "100%" in line({**JOB, "bytes": 0, "done_bytes": 0})


def test_programs_get_every_state_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(as_json=True) as progress:
        progress.show(JOB)
        progress.show({**JOB, "state": "done"})
    assert len(capsys.readouterr().out.splitlines()) == 2
    with Progress(as_json=False) as progress:
        progress.show(JOB)
    assert capsys.readouterr().out == "", "people get the end of it"


def test_summaries() -> None:
    example = {"path": "a\nb", "why": "it\x1b vanished"}
    bad = {**JOB, "state": "incomplete", "missing_blocks": 5, "problems": 2000, "examples": [example] * 1000}
    shown = list(warmup.summary(bad))
    assert "5 blocks are in no cache" in shown
    assert shown[2] == "  /mnt/a\\nb: it\\x1b vanished"
    assert shown[-1] == "  and 1,980 more (--json lists up to 1,000)"
    assert list(warmup.summary({**JOB, "state": "done", "verb": "check"})) == ["all of 1,000 files, 10 MiB is cached"]
    (left,) = warmup.summary({**JOB, "background": True})
    assert "--stop 1-ab" in left
    (stopped,) = warmup.summary({**JOB, "state": "stopped"})
    assert stopped.startswith("stopped: store 3 MiB")


def test_lists(tmp_path: Path) -> None:
    place = tmp_path / "list"
    place.write_bytes(b"/a\r\n\n/b c\n/\xff")
    assert list(warmup.listed_paths(["x"], str(place))) == ["x", "/a", "/b c", "/\udcff"]
    place.write_bytes(b"x" * (warmup.MAX_LINE + 1))
    with pytest.raises(UsageError, match="a line of more"):
        list(warmup.listed_paths([], str(place)))


def test_batches_of_paths() -> None:
    paths = [b"%d" % n for n in range(BATCH_PATHS + 1)]
    batches = list(_batches(iter(paths)))
    assert [last for _, last in batches] == [False, True]
    assert [path for batch, _ in batches for path in batch] == paths
    assert list(_batches([])) == [([], True)]
    assert len(list(_batches([b"x" * (1 << 19)] * 5))) == 3
