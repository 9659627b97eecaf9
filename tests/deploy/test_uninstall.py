"""Before an uninstall: the check that refuses while volumes are in use. After it: the sweep of the nodes."""

from __future__ import annotations

import http.server
import json
import mmap
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme
import yaml

from tests.deploy.chart import CHART, REPOSITORY, VERSIONS, mistakes_of, rendered

SCRIPT = CHART / "files/uninstall_check.py"
SWEEP = REPOSITORY / "deploy/kubernetes/sweep.yaml"
DRIVER = "cachefs.csi.k8s.io"
TOKEN = "token-of-the-account"
PVS, PODS = "/api/v1/persistentvolumes", "/api/v1/pods"
CONTENTS = "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents"


class Api:
    """A small HTTPS server that answers lists as the Kubernetes API does, in pages."""

    def __init__(self, folder: Path) -> None:
        self.lists: dict[str, list[dict[str, Any]]] = {PVS: [], PODS: []}
        self.asked: list[str] = []
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.crt")
        (folder / "token").write_text(TOKEN)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._answering())
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.address = f"https://127.0.0.1:{self._server.server_address[1]}"

    def _answering(self) -> type[http.server.BaseHTTPRequestHandler]:
        api = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                query = parse_qs(parts.query)
                api.asked.append(parts.path)
                status, body = 200, {}
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    status = 403
                elif parts.path not in api.lists:
                    status = 404
                else:
                    first, limit = int(query.get("continue", ["0"])[0]), int(query["limit"][0])
                    items = api.lists[parts.path][first : first + limit]
                    more = first + limit < len(api.lists[parts.path])
                    body = {"items": items, "metadata": {"continue": str(first + limit) if more else ""}}
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        return Answer

    def __enter__(self) -> Api:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with Api(tmp_path) as made:
        yield made


def check(address: str, account: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), DRIVER, address, str(account)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def volume(name: str, driver: str = DRIVER, phase: str = "Bound", **metadata: Any) -> dict[str, Any]:
    claim = {"namespace": "vision", "name": f"claim-{name}"}
    return {
        "metadata": {"name": name, **metadata},
        "spec": {"csi": {"driver": driver}, "claimRef": claim},
        "status": {"phase": phase},
    }


def pod(name: str, phase: str = "Running", driver: str = DRIVER) -> dict[str, Any]:
    volumes = [{"name": "x", "emptyDir": {}}, {"name": "y", "csi": {"driver": driver}}]
    return {
        "metadata": {"name": name, "namespace": "vision"},
        "spec": {"volumes": volumes},
        "status": {"phase": phase},
    }


def test_nothing_left(api: Api, tmp_path: Path) -> None:
    api.lists[PVS] = [volume("other", "ebs.csi.aws.com"), volume("kept", phase="Released"), {
        "metadata": {"name": "local"}, "spec": {"hostPath": {"path": "/x"}},
    }]  # fmt: skip
    api.lists[PODS] = [pod("ended", "Succeeded"), pod("other", driver="x.csi"), {
        "metadata": {"name": "none", "namespace": "a"}, "spec": {},
    }]  # fmt: skip
    done = check(api.address, tmp_path)
    assert (done.returncode, done.stdout) == (0, f"nothing uses {DRIVER}\n"), done.stderr
    assert api.asked == [PVS, PODS, CONTENTS]  # a cluster without snapshots answers 404


def test_what_is_left_is_named(api: Api, tmp_path: Path) -> None:
    api.lists[PVS] = [volume("pv-1"), volume("pv-2", phase="Released", deletionTimestamp="2026-01-01T00:00:00Z")]
    api.lists[PODS] = [pod("inline")]
    reference = {"namespace": "vision", "name": "snap"}
    for policy, wanted in (("Delete", reference), ("Retain", {})):
        spec = {"driver": DRIVER, "deletionPolicy": policy, "volumeSnapshotRef": wanted}
        api.lists.setdefault(CONTENTS, []).append({"metadata": {"name": policy.lower()}, "spec": spec})
    done = check(api.address, tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[1:] == [
        "  persistentvolume pv-1 of claim vision/claim-pv-1",
        "  persistentvolume pv-2, which is being deleted",
        "  pod vision/inline with an inline volume",
        "  volumesnapshot vision/snap",
    ]


@pytest.mark.parametrize(
    ("phase", "policy", "made_by", "waits"),
    [
        ("Released", "Delete", DRIVER, True), ("Failed", "Delete", DRIVER, True),
        ("Released", "Retain", DRIVER, False), ("Released", "Delete", "", False),
        ("Available", "Delete", DRIVER, False),
    ],
)  # fmt: skip
def test_a_volume_that_is_still_to_be_deleted_is_in_the_way(
    api: Api, tmp_path: Path, phase: str, policy: str, made_by: str, waits: bool
) -> None:
    """Its claim is gone, csi-provisioner has not asked yet, or was refused: what was made would stay for ever."""
    found = volume("pv-1", phase=phase, annotations={"pv.kubernetes.io/provisioned-by": made_by})
    found["spec"]["persistentVolumeReclaimPolicy"] = policy
    api.lists[PVS] = [found]
    done = check(api.address, tmp_path)
    assert done.returncode == (1 if waits else 0)
    assert ("persistentvolume pv-1, which is being deleted" in done.stdout) is waits


def test_many_are_counted_over_pages(api: Api, tmp_path: Path) -> None:
    api.lists[PVS] = [volume(f"pv-{number}") for number in range(1203)]
    done = check(api.address, tmp_path)
    assert done.returncode == 1
    assert "and 1183 more like this" in done.stdout
    assert api.asked.count(PVS) == 3


@pytest.mark.parametrize("trouble", ["token", "authority", "nobody", "missing"])
def test_what_cannot_be_asked_is_no_consent(api: Api, tmp_path: Path, trouble: str) -> None:
    address = api.address
    if trouble == "token":
        (tmp_path / "token").write_text("of somebody else")
    elif trouble == "authority":
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.crt")
    elif trouble == "missing":
        (tmp_path / "token").unlink()
    else:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            address = f"https://127.0.0.1:{unused.getsockname()[1]}"
    done = check(address, tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("the Kubernetes API could not be asked")
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_the_job_runs_this_script_before_anything_goes() -> None:
    hooks = [each for each in rendered("default") if "helm.sh/hook" in each["metadata"].get("annotations", {})]
    assert {each["kind"] for each in hooks} == {
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "Job",
    }
    assert {each["metadata"]["annotations"]["helm.sh/hook"] for each in hooks} == {"pre-delete"}
    weights = {each["kind"]: int(each["metadata"]["annotations"]["helm.sh/hook-weight"]) for each in hooks}
    assert weights["Job"] > max(weight for kind, weight in weights.items() if kind != "Job")
    [code] = [each["data"]["uninstall_check.py"] for each in hooks if each["kind"] == "ConfigMap"]
    assert code.strip() == SCRIPT.read_text(encoding="utf-8").strip()
    [job] = [each for each in hooks if each["kind"] == "Job"]
    [one] = job["spec"]["template"]["spec"]["containers"]
    assert one["command"] == ["python", "/check/uninstall_check.py", DRIVER]
    assert job["spec"]["backoffLimit"] == 0


# -- the sweep --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_sweep(version: str) -> None:
    assert mistakes_of(yaml.safe_load(SWEEP.read_text(encoding="utf-8")), version) == []


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """The directories of a node after an uninstall."""
    places = {name: str(tmp_path / name.lower()) for name in ("KUBELET", "RUNTIME", "SHM", "CACHE")}
    for path in places.values():
        os.makedirs(path)
    for path in (
        "runtime/keeper/x.json",
        "shm/cachefs-65532-abc/data",
        "shm/other/data",
        "cache/blocks",
        "kubelet/pods/a/note",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    return {**places, "DRIVER": DRIVER}


def sweep(places: dict[str, str]) -> subprocess.CompletedProcess[str]:
    spec = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    [one] = spec["initContainers"]
    assert {variable["name"] for variable in one["env"]} == set(places)
    return subprocess.run(
        one["command"], env={**os.environ, **places}, capture_output=True, text=True, check=False, timeout=20
    )


def test_the_sweep_leaves_what_is_not_ours(node: dict[str, str], tmp_path: Path) -> None:
    done = sweep(node)
    assert (done.returncode, done.stdout) == (0, "swept\n"), done.stderr
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"shm/other/data", "kubelet/pods/a/note"}
    assert sweep(node).returncode == 0  # and once more


def test_the_sweep_leaves_a_node_alone_that_is_in_use(node: dict[str, str], tmp_path: Path) -> None:
    if Path("/proc/1/net/unix").read_text() != Path("/proc/self/net/unix").read_text():
        pytest.skip("the first process has a network namespace of its own")
    with socket.socket(socket.AF_UNIX) as keeper:
        keeper.bind(f"{node['RUNTIME']}/keeper.sock")
        keeper.listen()
        done = sweep(node)
    assert done.returncode == 1
    assert "still runs" in done.stdout
    assert (tmp_path / "cache/blocks").exists()


MOUNT = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
sys.exit(libc.mount(b"cachefs", os.fsencode(sys.argv[1]), b"fuse.cachefs", 6, options))
"""


@pytest.fixture
def dead_mounts(tmp_path: Path) -> Iterator[Callable[..., list[Path]]]:
    """A function that makes a FUSE mount whose process is gone, and binds it: to look into it fails."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    made: list[Path] = []

    def make(*names: str) -> list[Path]:
        places = [tmp_path / "kubelet" / name for name in names]
        for place in places:
            place.mkdir(parents=True)
            command = [sys.executable, "-c", MOUNT] if place is places[0] else ["mount", "--bind", places[0]]
            subprocess.run([*command, place], check=True, timeout=20)
            made.append(place)
        return places

    yield make
    for place in reversed(made):
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True, timeout=20)


def mounted(places: list[Path]) -> list[bool]:
    there = Path("/proc/self/mountinfo").read_text()
    return [f" {place} " in there for place in places]


@pytest.mark.fuse
def test_the_sweep_detaches_dead_mounts(node: dict[str, str], dead_mounts: Callable[..., list[Path]]) -> None:
    ours = dead_mounts(f"plugins/{DRIVER}/mounts/v-1", "pods/a/volumes/kubernetes.io~csi/pv/mount")
    orphan = dead_mounts("pods/b/volumes/kubernetes.io~csi/pv/mount")  # its place is gone already
    assert mounted(ours + orphan) == [True] * 3
    done = sweep(node)
    assert done.returncode == 0, done.stderr
    assert {f"detaching {place}" for place in ours + orphan} <= set(done.stdout.splitlines())
    assert mounted(ours + orphan) == [False] * 3


@pytest.mark.fuse
def test_the_sweep_leaves_other_instances_and_sidecars_alone(
    node: dict[str, str], tmp_path: Path, dead_mounts: Callable[..., list[Path]]
) -> None:
    others = [
        *dead_mounts(f"plugins/b.{DRIVER}/mounts/v-1", "pods/a/volumes/kubernetes.io~csi/pv/mount"),
        *dead_mounts("pods/b/volumes/kubernetes.io~empty-dir/cachefs/mount", "pods/b/volume-subpaths/cachefs/main/0"),
    ]
    tier = tmp_path / "shm/cachefs-65532-def/data"
    tier.parent.mkdir()
    tier.write_text("x")
    with tier.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        done = sweep(node)
    assert done.returncode == 0, done.stderr
    assert "detaching" not in done.stdout
    assert f"in use: {tier.parent}" in done.stdout
    assert mounted(others) == [True] * 4
    assert tier.exists()
    assert not (tmp_path / "shm/cachefs-65532-abc").exists()
