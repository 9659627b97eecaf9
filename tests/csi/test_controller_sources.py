"""Snapshots, volumes made from them, clones: at the socket, over a real bucket."""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
import pytest

from bench.s3_server import S3Server
from cachefs.errors import StorageUnavailable
from cachefs.store.admin import BucketAdmin
from csi import snapshots
from csi.parameters import MANIFEST_KEY
from csi.status import Code
from csi.v1 import csi_pb2
from tests.csi.rig import Client, create_request, from_snapshot, from_volume, keys_of, own, put, when_deleted

OBJECTS = ("data/a", "data/deep/b", "data/z")


@pytest.fixture
def dataset(driver: Client, s3_server: S3Server, s3_bucket: str) -> Any:
    """A volume with three objects."""
    put(s3_server, s3_bucket, *OBJECTS, "elsewhere")
    return driver.create("dataset", bucket=s3_bucket, prefix="data").volume


def _shown(server: S3Server, bucket: str) -> list[str]:
    return [key for key in keys_of(server, bucket) if not key.startswith(".cachefs/")]


def test_a_snapshot_pins_what_is_there(driver: Client, dataset: Any, s3_server: S3Server, s3_bucket: str) -> None:
    before = time.time()
    snapshot = driver.snapshot("snap", dataset.volume_id)
    assert snapshot.ready_to_use
    assert snapshot.source_volume_id == dataset.volume_id
    assert snapshot.size_bytes == len(OBJECTS)
    assert before - 2 <= snapshot.creation_time.seconds <= time.time() + 1
    put(s3_server, s3_bucket, "data/later")
    assert driver.snapshot("snap", dataset.volume_id) == snapshot, "the same call again"
    found = driver.controller.GetSnapshot(csi_pb2.GetSnapshotRequest(snapshot_id=snapshot.snapshot_id)).snapshot
    assert found == snapshot
    assert snapshots.manifest_key(snapshot.snapshot_id) in keys_of(s3_server, s3_bucket)
    request = csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id)
    driver.controller.DeleteSnapshot(request)
    driver.controller.DeleteSnapshot(request)
    assert keys_of(s3_server, s3_bucket) == sorted([*OBJECTS, "data/later", "elsewhere"])


def test_a_volume_from_a_snapshot_is_immutable_and_outlives_it(
    driver: Client, dataset: Any, s3_server: S3Server, s3_bucket: str
) -> None:
    snapshot = driver.snapshot("snap", dataset.volume_id)
    more: dict[str, Any] = {"bucket": s3_bucket, "prefix": "data", "mode": "ttl", "metadataTTL": "5s"}
    request = create_request("restored", **more, volume_content_source=from_snapshot(snapshot.snapshot_id))
    volume = driver.controller.CreateVolume(request).volume
    assert volume.content_source.snapshot.snapshot_id == snapshot.snapshot_id
    assert volume.volume_context["mode"] == "immutable"
    assert "metadataTTL" not in volume.volume_context
    assert volume.volume_context["prefix"] == "data/"
    key = volume.volume_context[MANIFEST_KEY]
    driver.controller.DeleteSnapshot(csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id))
    assert [found for found in keys_of(s3_server, s3_bucket) if found.startswith(".cachefs")] == [key]
    assert driver.controller.CreateVolume(request).volume == volume, "also when the snapshot is gone"
    asked = csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id)
    assert not driver.controller.ControllerGetVolume(asked).status.volume_condition.abnormal
    again = driver.snapshot("of-restored", volume.volume_id)
    assert again.size_bytes == len(OBJECTS)
    driver.controller.DeleteSnapshot(csi_pb2.DeleteSnapshotRequest(snapshot_id=again.snapshot_id))
    driver.delete(volume.volume_id)
    assert keys_of(s3_server, s3_bucket) == sorted([*OBJECTS, "elsewhere"])


def test_a_snapshot_that_goes_in_between(
    driver: Client, dataset: Any, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the manifest of the volume is written: the volume is not made. After it: it is, whatever was killed."""
    pin = snapshots.pin
    killed: list[bool] = []

    def pin_and_die(admin: BucketAdmin, manifest: str, volume_id: str) -> str:
        if killed[0]:
            pin(admin, manifest, volume_id)
        raise StorageUnavailable("as if killed here")

    for pinned in (False, True):
        killed[:] = [pinned]
        snapshot = driver.snapshot(f"snap-{pinned}", dataset.volume_id)
        request = create_request("a", bucket=s3_bucket, volume_content_source=from_snapshot(snapshot.snapshot_id))
        with monkeypatch.context() as patched:
            patched.setattr(snapshots, "pin", pin_and_die)
            assert driver.refused(driver.controller.CreateVolume, request)[0] is Code.UNAVAILABLE
        driver.controller.DeleteSnapshot(csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id))
        if pinned:
            driver.delete(driver.controller.CreateVolume(request).volume.volume_id)
        else:
            assert driver.refused(driver.controller.CreateVolume, request)[0] is Code.NOT_FOUND
        assert driver.volumes() == [dataset.volume_id]
    assert keys_of(s3_server, s3_bucket) == sorted([*OBJECTS, "elsewhere"])


def test_what_a_snapshot_needs_is_not_deleted(driver: Client, s3_server: S3Server, s3_bucket: str) -> None:
    origin = driver.create("a", **own(s3_bucket, "ns", "c")).volume
    put(s3_server, s3_bucket, "ns/c/x")
    snapshot = driver.snapshot("snap", origin.volume_id)
    restored = driver.create("b", bucket=s3_bucket, volume_content_source=from_snapshot(snapshot.snapshot_id)).volume
    delete = csi_pb2.DeleteVolumeRequest(volume_id=origin.volume_id)
    code, text = driver.refused(driver.controller.DeleteVolume, delete)
    assert code is Code.FAILED_PRECONDITION
    assert snapshot.snapshot_id in text
    driver.controller.DeleteSnapshot(csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id))
    code, text = driver.refused(driver.controller.DeleteVolume, delete)
    assert code is Code.FAILED_PRECONDITION
    assert restored.volume_id in text
    assert "ns/c/x" in keys_of(s3_server, s3_bucket)
    driver.delete(restored.volume_id)
    driver.delete(origin.volume_id)
    assert keys_of(s3_server, s3_bucket) == []


def test_a_clone_of_a_dataset_pins_it(driver: Client, dataset: Any, s3_server: S3Server, s3_bucket: str) -> None:
    request = create_request(
        "clone", bucket=s3_bucket, prefix="data", volume_content_source=from_volume(dataset.volume_id)
    )
    volume = driver.controller.CreateVolume(request).volume
    assert volume.content_source.volume.volume_id == dataset.volume_id
    assert volume.volume_context["mode"] == "immutable"
    clone = driver.create(
        "clone-of-clone", bucket=s3_bucket, prefix="data", volume_content_source=from_volume(volume.volume_id)
    ).volume
    driver.delete(volume.volume_id)
    assert clone.volume_context[MANIFEST_KEY] in keys_of(s3_server, s3_bucket)
    driver.delete(clone.volume_id)
    assert _shown(s3_server, s3_bucket) == keys_of(s3_server, s3_bucket) == sorted([*OBJECTS, "elsewhere"])


def test_a_clone_with_a_prefix_of_its_own_is_a_copy(
    driver: Client, dataset: Any, s3_server: S3Server, s3_bucket: str
) -> None:
    order = own(s3_bucket, "ns", "copy")
    volume = driver.create("copy", **order, volume_content_source=from_volume(dataset.volume_id)).volume
    copied = ["ns/copy/", "ns/copy/a", "ns/copy/deep/b", "ns/copy/z"]
    assert keys_of(s3_server, s3_bucket) == sorted([*OBJECTS, "elsewhere", *copied])
    assert volume.volume_context["prefix"] == "ns/copy/"
    second = driver.create(
        "again", **own(s3_bucket, "ns", "copy2"), volume_content_source=from_volume(volume.volume_id)
    )
    driver.delete(volume.volume_id)
    assert "ns/copy2/deep/b" in keys_of(s3_server, s3_bucket)
    driver.delete(second.volume.volume_id)
    assert keys_of(s3_server, s3_bucket) == sorted([*OBJECTS, "elsewhere"])


def test_a_copy_needs_an_empty_prefix(driver: Client, dataset: Any, s3_server: S3Server, s3_bucket: str) -> None:
    put(s3_server, s3_bucket, "ns/copy/precious")
    request = create_request(
        "copy", **own(s3_bucket, "ns", "copy"), volume_content_source=from_volume(dataset.volume_id)
    )
    code, text = driver.refused(driver.controller.CreateVolume, request)
    assert code is Code.FAILED_PRECONDITION
    assert "empty" in text
    assert len(driver.volumes()) == 1


def test_a_big_copy_says_how_far_it_is(
    hasty: Client, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call ends before the copy, the provisioner asks again."""
    go_on, begun = threading.Event(), threading.Event()
    copy = BucketAdmin.copy

    def slow(self: BucketAdmin, *arguments: Any, **more: Any) -> str:
        begun.set()
        assert go_on.wait(20)
        return copy(self, *arguments, **more)

    monkeypatch.setattr(BucketAdmin, "copy", slow)
    driver = hasty
    put(s3_server, s3_bucket, *OBJECTS)
    dataset = driver.create("dataset", bucket=s3_bucket, prefix="data").volume
    request = create_request(
        "copy", **own(s3_bucket, "ns", "copy"), volume_content_source=from_volume(dataset.volume_id)
    )
    code, text = driver.refused(driver.controller.CreateVolume, request)
    assert begun.wait(10)
    assert code is Code.ABORTED
    assert "copying" in text
    copying = next(
        entry
        for entry in driver.controller.ListVolumes(csi_pb2.ListVolumesRequest()).entries
        if entry.volume.volume_id != dataset.volume_id
    )
    assert "copying" in copying.status.volume_condition.message
    snap = csi_pb2.CreateSnapshotRequest(name="too-early", source_volume_id=copying.volume.volume_id)
    assert driver.refused(driver.controller.CreateSnapshot, snap)[0] is Code.ABORTED
    clone = create_request("c2", bucket=s3_bucket, volume_content_source=from_volume(copying.volume.volume_id))
    assert driver.refused(driver.controller.CreateVolume, clone)[0] is Code.ABORTED
    go_on.set()
    volume = _when_ready(driver, request)
    assert "ns/copy/deep/b" in keys_of(s3_server, s3_bucket)
    driver.delete(volume.volume_id)


def test_an_unfinished_copy_goes_with_its_source(
    hasty: Client, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When both claims are gone the provisioner forgets the copy: nobody else would ever take it away."""
    copied, copy = threading.Event(), BucketAdmin.copy

    def stuck(self: BucketAdmin, *arguments: Any, **more: Any) -> str:
        if copied.is_set():
            raise StorageUnavailable("it takes long")
        copied.set()
        return copy(self, *arguments, **more)

    monkeypatch.setattr(BucketAdmin, "copy", stuck)
    source = hasty.create("source", **own(s3_bucket, "ns", "source")).volume
    put(s3_server, s3_bucket, "elsewhere", *(f"ns/source/{name}" for name in "abc"))
    ready = hasty.create("ready", bucket=s3_bucket, prefix="elsewhere").volume
    request = create_request(
        "copy", **own(s3_bucket, "ns", "copy"), volume_content_source=from_volume(source.volume_id)
    )
    assert hasty.refused(hasty.controller.CreateVolume, request)[0] in (Code.ABORTED, Code.UNAVAILABLE)
    assert copied.wait(10)
    assert len(hasty.volumes()) == 3
    when_deleted(hasty, source.volume_id)
    assert hasty.volumes() == [ready.volume_id]
    assert keys_of(s3_server, s3_bucket) == ["elsewhere"]
    assert hasty.refused(hasty.controller.CreateVolume, request)[0] is Code.NOT_FOUND


def test_an_unfinished_copy_leaves_no_listing_when_its_prefix_is_anothers(
    hasty: Client, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim was deleted while it was copied, and made again before the copy had written anything."""
    begun = threading.Semaphore(0)

    def stuck(self: BucketAdmin, *arguments: Any, **more: Any) -> str:
        begun.release()
        raise StorageUnavailable("it takes long")

    monkeypatch.setattr(BucketAdmin, "copy", stuck)
    put(s3_server, s3_bucket, "data/a")
    dataset = hasty.create("dataset", bucket=s3_bucket, prefix="data").volume
    more = {**own(s3_bucket, "ns", "copy"), "volume_content_source": from_volume(dataset.volume_id)}
    for name in ("one", "two"):
        hasty.refused(hasty.controller.CreateVolume, create_request(name, **more))
        assert begun.acquire(timeout=10)
    assert len(hasty.volumes()) == 3
    when_deleted(hasty, dataset.volume_id)
    assert hasty.volumes() == []
    assert keys_of(s3_server, s3_bucket) == ["data/a"]


def _when_ready(driver: Client, request: Any) -> Any:
    """Ask for a volume as the provisioner does, until it is there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            return driver.controller.CreateVolume(request).volume
        except grpc.RpcError as error:
            if Code(error.code()) is not Code.ABORTED:
                raise
            time.sleep(0.05)
    raise AssertionError("it never was ready")


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_sources_that_do_not_exist(driver: Client, s3_bucket: str) -> None:
    for source, named in (
        (from_snapshot("none-exist-id"), "none-exist-id"),
        (from_volume("fake-vol-id"), "fake-vol-id"),
        (from_volume("../x"), "../x"),
    ):
        request = create_request("a", bucket=s3_bucket, volume_content_source=source)
        code, text = driver.refused(driver.controller.CreateVolume, request)
        assert code is Code.NOT_FOUND
        assert named in text
    for source in (from_snapshot(""), from_volume("")):
        request = create_request("a", bucket=s3_bucket, volume_content_source=source)
        assert driver.refused(driver.controller.CreateVolume, request)[0] is Code.INVALID_ARGUMENT
    assert driver.volumes() == []


def test_a_source_lies_in_the_bucket_of_the_class(driver: Client, dataset: Any, s3_server: S3Server) -> None:
    other = s3_server.create_bucket("another-bucket")
    request = create_request("a", bucket=other, volume_content_source=from_volume(dataset.volume_id))
    code, text = driver.refused(driver.controller.CreateVolume, request)
    assert code is Code.INVALID_ARGUMENT
    assert "class of the same bucket" in text
    s3_server.client().delete_bucket(Bucket=other)


def test_a_limit_below_the_snapshot_is_out_of_range(driver: Client, dataset: Any, s3_bucket: str) -> None:
    snapshot = driver.snapshot("snap", dataset.volume_id)
    request = create_request("a", bucket=s3_bucket, limit=2, volume_content_source=from_snapshot(snapshot.snapshot_id))
    assert driver.refused(driver.controller.CreateVolume, request)[0] is Code.OUT_OF_RANGE


def test_the_same_name_from_elsewhere_is_refused(driver: Client, dataset: Any, s3_bucket: str) -> None:
    one, two = driver.snapshot("one", dataset.volume_id), driver.snapshot("two", dataset.volume_id)
    driver.create("a", bucket=s3_bucket, volume_content_source=from_snapshot(one.snapshot_id))
    for more in ({"volume_content_source": from_snapshot(two.snapshot_id)}, {}):
        code, _ = driver.refused(driver.controller.CreateVolume, create_request("a", bucket=s3_bucket, **more))
        assert code is Code.ALREADY_EXISTS


def test_requests_of_snapshots_are_checked(driver: Client, dataset: Any, s3_bucket: str) -> None:
    make = csi_pb2.CreateSnapshotRequest
    call = driver.controller.CreateSnapshot
    assert driver.refused(call, make(source_volume_id="x")) == (Code.INVALID_ARGUMENT, "name: must be given")
    assert driver.refused(call, make(name="x")) == (Code.INVALID_ARGUMENT, "source_volume_id: must be given")
    assert driver.refused(call, make(name="x", source_volume_id="v1-none"))[0] is Code.NOT_FOUND
    code, text = driver.refused(
        call, make(name="x", source_volume_id=dataset.volume_id, parameters={"compress": "yes"})
    )
    assert (code, "parameters.compress" in text) == (Code.INVALID_ARGUMENT, True)
    kubernetes = {"csi.storage.k8s.io/volumesnapshot/name": "x"}
    driver.snapshot("x", dataset.volume_id, parameters=kubernetes)
    other = driver.create("other", bucket=s3_bucket).volume
    assert driver.refused(call, make(name="x", source_volume_id=other.volume_id))[0] is Code.ALREADY_EXISTS
    delete, get = driver.controller.DeleteSnapshot, driver.controller.GetSnapshot
    assert driver.refused(delete, csi_pb2.DeleteSnapshotRequest())[0] is Code.INVALID_ARGUMENT
    delete(csi_pb2.DeleteSnapshotRequest(snapshot_id="reallyfakesnapshotid"))
    assert driver.refused(get, csi_pb2.GetSnapshotRequest())[0] is Code.INVALID_ARGUMENT
    assert driver.refused(get, csi_pb2.GetSnapshotRequest(snapshot_id="none-exist-id"))[0] is Code.NOT_FOUND


def test_lists_of_snapshots(driver: Client, dataset: Any, s3_bucket: str) -> None:
    other = driver.create("other", bucket=s3_bucket).volume
    ids = sorted(driver.snapshot(f"s{n}", dataset.volume_id).snapshot_id for n in range(5))
    alone = driver.snapshot("alone", other.volume_id).snapshot_id

    def listed(**more: Any) -> tuple[list[str], str]:
        answer = driver.controller.ListSnapshots(csi_pb2.ListSnapshotsRequest(**more))
        return [entry.snapshot.snapshot_id for entry in answer.entries], answer.next_token

    assert listed() == (sorted([*ids, alone]), "")
    assert listed(source_volume_id=dataset.volume_id) == (ids, "")
    assert listed(snapshot_id=alone) == ([alone], "")
    assert listed(snapshot_id=alone, source_volume_id=dataset.volume_id) == ([], "")
    assert listed(snapshot_id="none-exist-id") == ([], "")
    assert listed(source_volume_id="fake-vol-id") == ([], "")
    first, token = listed(max_entries=2, source_volume_id=dataset.volume_id)
    rest, end = listed(starting_token=token, source_volume_id=dataset.volume_id)
    assert (first + rest, end) == (ids, "")
    call = driver.controller.ListSnapshots
    assert driver.refused(call, csi_pb2.ListSnapshotsRequest(starting_token="x"))[0] is Code.ABORTED


def test_a_snapshot_outlives_the_volume_of_a_dataset(
    driver: Client, dataset: Any, s3_server: S3Server, s3_bucket: str
) -> None:
    snapshot = driver.snapshot("snap", dataset.volume_id)
    driver.delete(dataset.volume_id)
    volume = driver.create(
        "restored", bucket=s3_bucket, capacity=1 << 30, volume_content_source=from_snapshot(snapshot.snapshot_id)
    ).volume
    driver.controller.DeleteSnapshot(csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id))
    driver.delete(volume.volume_id)
    assert keys_of(s3_server, s3_bucket) == sorted([*OBJECTS, "elsewhere"])
