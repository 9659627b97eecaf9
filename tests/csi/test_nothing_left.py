"""The last volume of a cluster goes, and then its nodes: nothing stays in etcd, in the bucket, on the node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from bench.s3_server import S3Server
from csi.v1 import csi_pb2
from tests.csi.kube_node import KubeNode
from tests.csi.rig import CALL_S, from_snapshot, from_volume, own, when_deleted
from tests.support.etcd_server import EtcdServer
from tests.support.machine import wait_until
from tests.support.mounts import Bucket

CLUSTER = "left"


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    """An etcd that nobody else uses."""
    with EtcdServer() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    """An empty bucket."""
    with Bucket.create(s3_server) as made:
        yield made


def keys_in(etcd: EtcdServer) -> list[str]:
    """Return every key of an etcd."""
    with closing(etcd.client()) as client:
        return sorted(found.key.decode() for _, found in client.get_all(keys_only=True))


@pytest.mark.fuse
def test_nothing_stays_in_etcd(s3_server: S3Server, bucket: Bucket, etcd: EtcdServer) -> None:
    bucket.put("claims/team/a/there", b"before")
    options = (f"--etcd={etcd.endpoint}", f"--cluster={CLUSTER}", "--peer-insecure", "--advertise=127.0.0.1:0")
    with KubeNode(s3_server.environment, mode="all", node_options=options, state="etcd") as node:
        driver = node.client
        where: dict[str, Any] = {"endpoint": s3_server.endpoint_url, "prefix": "claims"}
        plain = driver.create("dataset", bucket=bucket.name, **where).volume
        claimed = driver.create("claimed", **own(bucket.name, "team", "b", **where)).volume
        bucket.put("claims/team/b/file", b"of the claim")
        copied = driver.create(
            "copied", **own(bucket.name, "team", "c", **where), volume_content_source=from_volume(claimed.volume_id)
        ).volume
        snapshot = driver.snapshot("snapshot", plain.volume_id)
        pinned = driver.create(
            "pinned", bucket=bucket.name, **where, volume_content_source=from_snapshot(snapshot.snapshot_id)
        ).volume
        made = [plain, claimed, copied, pinned]
        volumes = [node.volume(each.volume_id, dict(each.volume_context)) for each in made]
        for volume in volumes:
            volume.stage()
            assert any(volume.publish().iterdir())
        wait_until(lambda: any("/volumes/" in key for key in nodes_in(etcd)), 10, "the node says what it mounts")
        roots = {key.rpartition("/")[0] for key in keys_in(etcd)}
        assert {f"/cachefs-csi/{CLUSTER}/volumes", f"/cachefs-csi/{CLUSTER}/snapshots"} <= roots
        assert f"/cachefs/{CLUSTER}/nodes" in roots
        for volume in volumes:
            volume.unpublish()
            volume.unstage()
        driver.controller.DeleteSnapshot(
            csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id), timeout=CALL_S
        )
        for each in reversed(made):
            when_deleted(driver, each.volume_id)
        assert [key for key in keys_in(etcd) if key.startswith("/cachefs-csi/")] == []
    assert keys_in(etcd) == []
    found = s3_server.client().list_objects_v2(Bucket=bucket.name).get("Contents", [])
    assert [entry["Key"] for entry in found] == ["claims/team/a/there"]


def nodes_in(etcd: EtcdServer) -> list[str]:
    return [key for key in keys_in(etcd) if key.startswith(f"/cachefs/{CLUSTER}/")]
