"""Mounts share an agent, and one whose store hangs takes nothing from the others; and how much one store is asked."""

from __future__ import annotations

import functools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Node

READERS = 40
SOON_S = 0.5


@contextmanager
def running(commands: list[list[str | Path]]) -> Iterator[None]:
    """Have processes that will not end by themselves."""
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands]
    try:
        yield
    finally:
        for one in started:
            one.kill()
        for one in started:
            one.wait()


def took_s(action: Callable[[], object]) -> float:
    """Return how long an action took."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


@pytest.mark.parametrize(("what", "shm_size"), [("reads", "64MiB"), ("reads", "0"), ("listings", "64MiB")])
def test_a_store_that_hangs_keeps_no_other_mount_waiting(
    s3_server: S3Server, bucket: Bucket, proxy: FaultProxy, what: str, shm_size: str
) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(Bucket.create(s3_server))
        node = stack.enter_context(Node(s3_server.environment, shm_size=shm_size))
        bucket.fill({f"d{number}/f": b"x" for number in range(60)} | {f"files/{n}": b"y" * 100 for n in range(READERS)})
        other.fill({f"d{number}/f": os.urandom(1 << 20) for number in range(8)})
        hanging = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=1h", name="a")
        healthy = node.mount(other.url, f"--endpoint-url={s3_server.endpoint_url}", name="b")
        assert len(os.listdir(hanging.path / "files")) == READERS
        assert len(os.listdir(hanging.path)) == 61
        assert len(os.listdir(healthy.path)) == 8
        proxy.forget()
        proxy.add(Fault(stall=True))
        commands: list[list[str | Path]]
        if what == "reads":
            commands = [["cat", hanging.path / f"files/{number}"] for number in range(READERS)]
        else:
            commands = [["ls", hanging.path / f"d{number}"] for number in range(60)]
        with running(commands):
            wait_until(lambda: len(proxy.requests) >= 32, 5, "all requests of the one are under way")
            time.sleep(0.3)
            for number in range(8):
                directory = healthy.path / f"d{number}"
                assert took_s(functools.partial(os.listdir, directory)) < SOON_S
                assert took_s((directory / "f").read_bytes) < SOON_S
            assert took_s(lambda: node.mount(other.url, f"--endpoint-url={s3_server.endpoint_url}", name="c")) < 5
        proxy.down = True  # what hangs is refused from now on, and the mounts end in order


def test_a_store_gets_as_many_requests_as_were_allowed(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill({f"files/{number}": b"y" * 100 for number in range(60)})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=1h", "--max-requests=48")
    assert len(os.listdir(mount.path / "files")) == 60
    proxy.add(Fault(stall=True))
    with running([["cat", mount.path / f"files/{number}"] for number in range(60)]):
        wait_until(lambda: proxy.count("get") == 48, 5, "all requests are under way")
        time.sleep(0.3)
        assert proxy.count("get") == 48
    proxy.down = True
