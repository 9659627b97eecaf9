"""What is read again stays in an LRU shm tier, with both engines: workers say which blocks they used."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages

MIB = 1 << 20
SHM_MIB = 24
SETTLED_S = 0.5
"""After this nothing is read ahead or evicted any more."""


def in_shm(mount: Mount, name: str) -> bool:
    """Whether the file's one block that was read is in the shm tier."""
    return b"shm=1" in os.getxattr(mount.path / name, "user.cachefs.cached")


def read_page(path: Path) -> bytes:
    """Read a page in the middle. (From the start it would be a sequential reader, whose wishes use blocks as well.)"""
    evict_pages(path)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(file.fileno(), 4096, MIB + 8192)


def use(mount: Mount, name: str, page: bytes) -> None:
    """Read a page until the agent must have heard of it: the first report may have been on its way already."""
    for _ in range(2):
        reported = reads(mount)
        assert read_page(mount.path / name) == page
        wait_until(functools.partial(_says_more, mount, reported), 10, "the worker says what it used")


def _says_more(mount: Mount, reported: int) -> bool:
    return reads(mount) > reported


def reads(mount: Mount) -> int:
    """How many reads the worker has told the agent of."""
    return int(mount.status()["counters"].get("fuse_reads", 0))


@pytest.mark.parametrize("engine", ["channel", pytest.param("pyfuse3", marks=pytest.mark.slow)])
def test_a_block_that_is_used_outlives_those_that_are_not(
    make_node: Callable[..., Node], s3_server: S3Server, bucket: Bucket, engine: str
) -> None:
    bodies = {name: bucket.put(name, content(name, 3 * MIB)) for name in ("used", "unused")}
    bucket.put("stream", content("stream", 2 * SHM_MIB * MIB))
    mount = make_node(shm_size=f"{SHM_MIB}MiB").mount(
        bucket.url, f"--endpoint-url={s3_server.endpoint_url}", f"--engine={engine}", "--eviction=lru"
    )
    for name, body in bodies.items():
        assert read_page(mount.path / name) == body[MIB + 8192 :][:4096]
        assert in_shm(mount, name)
    with (mount.path / "stream").open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no blocks ahead of the steps
        while in_shm(mount, "unused"):
            use(mount, "used", bodies["used"][MIB + 8192 :][:4096])
            assert stream.read(SHM_MIB * MIB // 4), "nothing was evicted"
            time.sleep(SETTLED_S)
            assert in_shm(mount, "used")
