"""The Controller service at its socket: every method without a source, every code that the protocol wants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.s3_server import S3Server
from csi.buckets import Buckets
from csi.controller import UNLIMITED_BYTES, Controller
from csi.records import FileRecords
from csi.status import Code
from csi.v1 import csi_pb2
from csi.volumes import volume_id_of
from tests.csi.rig import Client, Mode, capability, claim, create_request, keys_of, own, put, served

GIB = 1 << 30
MiB = 1 << 20


# -- datasets ---------------------------------------------------------------------------------------------------------


def test_volumes_of_a_dataset_share_it_and_delete_nothing(driver: Client, s3_server: S3Server, s3_bucket: str) -> None:
    put(s3_server, s3_bucket, "data/a", "data/b")
    first = driver.create("one", bucket=s3_bucket, prefix="/data", capacity=5 * GIB).volume
    second = driver.create("two", bucket=s3_bucket, prefix="data/").volume
    assert first.volume_id == volume_id_of("one") != second.volume_id
    assert len(first.volume_id.encode()) <= 128
    assert first.capacity_bytes == 5 * GIB
    assert second.capacity_bytes == 0
    assert dict(first.volume_context) == {
        "bucket": s3_bucket, "prefix": "data/", "cachefs.csi.k8s.io/capacity": str(5 * GIB),
    }  # fmt: skip
    driver.delete(first.volume_id)
    driver.delete(second.volume_id)
    assert driver.volumes() == []
    assert keys_of(s3_server, s3_bucket) == ["data/a", "data/b"]


def test_a_bucket_that_does_not_exist_is_said_at_once(driver: Client) -> None:
    code, text = driver.refused(driver.controller.CreateVolume, create_request("a", bucket="no-such-bucket"))
    assert code is Code.NOT_FOUND
    assert "no-such-bucket" in text
    assert driver.volumes() == []


def test_a_store_that_does_not_answer_is_unavailable(driver: Client, free_port: int) -> None:
    request = create_request("a", bucket="some-bucket", endpoint=f"http://127.0.0.1:{free_port}")
    code, text = driver.refused(driver.controller.CreateVolume, request)
    assert code is Code.UNAVAILABLE
    assert str(free_port) in text
    assert driver.volumes() == []


# -- the same name again ----------------------------------------------------------------------------------------------


def test_the_same_request_finds_the_same_volume(driver: Client, s3_bucket: str) -> None:
    first = driver.create("a", bucket=s3_bucket, capacity=GIB)
    assert driver.create("a", bucket=s3_bucket, capacity=GIB) == first
    assert driver.create("a", bucket=s3_bucket, capacity=GIB // 2) == first, "as large as that it is"
    assert driver.create("a", bucket=s3_bucket, limit=2 * GIB) == first
    assert driver.volumes() == [first.volume.volume_id]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prefix": "other"}, "parameters.prefix"),
        ({"mode": "strict"}, "parameters.mode"),
        ({"capacity": 2 * GIB}, "capacity"),
        ({"limit": GIB // 2}, "capacity"),
    ],
)
def test_another_request_of_the_same_name_is_refused(
    driver: Client, s3_bucket: str, changed: dict[str, Any], named: str
) -> None:
    driver.create("a", bucket=s3_bucket, capacity=GIB)
    code, text = driver.refused(driver.controller.CreateVolume, create_request("a", bucket=s3_bucket, **changed))
    assert code is Code.ALREADY_EXISTS
    assert named in text


# -- what cannot be meant ---------------------------------------------------------------------------------------------

BLOCK = csi_pb2.VolumeCapability(
    block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER)
)
NO_TYPE = csi_pb2.VolumeCapability(access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER))
NO_MODE = csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume())


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (create_request("", bucket="abc"), "name: must be given"),
        (create_request("x" * 300, bucket="abc"), "name: must have at most"),
        (create_request("a\x00b", bucket="abc"), "name: must not have control characters"),
        (create_request("a", bucket="abc", volume_capabilities=[]), "volume_capabilities: must be given"),
        (create_request("a", bucket="abc", volume_capabilities=[capability(), BLOCK]), "volume_capabilities[1].block:"),
        (create_request("a", bucket="abc", volume_capabilities=[NO_TYPE]), "volume_capabilities[0].access_type:"),
        (create_request("a", bucket="abc", volume_capabilities=[NO_MODE]), "volume_capabilities[0].access_mode:"),
        (
            create_request("a", bucket="abc", volume_capabilities=[capability(fs_type="ext4")]),
            "volume_capabilities[0].mount.fs_type:",
        ),
        (
            create_request("a", bucket="abc", volume_capabilities=[capability(flags=["cache-dir=/secret"])]),
            "volume_capabilities[0].mount.mount_flags: mount flag cache-dir",
        ),
        (create_request("a"), "parameters.bucket: must be given"),
        (create_request("a", bucket="abc", secretKey="hush-hush"), "parameters.secretKey: unknown parameter"),
        (create_request("a", bucket="abc", prefx="x"), "did you mean 'prefix'?"),
        (create_request("a", bucket="abc", prefix="a/../b"), "parameters.prefix:"),
        (create_request("a", bucket="abc", mutable_parameters={"a": "b"}), "mutable_parameters:"),
        (
            create_request("a", bucket="abc", volume_content_source=csi_pb2.VolumeContentSource()),
            "volume_content_source.type:",
        ),
        (create_request("a", bucket="abc", authSource="secret", pathTemplate="${pv.name}"), "secrets: must be given"),
        (
            create_request("a", bucket="abc", authSource="secret", secrets={"accessKeyId": "AK"}),
            "secrets: the key secretAccessKey is missing",
        ),
    ],
)  # fmt: skip
def test_a_request_is_refused_by_the_name_of_the_field(driver: Client, request_: Any, named: str) -> None:
    if "pathTemplate" in request_.parameters:
        request_.parameters.update(claim("ns", "c"))
    code, text = driver.refused(driver.controller.CreateVolume, request_)
    assert code is Code.INVALID_ARGUMENT
    assert named in text
    assert "hush" not in text
    assert "/secret" not in text
    assert driver.volumes() == []


@pytest.mark.parametrize(("capacity", "limit"), [(2 * GIB, GIB), (-1, 0), (0, -1)])
def test_capacities_that_cannot_be_are_out_of_range(driver: Client, capacity: int, limit: int) -> None:
    request = create_request("a", bucket="abc", capacity=capacity, limit=limit)
    code, text = driver.refused(driver.controller.CreateVolume, request)
    assert code is Code.OUT_OF_RANGE
    assert text.startswith("capacity_range")


def test_every_access_mode_is_accepted(driver: Client, s3_bucket: str) -> None:
    modes = [value for value in Mode.Mode.values() if value]
    capabilities = [capability(mode, flags=["ro", "noatime", "metadata-ttl=5s"]) for mode in modes]
    assert len(modes) == 7
    volume = driver.create("a", bucket=s3_bucket, volume_capabilities=capabilities).volume
    request = csi_pb2.ValidateVolumeCapabilitiesRequest(volume_id=volume.volume_id, volume_capabilities=capabilities)
    answer = driver.controller.ValidateVolumeCapabilities(request)
    assert list(answer.confirmed.volume_capabilities) == capabilities


# -- the rest of the methods ------------------------------------------------------------------------------------------


def test_ids_that_are_missing_or_unknown(driver: Client) -> None:
    service = driver.controller
    capabilities = [capability()]
    size = csi_pb2.CapacityRange(required_bytes=GIB)
    for call, kind, more in (
        (service.DeleteVolume, csi_pb2.DeleteVolumeRequest, {}),
        (
            service.ValidateVolumeCapabilities,
            csi_pb2.ValidateVolumeCapabilitiesRequest,
            {"volume_capabilities": capabilities},
        ),
        (service.ControllerExpandVolume, csi_pb2.ControllerExpandVolumeRequest, {"capacity_range": size}),
        (service.ControllerGetVolume, csi_pb2.ControllerGetVolumeRequest, {}),
    ):  # fmt: skip
        make: Any = kind
        assert driver.refused(call, make(**more)) == (Code.INVALID_ARGUMENT, "volume_id: must be given")
        for unknown in ("none", "v1-0", "../../etc/passwd", "x" * 300, "Ä"):
            if call is service.DeleteVolume:
                call(make(volume_id=unknown))
            else:
                assert driver.refused(call, make(volume_id=unknown, **more))[0] is Code.NOT_FOUND


def test_capabilities_are_confirmed_or_explained(driver: Client, s3_bucket: str) -> None:
    volume = driver.create("a", bucket=s3_bucket, prefix="p").volume
    call = driver.controller.ValidateVolumeCapabilities

    def asked(**more: Any) -> Any:
        fields = {"volume_capabilities": [capability()], **more}
        return csi_pb2.ValidateVolumeCapabilitiesRequest(volume_id=volume.volume_id, **fields)

    parameters: Mapping[str, str] = {"bucket": s3_bucket, "prefix": "p"}
    kubernetes = {"storage.kubernetes.io/csiProvisionerIdentity": "x"}
    confirmed = call(asked(parameters=parameters, volume_context={**volume.volume_context, **kubernetes})).confirmed
    assert confirmed.volume_capabilities
    for more, named in (
        ({"volume_capabilities": [BLOCK]}, "volume_capabilities[0].block"),
        ({"parameters": {"bucket": "other"}}, "parameters"),
        ({"volume_context": {"bucket": "other"}}, "volume_context"),
    ):
        answer = call(asked(**more))
        assert not answer.HasField("confirmed")
        assert answer.message.startswith(named)
    assert driver.refused(call, asked(volume_capabilities=[]))[0] is Code.INVALID_ARGUMENT


def test_volumes_grow_and_never_shrink(driver: Client, s3_bucket: str) -> None:
    volume = driver.create("a", bucket=s3_bucket, capacity=GIB).volume

    def asked(required: int = 0, limit: int = 0, **more: Any) -> Any:
        size = csi_pb2.CapacityRange(required_bytes=required, limit_bytes=limit)
        return csi_pb2.ControllerExpandVolumeRequest(volume_id=volume.volume_id, capacity_range=size, **more)

    call = driver.controller.ControllerExpandVolume
    assert call(asked(3 * GIB)).capacity_bytes == 3 * GIB
    answer = call(asked(2 * GIB, volume_capability=capability()))
    assert (answer.capacity_bytes, answer.node_expansion_required) == (3 * GIB, True)
    assert driver.refused(call, asked(0, GIB))[0] is Code.OUT_OF_RANGE
    assert driver.refused(call, asked(-1))[0] is Code.OUT_OF_RANGE
    none = csi_pb2.ControllerExpandVolumeRequest(volume_id=volume.volume_id)
    assert driver.refused(call, none) == (Code.INVALID_ARGUMENT, "capacity_range: must be given")
    assert driver.refused(call, asked(GIB, volume_capability=BLOCK))[0] is Code.INVALID_ARGUMENT
    found = driver.controller.ControllerGetVolume(csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id)).volume
    assert found.capacity_bytes == 3 * GIB
    assert found.volume_context == volume.volume_context, "a context never changes"
    assert driver.create("a", bucket=s3_bucket, capacity=GIB).volume.capacity_bytes == 3 * GIB


def test_lists_come_in_pages(driver: Client, s3_bucket: str) -> None:
    ids = sorted(driver.create(f"v{n}", bucket=s3_bucket).volume.volume_id for n in range(7))
    found, token = [], ""
    while True:
        answer = driver.controller.ListVolumes(csi_pb2.ListVolumesRequest(max_entries=3, starting_token=token))
        assert len(answer.entries) <= 3
        found += [entry.volume.volume_id for entry in answer.entries]
        assert all(entry.status.volume_condition.message == "ready" for entry in answer.entries)
        token = answer.next_token
        if len(found) == 3:
            driver.delete(found[2])  # the one that the token names
        if not token:
            break
    assert found == ids
    call = driver.controller.ListVolumes
    for wrong in ("invalid-token", "after:", "after:../x"):
        assert driver.refused(call, csi_pb2.ListVolumesRequest(starting_token=wrong))[0] is Code.ABORTED
    assert driver.refused(call, csi_pb2.ListVolumesRequest(max_entries=-1))[0] is Code.INVALID_ARGUMENT


def test_the_condition_is_what_the_bucket_says(driver: Client, s3_server: S3Server, s3_bucket: str) -> None:
    dataset = driver.create("a", bucket=s3_bucket).volume
    prefix = driver.create("b", **own(s3_bucket, "ns", "c")).volume
    secret = driver.create("c", bucket=s3_bucket, authSource="secret").volume

    def condition(volume: Any) -> Any:
        request = csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id)
        return driver.controller.ControllerGetVolume(request).status.volume_condition

    assert not condition(dataset).abnormal
    assert not condition(prefix).abnormal
    assert "no credentials" in condition(secret).message
    s3_server.client().delete_object(Bucket=s3_bucket, Key="ns/c/")
    assert condition(prefix).abnormal
    assert "ns/c/ is gone" in condition(prefix).message


def test_a_bucket_has_room_for_what_it_can_have(driver: Client) -> None:
    call = driver.controller.GetCapacity
    assert call(csi_pb2.GetCapacityRequest()).available_capacity == UNLIMITED_BYTES
    fits = csi_pb2.GetCapacityRequest(volume_capabilities=[capability()], parameters={"bucket": "abc"})
    assert call(fits).available_capacity == UNLIMITED_BYTES
    assert call(csi_pb2.GetCapacityRequest(volume_capabilities=[BLOCK])).available_capacity == 0
    assert driver.refused(call, csi_pb2.GetCapacityRequest(parameters={"bukket": "abc"}))[0] is Code.INVALID_ARGUMENT


def test_only_what_is_offered_is_said_to_be(driver: Client) -> None:
    answer = driver.controller.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest())
    names = {csi_pb2.ControllerServiceCapability.RPC.Type.Name(each.rpc.type) for each in answer.capabilities}
    assert "PUBLISH_UNPUBLISH_VOLUME" not in names
    assert "LIST_VOLUMES_PUBLISHED_NODES" not in names
    assert {"CREATE_DELETE_VOLUME", "CREATE_DELETE_SNAPSHOT", "CLONE_VOLUME", "EXPAND_VOLUME", "GET_VOLUME"} <= names
    for call, request in (
        (driver.controller.ControllerPublishVolume, csi_pb2.ControllerPublishVolumeRequest(volume_id="a")),
        (driver.controller.ControllerModifyVolume, csi_pb2.ControllerModifyVolumeRequest(volume_id="a")),
        (driver.node.NodeGetInfo, csi_pb2.NodeGetInfoRequest()),
    ):
        assert driver.refused(call, request)[0] is Code.UNIMPLEMENTED


def test_places_are_passed_on_where_nodes_have_some(
    tmp_path: Path, records: FileRecords, buckets: Buckets, s3_bucket: str
) -> None:
    wanted = csi_pb2.TopologyRequirement(
        requisite=[csi_pb2.Topology(segments={"topology.kubernetes.io/zone": zone}) for zone in "ab"]
    )
    controller = Controller(records, buckets, has_topology=True)
    with served(tmp_path / "csi.sock", [controller]) as client:
        volume = client.create("a", bucket=s3_bucket, accessibility_requirements=wanted).volume
        assert list(volume.accessible_topology) == list(wanted.requisite)
        other = csi_pb2.TopologyRequirement(requisite=[csi_pb2.Topology(segments={"topology.kubernetes.io/zone": "c"})])
        request = create_request("a", bucket=s3_bucket, accessibility_requirements=other)
        assert client.refused(client.controller.CreateVolume, request)[0] is Code.ALREADY_EXISTS
        empty = create_request("b", bucket=s3_bucket, accessibility_requirements=csi_pb2.TopologyRequirement())
        assert client.refused(client.controller.CreateVolume, empty)[0] is Code.INVALID_ARGUMENT
    controller.close()
