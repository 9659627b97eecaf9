"""A shuffled epoch that does not fit into the shm tier is fetched ahead to disk, and little is fetched in vain."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuse.test_prefetch import counters
from tests.support.mounts import Mount, Node
from tests.support.programs import content

KIB, MIB = 1 << 10, 1 << 20
FILES = 1200
SIZE = 90 * KIB


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    directory = tmp_path / "origin"
    for number in range(FILES):
        file = directory / f"n{number // 100:02d}" / f"{number:05d}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(f"far {number}", SIZE))
    return directory


@pytest.fixture
def mount(make_node: Callable[..., Node], origin: Path) -> Mount:
    return make_node(idle_timeout="30s").mount(f"file://{origin}", "--shm-size=32MiB", "--cache-size=2GiB")


def test_the_rest_of_an_epoch_goes_to_disk_when_memory_is_full(mount: Mount) -> None:
    paths = [f"n{number // 100:02d}/{number:05d}" for number in range(FILES)]
    for path in random.Random(3).sample(paths, FILES):
        with (mount.path / path).open("rb") as file:
            assert len(file.read()) == SIZE
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    counted = counters(mount)
    issued = counted["prefetch_issued_bytes"]
    assert issued > 48 * MIB, "more than the shm tier holds"
    assert counted.get("prefetch_wasted_bytes", 0) <= 0.1 * issued
    assert counted["disk_hits"] > FILES / 8
