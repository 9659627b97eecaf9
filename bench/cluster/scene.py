"""A cluster whose nodes have one dataset mounted: what the scenarios of the bench and the tests of peers play on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from bench.cluster.dataset import Shape, upload
from bench.cluster.readers import Outcome, Reader, Readers
from bench.s3_server import S3Server
from tests.cluster.rig import Cluster, ClusterNode
from tests.support.mounts import Bucket, Mount

READ_S = 120.0


class Scene:
    """Nodes that see each other, and a dataset that nobody has read yet."""

    def __init__(self, cluster: Cluster, bucket: Bucket, work: Path, shape: Shape) -> None:
        self.cluster = cluster
        self.bucket = bucket
        self.shape = shape
        self.mounts: dict[str, Mount] = {}
        self.manifest = work / "manifest.json"
        """What is in the bucket."""
        self._work = work

    @classmethod
    @contextlib.contextmanager
    def create(
        cls,
        server: S3Server,
        bucket: Bucket,
        work: Path,
        size: int,
        shape: Shape,
        *,
        manifest: Path | None = None,
        **settings: Any,
    ) -> Iterator[Self]:
        """Start `size` nodes, mount everywhere, and wait until they see each other.

        `manifest`: what is in the bucket; none: it is filled here.
        """
        with Cluster(server, size, **settings) as cluster:
            scene = cls(cluster, bucket, work, shape)
            if manifest is None:
                upload(server, bucket.name, shape, scene.manifest)
            else:
                scene.manifest = manifest
            for node in cluster.nodes:
                scene.mount(node)
            if cluster.peers:
                cluster.wait_until_joined()
            yield scene

    def mount(self, node: ClusterNode) -> Mount:
        """Mount the dataset on a node."""
        mount = self.mounts[node.name] = node.mount(self.bucket.url)
        return mount

    def readers(self, *nodes: ClusterNode, **more: Any) -> Readers:
        """Return a reader for each node (of all, by default), ready to start; each has an order of its own.

        `more` goes into the specification of `bench.cluster.reader`.
        """
        spec = {"threads": 2, **more}
        return Readers(
            Reader(node.name, self.mounts[node.name].path, self.manifest, self._work, seed=node.name, **spec)
            for node in nodes or self.cluster.nodes
        )

    def read(self, *nodes: ClusterNode, **more: Any) -> dict[str, Outcome]:
        """Let these nodes read everything at the same time."""
        with self.readers(*nodes, **more) as readers:
            readers.start()
            return readers.outcomes(READ_S)

    @property
    def origin_bytes(self) -> int:
        """How many bytes of objects left S3 so far (without `faults`: all that left it, heads and listings too)."""
        cluster = self.cluster
        return cluster.origin.got_bytes(self.bucket.name) if cluster.faults else cluster.relay.sent_bytes
