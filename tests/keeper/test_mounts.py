"""What the keeper does when nothing goes wrong, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachefs.keeper.client import KeeperClient, KeeperError
from tests.keeper.rig import CONTENT, KubeletNode
from tests.support.machine import detach, mounts_below, wait_until
from tests.support.mounts import Bucket


@pytest.fixture
def volume(bucket: Bucket) -> str:
    """A source with one file."""
    bucket.put("a/file", CONTENT)
    return bucket.url


def refusal(call: Callable[[], object]) -> KeeperError:
    with pytest.raises(KeeperError) as caught:
        call()
    return caught.value


def options_of(place: Path) -> list[str]:
    line = next(
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split(" ")[4] == str(place)
    )
    return line.split(" ")[5].split(",")


def test_a_volume_from_its_mount_to_its_end(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    node.mount("vol", volume)  # the same again
    targets = [node.target(name) for name in ("one", "two", "three")]
    for target in targets:
        for _ in range(2):
            node.client.bind("vol", str(target), read_only=True)
        assert node.read(target / "a/file") == CONTENT
        assert {"ro", "nosuid", "nodev"} <= set(options_of(target))
    devices = {device for place, device, _ in mounts_below(node.root) if Path(place) in targets}
    assert len(devices) == 1  # one mount
    assert len(node.processes("cachefs.mount.worker")) == 1
    state = node.state("vol")
    assert [(bind.path, bind.read_only) for bind in state.targets] == [(str(target), True) for target in targets]
    assert (state.state, state.source, state.restarts, state.labels) == ("serving", volume, 0, {"volume": "vol"})

    assert refusal(lambda: node.client.unmount("vol")).kind == "busy"
    for target in targets:
        assert node.client.unbind(str(target))
        assert not target.exists()
        assert not node.client.unbind(str(target))
    assert node.client.unmount("vol")
    assert not node.client.unmount("vol")
    wait_until(lambda: not node.status().mounts, 5, "the mount is gone")
    wait_until(lambda: not node.processes("cachefs.mount.worker"), 5, "the worker ends")
    assert node.mounted() == []
    assert os.listdir(node.run / "keeper/records") == []
    assert os.listdir(node.run / "keeper/mounts") == []
    assert os.listdir(node.run / "node/mounts") == []


def test_other_settings_under_the_same_key_are_refused(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    wrong = refusal(
        lambda: node.client.mount("vol", node.plan(volume), environment={}, fingerprint="other", labels={}, timeout_s=5)
    )
    assert wrong.kind == "exists"


def test_a_volume_that_cannot_be_served_says_why_and_leaves_nothing(node: KubeletNode, bucket: Bucket) -> None:
    def mount(plan: dict[str, Any]) -> None:
        node.client.mount("vol", plan, environment={}, fingerprint="f", labels={}, timeout_s=20)

    assert refusal(lambda: mount({"config": {}})).kind == "usage"
    broken = node.plan(bucket.url)
    broken["config"]["metadata"]["consistency"] = "nonsense"
    wrong = refusal(lambda: mount(broken))
    assert wrong.kind == "MountError"
    assert "nonsense" in wrong.text
    wait_until(lambda: not node.status().mounts and not node.mounted(), 5, "nothing is left")
    node.mount("vol", bucket.url)


def test_two_who_ask_for_the_same_get_one_mount(node: KubeletNode, volume: str) -> None:
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            node.mount("vol", volume)
            node.client.bind("vol", str(node.target(f"pod-{number}")), read_only=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(node.state("vol").targets) == 20
    assert len(node.processes("cachefs.mount.worker")) == 1
    assert node.read(node.target("pod-19") / "a/file") == CONTENT


def test_forced_unmount_takes_binds_along_and_open_files_are_served_on(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    target = node.target("one")
    node.client.bind("vol", str(target), read_only=True)
    with subprocess.Popen(
        ["python3", "-c", "import sys; f = open(sys.argv[1], 'rb'); print(); sys.stdin.read(1); print(len(f.read()))",
         str(target / "a/file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        holder.stdout.readline()
        assert node.client.unmount("vol", force=True)
        assert node.mounted() == []
        assert node.status().find("vol") is None
        assert [state.state for state in node.status().mounts] == ["unmounting"]
        node.mount("vol", volume, fingerprint="another")  # the key is free
        output, _ = holder.communicate(b"x", timeout=20)
        assert int(output) == len(CONTENT)
    wait_until(lambda: [state.fingerprint for state in node.status().mounts] == ["another"], 5, "the first one ends")


def test_a_mount_with_credentials_of_its_own_does_not_use_those_of_the_node(node: KubeletNode, volume: str) -> None:
    for name, secret in (("right", node.credentials["AWS_SECRET_ACCESS_KEY"]), ("wrong", "not-the-secret")):
        file = node.base / name
        key = node.credentials["AWS_ACCESS_KEY_ID"]
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        node.client.mount(
            name, node.plan(volume, identity=name), environment={"AWS_SHARED_CREDENTIALS_FILE": str(file)},
            fingerprint="f", labels={}, timeout_s=20,
        )  # fmt: skip
        node.client.bind(name, str(node.target(name)), read_only=True)
        worker = node.state(name).worker_pid
        environment = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
        assert [line for line in environment if line.startswith(b"AWS_")] == [
            f"AWS_SHARED_CREDENTIALS_FILE={file}".encode()
        ]
    assert node.read(node.target("right") / "a/file") == CONTENT
    refused = subprocess.run(["ls", str(node.target("wrong"))], capture_output=True, timeout=60, check=False)
    assert b"Permission denied" in refused.stderr


def test_labels_and_what_is_unknown(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    node.client.label("vol", {"pod": "a", "volume": None})
    assert node.state("vol").labels == {"pod": "a"}
    assert refusal(lambda: node.client.label("other", {})).kind == "missing"
    assert refusal(lambda: node.client.bind("other", str(node.target("x")), read_only=True)).kind == "missing"
    assert refusal(lambda: node.client.label("Not A Key", {})).kind == "usage"
    assert not node.client.unmount("other")


def test_paths_that_lead_elsewhere_are_refused(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    elsewhere = node.base / "elsewhere"
    elsewhere.mkdir()
    pods = node.root / "pods"
    pods.mkdir()
    (pods / "link").symlink_to(elsewhere)
    (pods / "file").write_text("")
    (pods / "real").mkdir()
    (pods / "real/target").symlink_to(elsewhere)
    for path in (
        str(elsewhere), f"{node.root}", f"{node.root}/pods/../../elsewhere/x", "pods/x", f"{pods}/link/x",
        f"{pods}/link", f"{pods}/real/target", f"{pods}/file/x", f"{pods}/file", f"{pods}//x", f"{pods}/x/", "/",
        f"{node.root}/plugins/cachefs.csi.k8s.io/mounts/vol", f"{node.root}/plugins/cachefs.csi.k8s.io/mounts/x", "",
        f"{node.root}/plugins/cachefs.csi.k8s.io/mounts/vol/a/file",
    ):  # fmt: skip
        wrong = refusal(lambda path=path: node.client.bind("vol", path, read_only=True))  # type: ignore[misc]
        assert wrong.kind == "usage", (path, wrong.text)
        with contextlib.suppress(KeeperError):
            assert not node.client.unbind(path), path
    assert (pods / "link").is_symlink()
    assert (pods / "real/target").is_symlink()
    assert list(elsewhere.iterdir()) == []
    assert len(node.mounted()) == 1
    inside = node.target("one")
    node.client.bind("vol", str(inside), read_only=True)
    assert refusal(lambda: node.client.bind("vol", f"{inside}/a", read_only=True)).kind == "usage"


def test_what_is_mounted_by_others_is_left_alone(node: KubeletNode, volume: str, bucket: Bucket) -> None:
    node.mount("vol", volume)
    node.mount("other", volume)
    target = node.target("one")
    target.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(target)], check=True)
    try:
        assert refusal(lambda: node.client.bind("vol", str(target), read_only=True)).kind == "exists"
        assert refusal(lambda: node.client.unbind(str(target))).kind == "exists"
    finally:
        detach(str(target))
    node.client.bind("other", str(target), read_only=True)
    assert refusal(lambda: node.client.bind("vol", str(target), read_only=True)).kind == "exists"
    (target.parent / "file").write_text("")
    node.client.unbind(str(target))
    assert (target.parent / "file").exists()


def test_a_mount_waits_for_a_node_service(make_node: Callable[..., KubeletNode], volume: str) -> None:
    node = make_node()
    node.start_keeper()
    began = time.monotonic()
    wrong = refusal(
        lambda: node.client.mount("vol", node.plan(volume), environment={}, fingerprint="f", labels={}, timeout_s=0.3)
    )
    assert wrong.kind == "unavailable"
    assert "node service" in wrong.text
    assert 0.3 <= time.monotonic() - began < 3
    assert node.mounted() == []
    waiting = threading.Thread(target=node.mount, args=["vol", volume])
    waiting.start()
    node.start_service()
    waiting.join(20)
    assert node.state("vol").state == "serving"


def test_no_keeper_says_what_to_look_at(tmp_path: Path) -> None:
    wrong = refusal(lambda: KeeperClient(str(tmp_path / "none.sock")).status())
    assert wrong.kind == "unavailable"
    assert "cachefs-keeper" in wrong.text


@pytest.mark.slow
def test_fifty_mounts(node: KubeletNode, volume: str) -> None:
    threads = [threading.Thread(target=node.mount, args=[f"v{number}", volume, "f", 60.0]) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(50):
        node.client.bind(f"v{number}", str(node.target(f"p{number}")), read_only=True)
    assert all(state.state == "serving" for state in node.status().mounts)
    assert len(node.mounted()) == 100
    assert node.read(node.target("p49") / "a/file") == CONTENT
    for number in range(50):
        node.client.unbind(str(node.target(f"p{number}")))
        assert node.client.unmount(f"v{number}")
    wait_until(lambda: not node.status().mounts, 10, "all are gone")
    wait_until(lambda: not node.processes("cachefs.mount.worker"), 10, "all workers have ended")
