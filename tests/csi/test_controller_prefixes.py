"""Prefixes of claims, credentials of calls, being killed in between: what is made, and what is taken away."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.errors import AccessDenied
from cachefs.store.admin import BucketAdmin
from csi.buckets import Buckets
from csi.controller import Controller
from csi.records import VOLUMES, FileRecords
from csi.status import Code
from csi.v1 import csi_pb2
from csi.volumes import volume_id_of
from tests.csi.rig import Client, create_request, keys_of, own, put, served, when_deleted
from tests.support.fault_proxy import Fault, FaultProxy


def test_a_claim_gets_a_prefix_of_its_own_which_goes_with_it(
    driver: Client, s3_server: S3Server, s3_bucket: str
) -> None:
    put(s3_server, s3_bucket, "pvcs/ns/c2/other", "pvcs/ns/c-sibling", "elsewhere")
    volume = driver.create("a", **own(s3_bucket, "ns", "c", prefix="pvcs")).volume
    assert volume.volume_context["prefix"] == "pvcs/ns/c/"
    assert "pathTemplate" not in volume.volume_context
    assert not any(key.startswith("csi.storage") for key in volume.volume_context)
    assert "pvcs/ns/c/" in keys_of(s3_server, s3_bucket), "the marker says that it is there"
    put(s3_server, s3_bucket, *(f"pvcs/ns/c/{n}/{n}" for n in range(20)))
    driver.delete(volume.volume_id)
    assert keys_of(s3_server, s3_bucket) == ["elsewhere", "pvcs/ns/c-sibling", "pvcs/ns/c2/other"]
    driver.delete(volume.volume_id)


def test_objects_that_were_there_before_are_never_deleted(driver: Client, s3_server: S3Server, s3_bucket: str) -> None:
    put(s3_server, s3_bucket, "ns/c/precious")
    volume = driver.create("a", **own(s3_bucket, "ns", "c")).volume
    assert volume.volume_context["prefix"] == "ns/c/"
    driver.delete(volume.volume_id)
    assert keys_of(s3_server, s3_bucket) == ["ns/c/precious"]
    assert driver.volumes() == []


def test_two_claims_never_get_one_prefix(driver: Client, s3_server: S3Server, s3_bucket: str) -> None:
    driver.create("a", **own(s3_bucket, "team-a", "data", pathTemplate="${pvc.name}"))
    for name, more in (
        ("b", own(s3_bucket, "team-b", "data", pathTemplate="${pvc.name}")),
        ("c", own(s3_bucket, "data", "deeper")),
    ):
        code, text = driver.refused(driver.controller.CreateVolume, create_request(name, **more))
        assert code is Code.FAILED_PRECONDITION
        assert "team-a/data" in text
    assert len(driver.volumes()) == 1


def test_a_claim_that_is_made_anew_after_retain_keeps_its_objects(
    driver: Client, s3_server: S3Server, s3_bucket: str
) -> None:
    retained = driver.create("pv-1", **own(s3_bucket, "ns", "c")).volume
    put(s3_server, s3_bucket, "ns/c/model")
    again = driver.create("pv-2", **own(s3_bucket, "ns", "c")).volume
    assert again.volume_context == retained.volume_context
    driver.delete(retained.volume_id)  # somebody cleans up the released volume
    assert "ns/c/model" in keys_of(s3_server, s3_bucket)
    driver.delete(again.volume_id)
    assert "ns/c/model" in keys_of(s3_server, s3_bucket), "it had objects when the second claim came"


def test_a_claim_that_is_made_anew_waits_until_the_former_is_deleted(
    hasty: Client, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never gets what a deletion has not come to yet."""
    go_on, delete = threading.Event(), BucketAdmin.delete

    def slow(self: BucketAdmin, keys: Iterable[str]) -> int:
        assert go_on.wait(20)
        return delete(self, keys)

    former = hasty.create("pv-1", **own(s3_bucket, "ns", "c")).volume
    put(s3_server, s3_bucket, "ns/c/model")
    monkeypatch.setattr(BucketAdmin, "delete", slow)
    deletion = csi_pb2.DeleteVolumeRequest(volume_id=former.volume_id)
    assert hasty.refused(hasty.controller.DeleteVolume, deletion)[0] is Code.ABORTED
    request = create_request("pv-2", **own(s3_bucket, "ns", "c"))
    code, text = hasty.refused(hasty.controller.CreateVolume, request)
    assert code is Code.ABORTED
    assert "ns/c" in text
    assert former.volume_id in text
    go_on.set()
    when_deleted(hasty, former.volume_id)
    volume = hasty.controller.CreateVolume(request).volume
    assert keys_of(s3_server, s3_bucket) == ["ns/c/"]
    when_deleted(hasty, volume.volume_id)
    assert keys_of(s3_server, s3_bucket) == []


def test_without_the_names_of_the_claim_there_is_no_prefix(driver: Client, s3_bucket: str) -> None:
    request = create_request("a", bucket=s3_bucket, pathTemplate="${pvc.namespace}/${pvc.name}")
    code, text = driver.refused(driver.controller.CreateVolume, request)
    assert code is Code.INVALID_ARGUMENT
    assert "--extra-create-metadata" in text


@pytest.mark.parametrize("name", ["..", ".", "a/../../b", "x\n"])
def test_no_name_leads_out_of_the_prefix(driver: Client, s3_server: S3Server, s3_bucket: str, name: str) -> None:
    code, _ = driver.refused(driver.controller.CreateVolume, create_request("a", **own(s3_bucket, "ns", name)))
    assert code is Code.INVALID_ARGUMENT
    assert keys_of(s3_server, s3_bucket) == []


def test_credentials_come_with_each_call(
    tmp_path: Path, records: FileRecords, buckets: Buckets, s3_server: S3Server, s3_bucket: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A controller without keys of its own; and no key is ever in a log line or an error."""
    keys = {"accessKeyId": s3_server.access_key, "secretAccessKey": s3_server.secret_key}
    wrong = {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": "wrong-secret-key"}
    controller = Controller(records, dataclasses.replace(buckets, environment={}))
    with served(tmp_path / "csi.sock", [controller]) as client:
        order = own(s3_bucket, "ns", "c", authSource="secret")
        code, text = client.refused(client.controller.CreateVolume, create_request("a", **order, secrets=wrong))
        assert code is Code.UNAUTHENTICATED
        assert "wrong-secret-key" not in text
        volume = client.create("a", **order, secrets=keys).volume
        assert not any(key in str(volume) for key in keys.values() if key != "test")
        assert client.refused(
            client.controller.DeleteVolume, csi_pb2.DeleteVolumeRequest(volume_id=volume.volume_id)
        ) == (
            Code.INVALID_ARGUMENT,
            "secrets: must be given with authSource 'secret': name them in the class (provisioner-secret-name)",
        )
        client.delete(volume.volume_id, keys)
        assert client.volumes() == []
    controller.close()
    assert "CreateVolume" in caplog.text
    assert s3_server.secret_key not in caplog.text
    assert "wrong-secret-key" not in caplog.text
    assert keys_of(s3_server, s3_bucket) == []


def test_a_dataset_needs_no_secrets_of_the_provisioner(driver: Client, s3_bucket: str) -> None:
    volume = driver.create("a", bucket=s3_bucket, authSource="secret").volume
    driver.delete(volume.volume_id)


def test_who_may_only_read_is_told_so_and_leaves_no_record(
    driver: Client, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> NoReturn:
        raise AccessDenied("these credentials may not write")

    request = create_request("a", **own(s3_bucket, "ns", "c"))
    with monkeypatch.context() as patched:
        patched.setattr(BucketAdmin, "put", refused)
        code, text = driver.refused(driver.controller.CreateVolume, request)
    assert (code, text) == (Code.PERMISSION_DENIED, "these credentials may not write")
    assert driver.volumes() == []
    volume = driver.controller.CreateVolume(request).volume
    driver.delete(volume.volume_id)
    assert keys_of(s3_server, s3_bucket) == []


@pytest.mark.parametrize(("status", "code"), [(507, "XMinioStorageFull"), (403, "QuotaExceeded")])
def test_a_store_without_room_is_said_at_once(
    driver: Client, s3_server: S3Server, s3_bucket: str, status: int, code: str
) -> None:
    with FaultProxy.before(s3_server.endpoint_url) as proxy:
        proxy.add(Fault(kind="other", status=status, code=code))
        request = create_request("a", **own(s3_bucket, "ns", "c"), endpoint=proxy.endpoint_url)
        began = time.monotonic()
        found, text = driver.refused(driver.controller.CreateVolume, request)
        assert time.monotonic() - began < 3
    assert found is Code.RESOURCE_EXHAUSTED
    assert "has no room for 'ns/c/'" in text
    assert code in text


def test_a_controller_without_keys_says_where_they_come_from(
    tmp_path: Path, records: FileRecords, s3_server: S3Server, s3_bucket: str
) -> None:
    nobody = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/x", "AWS_SHARED_CREDENTIALS_FILE": "/x"}
    controller = Controller(records, Buckets(S3Config(endpoint_url=s3_server.endpoint_url), nobody))
    with closing(controller), served(tmp_path / "keyless.sock", [controller]) as client:
        request = create_request("a", **own(s3_bucket, "ns", "c"))
        code, text = client.refused(client.controller.CreateVolume, request)
        assert code is Code.UNAUTHENTICATED
        assert "authSource 'node'" in text
        assert "--" not in text
        volume = client.create("b", bucket=s3_bucket).volume  # a dataset: the nodes may have keys
        asked = csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id)
        condition = client.controller.ControllerGetVolume(asked).status.volume_condition
        assert not condition.abnormal
        assert "the nodes report what they see" in condition.message
        assert "authSource 'node'" in condition.message


# -- killed in between ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process had ended there."""


def test_create_and_delete_go_on_where_they_were_killed(
    driver: Client, records: FileRecords, buckets: Buckets, s3_server: S3Server, s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    request = create_request("a", **own(s3_bucket, "ns", "c"))
    controller = Controller(records, buckets)

    def killed(*_: object, **__: object) -> NoReturn:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(BucketAdmin, "put", killed)
        with pytest.raises(Killed):
            controller.CreateVolume(request, None)
    assert records.page(VOLUMES)[0][1]["state"] == "making"
    volume = driver.controller.CreateVolume(request).volume
    assert records.page(VOLUMES)[0][1]["owned"], "its marker was written by us, whoever finds it"
    delete = FileRecords.delete

    def killed_at_last(self: FileRecords, kind: str, record_id: str) -> bool:
        return killed() if kind == VOLUMES else delete(self, kind, record_id)

    with monkeypatch.context() as patched:
        patched.setattr(FileRecords, "delete", killed_at_last)
        with pytest.raises(Killed):
            controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume.volume_id), None)
    code, text = driver.refused(driver.controller.CreateVolume, request)
    assert (code, "is being deleted" in text) == (Code.ABORTED, True)
    driver.delete(volume.volume_id)
    controller.close()
    assert driver.volumes() == []
    assert keys_of(s3_server, s3_bucket) == []


def test_one_call_at_a_time_for_a_volume(driver: Client, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    check = BucketAdmin.check

    def slow(self: BucketAdmin, prefix: str) -> None:
        inside.set()
        assert go_on.wait(20)
        check(self, prefix)

    monkeypatch.setattr(BucketAdmin, "check", slow)
    request = create_request("a", bucket=s3_bucket)
    first = driver.controller.CreateVolume.future(request)
    assert inside.wait(20)
    volume_id = volume_id_of("a")
    for call, other in (
        (driver.controller.CreateVolume, request),
        (driver.controller.DeleteVolume, csi_pb2.DeleteVolumeRequest(volume_id=volume_id)),
    ):
        code, text = driver.refused(call, other)
        assert code is Code.ABORTED
        assert volume_id in text
    monkeypatch.setattr(BucketAdmin, "check", check)
    driver.create("b", bucket=s3_bucket)  # another volume does not wait
    go_on.set()
    assert first.result(20).volume.volume_id == volume_id


@pytest.mark.expect_warnings("DeleteVolume")
def test_a_record_that_cannot_be_read_deletes_nothing(
    driver: Client, tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    volume = driver.create("a", **own(s3_bucket, "ns", "c")).volume
    put(s3_server, s3_bucket, "ns/c/x")
    path = tmp_path / "state" / VOLUMES / f"{volume.volume_id}.json"
    for text in ("", "{", '{"format": 1, "record": {"volume_id": "x"}}', '{"format": 99, "record": {}}'):
        path.write_text(text)
        code, said = driver.refused(
            driver.controller.DeleteVolume, csi_pb2.DeleteVolumeRequest(volume_id=volume.volume_id)
        )
        assert code is Code.INTERNAL
        assert "record" in said
    assert "ns/c/x" in keys_of(s3_server, s3_bucket)


def test_a_bucket_that_is_gone_takes_its_volumes_along(driver: Client, s3_server: S3Server) -> None:
    bucket = s3_server.create_bucket("soon-gone")
    volume = driver.create("a", **own(bucket, "ns", "c")).volume
    s3_server.client().delete_bucket(Bucket=bucket)
    driver.delete(volume.volume_id)
    assert driver.volumes() == []


def test_one_of_many_at_once_is_made_and_the_rest_find_it(driver: Client, s3_server: S3Server, s3_bucket: str) -> None:
    request = create_request("a", **own(s3_bucket, "ns", "c"))
    calls = [driver.controller.CreateVolume.future(request) for _ in range(20)]
    codes = [Code(call.code()) for call in calls]  # waits for each
    assert set(codes) <= {Code.OK, Code.ABORTED}
    assert Code.OK in codes
    (volume_id,) = driver.volumes()
    calls = [driver.controller.DeleteVolume.future(csi_pb2.DeleteVolumeRequest(volume_id=volume_id)) for _ in range(20)]
    assert {Code(call.code()) for call in calls} <= {Code.OK, Code.ABORTED}
    driver.delete(volume_id)
    assert driver.volumes() == []
    assert keys_of(s3_server, s3_bucket) == []


def test_two_hundred_volumes_at_once(driver: Client, s3_bucket: str) -> None:
    requests = [create_request(f"v{number}", bucket=s3_bucket, prefix=f"p{number % 7}") for number in range(200)]
    made = [driver.controller.CreateVolume.future(request) for request in requests]
    ids = sorted(call.result(60).volume.volume_id for call in made)
    assert driver.volumes() == ids
    assert len(set(ids)) == 200
    deleted = [driver.controller.DeleteVolume.future(csi_pb2.DeleteVolumeRequest(volume_id=each)) for each in ids]
    for call in deleted:
        call.result(60)
    assert driver.volumes() == []
