"""What pods see while the containers of cachefs are killed, started again and upgraded: nothing."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.s3_server import S3Server
from csi.v1 import csi_pb2
from tests.csi.rig import CALL_S, Client, capability
from tests.keeper.containers import KubernetesNode
from tests.support.machine import wait_until
from tests.support.mounts import Bucket

NOBODY = 65532
LOST = "Transport endpoint is not connected"
FILES = {"large": 3_000_000, "small-1": 70_000, "small-2": 1_500}


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    with Bucket.create(s3_server) as made:
        yield made


@pytest.fixture
def digests(bucket: Bucket) -> list[str]:
    """Fill the bucket; return the check sums of the files, by name."""
    source = random.Random(5)
    bodies = {name: source.randbytes(size) for name, size in FILES.items()}
    bucket.fill(bodies)
    return [hashlib.sha256(bodies[name]).hexdigest() for name in sorted(bodies)]


@pytest.mark.parametrize("node_uid", [NOBODY, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.skipif(os.getuid() != 0, reason="makes namespaces and mounts")
def test_pods_do_not_notice(s3_server: S3Server, bucket: Bucket, digests: list[str], node_uid: int) -> None:
    with KubernetesNode(s3_server.environment, s3_server.endpoint_url, node_uid=node_uid) as machine:
        keeper, node, csi = machine.start_keeper(), machine.start_node(), machine.start_csi()
        context = {"bucket": bucket.name, "endpoint": s3_server.endpoint_url, "authSource": "node"}
        staging = machine.kubelet / "plugins/kubernetes.io/csi/cachefs.csi.k8s.io/1/globalmount"
        targets = [machine.kubelet / f"pods/{name}/volumes/kubernetes.io~csi/pv/mount" for name in ("a", "b")]
        try:
            _publish(machine.csi_socket, context, staging, targets)
        except grpc.RpcError as error:
            raise AssertionError(f"{error}\n{machine.logs()}") from error
        own = [place for place in machine.mounts() if place.startswith("plugins/cachefs.csi.k8s.io/mounts/")]
        assert len(own) == 1
        assert len(machine.mounts()) == 3
        pods = [
            machine.start_pod(target, digests, propagation=propagation)
            for target, propagation in zip(targets, ["private", "slave"], strict=True)
        ]
        try:
            for pod in pods:
                pod.goes_on()
            csi.kill()
            node.kill()  # its workers and its agent as well
            node = machine.start_node()
            for pod in pods:
                pod.goes_on()
            keeper.kill()
            keeper = machine.start_keeper()
            for pod in pods:
                pod.goes_on()
            beside = machine.start_node()  # a surge: the next one comes before the last one goes
            for pod in pods:
                pod.goes_on()
            assert node.end() == 0
            for pod in pods:
                pod.goes_on()
            csi = machine.start_csi()
            for pod in pods:
                pod.goes_on()
            assert len(machine.mounts()) == 3
        except AssertionError as error:
            raise AssertionError(f"{error}\n{machine.logs()}") from error
        finally:
            for pod in pods:
                pod.end()
        _unpublish(machine.csi_socket, staging, targets)
        assert machine.mounts() == []
        wait_until(lambda: machine.keeper().status().mounts == (), 10, "nothing is kept")
        for container in (csi, beside, keeper):
            assert container.end() == 0, machine.logs()


@pytest.mark.skipif(os.getuid() != 0, reason="makes namespaces and mounts")
def test_containers_with_propagation_get_the_mount_that_is_made_anew(s3_server: S3Server, bucket: Bucket) -> None:
    bucket.fill({f"part/{number}": bytes([number]) * 50_000 for number in range(3)})
    with KubernetesNode(s3_server.environment, s3_server.endpoint_url, node_uid=NOBODY) as machine:
        keeper, node, csi = machine.start_keeper(), machine.start_node(), machine.start_csi()
        context = {"bucket": bucket.name, "endpoint": s3_server.endpoint_url, "authSource": "node"}
        staging = machine.kubelet / "plugins/kubernetes.io/csi/cachefs.csi.k8s.io/1/globalmount"
        targets = [machine.kubelet / f"pods/{name}/volumes/kubernetes.io~csi/pv/mount" for name in ("a", "b")]
        _publish(machine.csi_socket, context, staging, targets)
        with (
            machine.opener(targets[0], "rslave") as follows,
            machine.opener(targets[0], "rslave", "part") as part_follows,
            machine.opener(targets[1], "rprivate") as stays,
        ):
            for _ in range(2):
                wait_until(lambda: follows() == part_follows() == "ok", 20, f"they read\n{machine.logs()}")
                keeper.kill()
                node.kill()
                wait_until(lambda: follows() == part_follows() == stays() == LOST, 10, "the devices are lost")
                keeper, node = machine.start_keeper(), machine.start_node()
            wait_until(lambda: follows() == part_follows() == "ok", 20, f"they read again\n{machine.logs()}")
            assert stays() == LOST
            machine.unmount_as_kubelet(targets[0].parents[3] / "volume-subpaths/pv/main/0")
        _unpublish(machine.csi_socket, staging, targets)
        assert machine.mounts() == []
        for container in (csi, node, keeper):
            assert container.end() == 0, machine.logs()


def _publish(socket: Path, context: dict[str, str], staging: Path, targets: list[Path]) -> None:
    staging.mkdir(parents=True)
    with Client(socket) as client:
        _as_kubelet(
            client.node.NodeStageVolume,
            csi_pb2.NodeStageVolumeRequest(
                volume_id="v1",
                staging_target_path=str(staging),
                volume_capability=capability(),
                volume_context=context,
            ),
        )
        for target in targets:
            target.parent.mkdir(parents=True)
            client.node.NodePublishVolume(
                csi_pb2.NodePublishVolumeRequest(
                    volume_id="v1",
                    staging_target_path=str(staging),
                    target_path=str(target),
                    volume_capability=capability(),
                    volume_context=context,
                    readonly=True,
                ),
                timeout=CALL_S,
            )


def _as_kubelet(call: Any, request: Any) -> None:
    """Call again while the answer is that somebody is not there yet."""
    deadline = time.monotonic() + CALL_S
    while True:
        try:
            call(request, timeout=CALL_S)
            return
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _unpublish(socket: Path, staging: Path, targets: list[Path]) -> None:
    with Client(socket) as client:
        for target in targets:
            client.node.NodeUnpublishVolume(
                csi_pb2.NodeUnpublishVolumeRequest(volume_id="v1", target_path=str(target)), timeout=CALL_S
            )
        client.node.NodeUnstageVolume(
            csi_pb2.NodeUnstageVolumeRequest(volume_id="v1", staging_target_path=str(staging)), timeout=CALL_S
        )
