"""A cluster on one machine: nodes with real mounts in namespaces of their own, one etcd, one S3 server.

    with S3Server() as server, Bucket.create(server) as bucket, Cluster(server, 3) as cluster:
        mounts = [node.mount(bucket.url) for node in cluster.nodes]
        (mounts[0].path / "a").read_bytes()
        assert cluster.origin.got_bytes(bucket.name) == ...
        cluster.nodes[1].kill_everything()
        cluster.network.link_down(cluster.nodes[2].place)

    hub  10.213.0.2:2379   etcd             s3  10.213.0.1:8333   the S3 server (`tests.cluster.origin`)
    n1   10.213.0.11       a node: cache directory, agent, mount      n2  10.213.0.12 ...

INVARIANT: `close` leaves no process, mount, namespace or directory, whatever happened before. What a run that was
killed with -9 left is removed by the next one: each cluster writes down what it makes in a directory with a lock, and a
lock that nobody holds belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from bench.s3_server import S3Server
from cachefs.cli.status import collect
from cachefs.config import join_address
from cachefs.runtime import shm_directory
from tests.cluster.namespaces import NAMESPACES, Network, Place, address_of, run
from tests.cluster.origin import PORT, ClusterEtcd, Origin
from tests.cluster.relay import Relay
from tests.support.machine import abort_connections, detach, kill, mounts_below, wait_until
from tests.support.mounts import COMMAND_S, Mount, Node

RECORDS = Path("/run/cachefs-clusters")
_S3_NUMBER, _ETCD_NUMBER, _FIRST_NODE = 1, 2, 11
MOST_NODES = 200
_END_S = 10.0
_numbers = itertools.count()


class ClusterNode(Node):
    """A node in a place of the network; everything of `tests.support.mounts.Node` works as there."""

    def __init__(self, cluster: Cluster, place: Place, options: Sequence[str], **more: Any) -> None:
        super().__init__(cluster.server.environment, **more)
        self.cluster = cluster
        self.place = place
        self.name = place.name
        self.peer_options = [*cluster.peer_options, f"--node-name={self.name}", f"--advertise={place.address}"]
        self.more_options = list(options)

    def run(self, *arguments: str, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """Run a `cachefs` command in the node's place."""
        with self.place.entered():
            return super().run(*arguments, timeout_s=timeout_s)

    def try_mount(self, source: str, *options: str, place: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `cachefs mount` with the options of this node, as far as `options` do not say otherwise."""
        origin = f"--endpoint-url={self.cluster.endpoint_url}"
        mine = self.peer_options if self.cluster.peers else []
        return super().try_mount(source, origin, *mine, *self.more_options, *options, place=place)

    def mount(self, source: str, *options: str, name: str = "") -> Mount:
        """Mount below the node's directory; `name` is the node's own by default."""
        return super().mount(source, *options, name=name or self.name)

    def agent_status(self) -> dict[str, Any]:
        """Return what the one agent of this node tells, as in `cachefs status --json` (without starting a command)."""
        agents = collect(str(self.runtime_dir))["agents"]
        assert len(agents) == 1, agents
        found: dict[str, Any] = agents[0]
        return found

    def counter(self, name: str) -> int:
        """Return one counter of the agent."""
        return int(self.agent_status()["counters"].get(name, 0))

    def holders(self) -> set[str]:
        """Return the names of the nodes that, as this one sees it, hold a volume that it mounts; empty: it is alone."""
        cluster = self.agent_status().get("cluster") or {"volumes": {}}
        return {name for names in cluster["volumes"].values() if self.name in names for name in names}

    def wait_for_holders(self, are_right: Callable[[set[str]], bool], timeout_s: float, what: str) -> None:
        """Return when `are_right` says so of the holders that this node knows."""
        wait_until(lambda: are_right(self.holders()), timeout_s, f"{self.name} {what}")


class Cluster:
    """See the module. Context manager; all methods in one thread."""

    def __init__(
        self,
        server: S3Server,
        size: int = 3,
        *,
        peers: bool = True,
        faults: bool = True,
        ipv6: bool = False,
        options: Sequence[str] = (),
        **node_settings: Any,
    ) -> None:
        """`peers`: whether nodes are told of etcd. `faults`: S3 is reached through `origin`, which counts requests and
        breaks them; otherwise through `relay`, which only counts bytes and costs next to nothing. `ipv6`: all have
        addresses of that, and no others. `options` go to every `cachefs mount`, `node_settings` to every `Node`
        (shm_size, cache_size, ...).
        """
        self.server = server
        self.size = size
        self.peers = peers
        self.faults = faults
        self.ipv6 = ipv6
        self.options = tuple(options)
        self.name = f"{os.getpid()}x{next(_numbers)}"
        self.nodes: list[ClusterNode] = []
        self.etcd: ClusterEtcd
        self.origin: Origin
        self.relay: Relay
        self.origin_place: Place
        self.network: Network
        self.record: Record
        self.peer_options: list[str] = []
        self._settings = {"idle_timeout": "10s", **node_settings}
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            with contextlib.suppress(AssertionError):
                self.close()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except AssertionError:
            if kind is None:  # else the first failure is the one to show
                raise

    def _build(self) -> None:
        prefix = f"cfs{self.name}-"
        self.record = self._resources.enter_context(Record.create(self.name, prefix))
        self.network = self._resources.enter_context(Network(prefix, ipv6=self.ipv6))
        etcd_address = address_of(_ETCD_NUMBER, ipv6=self.ipv6)
        self.network.add_address(etcd_address)
        place = self.origin_place = self.network.add("s3", _S3_NUMBER)
        if self.faults:
            self.origin = self._resources.enter_context(Origin(self.server.endpoint_url, place))
        else:
            self.relay = self._resources.enter_context(Relay(self.server.endpoint_url, place, PORT))
        if self.peers:
            self.etcd = self._resources.enter_context(ClusterEtcd(self.network.hub, etcd_address))
            secret = self.record.directory / "secret"
            secret.write_text(secrets.token_hex(32))
            secret.chmod(0o600)
            self.peer_options = [f"--etcd={self.etcd.url}", f"--cluster={self.name}", f"--peer-secret-file={secret}"]
        for _ in range(self.size):
            self.add_node()

    @property
    def endpoint_url(self) -> str:
        """Where nodes find S3."""
        return f"http://{join_address(self.origin_place.address, PORT)}"

    def add_node(self, *options: str, zone: str = "", **settings: Any) -> ClusterNode:
        """Add a node; it joins the cluster with its first mount. `options` go to every `cachefs mount`; `zone`: one of
        the network, which the node is told of.
        """
        number = len(self.nodes)
        assert number < MOST_NODES
        place = self.network.add(f"n{number + 1}", _FIRST_NODE + number, zone=zone)
        options = (*options, f"--zone={zone}") if zone else options
        node = ClusterNode(self, place, [*self.options, *options], **{**self._settings, **settings})
        self.nodes.append(node)
        self.record.add_base(node.base)
        return node

    def mount_all(self, source: str, *options: str) -> list[Mount]:
        """Mount on every node."""
        return [node.mount(source, *options) for node in self.nodes]

    def wait_until_joined(self, nodes: Sequence[ClusterNode] = (), timeout_s: float = 20.0) -> None:
        """Return when each of these nodes (all by default) knows that all of them hold its volume."""
        wanted = {node.name for node in nodes or self.nodes}
        for node in nodes or self.nodes:
            node.wait_for_holders(lambda seen: wanted <= seen, timeout_s, f"sees {sorted(wanted)}")

    def wait_until_gone(self, name: str, nodes: Sequence[ClusterNode], timeout_s: float = 30.0) -> None:
        """Return when none of these nodes counts the one called `name` as a holder any more."""
        for node in nodes:
            node.wait_for_holders(lambda seen: name not in seen, timeout_s, f"has forgotten {name}")

    def close(self) -> None:
        """End and remove everything. Raises AssertionError when something had to be forced."""
        complaints = []
        for node in self.nodes:
            with contextlib.suppress(RuntimeError):  # a node that cannot reach S3 would wait for it
                self.network.link_up(node.place)
                self.network.plug(node.place)
            try:
                node.close()
            except AssertionError as error:
                complaints.append(f"{node.name}: {error}")
        self.nodes = []
        self._resources.close()
        assert not complaints, "\n".join(complaints)


# -- what is written down, so that it can be removed by others ---------------------------------------------------------


class Record:
    """A directory that says what a cluster has made, with a lock that lives as long as its process."""

    def __init__(self, directory: Path, lock: TextIO) -> None:
        self.directory = directory
        self._lock = lock
        self._said: dict[str, Any] = {"pid": os.getpid(), "prefix": "", "bases": []}

    @classmethod
    @contextlib.contextmanager
    def create(cls, name: str, prefix: str) -> Iterator[Self]:
        """Remove what others left, and begin a record; it is removed at the end."""
        with _registry():
            for left in sorted(RECORDS.iterdir()):
                if left.is_dir():
                    _remove_if_abandoned(left)
            directory = RECORDS / name
            directory.mkdir(mode=0o700)
            lock = (directory / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            record = cls(directory, lock)
            record.say(prefix=prefix)
        try:
            yield record
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            lock.close()

    def say(self, **more: Any) -> None:
        """Write down more, whole or not at all."""
        self._said |= more
        fresh = self.directory / "fresh"
        fresh.write_text(json.dumps(self._said))
        fresh.replace(self.directory / "record.json")

    def add_base(self, base: Path) -> None:
        """Write down the directory of a node."""
        self.say(bases=[*self._said["bases"], str(base)])


@contextlib.contextmanager
def _registry() -> Iterator[None]:
    """Hold the lock of all records."""
    RECORDS.mkdir(mode=0o700, exist_ok=True)
    if RECORDS.stat().st_uid != os.getuid():
        raise RuntimeError(f"{RECORDS} belongs to somebody else")
    with (RECORDS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def records() -> list[tuple[Path, dict[str, Any], bool]]:
    """Return directory, content and whether its process lives, of every cluster on this machine."""
    found = []
    for directory in sorted(RECORDS.glob("*/")):
        with contextlib.suppress(OSError, ValueError), (directory / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lives = False
            except BlockingIOError:
                lives = True
            found.append((directory, json.loads((directory / "record.json").read_text()), lives))
    return found


def remove_abandoned() -> None:
    """Remove everything that clusters left whose processes are gone."""
    with _registry():
        for left in sorted(RECORDS.iterdir()):
            if left.is_dir():
                _remove_if_abandoned(left)


def _remove_if_abandoned(directory: Path) -> None:
    try:
        with (directory / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError, ValueError):
                said = json.loads((directory / "record.json").read_text())
                _remove_places(str(said["prefix"]))
                for base in said["bases"]:
                    _remove_base(Path(base))
            shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:
        return  # its process lives


def _remove_places(prefix: str) -> None:
    """End what runs in the namespaces with this prefix, and remove them."""
    assert prefix.startswith("cfs")
    for name in sorted(entry.name for entry in NAMESPACES.glob(f"{prefix}*")):
        place = Place(name, name, "")
        with contextlib.suppress(RuntimeError):  # made half: there is nobody in it
            for pid in place.pids():
                kill(pid)
            _wait_until_empty(place)
        run("ip", "netns", "del", name)


def _wait_until_empty(place: Place) -> None:
    wait_until(lambda: not place.pids(), _END_S, f"processes in {place.namespace} are gone")


def _remove_base(base: Path) -> None:
    """Remove the directory of a node, its mounts and its shm tier."""
    if base.parent != Path("/tmp") or not base.name.startswith("cfs-"):
        return
    abort_connections(base)
    for place, _, _ in reversed(mounts_below(base)):
        detach(place)
    shutil.rmtree(shm_directory("/dev/shm", str(base / "cache"), os.getuid()), ignore_errors=True)
    shutil.rmtree(base, ignore_errors=True)
