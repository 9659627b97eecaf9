"""Every method of the protocol, by the protocol's own description: with an empty request, and with fields that no
caller of today sends. No call ends with a code that the driver has not chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from cachefs.keeper.client import KeeperClient
from csi.buckets import Buckets
from csi.controller import Controller
from csi.identity import Identity
from csi.node import NodeService
from csi.records import FileRecords
from csi.status import Code
from csi.v1 import csi_pb2, csi_pb2_grpc
from tests.csi.node_fixtures import FakeNode, fake
from tests.csi.rig import CALL_S, Client, capability, served

__all__ = ["fake"]

Mode = csi_pb2.VolumeCapability.AccessMode
FIRST_FIELD = {
    "CreateVolume": "name",
    "DeleteVolume": "volume_id",
    "ValidateVolumeCapabilities": "volume_id",
    "ControllerExpandVolume": "volume_id",
    "ControllerGetVolume": "volume_id",
    "CreateSnapshot": "source_volume_id",
    "DeleteSnapshot": "snapshot_id",
    "GetSnapshot": "snapshot_id",
    "NodeStageVolume": "volume_id",
    "NodeUnstageVolume": "volume_id",
    "NodePublishVolume": "volume_id",
    "NodeUnpublishVolume": "volume_id",
    "NodeGetVolumeStats": "volume_id",
    "NodeExpandVolume": "volume_id",
}
"""What is missing first in an empty request."""
WITHOUT_FIELDS = {
    "GetPluginInfo", "GetPluginCapabilities", "Probe", "ListVolumes", "ListSnapshots", "GetCapacity",
    "ControllerGetCapabilities", "NodeGetCapabilities", "NodeGetInfo",
}  # fmt: skip
METHODS = [
    (service.name, method.name)
    for service in csi_pb2.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@dataclass
class Driver:
    """All services at one socket."""

    client: Client

    def method(self, service: str, name: str) -> tuple[Callable[..., Any], Any]:
        """Return a method, and the class of its requests."""
        described = csi_pb2.DESCRIPTOR.services_by_name[service].methods_by_name[name]
        stub = getattr(csi_pb2_grpc, f"{service}Stub")(self.client.channel)
        return getattr(stub, name), getattr(csi_pb2, described.input_type.name)


@pytest.fixture
def driver(fake: FakeNode, tmp_path: Path, records: FileRecords, buckets: Buckets) -> Iterator[Driver]:
    """A driver as with --mode all; keeper and agent are not real."""
    controller = Controller(records, buckets)
    node = NodeService(fake.settings, KeeperClient(str(fake.keeper.path)), None, records)
    with served(fake.base / "all.sock", [Identity(controller=True), controller, node]) as client:
        yield Driver(client)
    controller.close()


def test_all_methods_are_known_here() -> None:
    assert len(METHODS) > 25
    assert {name for _, name in METHODS} >= {*FIRST_FIELD, *WITHOUT_FIELDS}


@pytest.mark.parametrize(("service", "name"), METHODS)
def test_an_empty_request_names_the_field_that_is_missing(driver: Driver, service: str, name: str) -> None:
    call, kind = driver.method(service, name)
    if name in WITHOUT_FIELDS:
        call(kind(), timeout=CALL_S)
        return
    if service == "SnapshotMetadata":  # its methods answer with streams
        with pytest.raises(grpc.RpcError) as refused:
            list(call(kind(), timeout=CALL_S))
        assert Code(refused.value.code()) is Code.UNIMPLEMENTED
        return
    code, text = driver.client.refused(call, kind())
    if name in FIRST_FIELD:
        assert (code, text) == (Code.INVALID_ARGUMENT, f"{FIRST_FIELD[name]}: must be given")
    else:
        assert code is Code.UNIMPLEMENTED, text


WRONG = [
    (csi_pb2.VolumeCapability(), "access_type"),
    (csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume()), "access_mode"),
    (capability(Mode.UNKNOWN), "access_mode"),
    (capability(99), "access_mode"),
    (capability(-1), "access_mode"),
    (capability(fs_type="xfs"), "mount.fs_type"),
    (capability(flags=["rw"]), "mount.mount_flags"),
    (
        csi_pb2.VolumeCapability(
            mount=csi_pb2.VolumeCapability.MountVolume(volume_mount_group="staff"), access_mode=capability().access_mode
        ),
        "mount.volume_mount_group",
    ),
    (
        csi_pb2.VolumeCapability(
            block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=capability().access_mode
        ),
        "block",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "named"), WRONG)
def test_a_capability_that_cannot_be_is_refused_wherever_it_is_sent(
    driver: Driver, fake: FakeNode, s3_bucket: str, wrong: Any, named: str
) -> None:
    volume = driver.client.create("a", bucket=s3_bucket).volume
    size = csi_pb2.CapacityRange(required_bytes=1)
    path = f"{fake.settings.kubelet_dir}/place"
    one: dict[str, Any] = {"volume_id": volume.volume_id, "volume_capability": wrong}
    context = {"volume_context": dict(volume.volume_context), "staging_target_path": path}
    many = {"volume_capabilities": [capability(), wrong]}
    for service, name, fields in (
        ("Controller", "CreateVolume", {"name": "b", "parameters": {"bucket": s3_bucket}, **many}),
        ("Controller", "ControllerExpandVolume", {**one, "capacity_range": size}),
        ("Node", "NodeStageVolume", {**one, **context}),
        ("Node", "NodePublishVolume", {**one, **context, "target_path": f"{path}-2"}),
        ("Node", "NodeExpandVolume", {**one, "volume_path": path, "capacity_range": size}),
    ):
        call, kind = driver.method(service, name)
        code, text = driver.client.refused(call, kind(**fields))
        assert code is Code.INVALID_ARGUMENT, (name, text)
        assert f".{named}" in text.partition(": ")[0], (name, text)
    call, kind = driver.method("Controller", "ValidateVolumeCapabilities")
    answer = call(kind(volume_id=volume.volume_id, **many))
    assert not answer.HasField("confirmed")
    assert answer.message.startswith(f"volume_capabilities[1].{named}: ")
    call, kind = driver.method("Controller", "GetCapacity")
    assert call(kind(**many)).available_capacity == 0
    assert fake.keeper.mounts == {}


@pytest.mark.parametrize(("required", "limit"), [(-1, 0), (0, -1), (10, 5), (0, 5)])
def test_a_size_that_cannot_be_is_out_of_range_wherever_it_is_sent(
    driver: Driver, fake: FakeNode, s3_bucket: str, required: int, limit: int
) -> None:
    """The volume has ten bytes, and none shrinks."""
    volume = driver.client.create("a", bucket=s3_bucket, capacity=10).volume
    staged = fake.volume(volume.volume_id, dict(volume.volume_context))
    staged.stage()
    size = csi_pb2.CapacityRange(required_bytes=required, limit_bytes=limit)
    of_volume = {"volume_id": volume.volume_id, "capacity_range": size}
    if required or limit != 5:
        call, kind = driver.method("Controller", "CreateVolume")
        fields = {"capacity_range": size, "volume_capabilities": [capability()], "parameters": {"bucket": s3_bucket}}
        assert driver.client.refused(call, kind(name="b", **fields))[0] is Code.OUT_OF_RANGE
    for service, name, fields in (
        ("Controller", "ControllerExpandVolume", of_volume),
        ("Node", "NodeExpandVolume", {**of_volume, "volume_path": staged.staging}),
    ):
        call, kind = driver.method(service, name)
        code, text = driver.client.refused(call, kind(**fields))
        assert code is Code.OUT_OF_RANGE, (name, text)
        assert text.startswith("capacity_range"), text
    assert staged.stats(staged.staging).usage[0].total == 10


def test_tokens_of_lists_that_none_of_our_answers_had_are_aborted(driver: Driver) -> None:
    for name in ("ListVolumes", "ListSnapshots"):
        call, kind = driver.method("Controller", name)
        for token in ("invalid-token", "1", "after:", "after:../x", "after:A", "\x00", "x" * 5000):
            assert driver.client.refused(call, kind(starting_token=token))[0] is Code.ABORTED, (name, token)
        assert driver.client.refused(call, kind(max_entries=-1))[0] is Code.INVALID_ARGUMENT
