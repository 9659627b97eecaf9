"""The cluster on one machine itself: mounts work, faults are what they claim to be, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.runtime import shm_directory
from tests.cluster import rig
from tests.cluster.namespaces import NAMESPACES, Network, Place, run
from tests.cluster.relay import Relay
from tests.cluster.rig import Cluster
from tests.support.machine import kill, mounts_below, wait_until
from tests.support.mounts import Bucket
from tests.support.programs import REPOSITORY, content

ECHO = """
import socket, sys, threading
def serve(connection):
    while piece := connection.recv(1 << 20):
        connection.sendall(piece)
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as listener:
    print(listener.getsockname()[1], flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
CLIENT = """
import socket, sys, threading, time
def ask(size):
    begun = time.monotonic()
    with socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])) as connection:
        connected = time.monotonic() - begun
        threading.Thread(target=connection.sendall, args=(b"x" * size,), daemon=True).start()
        while size:
            piece = connection.recv(1 << 20)
            if not piece:
                raise ConnectionResetError
            size -= len(piece)
    return connected, time.monotonic() - begun
try:
    print(*ask(int(sys.argv[3])))
except OSError as error:
    print(type(error).__name__)
"""
HELD = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000), timeout=30)
for line in sys.stdin:
    connection.sendall(b"x" * 100_000)
    left = 100_000
    while left:
        piece = connection.recv(1 << 20)
        if not piece:
            sys.exit()
        left -= len(piece)
    print("answered", flush=True)
"""


Fault = Callable[[Network, Place, Place], None]


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


def start(place: Place, source: str, *arguments: str) -> subprocess.Popen[str]:
    with place.entered():
        return subprocess.Popen(
            [sys.executable, "-c", source, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )


@contextlib.contextmanager
def echo(place: Place) -> Iterator[None]:
    """A server that sends back what it gets."""
    child = start(place, ECHO, place.address, "7000")
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "7000\n"
        yield
    finally:
        child.kill()
        child.communicate()


def ask(place: Place, address: str, size: int = 1000, timeout_s: float = 5.0) -> list[str]:
    """Return the seconds of a connection and of an exchange, or the name of the error."""
    child = start(place, CLIENT, address, str(timeout_s), str(size))
    return child.communicate(timeout=60)[0].split()


def leftovers(pid: int, bases: list[Path]) -> list[Path]:
    """What there is of the clusters of a process, whose nodes have these directories (others may run beside)."""
    found = [*NAMESPACES.glob(f"cfs{pid}x*"), *rig.RECORDS.glob(f"{pid}x*"), *(base for base in bases if base.exists())]
    tiers = [Path(shm_directory("/dev/shm", str(base / "cache"), os.getuid())) for base in bases]
    return found + [tier for tier in tiers if tier.exists()]


# -- the network ------------------------------------------------------------------------------------------------------


def test_places_reach_each_other_and_the_machine_gets_no_device(network: Network) -> None:
    devices = os.listdir("/sys/class/net")
    one, two = network.add("n1", 11), network.add("n2", 12)
    with echo(two):
        connected, _ = map(float, ask(one, two.address))
        assert connected < 1
    assert os.listdir("/sys/class/net") == devices
    assert not run("ip", "route", "show", "to", "match", two.address).count("10.213")


def test_a_thread_is_back_home_after_a_visit(network: Network) -> None:
    place = network.add("n1", 11)
    home = os.readlink("/proc/thread-self/ns/net")
    seen: list[str] = []
    with contextlib.suppress(ValueError), place.entered():
        other = threading.Thread(target=lambda: seen.append(os.readlink("/proc/thread-self/ns/net")))
        other.start()
        other.join()
        seen.append(os.readlink("/proc/thread-self/ns/net"))
        raise ValueError("inside")
    assert seen[0] == seen[1] != home, "what it starts is there too"
    assert os.readlink("/proc/thread-self/ns/net") == home


FAULTS: dict[str, tuple[Fault, Fault]] = {
    "one way": (lambda net, one, two: net.cut(one, two.address), lambda net, one, two: net.mend(one, two.address)),
    "the other way": (
        lambda net, one, two: net.cut(two, one.address),
        lambda net, one, two: net.mend(two, one.address),
    ),
    "partition": (lambda net, one, two: net.unplug(two), lambda net, one, two: net.plug(two)),
    "link down": (lambda net, one, two: net.link_down(two), lambda net, one, two: net.link_up(two)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_silences_and_its_end_lets_connections_live_on(network: Network, name: str) -> None:
    fault, undo = FAULTS[name]
    one, two, three = network.add("n1", 11), network.add("n2", 12), network.add("n3", 13)
    with echo(two), echo(three):
        held = start(one, HELD, two.address)
        assert held.stdin is not None
        assert held.stdout is not None
        held.stdin.write("go\n")
        held.stdin.flush()
        assert held.stdout.readline() == "answered\n"
        fault(network, one, two)
        assert ask(one, two.address, timeout_s=0.5)[0] in ("TimeoutError", "OSError")
        held.stdin.write("go\n")
        held.stdin.flush()
        assert len(ask(one, three.address)) == 2, "others are still reached"
        undo(network, one, two)
        assert held.stdout.readline() == "answered\n"
        assert len(ask(one, two.address)) == 2
        held.communicate()


def test_what_is_far_takes_its_time_and_loses_nothing(network: Network) -> None:
    one, two = network.add("n1", 11), network.add("n2", 12)
    with echo(two):
        held = start(one, HELD, two.address)
        assert held.stdin is not None
        assert held.stdout is not None
        network.far(two, 0.05)
        connected, whole = map(float, ask(one, two.address, 4_000_000, timeout_s=30))
        assert 0.1 <= connected < 5, "the first packet may be lost on a busy machine, and is sent again after a second"
        assert whole < 10
        held.stdin.write("go\n")
        held.stdin.flush()
        assert held.stdout.readline() == "answered\n", "connections from before live on"
        network.plug(two)
        assert float(ask(one, two.address)[0]) < 0.05
        held.communicate()


def test_a_limit_holds_and_can_be_lifted(network: Network) -> None:
    one, two = network.add("n1", 11), network.add("n2", 12)
    with echo(two):
        network.limit(two, 10_000_000)
        assert 0.8 <= float(ask(one, two.address, 10_000_000, timeout_s=30)[1]) <= 2.5
        network.limit(two, None)
        assert float(ask(one, two.address, 10_000_000, timeout_s=30)[1]) < 0.7


def test_a_relay_carries_everything_and_counts_answers(network: Network) -> None:
    one, two = network.add("n1", 11), network.add("n2", 12)
    server = subprocess.Popen([sys.executable, "-c", ECHO, "127.0.0.1", "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        endpoint_url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with Relay(endpoint_url, two, 7000) as relay:
            assert len(ask(one, two.address, 5_000_000, timeout_s=30)) == 2
            assert len(ask(one, two.address, 1000)) == 2
            assert relay.sent_bytes == 5_001_000
            held = start(one, HELD, two.address)
            assert held.stdin is not None
            held.stdin.write("go\n")
            held.stdin.flush()
            assert held.stdout is not None
            assert held.stdout.readline() == "answered\n"
        assert "answered" not in held.communicate("go\n", timeout=20)[0], "the end of the relay ends its connections"
        server.kill()
        server.wait()
        with Relay(endpoint_url, two, 7000):
            assert ask(one, two.address) == ["ConnectionResetError"], "nobody is behind it"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


# -- the cluster ------------------------------------------------------------------------------------------------------


def test_nodes_mount_and_read_what_the_origin_counts(s3_server: S3Server, bucket: Bucket) -> None:
    body = bucket.put("a/b", content("b", 300_000))
    with Cluster(s3_server, 2, peers=False) as cluster:
        mounts = cluster.mount_all(bucket.url)
        for mount in mounts:
            assert (mount.path / "a/b").read_bytes() == body
        assert cluster.origin.got_bytes(bucket.name) == 2 * len(body)
        assert len(cluster.origin.gets("a/b")) == 2
        for node in cluster.nodes:
            assert set(node.processes()) <= set(node.place.pids()), "all of it runs in the node's place"
            assert node.processes("agent")
        bases = [node.base for node in cluster.nodes]
        assert len(leftovers(os.getpid(), bases)) > 2 * len(bases)
    assert leftovers(os.getpid(), bases) == []


def test_a_node_whose_link_is_down_comes_back(s3_server: S3Server, bucket: Bucket) -> None:
    bucket.put("a", b"one")
    bucket.put("b", b"two")
    with Cluster(s3_server, 1, peers=False) as cluster:
        mount = cluster.nodes[0].mount(bucket.url)
        assert (mount.path / "a").read_bytes() == b"one"
        place = cluster.nodes[0].place
        cluster.network.link_down(place)
        threading.Timer(1.0, cluster.network.link_up, [place]).start()
        assert (mount.path / "b").read_bytes() == b"two"


def test_etcd_answers_in_the_hub_and_comes_back(s3_server: S3Server) -> None:
    with Cluster(s3_server, 1) as cluster:
        place = cluster.nodes[0].place
        ask_health = f"import urllib.request; print(urllib.request.urlopen('{cluster.etcd.url}/health').read())"
        for _ in range(2):
            assert "true" in start(place, ask_health).communicate(timeout=20)[0]
            cluster.etcd.kill()
            cluster.etcd.restart()


LEAVER = """
import sys, time
from bench.s3_server import S3Server
from tests.cluster.relay import Relay
from tests.cluster.rig import Cluster
from tests.support.mounts import Bucket
with S3Server() as server, Bucket.create(server) as bucket:
    bucket.put("a", b"body")
    with Cluster(server, 2, peers=False) as cluster:
        mounts = cluster.mount_all(bucket.url)
        cluster.network.far(cluster.nodes[1].place, 0.01)
        print(*(mount.path for mount in mounts), flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@pytest.mark.slow
def test_what_was_left_is_removed(number: signal.Signals) -> None:
    child = subprocess.Popen([sys.executable, "-c", LEAVER], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert child.stdout is not None
    try:
        paths = [Path(word) for word in child.stdout.readline().split()]
        assert [path.joinpath("a").read_bytes() for path in paths] == [b"body", b"body"]
        kill(child.pid, number)
        child.wait(timeout=60)
        assert (number == signal.SIGKILL) == bool(leftovers(child.pid, [path.parent for path in paths]))
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        begun = time.monotonic()
        rig.remove_abandoned()
    assert time.monotonic() - begun < 20
    wait_until(lambda: not leftovers(child.pid, [path.parent for path in paths]), 5, "nothing is left")
    assert not any(mounts_below(path) for path in paths)


def test_a_living_cluster_is_not_removed_by_others(s3_server: S3Server, bucket: Bucket) -> None:
    bucket.put("a", b"body")
    with Cluster(s3_server, 1, peers=False) as cluster:
        mount = cluster.nodes[0].mount(bucket.url)
        source = (
            "from tests.cluster import rig; rig.remove_abandoned(); print([lives for _, _, lives in rig.records()])"
        )
        told = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=REPOSITORY
        ).stdout
        assert "True" in told
        assert (mount.path / "a").read_bytes() == b"body"


def test_what_cannot_be_built_leaves_nothing(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bases: list[Path] = []
    add = Network.add

    def failing(self: Network, name: str, number: int, **more: str) -> Place:
        place = add(self, name, number, **more)
        if name == "n2":
            bases.extend(node.base for node in cluster.nodes)
            raise RuntimeError("no more")
        return place

    monkeypatch.setattr(Network, "add", failing)
    cluster = Cluster(s3_server, 3)
    with pytest.raises(RuntimeError, match="no more"), cluster:
        pass
    assert len(bases) == 1
    assert leftovers(os.getpid(), bases) == []
