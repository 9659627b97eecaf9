"""The S3 server of the tests itself: it comes back after kill(), and never outlives whoever started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import s3_server
from bench.s3_server import S3Server

OWNER = """
import sys, time
from bench.s3_server import S3Server
with S3Server(sys.argv[1]) as server:
    print(server.pid, server.port, flush=True)
    time.sleep(60)
"""


def running(group: int) -> bool:
    """Return whether a process of this group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_restart_keeps_ports_and_objects(tmp_path: Path) -> None:
    with S3Server(str(tmp_path)) as server:
        url = server.endpoint_url
        assert server.put_many("kept", ((f"k{number}", b"body") for number in range(20))) == 20
        server.kill()
        server.kill()
        assert not server.running
        server.restart()
        assert server.endpoint_url == url
        assert server.client().get_object(Bucket="kept", Key="k7")["Body"].read() == b"body"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_nothing_is_left_when_its_owner_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    group, port = map(int, owner.stdout.readline().split())
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    while (runs := running(group)) or list(tmp_path.iterdir()):
        assert time.monotonic() < deadline, "the server still runs" if runs else "its directory is still there"
        time.sleep(0.05)
    assert not list(Path("/tmp").glob(f"seaweedfs-*-{port + 10_000}.sock"))


@pytest.mark.slow
def test_a_port_that_somebody_takes_in_time_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    free_ports = s3_server._free_ports
    asked: list[tuple[int, ...]] = []
    with socket.socket() as stranger:  # takes connections and never answers

        def ports(count: int) -> tuple[int, ...]:
            found = free_ports(count)
            if not asked:
                stranger.bind((s3_server.LOOPBACK, found[-1]))
                stranger.listen()
            asked.append(found)
            return found

        monkeypatch.setattr(s3_server, "_free_ports", ports)
        with S3Server() as server:
            assert len(asked) == 2
            assert server.port == asked[1][-1]
            server.create_bucket("there")
            assert [bucket["Name"] for bucket in server.client().list_buckets()["Buckets"]] == ["there"]
