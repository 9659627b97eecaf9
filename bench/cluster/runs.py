"""The scenarios: each begins with a cold cluster of its own, and returns figures of which every byte was verified.

* together: all nodes read the whole dataset at the same time, cold, behind a store that sends so many bytes a second;
  with peers and without; shards, where the store's bytes are what is scarce, and small files, where on one machine the
  CPU is;
* death: the same, with both kinds of files, and one node that dies in the middle (kill -9 of all its processes, or
  its link goes down), and is not among the readers;
* join: all have read everything; one more node comes and reads it, too.

A reader's error or a wrong byte fails the scenario: `ScenarioFailed`, and no figure.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.cluster.dataset import Shape, upload
from bench.cluster.readers import Outcome
from bench.cluster.scene import Scene
from bench.memory import cpu_seconds
from bench.s3_server import S3Server
from tests.cluster.rig import Cluster, ClusterNode
from tests.support.mounts import Bucket

Figures = dict[str, Any]
MIB = 1 << 20
_STRIKE_AT = 0.3
"""The share of the dataset that every reader has read when the node dies."""
_ROOM = 1.3
"""The shm tier of a node, by the bytes of the dataset: what was read is still there when others ask."""
_MEMORY = 2.2
"""By the bytes of the dataset and the nodes: their shm tiers and the kernel's pages of their mounts."""
_TIME_PER_BYTE = 4.0
"""So many times as long as the store alone would need for every node, a run may take, and a minute."""


class ScenarioFailed(RuntimeError):
    """A reader saw an error or a wrong byte, or did not come to an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all scenarios of a run have in common."""

    nodes: int
    shape: Shape
    """Shards and small files."""
    shards: Shape
    """Shards only."""
    small: Shape
    """Small files only."""
    bytes_per_s: int
    """What the store sends."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """The datasets by name."""
        return {"both": self.shape, "shards": self.shards, "small": self.small}

    @property
    def patience_s(self) -> float:
        """How long the readers of one scenario may take."""
        most = max(shape.total_bytes for shape in self.shapes.values())
        return 60 + _TIME_PER_BYTE * self.nodes * most / self.bytes_per_s


class Stage:
    """The S3 server with the datasets, and clusters one after the other before it. Context manager."""

    def __init__(self, terms: Terms, work: Path) -> None:
        self.terms = terms
        self._work = work
        self._resources = contextlib.ExitStack()
        self.server: S3Server
        self.buckets: dict[Shape, Bucket] = {}
        """By the dataset that is in it."""

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as resources:
            self.server = resources.enter_context(S3Server(str(self._work)))
            for shape in set(self.terms.shapes.values()):
                self.buckets[shape] = bucket = resources.enter_context(Bucket.create(self.server))
                upload(self.server, bucket.name, shape, self._manifest(bucket))
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _manifest(self, bucket: Bucket) -> Path:
        return self._work / f"manifest-{bucket.name}.json"

    @contextlib.contextmanager
    def scene(self, shape: Shape | None = None, *, peers: bool = True, nodes: int = 0) -> Iterator[Scene]:
        """A cold cluster behind the limited store; `shape`: of the dataset, both kinds of files by default."""
        shape = shape or self.terms.shape
        bucket = self.buckets[shape]
        room = f"{int(shape.total_bytes * _ROOM) // MIB + 32}MiB"
        settings: dict[str, Any] = {"peers": peers, "faults": False, "shm_size": room, "cache_size": room}
        settings["options"] = ["--log-level=warning"]
        count = nodes or self.terms.nodes
        with Scene.create(
            self.server, bucket, self._work, count, shape, manifest=self._manifest(bucket), **settings
        ) as scene:
            scene.cluster.network.limit(scene.cluster.origin_place, self.terms.bytes_per_s)
            machine.make_memory_resident(int(_MEMORY * (count + 1) * shape.total_bytes))
            yield scene


def together(stage: Stage, shape: Shape, *, peers: bool) -> Figures:
    """All nodes read everything at the same time."""
    with stage.scene(shape, peers=peers) as scene:
        before = _cpu_s(scene.cluster)
        with scene.readers() as readers:
            readers.start()
            outcomes = readers.outcomes(stage.terms.patience_s)
        cpu_s = _cpu_s(scene.cluster) - before
        return _figures(scene, outcomes) | {"cpu_s": round(cpu_s, 2), "counters": _counters(scene.cluster)}


def death(stage: Stage, strike: Callable[[Cluster, ClusterNode], None]) -> Figures:
    """All nodes but one read everything; that one dies in the middle."""
    with stage.scene() as scene:
        *living, dying = scene.cluster.nodes
        names = [node.name for node in living]
        with scene.readers(*living) as readers:
            readers.start()
            readers.wait_for_bytes(int(_STRIKE_AT * scene.shape.total_bytes), stage.terms.patience_s)
            struck = readers.seconds
            strike(scene.cluster, dying)
            outcomes = readers.outcomes(stage.terms.patience_s, of=names)
        counters = _counters(scene.cluster, names)
        return _figures(scene, outcomes) | {"struck_after_s": round(struck, 2), "counters": counters}


def kill_node(cluster: Cluster, node: ClusterNode) -> None:
    """kill -9 of every process of a node."""
    node.kill_everything()


def take_link_down(cluster: Cluster, node: ClusterNode) -> None:
    """`ip link set down` in a node."""
    cluster.network.link_down(node.place)


def join(stage: Stage) -> Figures:
    """Nodes that have everything, and one more that reads it."""
    with stage.scene(nodes=stage.terms.nodes - 1) as scene:
        cluster = scene.cluster
        cluster.network.limit(cluster.origin_place, None)
        with scene.readers() as readers:
            readers.start()
            _check(readers.outcomes(stage.terms.patience_s), scene.shape)
        cluster.network.limit(cluster.origin_place, stage.terms.bytes_per_s)
        before = scene.origin_bytes
        new = cluster.add_node()
        scene.mount(new)
        cluster.wait_until_joined()
        with scene.readers(new) as readers:
            readers.start()
            outcomes = readers.outcomes(stage.terms.patience_s)
        from_origin = scene.origin_bytes - before
        return _figures(scene, outcomes) | {
            "origin_bytes": from_origin,
            "origin_share": from_origin / scene.shape.total_bytes,
            "share_from_peers": new.counter("peer_fill_bytes") / scene.shape.total_bytes,
            "counters": _counters(cluster, [new.name]),
        }


def _figures(scene: Scene, outcomes: dict[str, Outcome]) -> Figures:
    _check(outcomes, scene.shape)
    size = scene.shape.total_bytes
    wall_s = max(outcome.seconds for outcome in outcomes.values())
    stalls = sorted(itertools.chain.from_iterable(one.stalls for one in outcomes.values()), key=lambda s: -s[1])
    return {
        "readers": len(outcomes),
        "wall_s": round(wall_s, 3),
        "fastest_s": round(min(outcome.seconds for outcome in outcomes.values()), 3),
        "mb_per_s_each": round(statistics.mean(size / outcome.seconds / 1e6 for outcome in outcomes.values()), 1),
        "origin_bytes": scene.origin_bytes,
        "origin_share": scene.origin_bytes / size,
        "worst_stall_ms": round(max(outcome.longest_ms for outcome in outcomes.values()), 1),
        "worst_stalls": stalls[:5],
    }


def _check(outcomes: dict[str, Outcome], shape: Shape) -> None:
    for name, outcome in outcomes.items():
        if not outcome.is_clean:
            raise ScenarioFailed(f"{name} saw {outcome.errors[:3] + outcome.wrong[:3]}")
        if outcome.bytes_read != shape.total_bytes:
            raise ScenarioFailed(f"{name} read {outcome.bytes_read:,} of {shape.total_bytes:,} bytes")


def _counters(cluster: Cluster, names: list[str] | None = None) -> Figures:
    """Return what the agents counted of peers and store, in sum."""
    total: dict[str, int] = {}
    for node in cluster.nodes:
        if names is not None and node.name not in names:
            continue
        for name, value in node.agent_status()["counters"].items():
            if name.startswith(("peer_", "origin_fill", "disk_")) and isinstance(value, int):
                total[name] = total.get(name, 0) + value
    return total


def _cpu_s(cluster: Cluster) -> float:
    return sum(cpu_seconds(pid) for node in cluster.nodes for pid in node.processes())
