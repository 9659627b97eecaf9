"""Every call of the node service and every code it ends with, over the real socket; keeper and agent are not real."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachefs.runtime import mount_id
from csi.v1 import csi_pb2
from tests.csi.node_fixtures import FakeNode, fake
from tests.csi.node_rig import KEYS, capability, code, refusal

__all__ = ["fake"]

LONG = "x" * 300
SECRET = {"authSource": "secret"}


# -- what the node says of itself -------------------------------------------------------------------------------------


def test_the_node_says_what_it_is_called_and_where_it_is(fake: FakeNode) -> None:
    found = fake.plugin.node.NodeGetInfo(csi_pb2.NodeGetInfoRequest())
    assert (found.node_id, found.max_volumes_per_node) == ("node-a", 110)
    assert dict(found.accessible_topology.segments) == {"topology.kubernetes.io/zone": "zone-1"}


def test_the_node_says_what_it_offers(fake: FakeNode) -> None:
    found = fake.plugin.node.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest())
    names = {csi_pb2.NodeServiceCapability.RPC.Type.Name(each.rpc.type) for each in found.capabilities}
    assert names == {
        "STAGE_UNSTAGE_VOLUME", "GET_VOLUME_STATS", "VOLUME_CONDITION", "EXPAND_VOLUME", "VOLUME_MOUNT_GROUP",
        "SINGLE_NODE_MULTI_WRITER",
    }  # fmt: skip


# -- fields -----------------------------------------------------------------------------------------------------------

BLOCK = csi_pb2.VolumeCapability(
    block=csi_pb2.VolumeCapability.BlockVolume(),
    access_mode=csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY),
)
NO_TYPE = csi_pb2.VolumeCapability(access_mode=BLOCK.access_mode)
NO_MODE = csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume())
EXT4 = csi_pb2.VolumeCapability(
    mount=csi_pb2.VolumeCapability.MountVolume(fs_type="ext4"), access_mode=BLOCK.access_mode
)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("volume_id", "", "volume_id"),
        ("volume_id", LONG, "volume_id"),
        ("volume_id", "a\nb", "volume_id"),
        ("volume_capability", None, "volume_capability"),
        ("volume_capability", BLOCK, "volume_capability.block"),
        ("volume_capability", NO_TYPE, "volume_capability.access_type"),
        ("volume_capability", NO_MODE, "volume_capability.access_mode"),
        ("volume_capability", EXT4, "volume_capability.mount.fs_type"),
        ("volume_capability", capability(group="staff"), "volume_capability.mount.volume_mount_group"),
        ("volume_capability", capability(group="4294967296"), "volume_capability.mount.volume_mount_group"),
        ("volume_capability", capability(flags=("cache-size=1GiB",)), "cache-size"),
        ("volume_capability", capability(flags=("nonsense",)), "nonsense"),
        ("volume_context", {}, "volume_context.bucket"),
        ("volume_context", {"bucket": "b-1", "buckets": "x"}, "volume_context.buckets"),
        ("volume_context", {"bucket": "b-1", "authSource": "pod", "roleArn": "r"}, "pod.namespace"),
        ("volume_context", {"bucket": "b-1", **SECRET}, "accessKeyId"),
    ],
)
def test_a_field_that_cannot_be_is_named(fake: FakeNode, field: str, value: Any, named: str) -> None:
    volume = fake.volume()
    volume.stage(
        **({"volume_context": value} if field == "volume_context" and "buckets" not in value and value else {})
    )
    got, text = refusal(volume.publish, **{field: value})
    assert got == "INVALID_ARGUMENT"
    assert named in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("path", "named"),
    [("", "must be given"), ("pods/x", "absolute"), ("/etc", "below"), ("/../../etc", ".."), ("/a\0b", "NUL")],
)
def test_paths_have_to_be_kubelets(fake: FakeNode, path: str, named: str) -> None:
    volume = fake.volume()
    inside = f"{fake.settings.kubelet_dir}{path}" if path.startswith(("/..", "/a")) else path
    got, text = refusal(volume.stage, staging_target_path=inside)
    assert (got, named in text, "staging_target_path" in text) == ("INVALID_ARGUMENT", True, True), text
    got, text = refusal(volume.publish, target_path=inside)
    assert (got, named in text, "target_path" in text) == ("INVALID_ARGUMENT", True, True), text


def test_the_root_of_the_kubelet_itself_is_no_target(fake: FakeNode) -> None:
    assert code(fake.volume().stage, staging_target_path=fake.settings.kubelet_dir) == "INVALID_ARGUMENT"


# -- stage, publish and back ------------------------------------------------------------------------------------------


def test_the_life_of_a_volume(fake: FakeNode) -> None:
    volume = fake.volume()
    volume.stage()
    first, second = volume.publish("a"), volume.publish("b")
    assert fake.keeper.targets("v1") == {str(first), str(second)}
    (mount,) = fake.keeper.mounts.values()
    assert all(target["read_only"] for target in mount["targets"])
    volume.unpublish("a")
    assert code(volume.unstage) == "FAILED_PRECONDITION"
    volume.unpublish("b")
    assert fake.keeper.targets("v1") == set()
    volume.unstage()
    assert fake.keeper.mounts == {}
    assert not first.exists()


def test_every_call_can_be_repeated(fake: FakeNode) -> None:
    volume = fake.volume(parameters=SECRET, secrets=KEYS)
    for _ in range(3):
        volume.stage()
    for _ in range(3):
        volume.publish()
    assert len(fake.keeper.mounts) == 1
    assert len(fake.keeper.targets("v1")) == 1
    for _ in range(3):
        volume.unpublish()
    for _ in range(3):
        volume.unstage()
    assert fake.keeper.mounts == {}
    assert fake.credential_files() == {}


def test_what_is_not_there_can_be_taken_away(fake: FakeNode) -> None:
    volume = fake.volume("never-seen")
    volume.unpublish()
    volume.unstage()


def test_a_volume_that_is_not_staged_cannot_be_published(fake: FakeNode) -> None:
    volume = fake.volume()
    assert refusal(volume.publish) == (
        "FAILED_PRECONDITION",
        "the volume is not staged on this node: call NodeStageVolume first",
    )
    assert code(volume.publish, staging_target_path="") == "FAILED_PRECONDITION"
    volume.stage()
    assert code(volume.publish, staging_target_path=f"{volume.staging}-2") == "FAILED_PRECONDITION"


@pytest.mark.parametrize("source", ["secret", "pod"])
def test_neither_can_one_that_has_its_mount_made_by_the_publish_call(fake: FakeNode, source: str) -> None:
    role = {"roleArn": "arn:aws:iam::1:role/r"} if source == "pod" else {}
    volume = fake.volume(parameters={"authSource": source, **role}, secrets=KEYS)
    assert code(volume.publish) == "FAILED_PRECONDITION"


def test_other_parameters_for_what_is_there_are_refused(fake: FakeNode) -> None:
    volume = fake.volume()
    volume.stage()
    volume.publish()
    other = {"bucket": "bucket-2"}
    assert code(volume.stage, volume_context=other) == "ALREADY_EXISTS"
    assert code(volume.stage, volume_capability=capability("SINGLE_NODE_WRITER")) == "ALREADY_EXISTS"
    assert code(volume.stage, group="7") == "ALREADY_EXISTS"
    assert code(volume.publish, volume_context=other) == "ALREADY_EXISTS"
    assert code(volume.publish, readonly=True) == "ALREADY_EXISTS"
    assert code(volume.publish, volume_capability=capability("SINGLE_NODE_WRITER")) == "ALREADY_EXISTS"
    assert code(volume.publish, group="7") == "ALREADY_EXISTS"
    assert code(volume.publish, "pod-2", volume_context=other) == "ALREADY_EXISTS"
    assert code(volume.publish, volume_capability=capability(flags=("negative-ttl=1s",))) == "ALREADY_EXISTS"
    assert code(volume.stage, staging_target_path=f"{volume.staging}-2") == "FAILED_PRECONDITION"
    volume.publish()


def test_a_volume_that_has_grown_is_the_same(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"cachefs.csi.k8s.io/capacity": "1000"})
    volume.stage()
    volume.parameters["cachefs.csi.k8s.io/capacity"] = "2000"
    volume.stage()
    volume.publish()


def test_the_target_of_another_volume_is_left_alone(fake: FakeNode) -> None:
    one, two = fake.volume("v1"), fake.volume("v2")
    one.stage()
    two.stage()
    target = str(one.publish())
    assert code(two.publish, target_path=target) == "ALREADY_EXISTS"
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v2", target_path=target)
    assert code(fake.plugin.node.NodeUnpublishVolume, request) == "FAILED_PRECONDITION"
    assert target in fake.keeper.targets("v1")


@pytest.mark.parametrize(
    "mode",
    [
        "SINGLE_NODE_WRITER", "SINGLE_NODE_READER_ONLY", "SINGLE_NODE_MULTI_WRITER", "MULTI_NODE_READER_ONLY",
        "MULTI_NODE_SINGLE_WRITER", "MULTI_NODE_MULTI_WRITER",
    ],
)  # fmt: skip
def test_pods_of_a_node_share_a_volume(fake: FakeNode, mode: str) -> None:
    volume = fake.volume(mode=mode)
    volume.stage()
    volume.publish("a")
    volume.publish("b")
    assert len(fake.keeper.mounts) == 1


def test_read_write_once_pod_is_for_one_pod(fake: FakeNode) -> None:
    volume = fake.volume(mode="SINGLE_NODE_SINGLE_WRITER")
    volume.stage()
    volume.publish("a")
    volume.publish("a")
    got, text = refusal(volume.publish, "b")
    assert got == "FAILED_PRECONDITION"
    assert "ReadWriteOncePod" in text
    volume.unpublish("a")
    volume.publish("b")


@pytest.mark.parametrize("other", ["MULTI_NODE_MULTI_WRITER", "SINGLE_NODE_MULTI_WRITER"])
def test_the_one_pod_has_it_alone_whatever_others_say(fake: FakeNode, other: str) -> None:
    volume = fake.volume(mode="SINGLE_NODE_SINGLE_WRITER")
    volume.stage()
    volume.publish("a")
    for _ in range(2):
        got, text = refusal(volume.publish, "b", volume_capability=capability(other))
        assert (got, "ReadWriteOncePod" in text) == ("FAILED_PRECONDITION", True), text
        fake.restart_plugin()
        volume = fake.volume(mode="SINGLE_NODE_SINGLE_WRITER")
    volume.unpublish("a")
    volume.publish("b", volume_capability=capability(other))
    assert code(volume.publish, "a") == "FAILED_PRECONDITION"


def test_two_pods_cannot_both_be_the_only_one(fake: FakeNode) -> None:
    volume = fake.volume(mode="SINGLE_NODE_SINGLE_WRITER")
    volume.stage()
    with ThreadPoolExecutor(8) as threads:
        codes = Counter(threads.map(lambda pod: code(volume.publish, f"pod-{pod}"), range(8)))
    assert codes["OK"] == 1
    assert set(codes) <= {"OK", "FAILED_PRECONDITION", "ABORTED"}
    assert len(fake.keeper.targets("v1")) == 1


def test_a_group_has_a_mount_of_its_own(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"gid": "5", **SECRET}, secrets=KEYS)
    volume.stage(group="100")
    volume.publish("a", group="100")
    assert len(fake.keeper.mounts) == 1
    volume.publish("b", group="200", secrets={})
    volume.publish("c")
    assert sorted(plan["config"]["fuse"]["gid"] for plan in fake.keeper.plans.values()) == [5, 100, 200]
    assert len({frozenset(found.items()) for found in fake.keeper.environments.values()}) == 1
    for pod in "bc":
        volume.unpublish(pod)
    assert len(fake.keeper.mounts) == 1
    assert len(fake.credential_files()) == 1
    volume.unpublish("a")
    volume.unstage()
    assert fake.credential_files() == {}


# -- inline volumes ---------------------------------------------------------------------------------------------------

INLINE = {"csi.storage.k8s.io/ephemeral": "true"}


def test_an_inline_volume_lives_as_long_as_its_pod(fake: FakeNode) -> None:
    volume = fake.volume("csi-1234", SECRET, secrets=KEYS)
    target = volume.publish(context=INLINE, staging_target_path="")
    volume.publish(context=INLINE, staging_target_path="")
    assert fake.keeper.targets("csi-1234") == {str(target)}
    volume.unpublish()
    assert fake.keeper.mounts == {}
    assert fake.credential_files() == {}
    assert not target.exists()


def test_an_inline_volume_says_what_its_secret_lacks(fake: FakeNode) -> None:
    volume = fake.volume("csi-1", SECRET, secrets={"accessKeyId": "only"})
    got, text = refusal(volume.publish, context=INLINE, staging_target_path="")
    assert got == "INVALID_ARGUMENT"
    assert "secretAccessKey" in text
    assert fake.keeper.mounts == {}


# -- who does not answer ----------------------------------------------------------------------------------------------


def test_a_node_without_keeper_says_so(fake: FakeNode) -> None:
    volume = fake.volume()
    volume.stage()
    fake.keeper.stop()
    for call in (volume.stage, volume.publish, volume.unpublish, volume.unstage, lambda: volume.stats(volume.staging)):
        got, text = refusal(call)
        assert got == "UNAVAILABLE"
        assert "cachefs-keeper" in text
        assert "node-a" in text
    fake.keeper.start()
    volume.publish()


def test_a_node_without_node_service_says_so_and_serves_what_is_there(fake: FakeNode) -> None:
    volume = fake.volume()
    volume.stage()
    fake.keeper.has_runner = False
    volume.publish()
    got, text = refusal(fake.volume("v2").stage)
    assert (got, "cachefs-node" in text) == ("UNAVAILABLE", True)
    assert len(fake.keeper.mounts) == 1


def test_a_node_without_agent_says_so_at_once(fake: FakeNode) -> None:
    fake.agent.stop()
    began = time.monotonic()
    got, text = refusal(fake.volume(parameters=SECRET, secrets=KEYS).stage)
    assert (got, "cachefs-node" in text) == ("UNAVAILABLE", True)
    assert time.monotonic() - began < 2
    assert fake.keeper.mounts == {}
    assert fake.credential_files() == {}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("BucketNotFound", "NOT_FOUND"),
        ("CredentialsError", "UNAUTHENTICATED"),
        ("AccessDenied", "PERMISSION_DENIED"),
        ("StorageUnavailable", "UNAVAILABLE"),
    ],
)
def test_a_bucket_that_cannot_be_listed_is_never_mounted(fake: FakeNode, kind: str, expected: str) -> None:
    fake.agent.refuse = (kind, "the store says why")
    volume = fake.volume(parameters=SECRET, secrets=KEYS)
    assert refusal(volume.stage) == (expected, "the store says why")
    assert fake.keeper.mounts == {}
    assert fake.credential_files() == {}
    fake.agent.refuse = None
    volume.stage()


@pytest.mark.expect_warnings("NodeStageVolume")
def test_a_mount_that_cannot_be_made_leaves_nothing(fake: FakeNode) -> None:
    volume = fake.volume(parameters=SECRET, secrets=KEYS)
    fake.keeper.failures["mount"] = ("MountError", "the kernel says no")
    assert refusal(volume.stage) == ("INTERNAL", "the kernel says no")
    fake.keeper.failures.clear()
    assert fake.keeper.mounts == {}
    assert fake.credential_files() == {}
    volume.stage()


@pytest.mark.parametrize("state", ["failed", "starting"])
def test_a_mount_that_does_not_serve_is_asked_for_again(fake: FakeNode, state: str) -> None:
    volume = fake.volume(parameters={"authSource": "secret"}, secrets=KEYS)
    volume.stage()
    volume.publish("a")
    (mount,) = fake.keeper.mounts.values()
    for call in (lambda: volume.publish("b"), volume.stage):
        mount["state"] = state
        before = fake.keeper.calls["mount"]
        call()
        assert fake.keeper.calls["mount"] == before + 1
        assert mount["state"] == "serving"
    fake.keeper.failures["mount"] = ("unavailable", "not served within 60 s")
    mount["state"] = state
    assert code(volume.publish, "c") == "UNAVAILABLE"
    assert len(fake.credential_files()) == 1


# -- many at once -----------------------------------------------------------------------------------------------------


def test_a_hundred_publishes_of_one_volume_at_once(fake: FakeNode) -> None:
    volume = fake.volume()
    volume.stage()
    began = time.monotonic()
    with ThreadPoolExecutor(100) as threads:
        codes = Counter(threads.map(lambda pod: code(volume.publish, f"pod-{pod}"), range(100)))
    took_s = time.monotonic() - began
    assert codes == {"OK": 100}
    assert took_s < 5
    with ThreadPoolExecutor(100) as threads:
        codes = Counter(threads.map(lambda pod: code(volume.unpublish, f"pod-{pod}"), range(100)))
    assert codes == {"OK": 100}
    volume.unstage()
    assert fake.keeper.mounts == {}


def test_calls_for_one_volume_take_turns(fake: FakeNode) -> None:
    fake.keeper.mount_s = 0.5
    volume = fake.volume()
    staging = threading.Thread(target=volume.stage)
    staging.start()
    time.sleep(0.2)
    got = {name: refusal(call) for name, call in (("stage", volume.stage), ("unstage", volume.unstage))}
    got["publish"] = refusal(volume.publish)
    assert code(fake.volume("another").unpublish) == "OK"
    staging.join()
    assert {name: found for name, (found, _) in got.items()} == dict.fromkeys(got, "ABORTED")
    assert "v1" in got["stage"][1]
    volume.publish()


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_many_volumes(fake: FakeNode, count: int) -> None:
    volumes = [fake.volume(f"v{number}", SECRET, secrets=KEYS) for number in range(count)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda volume: volume.stage(), volumes))
        list(threads.map(lambda volume: volume.publish(), volumes))
        assert len(fake.keeper.mounts) == count
        assert all(volume.stats(volume.staging).usage for volume in volumes[:10])
        fake.restart_plugin()
        again = [fake.volume(f"v{number}", SECRET, secrets=KEYS) for number in range(count)]
        list(threads.map(lambda volume: volume.unpublish(), again))
        list(threads.map(lambda volume: volume.unstage(), again))
    assert fake.keeper.mounts == {}
    assert fake.credential_files() == {}


# -- after a restart --------------------------------------------------------------------------------------------------


def test_another_plugin_goes_on_where_the_last_one_was(fake: FakeNode) -> None:
    fake.volume("staged").stage()
    fake.volume("staged").publish()
    lazy = fake.volume("lazy", SECRET, secrets=KEYS)
    lazy.stage(secrets={})
    inline = fake.volume("csi-1", SECRET, secrets=KEYS)
    inline.publish(context=INLINE)
    fake.restart_plugin()
    assert code(fake.volume("staged").stage, volume_context={"bucket": "other"}) == "ALREADY_EXISTS"
    fake.volume("staged").publish()
    fake.volume("staged").publish("another-pod")
    fake.volume("lazy", SECRET, secrets=KEYS).publish()
    for volume_id, pod in (("staged", "pod-1"), ("staged", "another-pod"), ("lazy", "pod-1"), ("csi-1", "pod-1")):
        fake.volume(volume_id).unpublish(pod)
    for volume_id in ("staged", "lazy"):
        fake.volume(volume_id).unstage()
    assert fake.keeper.mounts == {}
    assert fake.credential_files() == {}


def test_the_start_of_a_plugin_removes_what_nobody_needs(fake: FakeNode, caplog: pytest.LogCaptureFixture) -> None:
    kept = fake.volume("kept", SECRET, secrets=KEYS)
    kept.stage()
    inline = fake.volume("csi-1", SECRET, secrets=KEYS)
    inline.publish(context=INLINE)
    (gone,) = (mount for mount in fake.keeper.mounts.values() if mount["labels"]["volume"] == "csi-1")
    gone["targets"].clear()  # the pod went while no plugin was there
    gone["started_at"] -= 1000
    orphan = Path(fake.settings.credentials_dir, "v-" + "0" * 32)
    orphan.mkdir()
    (orphan / "credentials").write_text("[default]\n")
    fresh = Path(fake.settings.credentials_dir, "v-" + "1" * 32)  # of a plugin that this one is to follow
    fresh.mkdir()
    for path in Path(fake.settings.credentials_dir).iterdir():
        if path != fresh:
            os.utime(path, (0, 0))
    with caplog.at_level("INFO"):
        fake.restart_plugin()
    assert [mount["labels"]["volume"] for mount in fake.keeper.mounts.values()] == ["kept"]
    assert len(fake.credential_files()) == 1
    assert not orphan.exists()
    assert fresh.exists()
    assert fake.keeper.calls["reconcile"] == 2
    assert "1 mounts are there; repaired 0, dropped 0, detached 0, released 1, removed 1" in caplog.text


@pytest.mark.expect_warnings("nothing was repaired yet")
def test_a_plugin_that_starts_before_the_keeper_repairs_later(fake: FakeNode) -> None:
    fake.keeper.stop()
    fake.restart_plugin()
    assert code(fake.volume().stage) == "UNAVAILABLE"
    fake.keeper.start()
    fake.volume().stage()
    fake.volume().publish()
    assert fake.keeper.calls["reconcile"] == 2


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_what_is_not_there(fake: FakeNode) -> None:
    volume = fake.volume()
    for path in ("some/path", volume.staging, volume.target("a")):
        assert code(volume.stats, path) == "NOT_FOUND"
        assert code(volume.expand, path, 5) == "NOT_FOUND"
    assert refusal(volume.stats, "") == ("INVALID_ARGUMENT", "volume_path: must be given")
    volume.stage()
    assert code(volume.stats, "some/path") == "NOT_FOUND"
    assert code(fake.volume("v2").stats, volume.staging) == "NOT_FOUND"


def test_a_volume_grows(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"cachefs.csi.k8s.io/capacity": "1000"})
    volume.stage()
    target = str(volume.publish())
    assert volume.stats(target).usage[0].total == 1000
    assert volume.expand(target, 5000).capacity_bytes == 5000
    assert volume.stats(volume.staging).usage[0].total == 5000
    fake.restart_plugin()
    assert fake.volume().stats(target).usage[0].total == 5000


def test_a_volume_never_shrinks(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"cachefs.csi.k8s.io/capacity": "1000"})
    volume.stage()
    target = str(volume.publish())
    assert volume.expand(target, 5000).capacity_bytes == 5000
    assert volume.expand(target, 2000).capacity_bytes == 5000, "a call that comes late"
    assert volume.stats(target).usage[0].total == 5000
    assert code(volume.expand, target, 100, limit=4000) == "OUT_OF_RANGE"


def test_the_condition_says_what_is_wrong(fake: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi.node_stats.SHARED_S", -1.0)
    volume = fake.volume()
    volume.stage()
    (mount,) = fake.keeper.mounts.values()

    def condition() -> tuple[bool, str]:
        found = volume.stats(volume.staging)
        assert len(found.usage) == 2
        return found.volume_condition.abnormal, found.volume_condition.message

    assert condition() == (False, "mounted; its worker has no connection to the agent of the node now")
    fake.agent.mounts = {mount_id(mount["mountpoint"]): {"volume_id": "w"}}
    fake.agent.volumes = {"w": {"origin": {"failing": False}}}
    assert condition() == (False, "mounted, and the bucket answers")
    fake.agent.volumes["w"]["origin"] = {"failing": True, "last_error": "AccessDenied: go away"}
    assert condition() == (True, "the bucket does not answer: AccessDenied: go away")
    mount["state"], mount["last_crash"] = "failed", "SIGSEGV"
    abnormal, text = condition()
    assert abnormal
    assert "SIGSEGV" in text
    mount["state"] = "restarting"
    assert condition() == (False, "the mount is restarting; readers wait")
    mount["state"] = "serving"
    fake.agent.stop()
    abnormal, text = condition()
    assert abnormal
    assert "agent" in text


def test_a_mount_that_stays_away_is_abnormal(fake: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi.node_stats.RESTART_S", 0.1)
    volume = fake.volume()
    volume.stage()
    (mount,) = fake.keeper.mounts.values()
    mount["state"], fake.keeper.has_runner = "waiting", False
    assert not volume.stats(volume.staging).volume_condition.abnormal
    time.sleep(0.15)
    found = volume.stats(volume.staging).volume_condition
    assert found.abnormal
    assert "node service of node-a is not running" in found.message
