"""The link that puts the S3 server far away: it delays, loses nothing, and leaves nothing behind.

The tests themselves stay on the loopback interface: whatever uses the link is a process of its own.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import suite
from bench.far_link import FarLink, LinkUnavailable
from bench.results import Pass
from bench.suite import SuiteOptions
from tests.support.machine import wait_until
from tests.support.programs import REPOSITORY, run_python

TUN = Path("/dev/net/tun")

needs_link = pytest.mark.skipif(
    os.geteuid() != 0 or not TUN.exists() or shutil.which("nsenter") is None,
    reason="needs root, /dev/net/tun and nsenter (util-linux)",
)

ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as listener:
    print("ready", flush=True)
    connection, _ = listener.accept()
    while piece := connection.recv(1 << 20):
        connection.sendall(piece)
"""
CLIENT = """
import os, socket, sys, threading, time
times = []
with socket.create_connection((sys.argv[1], 7000), timeout=20) as connection:
    for _ in range(5):
        begun = time.monotonic()
        connection.sendall(b"x")
        connection.recv(1)
        times.append(time.monotonic() - begun)
    sent = os.urandom(4 << 20)
    threading.Thread(target=connection.sendall, args=(sent,)).start()
    got = bytearray()
    while len(got) < len(sent):
        got += connection.recv(1 << 20)
print(min(times), bytes(got) == sent)
"""
OWNER = """
import sys, time
from bench.far_link import FarLink
with FarLink() as link:
    print(link.pid, link.address, flush=True)
    time.sleep(60)
"""
STORE = """
import sys
from bench.far_link import FarLink
from bench.s3_server import S3Server
with FarLink() as link, S3Server(sys.argv[1], address=link.address, enter=link.enter) as server:
    server.put_many("far", [("a/b", bytes(range(256)) * 1000)])
    body = server.client().get_object(Bucket="far", Key="a/b")["Body"].read()
    assert link.address in server.endpoint_url and link.address in server.filer_address
    print(body == bytes(range(256)) * 1000, link.carried_bytes() > 2 * len(body))
"""


def devices() -> set[str]:
    """The network devices of this machine."""
    return set(os.listdir("/sys/class/net"))


@pytest.fixture(autouse=True)
def _one_at_a_time() -> Iterator[None]:
    """These tests count the devices of the machine, and two processes run tests of this checkout."""
    with Path(__file__).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@needs_link
def test_what_crosses_the_link_is_late_and_whole() -> None:
    before = devices()
    with FarLink(one_way_s=0.03) as link:
        assert len(devices() - before) == 1
        with subprocess.Popen(
            [*link.enter, sys.executable, "-c", ECHO, link.address], stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            round_trip_s, whole = run_python(CLIENT, link.address).split()
            server.kill()
        assert 0.06 <= float(round_trip_s) < 0.2
        assert whole == "True"
        assert link.carried_bytes() > 8 << 20
    assert devices() == before
    link.close()


@needs_link
@pytest.mark.slow
def test_a_store_behind_the_link_is_a_store(tmp_path: Path) -> None:
    assert run_python(STORE, tmp_path).split() == ["True", "True"]
    assert list(tmp_path.iterdir()) == []


@needs_link
def test_the_link_goes_with_its_owner() -> None:
    before = devices()
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline().split()[0])
    os.kill(pid, signal.SIGINT)  # a Ctrl-C is not for the link: mounts need it to the end
    assert len(devices() - before) == 1
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() and devices() == before, 5, "the link is gone")


@needs_link
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_a_machine_without_the_rights_says_so() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "bench.far_link", "0.01"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no link with a delay: " in json.loads(done.stdout)["error"]


def test_without_a_link_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class NoLink:
        def __enter__(self) -> None:
            raise LinkUnavailable("no link with a delay: not permitted")

        def __exit__(self, *_: object) -> None: ...

    near: list[str] = []
    monkeypatch.setattr(suite, "FarLink", NoLink)
    monkeypatch.setattr(suite, "_measure_near", lambda *_: near.append("measured"))
    options = SuiteOptions(
        work_dir=tmp_path, small_count=2, far_small_count=2, large_bytes=1 << 20, repeats=1, time_limit_s=60,
        systems=("cachefs",), scenarios=("small",), passes=(Pass.INSTALLED,),
    )  # fmt: skip
    results = suite.run_suite(options, lambda line: None)
    assert near == ["measured"]
    assert results.remarks == ["S3 far away: not measured (no link with a delay: not permitted)"]
    assert list(tmp_path.iterdir()) == []
