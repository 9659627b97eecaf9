"""The reading program finds every wrong byte, whatever it is measured for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import dataset as datasets
from bench.dataset import LARGE_NAME, SMALL_DIRECTORY, Dataset
from bench.reader import ACTIONS, PAGE, WRONG_BYTES_EXIT, WrongBytes
from bench.scenarios import ScenarioFailed, run_program

SMALL, COUNT = 5000, 7


@pytest.fixture
def files(tmp_path: Path) -> Dataset:
    return datasets.generate(tmp_path, small_count=COUNT, large_bytes=3 << 20, small_bytes=SMALL)


def spec_of(files: Dataset, action: str) -> dict[str, Any]:
    return {
        "action": action,
        "directory": str(files.root / SMALL_DIRECTORY),
        "path": str(files.root / LARGE_NAME),
        "manifest": str(files.manifest),
        "passes": 3,
        "count": 100,
        "limit_s": 5,
        "seed": 1,
        "duration_s": 0.05,
    }


def run_action(files: Dataset, action: str) -> dict[str, Any]:
    return ACTIONS[action](spec_of(files, action), json.loads(files.manifest.read_text()))


@pytest.mark.parametrize(
    ("action", "count", "size"),
    [
        ("list", COUNT, 0),
        ("stat", COUNT, 0),
        ("small", COUNT, COUNT * SMALL),
        ("large", 3, 3 << 20),
        ("random", 100, 100 * PAGE),
    ],
)
def test_right_bytes_are_counted(files: Dataset, action: str, count: int, size: int) -> None:
    outcome = run_action(files, action)
    assert (outcome["count"], outcome["bytes"]) == (count, size)
    assert outcome["seconds"] > 0


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    one = datasets.generate(tmp_path / "one", small_count=2, large_bytes=1, small_bytes=100)
    two = datasets.generate(tmp_path / "two", small_count=2, large_bytes=1, small_bytes=100)
    assert one.large_bytes == 1 << 20
    for name in one.names():
        assert (one.root / name).read_bytes() == (two.root / name).read_bytes()


def change_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))


def some_small_file(files: Dataset) -> Path:
    return files.root / SMALL_DIRECTORY / datasets.small_name(COUNT - 1)


@pytest.mark.parametrize("action", ["small", "watch"])
def test_one_changed_byte_in_a_small_file_is_found(files: Dataset, action: str) -> None:
    change_byte(some_small_file(files), SMALL - 1)
    with pytest.raises(WrongBytes):
        run_action(files, action)


@pytest.mark.parametrize("size", [0, SMALL - 1, SMALL + 1])
def test_a_small_file_of_another_size_is_found(files: Dataset, size: int) -> None:
    os.truncate(some_small_file(files), size)
    for action in ("small", "list", "stat"):
        with pytest.raises(WrongBytes):
            run_action(files, action)


def test_one_changed_byte_in_the_large_file_is_found(files: Dataset) -> None:
    change_byte(files.root / LARGE_NAME, (2 << 20) + 12345)
    with pytest.raises(WrongBytes):
        run_action(files, "large")
    with pytest.raises(WrongBytes):
        ACTIONS["random"](spec_of(files, "random") | {"count": 10**6}, json.loads(files.manifest.read_text()))


@pytest.mark.parametrize("size", [(3 << 20) - 1, (3 << 20) + 1])
def test_a_large_file_of_another_size_is_found(files: Dataset, size: int) -> None:
    os.truncate(files.root / LARGE_NAME, size)
    with pytest.raises(WrongBytes):
        run_action(files, "large")


def test_a_missing_and_a_foreign_name_are_found(files: Dataset) -> None:
    (files.root / SMALL_DIRECTORY / "foreign").touch()
    with pytest.raises(WrongBytes):
        run_action(files, "list")


def test_watching_survives_errors_and_reports_them(files: Dataset) -> None:
    some_small_file(files).unlink()
    outcome = run_action(files, "watch")
    assert outcome["errors"]
    assert "No such file" in outcome["errors"][0]


def test_random_stops_at_its_time_limit(files: Dataset) -> None:
    outcome = ACTIONS["random"](spec_of(files, "random") | {"limit_s": 0}, json.loads(files.manifest.read_text()))
    assert outcome["count"] == 1


def test_as_a_program_wrong_bytes_have_their_own_exit_code(files: Dataset) -> None:
    change_byte(some_small_file(files), 0)
    done = subprocess.run(
        [sys.executable, "-m", "bench.reader"],
        input=json.dumps(spec_of(files, "small")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == WRONG_BYTES_EXIT
    with pytest.raises(ScenarioFailed, match="wrong bytes"):
        run_program("bench.reader", spec_of(files, "small"))


def test_a_read_error_is_a_failed_scenario_not_a_figure(files: Dataset) -> None:
    some_small_file(files).unlink()
    with pytest.raises(ScenarioFailed, match="No such file"):
        run_program("bench.reader", spec_of(files, "small"))
