"""The node service on a real node: keeper, agent, workers and kernel mounts, over a real S3 server."""

from __future__ import annotations

import hashlib
import os
import random
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.mount import mountinfo
from csi.v1 import csi_pb2
from peer.etcd import etcdrpc
from tests.csi.kube_node import KubeNode
from tests.csi.node_rig import CALL_S, KEYS, KubeletVolume, code, refusal
from tests.csi.rig import claim, create_request, keys_of
from tests.support.etcd_server import EtcdServer
from tests.support.machine import kill, stopped, wait_until
from tests.support.mounts import Bucket

pytestmark = pytest.mark.fuse

LARGE = random.Random(5).randbytes(6 << 20)
needs_memory = pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 << 30, reason="200 workers take 5 GiB"
)


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    """A bucket that nobody changes."""
    with Bucket.create(s3_server) as made:
        made.put("a/b.txt", b"hello")
        made.put("large", LARGE)
        made.fill({f"many/{number}": f"file {number}".encode() for number in range(40)})
        yield made


@pytest.fixture(scope="module")
def node(s3_server: S3Server) -> Iterator[KubeNode]:
    """A node that no test harms."""
    with KubeNode(s3_server.environment) as made:
        yield made


@pytest.fixture
def own_node(s3_server: S3Server) -> Iterator[KubeNode]:
    """A node that the test may harm."""
    with KubeNode(s3_server.environment) as made:
        yield made


def parameters(bucket: Bucket, **more: str) -> dict[str, str]:
    """Return what a volume of the bucket says."""
    return {"bucket": bucket.name, "endpoint": bucket.server.endpoint_url, **more}


def secrets_of(server: S3Server) -> dict[str, str]:
    """Return the keys of the server as a Secret has them."""
    return {"accessKeyId": server.access_key, "secretAccessKey": server.secret_key}


def give_back(volume: KubeletVolume, *pods: str) -> None:
    """Take a volume from its pods and from the node."""
    for pod in pods:
        volume.unpublish(pod)
    volume.unstage()


# -- what pods see ----------------------------------------------------------------------------------------------------


def test_pods_read_what_is_in_the_bucket_and_cannot_write(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-read", parameters(bucket))
    volume.stage()
    places = [volume.publish(f"pod-{number}", readonly=number == 1) for number in range(3)]
    for place in places:
        assert (place / "a/b.txt").read_bytes() == b"hello"
        assert sorted(each.name for each in place.iterdir()) == ["a", "large", "many"]
        with pytest.raises(OSError, match="Read-only"):
            (place / "new").write_bytes(b"")
    assert len({os.stat(place).st_dev for place in places}) == 1  # one mount
    give_back(volume, "pod-0", "pod-1", "pod-2")
    assert not any(place.exists() for place in places)
    assert [place for place in node.mounts() if "v-read" in place] == []


def device_mount_refs(path: str) -> list[str]:
    """Return what kubelet finds before it unstages a volume (GetMountRefs of k8s.io/mount-utils): the other places
    where the same directory of the same device is mounted. While there is one, it does not call NodeUnstageVolume.
    """
    mounts = mountinfo.mounts()
    own = next(each for each in reversed(mounts) if f"{path}/".startswith(each.mountpoint.rstrip("/") + "/"))
    root = str(Path(own.root, os.path.relpath(path, own.mountpoint)))
    same = (each for each in mounts if each.mount_id != own.mount_id and each.device == own.device)
    return [each.mountpoint for each in same if each.root == root]


def test_kubelet_would_unstage_what_is_unpublished(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-refs", parameters(bucket))
    volume.stage()
    Path(volume.staging).mkdir(parents=True, exist_ok=True)  # kubelet has made it
    assert device_mount_refs(volume.staging) == []
    place = volume.publish()
    assert (place / "a/b.txt").read_bytes() == b"hello"
    assert not volume.stats(volume.staging).volume_condition.abnormal
    assert len(device_mount_refs(str(place))) == 1, "the keeper's own: it would be found"
    volume.unpublish()
    assert device_mount_refs(volume.staging) == []
    volume.unstage()


def test_a_prefix_is_all_that_is_seen(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-prefix", parameters(bucket, prefix="a"))
    volume.stage()
    assert [each.name for each in volume.publish().iterdir()] == ["b.txt"]
    give_back(volume, "pod-1")


def test_a_sub_path_is_bound_by_the_kubelet(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-sub", parameters(bucket))
    volume.stage()
    place = volume.publish()
    inner = node.kubelet / "pods/pod-1/volume-subpaths/v-sub/container/0"
    inner.mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(place / "a"), str(inner)], check=True)
    try:
        assert (inner / "b.txt").read_bytes() == b"hello"
        volume.unpublish()  # the kubelet ends with the sub-path, but a lazy one may be late
        assert (inner / "b.txt").read_bytes() == b"hello"
    finally:
        subprocess.run(["umount", str(inner)], check=True)
    volume.unstage()


def test_groups_and_owners(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-group", parameters(bucket, uid="1001", fileMode="0440"))
    volume.stage(group="2000")
    one, two = volume.publish("pod-1", group="2000"), volume.publish("pod-2", group="3000")
    found = [os.stat(place / "a/b.txt") for place in (one, two)]
    assert [(each.st_uid, each.st_gid, each.st_mode & 0o777) for each in found] == [
        (1001, 2000, 0o440),
        (1001, 3000, 0o440),
    ]
    volume.unpublish("pod-2")
    assert (one / "a/b.txt").read_bytes() == b"hello"
    give_back(volume, "pod-1")


def test_mount_flags_reach_the_mount(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-flags", parameters(bucket), flags=("noexec", "gid=77", "metadata-ttl=5s"))
    volume.stage()
    place = volume.publish()
    line = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {place} " in line)
    assert "noexec" in line
    assert os.stat(place / "large").st_gid == 77
    give_back(volume, "pod-1")


def test_an_inline_volume(node: KubeNode, bucket: Bucket, s3_server: S3Server) -> None:
    volume = node.volume("csi-inline", parameters(bucket, authSource="secret"), secrets=secrets_of(s3_server))
    context = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "p"}
    place = volume.publish(context=context, staging_target_path="")
    assert (place / "a/b.txt").read_bytes() == b"hello"
    volume.unpublish()
    assert node.mounts() == []


# -- what is wrong with a volume is said at once ----------------------------------------------------------------------


def test_what_is_wrong_with_a_bucket_is_said_at_once(node: KubeNode, bucket: Bucket, s3_server: S3Server) -> None:
    missing = node.volume("v-missing", {**parameters(bucket), "bucket": "no-such-bucket"})
    wrong = node.volume("v-wrong", parameters(bucket, authSource="secret"), secrets={**KEYS})
    nowhere = node.volume("v-nowhere", {"bucket": "b-1", "endpoint": "http://127.0.0.1:1"})
    began = time.monotonic()
    codes = [refusal(volume.stage) for volume in (missing, wrong, nowhere)]
    assert time.monotonic() - began < 60
    assert [found for found, _ in codes] == ["NOT_FOUND", "UNAUTHENTICATED", "UNAVAILABLE"], codes
    assert "no-such-bucket" in codes[0][1]
    assert node.mounts() == []
    for key in KEYS.values():
        assert key not in codes[1][1]
        assert key not in node.full_log()


# -- how it is --------------------------------------------------------------------------------------------------------


def test_figures_and_condition(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-stats", parameters(bucket, **{"cachefs.csi.k8s.io/capacity": str(1 << 30)}))
    volume.stage()
    place = volume.publish()
    list(place.iterdir())
    found = volume.stats(str(place))
    assert [usage.unit for usage in found.usage] == [csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES]
    assert found.usage[0].total == 1 << 30
    assert found.usage[0].used >= len(LARGE)
    assert (found.volume_condition.abnormal, found.volume_condition.message) == (
        False,
        "mounted, and the bucket answers",
    )
    give_back(volume, "pod-1")


def test_a_mount_that_hangs_does_not_hang_the_plugin(own_node: KubeNode, bucket: Bucket) -> None:
    volume = own_node.volume("v-hangs", parameters(bucket))
    volume.stage()
    place = volume.publish()
    (worker,) = own_node.processes("worker")
    with stopped(worker):
        for _ in range(2):
            began = time.monotonic()
            found = volume.stats(str(place))
            assert time.monotonic() - began < 8
            assert found.volume_condition.abnormal
            assert "does not answer" in found.volume_condition.message
    wait_until(lambda: not volume.stats(str(place)).volume_condition.abnormal, 20, "the mount is well again")
    give_back(volume, "pod-1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start programs as somebody else")
def test_agent_and_workers_need_no_rights(bucket: Bucket, s3_server: S3Server) -> None:
    with KubeNode({"AWS_EC2_METADATA_DISABLED": "true"}, node_uid=65532) as node:
        volume = node.volume("v-user", parameters(bucket, authSource="secret"), secrets=secrets_of(s3_server))
        volume.stage()
        place = volume.publish()
        assert (place / "large").read_bytes() == LARGE
        assert os.stat(place / "large").st_uid == 0
        for role in ("node", "agent", "worker"):
            (pid,) = node.processes(role)
            assert os.stat(f"/proc/{pid}").st_uid == 65532
        files = [path for path in (node.base / "credentials").rglob("*") if path.is_file()]
        assert {(os.stat(path).st_uid, os.stat(path).st_mode & 0o777) for path in files} == {(65532, 0o600)}
        assert not volume.stats(str(place)).volume_condition.abnormal
        give_back(volume, "pod-1")


# -- many at once -----------------------------------------------------------------------------------------------------


def test_a_hundred_publishes_at_once_and_one_alone(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-many", parameters(bucket))
    volume.stage()
    began = time.monotonic()
    with ThreadPoolExecutor(100) as threads:
        codes = Counter(threads.map(lambda pod: code(volume.publish, f"pod-{pod}"), range(100)))
    took_s = time.monotonic() - began
    assert codes == {"OK": 100}
    assert took_s < 5
    alone_s = []
    for number in range(5):
        began = time.monotonic()
        volume.publish(f"one-more-{number}")
        alone_s.append(time.monotonic() - began)
    assert statistics.median(alone_s) < 0.05, alone_s
    assert (Path(volume.target("pod-99")) / "a/b.txt").read_bytes() == b"hello"
    pods = [*(f"pod-{number}" for number in range(100)), *(f"one-more-{number}" for number in range(5))]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda pod: volume.unpublish(pod), pods))
    volume.unstage()
    assert node.mounts() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=needs_memory)])
def test_many_volumes_on_one_node(own_node: KubeNode, bucket: Bucket, s3_server: S3Server, count: int) -> None:
    volumes = [
        own_node.volume(f"v{number}", parameters(bucket, authSource="secret"), secrets=secrets_of(s3_server))
        for number in range(count)
    ]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda volume: volume.stage(), volumes))
        for place in threads.map(lambda volume: volume.publish(), volumes):
            assert (place / "a/b.txt").read_bytes() == b"hello"
        assert len(own_node.mounts()) == 2 * count
        assert not any(threads.map(lambda each: each.stats(each.staging).volume_condition.abnormal, volumes))
        list(threads.map(lambda volume: give_back(volume, "pod-1"), volumes))
    assert own_node.mounts() == []
    wait_until(lambda: own_node.processes("worker") == [], 60, "all workers have ended")
    assert s3_server.secret_key not in own_node.full_log()


def test_a_volume_comes_and_goes_and_comes(node: KubeNode, bucket: Bucket) -> None:
    volume = node.volume("v-again", parameters(bucket))
    for _ in range(6):
        volume.stage()
        assert (volume.publish() / "a/b.txt").read_bytes() == b"hello"
        give_back(volume, "pod-1")


# -- survival ---------------------------------------------------------------------------------------------------------


class Reader:
    """Reads an open file over and over, past the kernel's pages, and notes what goes wrong."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._stop = threading.Event()
        self.rounds = 0
        self.faults: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        expected = hashlib.sha256(LARGE).digest()
        while not self._stop.is_set():
            digest = hashlib.sha256()
            try:
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                for start in range(0, len(LARGE), 1 << 20):
                    digest.update(os.pread(self._descriptor, 1 << 20, start))
            except OSError as error:
                self.faults.append(str(error))
                continue
            if digest.digest() != expected:
                self.faults.append("wrong bytes")
            self.rounds += 1

    def goes_on(self) -> None:
        """Return when it has read everything twice from now on."""
        now = self.rounds
        wait_until(lambda: self.rounds >= now + 2, 30, "the reader goes on")
        assert self.faults == []

    def end(self) -> None:
        """Stop it."""
        self._stop.set()
        self._thread.join()
        os.close(self._descriptor)


@pytest.mark.timeout(240)
def test_the_life_of_a_volume(s3_server: S3Server, s3_bucket: str) -> None:
    """From its claim to its end; nothing of it is left in the kernel, in memory, in the bucket or in etcd."""
    with EtcdServer() as etcd:
        options = (f"--etcd={etcd.endpoint}", "--cluster=life", "--peer-insecure", "--node-name=node-a")
        with KubeNode(s3_server.environment, mode="all", state="etcd", node_options=options) as node:
            live(node, s3_server, s3_bucket)
            assert keys_of(s3_server, s3_bucket) == []
            assert node.mounts() == []
            assert keys_of_etcd(etcd, "/cachefs-csi/") == []
            assert keys_of_etcd(etcd, "/cachefs/life/nodes/") != []
        assert keys_of_etcd(etcd, "") == []


def live(node: KubeNode, server: S3Server, bucket: str) -> None:
    """Make a volume, publish it to three pods, kill everything in turn while they read, and take it away."""
    controller = node.client.controller
    made = controller.CreateVolume(
        create_request(
            "pvc-1", bucket=bucket, endpoint=server.endpoint_url, prefix="claims", capacity=1 << 30,
            pathTemplate="${pvc.namespace}/${pvc.name}", parameters=claim("team", "set"),
        ),
        timeout=CALL_S,
    ).volume  # fmt: skip
    assert keys_of(server, bucket) == ["claims/team/set/"]
    server.client().put_object(Bucket=bucket, Key="claims/team/set/large", Body=LARGE)
    volume = node.volume(made.volume_id, dict(made.volume_context))
    volume.stage()
    pods = ["pod-1", "pod-2", "pod-3"]
    places = [volume.publish(pod) for pod in pods]
    with ExitStack() as stack:
        readers = [Reader(place / "large") for place in places]
        for reader in readers:
            stack.callback(reader.end)
        for role, start in (
            ("csi", node.start_plugin),
            ("worker", lambda: None),
            ("agent", lambda: None),
            ("node", node.start_node_service),
            ("keeper", node.start_keeper),
        ):
            harm(node, role, start)
            for reader in readers:
                reader.goes_on()
    volume = node.volume(made.volume_id, dict(made.volume_context))
    assert volume.publish("pod-4").joinpath("large").read_bytes() == LARGE
    assert not volume.stats(str(places[1])).volume_condition.abnormal
    give_back(volume, *pods, "pod-4")
    comes_back_larger(node, volume)
    node.client.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=made.volume_id), timeout=CALL_S)


def comes_back_larger(node: KubeNode, volume: KubeletVolume) -> None:
    """A volume that has grown is staged anew: the context of its PersistentVolume never changes, but its size has."""
    size = csi_pb2.CapacityRange(required_bytes=3 << 30)
    request = csi_pb2.ControllerExpandVolumeRequest(volume_id=volume.volume_id, capacity_range=size)
    node.client.controller.ControllerExpandVolume(request, timeout=CALL_S)
    wait_until(lambda: code(volume.stage) == "OK", CALL_S, "the node service has found the keeper")
    assert volume.stats(volume.staging).usage[0].total == 3 << 30
    volume.unstage()


def harm(node: KubeNode, role: str, start: Callable[[], object]) -> None:
    """Kill all processes of a kind, and start them again unless somebody does."""
    before = node.processes(role)
    for pid in before:
        kill(pid)
    start()
    node.wait_for(role, before)


def keys_of_etcd(etcd: EtcdServer, prefix: str) -> list[str]:
    """Return all keys that begin with a prefix; "": all that there are."""
    first, last = (prefix.encode(), prefix[:-1].encode() + b"0") if prefix else (b"\0", b"\0")
    with closing(etcd.client()) as client:
        request = etcdrpc.RangeRequest(key=first, range_end=last, keys_only=True)
        return [bytes(each.key).decode() for each in client.kvstub.Range(request, 5.0).kvs]


def test_a_plugin_that_is_killed_while_it_stages_can_stage_again(own_node: KubeNode, bucket: Bucket) -> None:
    volumes = [own_node.volume(f"v{number}", parameters(bucket)) for number in range(4)]
    threads = [threading.Thread(target=refusal, args=(volume.stage,)) for volume in volumes]
    for thread in threads:
        thread.start()
    time.sleep(0.15)
    own_node.kill("csi")
    for thread in threads:
        thread.join()
    own_node.start_plugin()
    for number in range(4):
        volume = own_node.volume(f"v{number}", parameters(bucket))
        volume.stage()
        assert (volume.publish() / "a/b.txt").read_bytes() == b"hello"
        give_back(volume, "pod-1")
    assert own_node.mounts() == []
