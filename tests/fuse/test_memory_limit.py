"""`--memory-limit` holds, whatever the shm tier does: anonymous memory of the agent under 24 readers, all cold."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.agent.memory import anonymous_bytes
from tests.support.machine import tmpfs
from tests.support.mounts import Bucket, Mount, Node

MIB = 1 << 20
LIMIT = 128 * MIB
READERS = 24
SIZE = 16 * MIB


@pytest.fixture(scope="module")
def large(s3_server: S3Server) -> Iterator[Bucket]:
    """Objects that no read-ahead of the kernel covers at once."""
    with Bucket.create(s3_server) as bucket:
        body = os.urandom(SIZE)
        bucket.fill({f"{number:02}": number.to_bytes(8, "big") + body[8:] for number in range(READERS)})
        yield bucket


@contextmanager
def peak_of(pid: int) -> Iterator[Callable[[], int]]:
    """Watch the anonymous memory of a process; gives a function that returns its peak."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: peak[0]
    finally:
        over.set()
        watcher.join()


def read_all_at_once(mount: Mount) -> None:
    """Every reader reads a file of its own."""
    readers = [
        subprocess.Popen(["cmp", "-n", str(SIZE - 8), "-i", "8:8", mount.path / f"{number:02}", mount.path / "00"])
        for number in range(READERS)
    ]
    assert [reader.wait(60) for reader in readers] == [0] * READERS


@pytest.mark.parametrize("tiers", ["shm", "no shm", "no tiers", "full tmpfs", "full tmpfs without disk"])
def test_the_memory_limit_holds(tiers: str, tmp_path: Path, s3_server: S3Server, large: Bucket) -> None:
    with ExitStack() as stack:
        full = tiers.startswith("full")
        shm_dir = stack.enter_context(tmpfs(tmp_path / "shm", "160m")) if full else Path("/dev/shm")
        node = stack.enter_context(
            Node(
                s3_server.environment,
                shm_dir=shm_dir,
                shm_size="0" if tiers.startswith("no") else "128MiB",
                cache_size="0" if tiers in ("no tiers", "full tmpfs without disk") else "512MiB",
            )
        )
        mount = node.mount(large.url, f"--endpoint-url={s3_server.endpoint_url}", "--memory-limit=128MiB")
        assert len(os.listdir(mount.path)) == READERS
        if full:
            fill_up(shm_dir)
        with peak_of(node.agent_pid) as peak:
            read_all_at_once(mount)
        assert peak() < LIMIT, f"{peak() / MIB:.0f} MiB"


def fill_up(place: Path) -> None:
    """Leave no room on a file system, as a neighbour would."""
    with (place / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(MIB)) == MIB:
                pass
        except OSError:
            pass
