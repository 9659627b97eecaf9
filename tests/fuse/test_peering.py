"""Agents as peers of each other, with real mounts on this machine: how they are set up, and what they are without it.

What happens to a cluster whose nodes and network fail is in tests/cluster.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from cachefs.types import ObjectVersion, block_key, object_id
from tests.support.etcd_cluster import EtcdCluster
from tests.support.etcd_server import EtcdServer
from tests.support.machine import kill, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, read_and_compare

MIB = 1 << 20
OBJECTS = {"large": content("large", 20 * MIB + 77), "small": content("small", 5000), "empty": b""}
OBJECTS |= {f"{number:03}": content(f"{number}", 2000) for number in range(150)}
"""So many that a node owns some of them, however small its share."""
TOTAL = sum(map(len, OBJECTS.values()))


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("correct horse battery staple\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def options(etcd: EtcdServer, bucket: Bucket, secret: Path) -> list[str]:
    """What a node of this test's own cluster is mounted with."""
    bucket.fill(OBJECTS)
    return [*place(etcd, bucket), f"--peer-secret-file={secret}"]


def place(etcd: EtcdServer, bucket: Bucket) -> list[str]:
    """Where the store is, and the cluster of this test."""
    return [f"--endpoint-url={bucket.server.endpoint_url}", f"--etcd={etcd.endpoint}", f"--cluster={bucket.name}"]


def counter(node: Node, name: str) -> int:
    return int(node.status()["agents"][0]["counters"].get(name, 0))


def members(node: Node) -> set[str]:
    for agent in node.status()["agents"]:
        if agent["cluster"]:
            return {name for names in agent["cluster"]["volumes"].values() for name in names}
    return set()  # it has just been killed


def wait_for_members(node: Node, *names: str) -> None:
    wait_until(lambda: members(node) == set(names), 10, f"{names} hold the volume")


def pair(make_node: Callable[..., Node], bucket: Bucket, options: list[str], **second: str) -> tuple[Mount, Mount]:
    """Two nodes that see each other; the second one may be different."""
    one, two = make_node(), make_node(**second)
    mounts = (
        one.mount(bucket.url, *options, "--node-name=one"),
        two.mount(bucket.url, *options, "--node-name=two"),
    )
    for node in (one, two):
        wait_for_members(node, "one", "two")
    return mounts


def test_without_etcd_no_module_of_peers_is_loaded() -> None:
    code = (
        "import sys, cachefs.agent.main; print(sorted(m for m in sys.modules if m.split('.')[0] in ('peer', 'grpc')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_two_nodes_fetch_every_byte_once(make_node: Callable[..., Node], bucket: Bucket, options: list[str]) -> None:
    one, two = pair(make_node, bucket, options)
    read_and_compare(one.path, OBJECTS)
    read_and_compare(two.path, OBJECTS)
    assert counter(one.node, "origin_fill_bytes") + counter(two.node, "origin_fill_bytes") == TOTAL
    assert counter(two.node, "peer_fill_bytes") > 0
    done = one.node.run("peers", "--json", f"--runtime-dir={one.node.runtime_dir}")
    assert done.returncode == 0, done.stderr
    [cluster] = json.loads(done.stdout)["clusters"]
    assert cluster["amplification"] == 1.0
    assert {member["name"]: member["error"] for member in cluster["members"]} == {"one": None, "two": None}
    assert "2 nodes in cluster" in one.node.run("status", f"--runtime-dir={one.node.runtime_dir}").stdout


@pytest.mark.parametrize(
    "second",
    [{"shm_size": "0"}, {"cache_size": "0"}],
    ids=["no shm tier", "no disk tier"],
)
@pytest.mark.slow
def test_a_node_that_lacks_a_tier_gives_and_takes(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str], second: dict[str, str]
) -> None:
    one, two = pair(make_node, bucket, options, **second)
    read_and_compare(one.path, OBJECTS)
    assert counter(two.node, "peer_served_bytes") == counter(one.node, "peer_fill_bytes") > 0
    read_and_compare(two.path, OBJECTS)
    assert counter(two.node, "peer_fill_bytes") > 0
    assert counter(one.node, "peer_failures") == counter(two.node, "peer_failures") == 0


@pytest.mark.slow
def test_nodes_with_other_blocks_do_without_each_other(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str]
) -> None:
    one, two = pair(make_node, bucket, options)
    two.umount()
    two.node.stop_agent()
    shutil.rmtree(two.node.cache_dir)
    other = two.node.mount(bucket.url, *options, "--node-name=other", "--block-size=2MiB")
    wait_for_members(one.node, "one", "other")
    read_and_compare(one.path, OBJECTS)
    read_and_compare(other.path, OBJECTS)
    assert counter(one.node, "peer_fills") == counter(other.node, "peer_fills") == 0


def test_directories_of_nodes_are_not_shared(
    make_node: Callable[..., Node], options: list[str], tmp_path: Path
) -> None:
    """The same path is another directory on another node."""
    one, two = make_node(), make_node()
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "x").write_bytes(b"of the first")
    source = f"file://{tmp_path}/origin"
    first = one.mount(source, *options[1:])
    assert os.listdir(first.path) == ["x"]
    (tmp_path / "origin" / "x").rename(tmp_path / "origin" / "y")
    second = two.mount(source, *options[1:])
    assert os.listdir(second.path) == ["y"]
    assert (second.path / "y").read_bytes() == b"of the first"
    assert members(one) == members(two) == set()


def test_a_strict_mount_lists_at_the_store(make_node: Callable[..., Node], bucket: Bucket, options: list[str]) -> None:
    one, two = pair(make_node, bucket, [*options, "--consistency=strict"])
    for mount in (one, two, one):
        assert sorted(os.listdir(mount.path)) == sorted(OBJECTS)
        bucket.put(f"new-{time.monotonic_ns()}", b"x")
        assert len(os.listdir(mount.path)) == len(OBJECTS) + 1
        bucket.delete(*(name for name in os.listdir(mount.path) if name.startswith("new-")))
    assert counter(one.node, "peer_listing_pages") == counter(two.node, "peer_listing_pages") == 0


@pytest.mark.parametrize("pinned", ["--consistency=immutable", "--metadata-ttl=forever"])
def test_listings_that_are_kept_for_ever_are_shared_and_never_older_than_the_mount(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str], pinned: str
) -> None:
    options = [*options, pinned]
    directories = [f"d{number}" for number in range(8)]  # each node owns some of them
    bucket.fill({f"{name}/old": b"x" for name in directories})
    one, two = pair(make_node, bucket, options)
    for mount in (one, two):
        assert [os.listdir(mount.path / name) for name in directories] == [["old"]] * 8
    assert counter(one.node, "peer_listing_pages") + counter(two.node, "peer_listing_pages") == 8
    bucket.fill({f"{name}/new": b"x" for name in directories})
    later = make_node().mount(bucket.url, *options, "--node-name=later")
    wait_for_members(later.node, "one", "two", "later")
    assert [sorted(os.listdir(later.path / name)) for name in directories] == [["new", "old"]] * 8


@pytest.mark.slow
def test_a_name_that_appears_is_seen_within_its_time(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str]
) -> None:
    """However many nodes hand the listing on."""
    one, two = pair(make_node, bucket, [*options, "--metadata-ttl=4s"])
    assert sorted(os.listdir(one.path)) == sorted(os.listdir(two.path)) == sorted(OBJECTS)
    bucket.put("new", b"x")
    since = time.monotonic()
    for mount in (one, two):
        wait_until(functools.partial(_shows, mount, "new"), 6, "the name is seen")
        assert time.monotonic() - since < 5.5


def _shows(mount: Mount, name: str) -> bool:
    return name in os.listdir(mount.path)


def test_an_agent_that_was_killed_is_the_same_node(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str]
) -> None:
    one, two = pair(make_node, bucket, options)
    bucket.put("later", content("later", 9 * MIB))
    read_and_compare(one.path, OBJECTS)
    read_and_compare(two.path, OBJECTS)
    before = one.node.status()["agents"][0]["cluster"]
    killed = one.node.kill_agent()
    assert sorted(os.listdir(one.path)) == sorted([*OBJECTS, "later"])
    one.node.wait_for_agent(killed)
    wait_for_members(one.node, "one", "two")
    wait_for_members(two.node, "one", "two")
    after = one.node.status()["agents"][0]["cluster"]
    assert after["node_id"] == before["node_id"] == (one.node.cache_dir / "node-id").read_text().strip()
    assert after["server"]["address"] != before["server"]["address"]
    for mount in (one, two):
        assert (mount.path / "later").read_bytes() == content("later", 9 * MIB)
    assert counter(one.node, "origin_fill_bytes") + counter(two.node, "origin_fill_bytes") <= TOTAL + 9 * MIB


def test_who_unmounts_leaves_the_volume_and_who_ends_the_cluster(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str]
) -> None:
    one, two = pair(make_node, bucket, options)
    two.umount()
    wait_for_members(one.node, "one")
    two.node.stop_agent()
    wait_until(lambda: len(one.node.status()["agents"][0]["cluster"]["members"]) == 1, 3, "the node has left")
    assert "WARNING" not in one.node.full_log()


def test_what_was_asked_for_and_is_not_done_is_said(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str]
) -> None:
    node = make_node()
    node.mount(bucket.url, *options)
    done = node.try_mount(bucket.url, "--zone=b", *options[:3], place=_directory(node, "second"))
    assert done.returncode == 0
    assert "the running agent keeps --zone at nothing" in done.stderr
    assert "--etcd" not in done.stderr, "that is as it was asked for"
    node.mounts.append(Mount(node, node.base / "second"))


def _directory(node: Node, name: str) -> Path:
    (node.base / name).mkdir()
    return node.base / name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no secret", "--peer-insecure"),
        ("short secret", "must hold 16 to"),
        ("readable secret", "chmod o="),
        ("taken port", "in use"),
    ],
)
def test_what_cannot_work_is_one_line(
    node: Node, bucket: Bucket, options: list[str], secret: Path, change: str, says: str
) -> None:
    options = [*options, "--advertise=127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if change == "no secret":
            options = [*options[:3], "--peer-listen=0.0.0.0"]
        elif change == "short secret":
            secret.write_text("short\n")
        elif change == "readable secret":
            secret.chmod(0o644)
        else:
            options.append(f"--peer-listen=127.0.0.1:{taken.getsockname()[1]}")
        done = node.try_mount(bucket.url, *options, place=_directory(node, "mnt"))
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not node.processes("supervisor")


def _certificates(directory: Path) -> list[str]:
    """Make a certificate of a new authority, and return the options that name the files."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    leaf = authority.issue_cert("node.cachefs")
    leaf.private_key_pem.write_to_path(directory / "key.pem")
    with (directory / "cert.pem").open("wb") as file:
        for part in leaf.cert_chain_pems:
            file.write(part.bytes())
    return [f"--peer-{name}={directory}/{name}.pem" for name in ("ca", "cert", "key")]


def test_certificates_and_curl(
    make_node: Callable[..., Node], etcd: EtcdServer, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.fill(OBJECTS)
    files = _certificates(tmp_path)
    one, two = pair(make_node, bucket, [*place(etcd, bucket), *files])
    read_and_compare(one.path, OBJECTS)
    read_and_compare(two.path, OBJECTS)
    assert counter(one.node, "origin_fill_bytes") + counter(two.node, "origin_fill_bytes") == TOTAL
    address = one.node.status()["agents"][0]["cluster"]["server"]["address"]
    etag = os.getxattr(one.path / "small", "user.cachefs.etag").decode()
    version = ObjectVersion("small", etag, len(OBJECTS["small"]))
    name = block_key(object_id(_endpoint(bucket), bucket.name, version), 0).hex()
    url = f"https://{address}/v1/blocks/{name}?length=5000"
    curl = ["curl", "--silent", "--show-error", "--fail", "--insecure", url]
    proof = ["--cert", str(tmp_path / "cert.pem"), "--key", str(tmp_path / "key.pem")]
    found = subprocess.run([*curl, *proof], capture_output=True, check=False)
    assert found.stdout == OBJECTS["small"], found.stderr
    refused = subprocess.run(curl, capture_output=True, check=False)
    assert refused.returncode
    assert not refused.stdout


def _endpoint(bucket: Bucket) -> str:
    return bucket.server.endpoint_url


@pytest.mark.slow
def test_a_node_that_is_stopped_costs_moments(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str]
) -> None:
    """SIGSTOP: its sockets are open, and nothing answers."""
    one, two = pair(make_node, bucket, options)
    agent = two.node.agent_pid
    os.kill(agent, signal.SIGSTOP)
    try:
        since = time.monotonic()
        read_and_compare(one.path, OBJECTS)
        assert time.monotonic() - since < 5
    finally:
        kill(agent, signal.SIGCONT)
    assert counter(one.node, "peer_failures") > 0
    assert "EIO" not in one.node.full_log()


def test_readers_do_not_wait_for_etcd_when_their_agent_has_died(
    make_node: Callable[..., Node], etcd: EtcdServer, bucket: Bucket, options: list[str]
) -> None:
    node = make_node()
    mount = node.mount(bucket.url, *options)
    assert sorted(os.listdir(mount.path)) == sorted(OBJECTS)
    etcd.pause()
    try:
        node.kill_agent()
        since = time.monotonic()
        assert (mount.path / "small").read_bytes() == OBJECTS["small"]
        assert time.monotonic() - since < 2.5, "a new agent takes about one second here"
    finally:
        etcd.resume()
    wait_for_members(node, os.uname().nodename)


@pytest.mark.slow
def test_an_agent_that_cannot_be_a_peer_any_more_serves_its_readers_and_becomes_one_again(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str], secret: Path
) -> None:
    """Its mounts, which were made without peers, have them then."""
    own = secret.with_name("own-secret")
    shutil.copy(secret, own)
    one, two = pair(make_node, bucket, options)
    two.umount()
    two.node.stop_agent()
    mount = two.node.mount(bucket.url, *options[:-1], f"--peer-secret-file={own}", "--node-name=two")
    node = mount.node
    wait_for_members(one.node, "one", "two")
    assert (mount.path / "small").read_bytes() == OBJECTS["small"]
    own.unlink()
    killed = node.kill_agent()
    assert (mount.path / "large").read_bytes() == OBJECTS["large"]
    node.wait_for_agent(killed)
    assert (node.shm_directory / "data.mdb").exists() or any(node.shm_directory.iterdir()), "the warm tier stays"
    assert_the_reason_is_shown(mount, bucket, str(own))
    assert counter(node, "peer_requests") == 0

    for number in range(4):
        bucket.put(f"later/{number}", content(f"later {number}", 9 * MIB))
    for number in range(4):
        assert (one.path / f"later/{number}").read_bytes() == content(f"later {number}", 9 * MIB)
    shutil.copy(secret, own)
    wait_until(lambda: members(node) == {"one", "two"}, 30, "it is a peer again")
    wait_for_members(one.node, "one", "two")
    for number in range(4):
        assert (mount.path / f"later/{number}").read_bytes() == content(f"later {number}", 9 * MIB)
    assert counter(node, "peer_fill_bytes") == 4 * 9 * MIB, "a mount that was there has peers"
    assert mount.status()["health"] == "ok"
    assert node.full_log().count("goes on without peers") == node.full_log().count("is a peer again") == 1
    assert node.run("peers", f"--runtime-dir={node.runtime_dir}").returncode == 0


def assert_the_reason_is_shown(mount: Mount, bucket: Bucket, reason: str) -> None:
    """Wherever somebody looks who wonders why his node has no peers."""
    node = mount.node
    where = f"--runtime-dir={node.runtime_dir}"
    assert node.full_log().count(f"tries again by itself: --peer-secret-file: {reason}") == 1
    cluster = node.status()["agents"][0]["cluster"]
    assert reason in cluster["problem"]
    assert (cluster["members"], cluster["node_id"]) == ([], None)
    assert mount.status()["health"] == "degraded"
    assert reason in node.run("status", where).stdout
    done = node.run("peers", where)
    assert (done.returncode, "is no peer for now" in done.stdout, reason in done.stdout) == (1, True, True)
    done = node.run("peers", "--json", where)
    assert reason in json.loads(done.stdout)["clusters"][0]["problem"]
    done = node.run("doctor", where, f"--cache-dir={node.cache_dir}")
    assert any(line.startswith("fail") and reason in line for line in done.stdout.splitlines()), done.stdout
    endpoint = f"--endpoint-url={bucket.server.endpoint_url}"
    done = node.try_mount(bucket.url, endpoint, place=_directory(node, "second"))
    assert (done.returncode, "has no peers for now" in done.stderr) == (0, True)
    second = Mount(node, node.base / "second")
    node.mounts.append(second)
    assert (second.path / "small").read_bytes() == OBJECTS["small"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["certificate", "port"])
def test_whatever_kept_an_agent_from_being_a_peer_may_be_mended(
    make_node: Callable[..., Node], etcd: EtcdServer, bucket: Bucket, tmp_path: Path, what: str
) -> None:
    bucket.fill(OBJECTS)
    files = _certificates(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    node = make_node()
    mount = node.mount(bucket.url, *place(etcd, bucket), *files, f"--advertise=127.0.0.1:{port}", "--node-name=one")
    wait_for_members(node, "one")
    good = (tmp_path / "cert.pem").read_bytes()
    if what == "certificate":
        (tmp_path / "cert.pem").write_bytes(good[: len(good) // 2])
    killed = node.kill_agent()
    with contextlib.ExitStack() as taken:
        if what == "port":
            taken.enter_context(_listener_at(port))
        node.wait_for_agent(killed)
        read_and_compare(mount.path, OBJECTS)
        problem = node.status()["agents"][0]["cluster"]["problem"]
        assert ("--peer-cert" if what == "certificate" else "already in use") in problem
    (tmp_path / "cert.pem").write_bytes(good)
    wait_until(lambda: members(node) == {"one"}, 30, "it is a peer again")
    assert node.status()["agents"][0]["cluster"]["problem"] is None


def _listener_at(port: int) -> socket.socket:
    """Take the port of an agent that was just killed, before the next one does."""
    found: list[socket.socket] = []

    def taken() -> bool:
        with contextlib.suppress(OSError):  # the last thread of the dead one holds it for a moment
            found.append(socket.create_server(("127.0.0.1", port)))
        return bool(found)

    wait_until(taken, 2, f"port {port} is free")
    return found[0]


@pytest.mark.slow
def test_an_agent_that_is_no_peer_ends_in_order_and_survives_kills(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str], secret: Path
) -> None:
    node = make_node()
    mount = node.mount(bucket.url, *options, "--node-name=one")
    secret.unlink()
    killed = 0
    for _ in range(2):
        killed = node.kill_agent()
        assert (mount.path / "small").read_bytes() == OBJECTS["small"]
        node.wait_for_agent(killed)
    since = time.monotonic()
    kill(node.agent_pid, signal.SIGTERM)
    node.wait_for_agent(killed)
    assert time.monotonic() - since < 5
    assert (mount.path / "large").read_bytes() == OBJECTS["large"]
    assert "Traceback" not in node.full_log()


@pytest.mark.slow
def test_one_of_three_members_of_etcd_may_die(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str]
) -> None:
    """`--etcd` is repeated; whoever starts while one is dead finds the others."""
    with EtcdCluster() as etcd:
        options = [option for option in options if not option.startswith("--etcd=")]
        options += [f"--etcd={endpoint}" for endpoint in etcd.endpoints]
        one, two = pair(make_node, bucket, options)
        leader = etcd.leader()
        leader.kill()
        etcd.leader([member for member in etcd.members if member is not leader])
        new = make_node().mount(bucket.url, *options, "--node-name=new")
        for node in (one.node, two.node, new.node):
            wait_for_members(node, "one", "two", "new")
            wait_until(functools.partial(_is_connected, node), 10, "it is connected to etcd")
        for mount in (one, two, new):
            read_and_compare(mount.path, OBJECTS)
        assert sum(counter(mount.node, "origin_fill_bytes") for mount in (one, two, new)) == TOTAL
        done = new.node.run("doctor", f"--runtime-dir={new.node.runtime_dir}", *options)
        assert done.stdout.count("fail  etcd ") == 1, done.stdout


def _is_connected(node: Node) -> bool:
    return bool(node.status()["agents"][0]["cluster"]["etcd"]["connected"])


def test_the_advertised_port_is_the_one_that_is_bound(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    node = make_node()
    node.mount(bucket.url, *options, f"--advertise=127.0.0.1:{port}", "--peer-listen=127.0.0.1")
    cluster = node.status()["agents"][0]["cluster"]
    assert cluster["server"]["address"] == cluster["members"][0]["address"] == f"127.0.0.1:{port}"
