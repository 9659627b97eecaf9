"""200,000 entries are listed, listed again and read in bounded memory, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import functools, json, os, sys, time
import trio
from cachefs.config import MetadataConfig
from cachefs.store.port import ListPage, ObjectInfo
from cachefs.types import ROOT_INO
from metadata.freshness import Freshness
from metadata.listing import Lister
from metadata.store import MetadataReader, MetadataWriter
from tests.support.tree import IDENTITY

TOTAL = 200_000
path, role = sys.argv[1:]

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

class Endless:
    endpoint, bucket = "memory://", "bucket"
    def list_page(self, prefix, *, delimiter="/", token=None, limit=1000):
        start = int(token or 0)
        objects = tuple(
            ObjectInfo(f"{prefix}img_{i:08}.jpeg", 110_000, "d41d8cd98f00b204e9800998ecf8427e", 1_700_000_000 * 10**9)
            for i in range(start, min(start + limit, TOTAL))
        )
        return ListPage(objects, (), str(start + limit) if start + limit < TOTAL else None)

def read(reader):
    seen, after, peak = 0, None, 0.0
    begun = time.perf_counter()
    while entries := reader.scan(ROOT_INO, after, 500):
        seen, after, peak = seen + len(entries), entries[-1].ino, max(peak, anonymous())
    return seen, (time.perf_counter() - begun) / max(seen, 1) * 1e6, peak

async def write():
    writer = MetadataWriter(path, IDENTITY)
    fresh = Freshness(MetadataConfig(metadata_ttl_s=0))
    peak = 0.0
    async with trio.open_nursery() as nursery:
        lister = Lister(writer, Endless(), "v", fresh, trio.to_thread.run_sync, nursery)
        for _ in range(2):
            progress = await lister.list_directory(ROOT_INO, None)
            while not progress.complete:
                peak = max(peak, anonymous())
                progress = await lister.list_directory(ROOT_INO, progress.frontier)
    writer.close()
    return {"peak": max(peak, anonymous()) - before}

trio.run(trio.to_thread.run_sync, len, "")  # the thread's stack and allocator belong to the base line
before = anonymous()
if role == "writer":
    print(json.dumps(trio.run(write)))
else:
    seen, cost_us, peak = read(MetadataReader(path))
    print(json.dumps({"seen": seen, "cost_us": cost_us, "peak": peak - before}))
"""


def run(path: Path, role: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), role],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stderr == ""
    figures: dict[str, float] = json.loads(done.stdout)
    print(role, figures)
    return figures


@pytest.mark.slow
def test_200_000_entries_in_bounded_memory(tmp_path: Path):
    assert run(tmp_path / "volume", "writer")["peak"] < 30
    reader = run(tmp_path / "volume", "reader")
    assert reader["seen"] == 200_000
    assert reader["peak"] < 10
    assert sum(file.stat().st_size for file in (tmp_path / "volume").iterdir()) < 80 << 20
