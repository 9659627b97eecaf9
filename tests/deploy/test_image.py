"""The image: its Dockerfile, and the file system that comes of it, with every entry point started in it.

`deploy/docker/rootfs` follows the Dockerfile in a chroot. The quick test takes the packages from the environment that
runs the tests; the slow one lets pip install them, as Docker would.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import yaml

import cachefs
from cachefs.cli.main import COMMANDS
from cachefs.keeper.client import KeeperClient
from cachefs.runtime import agent_id
from csi.v1 import csi_pb2, csi_pb2_grpc
from tests.deploy.chart import REPOSITORY

DOCKER = REPOSITORY / "deploy/docker"
ROOTFS = DOCKER / "rootfs"
NODE_UID = 65532
MOST_MIB = 130
"""Of what the project and its dependencies add to the base image; 95 MiB in this version."""


def load_rootfs() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("rootfs", str(ROOTFS))
    spec = importlib.util.spec_from_loader("rootfs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rootfs"] = module  # dataclasses look for it there
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


rootfs = load_rootfs()
STEPS = list(rootfs.instructions((DOCKER / "Dockerfile").read_text(encoding="utf-8")))
ENTRYPOINT: list[str] = json.loads(next(step.value for step in STEPS if step.word == "ENTRYPOINT"))
FINAL = STEPS[max(index for index, step in enumerate(STEPS) if step.word == "FROM") :]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")


def values(word: str, steps: list[Any] = STEPS) -> list[str]:
    return [step.value for step in steps if step.word == word]


# -- the Dockerfile ---------------------------------------------------------------------------------------------------


def test_base_is_pinned() -> None:
    [image] = values("ARG")
    assert re.fullmatch(r"PYTHON_IMAGE=docker\.io/library/python:3\.11\.\d+-slim-bookworm", image)
    assert values("FROM") == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]


def test_packages_have_the_versions_of_the_tests() -> None:
    [install] = [text for text in values("RUN") if "pip install" in text]
    assert "-c constraints.txt" in install
    assert "[" not in install, "no extras: what tests need is not in the image"


def test_no_compiler_and_no_installer_in_the_final_stage() -> None:
    assert [rootfs.apt_packages(text) for text in values("RUN", FINAL) if "apt-get" in text] == [["libfuse3-3"]]
    assert not [text for text in values("RUN", FINAL) if "pip" in text]
    assert values("COPY", FINAL) == ["--from=build /opt/cachefs /opt/cachefs"]
    assert any("pip uninstall" in text for text in values("RUN"))


def test_it_starts_as_the_user_of_the_chart() -> None:
    assert values("USER", FINAL) == [f"{NODE_UID}:{NODE_UID}"]
    assert values("HEALTHCHECK", FINAL) == ["NONE"]
    chart = (REPOSITORY / "deploy/helm/cachefs/templates/node.yaml").read_text(encoding="utf-8")
    assert f"runAsUser: {NODE_UID}" in chart


def test_all_packages_of_the_project_are_copied_and_nothing_else() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = [name for text in values("COPY")[:-1] for name in text.split()[:-1]]
    assert sorted(copied) == sorted(
        [*packages, "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "CHANGELOG.md"]
    )
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in allowed
    assert sorted(line[1:] for line in allowed if line.startswith("!")) == sorted(copied)


def test_what_is_not_known_is_an_error(tmp_path: Path) -> None:
    builder = rootfs.Builder(tmp_path, None)
    with pytest.raises(rootfs.BuildError, match="line 2: VOLUME is not known"):
        builder.build("FROM docker.io/library/python:3.11.14-slim-bookworm\nVOLUME /data\n")
    with pytest.raises(rootfs.BuildError, match="not for docker.io/library/alpine".replace(".", r"\.")):
        builder.build("FROM docker.io/library/alpine:3.22 AS other\n")
    with pytest.raises(rootfs.BuildError, match="no-such-package-here"):
        rootfs.look_for_packages(["libc6", "no-such-package-here"])


# -- the file system --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The layout, with the packages of the environment of the tests."""
    place = tmp_path_factory.mktemp("image") / "layout"
    yield build(place, "--packages-from", sys.prefix)
    subprocess.run(["rm", "-rf", "--one-file-system", str(place)], check=True, timeout=60)


def build(place: Path, *arguments: str) -> Path:
    command = [sys.executable, str(ROOTFS), "build", str(place), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if "lacks the Debian packages" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert str(place) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    return place


def start(image: Path, *arguments: str, user: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOTFS), "run", str(image), *(["--user", user] if user else []), "--", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def start_program(image: Path, *words: str, user: str = "") -> subprocess.CompletedProcess[str]:
    """Start something else than the entry point of the image, as `command` of a container does."""
    note = image / "image.json"
    text = note.read_text(encoding="utf-8")
    note.write_text(json.dumps({**json.loads(text), "entrypoint": [words[0]]}), encoding="utf-8")
    try:
        return start(image, *words[1:], user=user)
    finally:
        note.write_text(text, encoding="utf-8")


AS_ROOT = ("csi", "keeper", "mount", "sidecar", "umount")


def check_entry_points(image: Path) -> None:
    """Start every command as the users of the chart, every program of the project, and what its processes become."""
    told = start(image, "version")
    assert (told.stdout, told.returncode) == (f"{cachefs.__version__}\n", 0), told.stderr
    for command, user in [*((name, str(NODE_UID)) for name in COMMANDS), *((name, "0") for name in AS_ROOT)]:
        helped = start(image, command, "--help", user=user)
        assert helped.returncode == 0, f"{command}: {helped.stderr}"
        assert f"cachefs {command}" in helped.stdout
    assert "Commands" in start(image).stdout  # without arguments: CMD
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name in set(scripts) - {"cachefs"}:
        told = start_program(
            image, name, "-f", "s3://bucket", "/mnt", user="0"
        )  # as mount(8) does, and nothing is done
        assert (told.returncode, told.stdout + told.stderr) == (0, ""), name
    for module in ("cachefs.keeper", "cachefs.mount.supervisor", "cachefs.mount.worker"):
        told = start_program(image, "python", "-m", module, "--help")
        assert (told.returncode, told.stdout[:7]) == (0, "usage: "), f"{module}: {told.stderr}"


@needs_root
def test_every_entry_point_starts(image: Path) -> None:
    check_entry_points(image)


@needs_root
def test_wrong_settings_end_it_with_one_line(image: Path) -> None:
    """Not only the help: the modules behind the commands are there as well."""
    told = start(image, "csi", "--endpoint=tcp://127.0.0.1:1", "--mode=controller")
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert "unix" in told.stderr
    assert "Traceback" not in told.stderr


@needs_root
def test_all_modules_can_be_imported(image: Path) -> None:
    """Each part of the project with the packages that the image has, and no other."""
    modules = ("cachefs.agent.main", "cachefs.mount.worker", "cachefs.keeper.keeper", "csi.driver", "peer.membership")
    told = start_program(image, "python", "-c", f"import {', '.join(modules)}; import sys; print(sys.prefix)")
    assert told.stdout == "/opt/cachefs\n", told.stderr


@needs_root
def test_what_is_in_it(image: Path) -> None:
    final = image / "final"
    passwd = (final / "etc/passwd").read_text(encoding="utf-8")
    assert f"cachefs:x:{NODE_UID}:{NODE_UID}:" in passwd
    names = {path.name for path in (final / "opt/cachefs/bin").iterdir()}
    assert {"cachefs", "mount.cachefs", "python"} <= names
    assert not names & {"pip", "pip3", "pytest", "ruff", "mypy"}
    packages = {path.name for path in next(final.glob("opt/cachefs/lib/python3.*/site-packages")).iterdir()}
    assert {"cachefs", "metadata", "peer", "csi", "pyfuse3", "trio"} <= packages
    assert not packages & {"pip", "pytest", "hypothesis", "moto", "helm_python", "setuptools"}
    assert [path for path in final.rglob("*") if path.is_file() and path.stat().st_mode & 0o6000] == []
    size = sum(path.lstat().st_size for path in (final / "opt/cachefs").rglob("*"))
    assert size < MOST_MIB << 20, f"{size >> 20} MiB"


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_build_with_pip(tmp_path: Path) -> None:
    check_entry_points(build(tmp_path / "layout"))


def test_the_tag_of_the_examples_is_the_version() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert f"cachefs:{cachefs.__version__} ." in text
    readme = (REPOSITORY / "deploy/kubernetes/README.md").read_text(encoding="utf-8")
    assert f"REGISTRY/cachefs:{cachefs.__version__}" in readme
    values_file = yaml.safe_load((REPOSITORY / "deploy/helm/cachefs/values.yaml").read_text(encoding="utf-8"))
    assert values_file["image"]["repository"] == "cachefs"


# -- the pods of a node, from the image -------------------------------------------------------------------------------


class NodeOfImage:
    """Keeper, node service and plugin as the chart starts them, each in a tree of the image. Context manager."""

    def __init__(self, image: Path, base: Path) -> None:
        self._image = image
        self._base = base
        self._running: list[subprocess.Popen[bytes]] = []
        self.keeper = base / "run/keeper.sock"
        self.csi = base / "csi/csi.sock"
        for name in ("run", "kubelet", "csi", "cache"):
            (base / name).mkdir()
        os.chown(base / "cache", NODE_UID, NODE_UID)  # as the init container does
        for folder in (base, *base.parents):
            if folder.stat().st_mode & 0o001 == 0 and folder.stat().st_uid == os.geteuid():
                folder.chmod(folder.stat().st_mode | 0o011)

    def start(self, *arguments: str, user: int) -> None:
        """Start one entry point of the image."""
        command = [sys.executable, str(ROOTFS), "run", str(self._image), "--user", str(user)]
        binds = [f"--bind={self._base}", "--bind=/dev/shm"]
        with (self._base / f"{arguments[0]}.log").open("wb") as log:
            self._running.append(subprocess.Popen([*command, *binds, "--", *arguments], stdout=log, stderr=log))

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._base.glob("*.log")))

    def __enter__(self) -> NodeOfImage:
        return self

    def __exit__(self, *_: object) -> None:
        while inside := processes_in(self._image / rootfs.FINAL):
            for pid in inside:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for process in self._running:
            process.wait(20)


def processes_in(root: Path) -> list[int]:
    """Processes whose root directory this is, wherever they were started from."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and os.readlink(entry / "root") == str(root):
                found.append(int(entry.name))
    return found


def until(condition: Callable[[], bool], node: NodeOfImage, seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, node.logs()
        time.sleep(0.1)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="cachefs-image-") as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        yield path


@needs_root
@pytest.mark.fuse
@pytest.mark.slow
def test_the_pods_of_a_node_find_each_other(image: Path, place: Path) -> None:
    """Ready, by the very programs of the probes, and as the users of the chart."""
    with NodeOfImage(image, place) as node:
        shared = ["--driver-name=x.csi", f"--node-uid={NODE_UID}"]
        node.start("keeper", f"--runtime-dir={place}/run", f"--root={place}/kubelet", *shared, user=0)
        until(node.keeper.is_socket, node)
        cache = [f"--cache-dir={place}/cache", f"--runtime-dir={place}/run/node", "--shm-size=32MiB"]
        node.start("node", f"--keeper={node.keeper}", *cache, "--cache-size=64MiB", user=NODE_UID)
        until(lambda: KeeperClient(str(node.keeper), 5).status().runner is not None, node)
        more = [f"--credentials-dir={place}/run/credentials", f"--kubelet-dir={place}/kubelet", "--node-id=n1"]
        node.start(
            "csi", "--mode=node", f"--endpoint=unix://{node.csi}", f"--keeper={node.keeper}", *shared, *more, *cache,
            "--cache-size=64MiB", user=0,
        )  # fmt: skip
        until(node.csi.is_socket, node)
        with grpc.insecure_channel(f"unix:{node.csi}") as channel:
            identity = csi_pb2_grpc.IdentityStub(channel)  # type: ignore[no-untyped-call]
            until(lambda: identity.Probe(csi_pb2.ProbeRequest(), timeout=10, wait_for_ready=True).ready.value, node)
            told = identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=10)
            assert (told.name, told.vendor_version) == ("x.csi", cachefs.__version__)
        assert {path.stat().st_uid for path in (place / "run/node").iterdir()} == {NODE_UID}
    shutil.rmtree(f"/dev/shm/cachefs-{NODE_UID}-{agent_id(f'{place}/cache')}", ignore_errors=True)
