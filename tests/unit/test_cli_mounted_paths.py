"""From paths that people type to mounts and paths in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.cli import mounted_paths
from cachefs.cli.mounted_paths import Mounts
from cachefs.errors import UsageError
from cachefs.mount.kernel import FSTYPE
from cachefs.mount.mountinfo import Mount
from cachefs.runtime import RuntimeDir, mount_id, write_state


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir(str(tmp_path / "run"))


@pytest.fixture
def mountpoint(tmp_path: Path, runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "mnt"
    place.mkdir()
    state = {"mount_id": mount_id(str(place)), "mountpoint": str(place), "cache_dir": "/cache"}
    write_state(runtime.mount(state["mount_id"], "json"), state)
    found = [
        Mount(1, 0, "8:1", "/", "/", "rw", "ext4", "/dev/sda"),
        Mount(2, 1, "0:52", "/", str(place), "ro", FSTYPE, "s3://b"),
        Mount(3, 1, "0:52", "/data", str(tmp_path / "bound"), "ro", FSTYPE, "s3://b"),
        Mount(4, 1, "0:53", "/", str(tmp_path / "stranger"), "ro", FSTYPE, "s3://c"),
    ]
    monkeypatch.setattr(mounted_paths, "mounts", lambda: found)
    return place


def test_paths_in_a_mount(
    tmp_path: Path, runtime: RuntimeDir, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("mnt")
    (tmp_path / "deep").symlink_to(mountpoint / "a/b")
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    mounts = Mounts(runtime)
    for typed, path in (
        (f"{mountpoint}", b""),
        (f"{mountpoint}/", b""),
        (f"{mountpoint}/a//b/.", b"a/b"),
        (f"{mountpoint}/a/../b", b"b"),
        ("mnt/a", b"a"),
        ("link/a", b"a"),
        ("deep/c", b"a/b/c"),
        ("dir/../mnt/x", b"x"),
        ("mnt/../mnt/y", b"y"),
        (os.fsdecode(f"{mountpoint}/".encode() + b"\xff"), b"\xff"),
        ("bound/a", b"data/a"),
    ):
        place = mounts.locate(typed)
        assert place == (mount_id(str(mountpoint)), str(mountpoint), "/cache", path), typed


@pytest.mark.parametrize("typed", ["dir", "mnt/..", "mnt/../dir", "loop/x", "/", "missing/x"])
def test_paths_elsewhere(
    tmp_path: Path, runtime: RuntimeDir, mountpoint: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="not in a mount"):
        Mounts(runtime).locate(typed)


def test_a_mount_of_another_runtime_directory(tmp_path: Path, runtime: RuntimeDir, mountpoint: Path) -> None:
    with pytest.raises(UsageError, match="--runtime-dir"):
        Mounts(runtime).locate(str(tmp_path / "stranger/x"))
