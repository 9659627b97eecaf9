"""The store answers badly, slowly or not at all: R4 and R5 of docs/SEMANTICS.md, and faults at any point of a read."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import CACHEFS, Bucket, Mount, Node
from tests.support.programs import REPOSITORY, content, errno_name, evict_pages

MIB = 1 << 20
IO_TIMEOUT_S = 3.0


@pytest.fixture
def mount(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    """A mount with short deadlines, behind the proxy."""
    return mount_behind(node, bucket, proxy)


def mount_behind(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str) -> Mount:
    """Mount with short deadlines, behind the proxy."""
    deadlines = (f"--io-timeout={IO_TIMEOUT_S}s", "--request-timeout=2s", "--connect-timeout=1s")
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", *deadlines, *options)


def timed(action: Callable[[], object]) -> tuple[str, float]:
    """Return the errno's name of an action and how long it took."""
    started = time.monotonic()
    name = errno_name(action)
    return name, time.monotonic() - started


# -- passing faults: nobody notices -----------------------------------------------------------------------------------

PASSING = {
    "503": Fault(kind="get", status=503, times=2),
    "503 with Retry-After": Fault(kind="get", status=503, retry_after_s=1, times=1),
    "429": Fault(kind="get", status=429, times=1),
    "500": Fault(kind="get", status=500, times=2),
    "reset": Fault(kind="get", reset=True, times=2),
    "truncated": Fault(kind="get", truncate_after=1000, times=2),
    "cut in the middle": Fault(kind="get", truncate_after=700_000, reset=True, times=2),
    "nothing at all": Fault(kind="get", truncate_after=0, times=1),
    "too short": Fault(kind="get", length_delta=-10, times=1),
    "too long": Fault(kind="get", length_delta=10, times=1),
    "another etag": Fault(kind="get", etag='"0123456789abcdef0123456789abcdef"', times=1),
    "slow": Fault(kind="get", delay_s=0.5, times=3),
    "stalled": Fault(kind="get", truncate_after=300_000, stall=True, times=1),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_passing_faults_of_gets_are_not_seen(node: Node, bucket: Bucket, proxy: FaultProxy, fault: Fault) -> None:
    body = bucket.put("file", content("body", 3 * MIB + 5))
    mount = mount_behind(node, bucket, proxy, "--io-timeout=20s")
    rule = proxy.add(fault)
    assert (mount.path / "file").read_bytes() == body
    assert rule.hits, "the fault was never met"


def test_bodies_that_break_at_any_point(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    points = (0, 1, 4095, 65_536, MIB - 1, MIB, MIB + 1, 2 * MIB - 1)
    bodies = {f"{way}-{point}": content(f"{way} {point}", 2 * MIB) for way in ("end", "reset") for point in points}
    bucket.fill(bodies)
    mount = mount_behind(node, bucket, proxy, "--io-timeout=20s")
    for name in bodies:
        way, _, point = name.partition("-")
        proxy.add(Fault(kind="get", key=name, truncate_after=int(point), reset=way == "reset", times=1))
    for name, body in bodies.items():
        assert (mount.path / name).read_bytes() == body, name


@pytest.mark.parametrize("kind", ["list", "head"])
@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 500}, {"reset": True}, {"truncate_after": 20}], ids=str)
def test_passing_faults_of_names_are_not_seen(
    mount: Mount, bucket: Bucket, proxy: FaultProxy, kind: str, fault: dict[str, int]
) -> None:
    bucket.fill({f"d/{number}": b"x" for number in range(5)})
    rule = proxy.add(Fault(kind=kind, times=2, **fault))  # type: ignore[arg-type]
    if kind == "head":
        assert os.stat(mount.path / "d/3").st_size == 1
        if fault != {"truncate_after": 20}:  # the answer to HEAD has no body that could be cut
            assert rule.hits
    else:
        assert sorted(os.listdir(mount.path / "d")) == ["0", "1", "2", "3", "4"]
        assert rule.hits


# -- lasting faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"), [(403, "EACCES"), (404, "ESTALE"), (412, "ESTALE"), (500, "EIO"), (503, "EIO")]
)
def test_lasting_faults_of_gets(mount: Mount, bucket: Bucket, proxy: FaultProxy, status: int, code: str) -> None:
    body = bucket.put("file", content("body", 2 * MIB))
    assert os.stat(mount.path / "file").st_size == len(body)
    proxy.add(Fault(kind="get", status=status))
    found, took_s = timed((mount.path / "file").read_bytes)
    assert found == code
    assert took_s < (IO_TIMEOUT_S + 2 if code == "EIO" else 2)
    wait_until(lambda: "file" in mount.node.full_log(), 2, "the log names the key")
    proxy.clear()
    assert (mount.path / "file").read_bytes() == body, "an error is not cached"


def test_403_of_a_listing_and_of_a_name(mount: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill({"d/file": b"x", "e/file": b"y"})
    proxy.add(Fault(kind="list", status=403))
    assert timed(lambda: os.listdir(mount.path / "d"))[0] == "EACCES"
    proxy.add(Fault(kind="head", status=403))
    assert timed(lambda: os.stat(mount.path / "e/file"))[0] == "EACCES"
    proxy.clear()
    assert os.listdir(mount.path / "d") == ["file"]
    assert (mount.path / "e/file").read_bytes() == b"y"


def test_a_lasting_truncation_is_never_data(mount: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    body = bucket.put("file", content("body", 2 * MIB))
    proxy.add(Fault(kind="get", truncate_after=500_000))
    found, took_s = timed((mount.path / "file").read_bytes)
    assert found == "EIO"
    assert took_s < IO_TIMEOUT_S + 2
    proxy.clear()
    assert (mount.path / "file").read_bytes() == body


def test_a_listing_that_breaks_in_the_middle_never_looks_complete(
    mount: Mount, bucket: Bucket, proxy: FaultProxy
) -> None:
    names = [f"{number:05}" for number in range(2200)]
    bucket.fill({f"d/{name}": b"" for name in names})
    rule = proxy.add(Fault(kind="list", skip=1, status=500))
    assert errno_name(lambda: os.listdir(mount.path / "d")) == "EIO"
    assert rule.hits
    proxy.clear()
    assert sorted(os.listdir(mount.path / "d")) == names


def test_one_bad_object_does_not_harm_the_others(mount: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    bodies = {f"file{number}": content(str(number), 200_000) for number in range(6)}
    bucket.fill(bodies)
    proxy.add(Fault(kind="get", key="file3", status=500))
    for name, body in bodies.items():
        if name != "file3":
            assert (mount.path / name).read_bytes() == body
    assert errno_name((mount.path / "file3").read_bytes) == "EIO"


# -- the store is away ------------------------------------------------------------------------------------------------


def test_r4_cached_bytes_stay_readable_and_others_wait_bounded(mount: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    warm = bucket.put("warm", content("warm", 3 * MIB))
    cold = bucket.put("cold", content("cold", 3 * MIB))
    assert sorted(os.listdir(mount.path)) == ["cold", "warm"]
    assert (mount.path / "warm").read_bytes() == warm
    proxy.down = True
    evict_pages(mount.path / "warm")
    started = time.monotonic()
    assert (mount.path / "warm").read_bytes() == warm
    assert time.monotonic() - started < 1
    found, took_s = timed((mount.path / "cold").read_bytes)
    assert found == "EIO"
    assert IO_TIMEOUT_S * 0.5 < took_s < IO_TIMEOUT_S + 2
    wait_until(lambda: "cold" in mount.node.full_log(), 2, "the log names the key")
    assert any("refused" in line.lower() for line in mount.node.full_log().splitlines()), "the log says why"
    found, took_s = timed(lambda: os.stat(mount.path / "never heard of"))
    assert found in ("ENOENT", "EIO")
    assert took_s < IO_TIMEOUT_S + 4
    proxy.down = False
    assert (mount.path / "cold").read_bytes() == cold


def test_r4_a_reader_that_waits_gets_its_bytes_when_the_store_comes_back(
    node: Node, bucket: Bucket, proxy: FaultProxy
) -> None:
    body = bucket.put("file", content("body", 2 * MIB))
    mount = mount_behind(node, bucket, proxy, "--io-timeout=30s")
    os.stat(mount.path / "file")
    proxy.down = True
    reader = subprocess.Popen(["md5sum", str(mount.path / "file")], stdout=subprocess.PIPE)
    try:
        time.sleep(1.5)
        assert reader.poll() is None
        proxy.down = False
        output, _ = reader.communicate(timeout=30)
    finally:
        reader.kill()
        reader.wait()
    assert reader.returncode == 0
    assert output.split()[0].decode() == hashlib.md5(body).hexdigest()


def test_a_server_that_never_answers_is_bounded_too(mount: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", content("body", MIB))
    os.stat(mount.path / "file")
    proxy.add(Fault(kind="get", stall=True))
    found, took_s = timed((mount.path / "file").read_bytes)
    assert found == "EIO"
    assert took_s < IO_TIMEOUT_S + 5


# -- readers that are killed ------------------------------------------------------------------------------------------


def start_reader(path: Path) -> subprocess.Popen[bytes]:
    """A process that reads a whole file."""
    program = "import sys; open(sys.argv[1], 'rb').read()"
    return subprocess.Popen([sys.executable, "-c", program, str(path)], stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("engine", ["channel", "pyfuse3"])
def test_r5_a_killed_reader_dies_at_once(
    node: Node, bucket: Bucket, proxy: FaultProxy, number: signal.Signals, engine: str
) -> None:
    body = bucket.put("file", content("body", MIB))
    mount = mount_behind(node, bucket, proxy, "--io-timeout=30s", "--request-timeout=30s", f"--engine={engine}")
    os.stat(mount.path / "file")
    rule = proxy.add(Fault(kind="get", stall=True))
    with start_reader(mount.path / "file") as reader:
        wait_until(lambda: rule.hits, 5, "the reader waits for the store")
        started = time.monotonic()
        reader.send_signal(number)
        assert reader.wait(10) == -number
        assert time.monotonic() - started < 1
    proxy.clear()
    assert (mount.path / "file").read_bytes() == body


@pytest.mark.parametrize("engine", ["channel", "pyfuse3"])
def test_r5_who_asks_for_a_name_and_is_killed_dies_at_once(
    node: Node, bucket: Bucket, proxy: FaultProxy, engine: str
) -> None:
    bucket.put("file", b"there")
    mount = mount_behind(node, bucket, proxy, "--io-timeout=30s", "--request-timeout=30s", f"--engine={engine}")
    rule = proxy.add(Fault(kind="head", stall=True))
    program = "import os, sys; os.stat(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", program, str(mount.path / "file")]) as asking:
        wait_until(lambda: rule.hits, 5, "the name is asked for")
        started = time.monotonic()
        asking.kill()
        assert asking.wait(10) == -signal.SIGKILL
        assert time.monotonic() - started < 1
    proxy.clear()
    assert os.stat(mount.path / "file").st_size == 5


def test_r5_a_killed_reader_takes_no_other_with_it(mount: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", content("body", MIB))
    os.stat(mount.path / "file")
    rule = proxy.add(Fault(kind="get", delay_s=1.0, times=1))
    with start_reader(mount.path / "file") as first, start_reader(mount.path / "file") as second:
        wait_until(lambda: rule.hits, 5, "the readers wait for the store")
        first.kill()
        assert first.wait(5) == -signal.SIGKILL
        assert second.wait(20) == 0
    assert proxy.count("get") == 1


def read_among_signals(path: Path) -> int:
    """Read a file while harmless signals arrive; returns how many bytes came."""
    program = (
        "import os, signal, sys\n"
        "seen = []\n"
        "signal.signal(signal.SIGALRM, lambda *_: seen.append(1)); signal.siginterrupt(signal.SIGALRM, False)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY); got = 0\n"
        "while piece := os.read(fd, 1 << 20): got += len(piece)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"  # the end of the interpreter is no place for an alarm
        "print(got, len(seen))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=30, check=True
    )
    got, seen = map(int, done.stdout.split())
    assert seen >= 1, "no signal came, so nothing was tested"  # Python counts those during one call as one
    return got


def test_r5_harmless_signals_do_not_interrupt_a_read(mount: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    body = bucket.put("file", content("body", MIB))
    os.stat(mount.path / "file")
    proxy.add(Fault(kind="get", delay_s=1.5, times=1))
    assert read_among_signals(mount.path / "file") == len(body)


@pytest.fixture
def mount_of_a_container(node: Node, bucket: Bucket, proxy: FaultProxy, needs_root: None) -> Iterator[Mount]:
    """A mount whose processes see no others: to them all readers have the number 0."""
    (node.base / "mnt").mkdir()
    mount = Mount(node, node.base / "mnt")
    deadlines = ("--io-timeout=30s", "--request-timeout=30s")
    command = ["unshare", "-pf", "--kill-child", *CACHEFS, "mount", *node.options, *deadlines, "--foreground"]
    command += [f"--endpoint-url={proxy.endpoint_url}", bucket.url, str(mount.path)]
    with subprocess.Popen(command, env=node.environment, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as child:
        try:
            wait_until(lambda: mount.state().get("state") == "serving", 20, "the mount serves")
            yield mount
        finally:
            proxy.clear()
            subprocess.run(["umount", str(mount.path)], check=True)
            assert child.wait(15) == 0
            node.kill_everything()  # the end of process 1 has killed the agent, which leaves its shm tier to the next


def test_r5_a_killed_reader_of_another_container_dies_soon(
    mount_of_a_container: Mount, bucket: Bucket, proxy: FaultProxy
) -> None:
    path = mount_of_a_container.path / "file"
    body = bucket.put("file", content("body", MIB))
    os.stat(path)
    slow = proxy.add(Fault(kind="get", delay_s=1.0, times=1))
    assert read_among_signals(path) == len(body)
    assert slow.hits
    bucket.put("other", body)
    rule = proxy.add(Fault(kind="head", stall=True))  # the kernel lets nobody go who waits for a name
    program = "import os, sys; os.stat(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", program, str(path.parent / "other")]) as asking:
        wait_until(lambda: rule.hits, 5, "the name is asked for")
        started = time.monotonic()
        asking.kill()
        assert asking.wait(10) == -signal.SIGKILL
        assert 1.5 < time.monotonic() - started < 4
    proxy.clear()
    assert (path.parent / "other").read_bytes() == body
