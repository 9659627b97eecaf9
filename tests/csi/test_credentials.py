"""Credentials of volumes: what calls bring, what is written, who may use what is read with them."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs.errors import MountError
from csi.credentials import TOKENS_KEY, CredentialFiles, Credentials, from_request
from csi.parameter_table import AuthSource
from csi.parameters import parse
from csi.status import Refused
from tests.csi.fake_sts import FakeSts
from tests.csi.kube_node import KubeNode
from tests.csi.node_fixtures import FakeNode, fake
from tests.csi.node_rig import KEYS, KubeletVolume, code, refusal
from tests.fuse.memory_s3 import MemoryS3
from tests.support.machine import wait_until
from tests.support.programs import errno_name

__all__ = ["fake"]

ROLE = "arn:aws:iam::123456789012:role/reader"
IN_AN_HOUR = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
POD_SPEC = parse({"bucket": "bucket-1", "authSource": "pod", "roleArn": ROLE, "stsRegion": "eu-west-1"})
SECRET_SPEC = parse({"bucket": "bucket-1", "authSource": "secret"})


def tokens(token: str, *, audience: str = "sts.amazonaws.com", until: str = IN_AN_HOUR) -> str:
    """Return what kubelet says of the tokens of a pod."""
    return json.dumps({audience: {"token": token, "expirationTimestamp": until}})


def pod(account: str, *, token: str = "", namespace: str = "team", uid: str = "uid-1", **more: str) -> dict[str, str]:
    """Return what kubelet adds to the context of a publish call."""
    prefix = "csi.storage.k8s.io"
    return {
        f"{prefix}/pod.name": f"pod-of-{account}",
        f"{prefix}/pod.namespace": namespace,
        f"{prefix}/pod.uid": uid,
        f"{prefix}/serviceAccount.name": account,
        TOKENS_KEY: tokens(token or f"token-of-{account}", **more),
    }


def brought(spec: Any, *, secrets: dict[str, str] | None = None, context: dict[str, str] | None = None) -> Credentials:
    """Return what a publish call brings."""
    found = from_request(spec, secrets or {}, context or {}, at_publish=True)
    assert found is not None
    return found


# -- what calls bring -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("accessKeyId", "secretAccessKey", "sessionToken"),
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    ],
)
def test_keys_of_a_secret(names: tuple[str, str, str]) -> None:
    found = brought(SECRET_SPEC, secrets=dict(zip(names, ("AK", "sk=/+", "tok"), strict=True)))
    assert found.files["credentials"].decode() == (
        "[default]\naws_access_key_id = AK\naws_secret_access_key = sk=/+\naws_session_token = tok\n"
    )
    assert found.environment("/d")["AWS_SHARED_CREDENTIALS_FILE"] == "/d/credentials"
    assert found.environment("/d")["AWS_EC2_METADATA_DISABLED"] == "true"


@pytest.mark.parametrize(
    ("secrets", "named"),
    [
        ({}, "accessKeyId"),
        ({"accessKeyId": "AK"}, "secretAccessKey"),
        ({"secretAccessKey": "sk"}, "accessKeyId"),
        ({"accessKeyId": " ", "secretAccessKey": "sk"}, "accessKeyId"),
        ({"accessKeyId": "AK\n[other]", "secretAccessKey": "sk"}, "accessKeyId"),
        ({"accessKeyId": "AK", "secretAccessKey": "s\nrole_arn = x"}, "secretAccessKey"),
    ],
)
def test_keys_that_cannot_be_used_are_named_and_not_shown(secrets: dict[str, str], named: str) -> None:
    with pytest.raises(Refused, match=named) as caught:
        brought(SECRET_SPEC, secrets=secrets)
    assert not any(value.strip() and value in str(caught.value) for value in secrets.values())


def test_who_has_both_keys_is_who_he_was() -> None:
    identities = {
        brought(SECRET_SPEC, secrets={"accessKeyId": key, "secretAccessKey": secret}).identity
        for key, secret in (("A", "1"), ("A", "1"), ("A", "2"), ("B", "1"))
    }
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"csi.storage.k8s.io/pod.namespace": ""}, "pod.namespace"),
        ({"csi.storage.k8s.io/serviceAccount.name": ""}, "serviceAccount.name"),
        ({TOKENS_KEY: ""}, "tokenRequests"),
        ({TOKENS_KEY: "{secret-text"}, "is not JSON"),
        ({TOKENS_KEY: '["secret-text"]'}, "sts.amazonaws.com"),
        ({TOKENS_KEY: tokens("secret-text", audience="other")}, "sts.amazonaws.com"),
        ({TOKENS_KEY: tokens("secret-text\nand more")}, "characters"),
    ],
)
def test_what_a_pod_lacks_is_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(Refused, match=named) as caught:
        brought(POD_SPEC, context={**pod("alice"), **change})
    assert "secret-text" not in str(caught.value)


def test_the_token_of_a_pod_may_come_as_a_secret() -> None:
    context = pod("alice")
    found = brought(POD_SPEC, secrets={TOKENS_KEY: context.pop(TOKENS_KEY)}, context=context)
    assert found.files == {"token": b"token-of-alice"}
    environment = found.environment("/d")
    assert environment["AWS_ROLE_ARN"] == ROLE
    assert environment["AWS_WEB_IDENTITY_TOKEN_FILE"] == "/d/token"
    assert environment["AWS_DEFAULT_REGION"] == "eu-west-1"
    assert environment["AWS_ROLE_SESSION_NAME"] == "team.alice"


def test_identities_of_pods() -> None:
    others = [
        brought(POD_SPEC, context=pod("alice")),
        brought(POD_SPEC, context=pod("bob")),
        brought(POD_SPEC, context=pod("alice", namespace="other")),
        brought(parse({"bucket": "bucket-1", "authSource": "pod", "roleArn": f"{ROLE}2"}), context=pod("alice")),
    ]
    assert len({found.identity for found in others}) == 4
    assert brought(POD_SPEC, context=pod("alice", token="another", uid="uid-2")).identity == others[0].identity


def test_credentials_are_in_no_text() -> None:
    assert "sk" not in repr(brought(SECRET_SPEC, secrets={"accessKeyId": "AK", "secretAccessKey": "sk"}))


# -- files ------------------------------------------------------------------------------------------------------------


def keys(key: str) -> Credentials:
    return Credentials(AuthSource.SECRET, "i", {"credentials": key.encode()})


def test_files_are_for_one_user_alone(tmp_path: Path) -> None:
    files = CredentialFiles(str(tmp_path / "c"), 65532 if os.geteuid() == 0 else os.geteuid())
    before = os.umask(0)
    try:
        assert files.write("v-1", keys("a"), now=0.0)
    finally:
        os.umask(before)
    directory, file = tmp_path / "c/v-1", tmp_path / "c/v-1/credentials"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o711
    if os.geteuid() == 0:
        assert directory.stat().st_uid == file.stat().st_uid == 65532
    assert [path.name for path in directory.iterdir()] == ["credentials"]


def test_a_file_is_replaced_only_by_another(tmp_path: Path) -> None:
    files = CredentialFiles(str(tmp_path), os.geteuid())
    files.write("v-1", keys("a"), now=0.0)
    inode = (tmp_path / "v-1/credentials").stat().st_ino
    assert not files.write("v-1", keys("a"), now=0.0)
    assert (tmp_path / "v-1/credentials").stat().st_ino == inode
    assert files.write("v-1", keys("b"), now=0.0)
    assert (tmp_path / "v-1/credentials").stat().st_ino != inode
    assert (tmp_path / "v-1/credentials").read_bytes() == b"b"


def test_links_in_the_directory_of_another_user_are_not_followed(tmp_path: Path) -> None:
    files = CredentialFiles(str(tmp_path / "c"), os.geteuid())
    files.write("v-1", keys("a"), now=0.0)
    bait = tmp_path / "bait"
    bait.write_bytes(b"precious")
    (tmp_path / "c/v-1/credentials").unlink()
    (tmp_path / "c/v-1/credentials").symlink_to(bait)
    files.write("v-1", keys("b"), now=0.0)
    assert bait.read_bytes() == b"precious"
    assert (tmp_path / "c/v-1/credentials").read_bytes() == b"b"
    (tmp_path / "c/v-2").symlink_to(tmp_path)
    with pytest.raises(MountError):
        files.write("v-2", keys("b"), now=0.0)


@pytest.mark.parametrize("name", ["../x", "", "a/b", "V", "x" * 65])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(MountError):
        CredentialFiles(str(tmp_path), os.geteuid()).write(name, keys("a"), now=0.0)


def token(text: str, *, uid: str = "one", expires_at: float = 3600.0) -> Credentials:
    return Credentials(AuthSource.POD, "i", {"token": text.encode()}, pod_uid=uid, expires_at=expires_at)


def test_pods_of_one_identity_do_not_renew_each_others_token_all_the_time(tmp_path: Path) -> None:
    files = CredentialFiles(str(tmp_path), os.geteuid())
    assert files.write("v-1", token("a"), now=0.0)
    assert files.write("v-1", token("b"), now=0.0)  # the same pod: always
    assert not files.write("v-1", token("c", uid="two"), now=0.0)
    assert files.write("v-1", token("d", uid="two", expires_at=7200.0), now=0.0)  # much longer
    assert not files.write("v-1", token("e", uid="one"), now=6000.0)
    assert files.write("v-1", token("f", uid="one", expires_at=7300.0), now=7000.0)  # the one there ends soon
    assert not files.write("v-1", token("g", uid="two", expires_at=7300.0), now=0.0)
    files.forget_writer("v-1")
    assert files.write("v-1", token("h", uid="two", expires_at=7300.0), now=0.0)  # its pod is gone


# -- secrets in calls -------------------------------------------------------------------------------------------------


def test_keys_are_written_once_and_rewritten_when_they_change(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"authSource": "secret"}, secrets=KEYS)
    volume.stage()
    (name,) = fake.credential_files()
    (environment,) = fake.keeper.environments.values()
    assert environment["AWS_SHARED_CREDENTIALS_FILE"] == f"{fake.settings.credentials_dir}/{name}"
    volume.publish(secrets={})
    asked = len(fake.agent.attached)
    volume.publish(secrets={"accessKeyId": "NEW", "secretAccessKey": "new"})
    assert b"= NEW\n" in fake.credential_files()[name]
    assert len(fake.agent.attached) == asked + 1  # the agent uses them from now on
    volume.publish(secrets={"accessKeyId": "NEW", "secretAccessKey": "new"})
    assert len(fake.agent.attached) == asked + 1
    assert KEYS["secretAccessKey"].encode() not in fake.keeper.raw
    volume.unpublish()
    volume.unstage()
    assert fake.credential_files() == {}


def test_keys_may_come_with_the_publish_call_only(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"authSource": "secret"})
    volume.stage()
    volume.stage()
    assert fake.keeper.mounts == {}
    got, text = refusal(volume.publish)
    assert (got, "accessKeyId" in text) == ("INVALID_ARGUMENT", True)
    volume.publish("a", secrets=KEYS)
    volume.publish("b", secrets=KEYS)
    assert len(fake.keeper.mounts) == 1
    assert code(volume.stage, volume_context={"bucket": "bucket-2", "authSource": "secret"}) == "ALREADY_EXISTS"
    assert code(volume.unstage) == "FAILED_PRECONDITION"
    volume.unpublish("a")
    volume.unpublish("b")
    assert fake.keeper.mounts == {}
    volume.unstage()
    assert fake.credential_files() == {}


def test_a_volume_that_goes_leaves_its_client_to_those_with_the_same_keys(fake: FakeNode) -> None:
    one, two = (fake.volume(name, {"authSource": "secret"}, secrets=KEYS) for name in ("v1", "v2"))
    one.stage()
    two.stage()
    two.unstage()
    last = fake.agent.attached[-1].environment["AWS_SHARED_CREDENTIALS_FILE"]
    assert Path(last).exists()
    assert last in {each["AWS_SHARED_CREDENTIALS_FILE"] for each in fake.keeper.environments.values()}


def test_keys_are_in_no_log(fake: FakeNode, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    volume = fake.volume(parameters={"authSource": "secret"}, secrets=KEYS)
    volume.stage()
    volume.publish(secrets={**KEYS, "sessionToken": "session-token-text"})
    role = {"authSource": "pod", "roleArn": ROLE}
    of_pod = fake.volume("v2", role)
    of_pod.stage()
    of_pod.publish(context=pod("alice", token="token-of-alice-text"))
    code(of_pod.publish, "b", context={**pod("alice"), TOKENS_KEY: "{token-of-alice-text"})
    for text in (*KEYS.values(), "session-token-text", "token-of-alice-text"):
        assert text not in caplog.text
        assert text.encode() not in fake.keeper.raw


# -- identities -------------------------------------------------------------------------------------------------------


def test_pods_with_different_identities_share_nothing(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"authSource": "pod", "roleArn": ROLE})
    volume.stage()
    assert fake.keeper.mounts == {}
    volume.publish("a1", context=pod("alice", uid="1"))
    volume.publish("a2", context=pod("alice", uid="2"))
    volume.publish("b", context=pod("bob", uid="3"))
    assert len(fake.keeper.mounts) == 2
    assert len({plan["config"]["s3"]["identity"] for plan in fake.keeper.plans.values()}) == 2
    assert len({each["AWS_WEB_IDENTITY_TOKEN_FILE"] for each in fake.keeper.environments.values()}) == 2
    assert code(volume.publish, "b", context=pod("alice")) == "ALREADY_EXISTS"
    volume.unpublish("a1")
    assert len(fake.keeper.mounts) == 2
    volume.unpublish("a2")
    volume.unpublish("b")
    assert fake.keeper.mounts == {}
    volume.unstage()
    assert fake.credential_files() == {}


def test_a_token_is_renewed_by_the_next_publish(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"authSource": "pod", "roleArn": ROLE})
    volume.stage()
    volume.publish(context=pod("alice", token="first"))
    volume.publish(context=pod("alice", token="second"))
    assert [text for name, text in fake.credential_files().items() if name.endswith("/token")] == [b"second"]


# -- on a real node ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[MemoryS3]:
    """A store that takes one access key, whichever the test says."""
    with MemoryS3() as made:
        for number in range(60):
            made.store.put(f"d/{number}", b"x" * 1000)
        yield made


@pytest.fixture(scope="module")
def node() -> Iterator[KubeNode]:
    """A node without keys of its own."""
    with KubeNode({"AWS_EC2_METADATA_DISABLED": "true"}) as made:
        yield made


def of_store(store: MemoryS3, **more: str) -> dict[str, str]:
    return {"bucket": store.bucket, "endpoint": store.endpoint_url, "metadataTTL": "1h", "prefetch": "off", **more}


def pair(key: str) -> dict[str, str]:
    return {"accessKeyId": key, "secretAccessKey": f"secret-of-{key}"}


def read(place: Path, number: int) -> str:
    """Read a file that nobody has read; returns the name of the error."""
    return errno_name(lambda: (place / f"d/{number}").read_bytes())


def abnormal(volume: KubeletVolume, place: Path) -> bool:
    return bool(volume.stats(str(place)).volume_condition.abnormal)


@pytest.mark.fuse
def test_keys_are_rotated_under_a_running_pod(node: KubeNode, store: MemoryS3) -> None:
    store.access_key = ""
    volumes = [node.volume(f"v-rotates-{number}", of_store(store, authSource="secret")) for number in range(2)]
    places = []
    for volume in volumes:
        volume.stage(secrets=pair("OLD"))
        places.append(volume.publish(secrets=pair("OLD")))
    assert [len(list((place / "d").iterdir())) for place in places] == [60, 60]
    store.access_key = "NEW/"
    for number, volume in enumerate(volumes):
        volume.publish(secrets=pair("NEW"))  # kubelet calls again and again
        wait_until(lambda n=number: read(places[n], n) == "", 5, "the new keys are used")  # type: ignore[misc]
    for number in range(2, 6):
        assert [read(place, number) for place in places] == ["", ""]
    volumes[1].unpublish()
    volumes[1].unstage()  # the newest of both, whose files the agent had
    store.access_key = "NEWER/"
    volumes[0].publish(secrets=pair("NEWER"))
    wait_until(lambda: read(places[0], 6) == "", 5, "and those after them")
    store.access_key = "REVOKED/"
    wait_until(lambda: read(places[0], 7) != "" and abnormal(volumes[0], places[0]), 10, "the condition says so")
    assert "bucket" in volumes[0].stats(str(places[0])).volume_condition.message
    volumes[0].unpublish()
    volumes[0].unstage()
    assert "secret-of-" not in node.full_log()


@pytest.mark.fuse
def test_two_pods_with_different_identities(node: KubeNode, store: MemoryS3) -> None:
    store.access_key = "alice/"
    with FakeSts() as sts:
        volume = node.volume("v-pods", of_store(store, authSource="pod", roleArn=ROLE, stsEndpoint=sts.url))
        volume.stage()
        place = volume.publish("a", context=pod("alice", uid="1"))
        assert read(place, 0) == ""
        before = len(sts.asked)
        volume.publish("a", context=pod("alice", uid="1", token="token-of-alice-2"))
        wait_until(lambda: read(place, 10 + len(sts.asked)) == "" and len(sts.asked) > before, 10, "the new token")
        assert sts.tokens[-1] == "token-of-alice-2"
        got, text = refusal(volume.publish, "b", context=pod("bob", uid="2"))  # whom the store does not know
        assert got in ("UNAUTHENTICATED", "PERMISSION_DENIED"), text
        assert not Path(volume.target("b")).exists()
        got, text = refusal(volume.publish, "c", context=pod("mallory", uid="3", token="forged"))  # nor does the STS
        assert got == "UNAUTHENTICATED", text
        store.access_key = ""
        other = volume.publish("b", context=pod("bob", uid="2"))
        assert read(other, 0) == ""
        assert os.stat(place).st_dev != os.stat(other).st_dev
        assert sorted({question["RoleArn"] for question in sts.asked}) == [ROLE]
        for name in "ab":
            volume.unpublish(name)
        volume.unstage()
    assert "token-of-" not in node.full_log()


@pytest.mark.fuse
def test_a_node_without_keys_never_lends_any(node: KubeNode, store: MemoryS3) -> None:
    got, text = refusal(node.volume("v-none", of_store(store)).stage)
    assert got == "UNAUTHENTICATED", text
    anonymous: KubeletVolume = node.volume("v-anonymous", of_store(store, authSource="anonymous"))
    store.access_key = ""
    anonymous.stage()
    assert read(anonymous.publish(), 20) == ""
    anonymous.unpublish()
    anonymous.unstage()
