"""Bind mounts below the keeper's root, without a keeper."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.keeper.binds import Ground
from cachefs.mount.mountinfo import Mount
from tests.support.machine import mounts_below

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="makes mounts")


def test_a_mount_that_has_just_gone_is_not_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the table and the bind: what would be bound is the directory below."""
    root = tmp_path.resolve()
    source, target = root / "places/v", root / "pods/a/mount"
    source.mkdir(parents=True)
    ground = Ground(str(root), str(root / "places"))
    gone = Mount(9, 1, "0:9", "/", str(source), "ro", "fuse.cachefs", "s3://b")
    monkeypatch.setattr(ground, "_look", lambda *paths: {str(source): gone})
    with pytest.raises(FileNotFoundError, match="is not mounted"):
        ground.bind(str(source), str(target), read_only=True)
    assert mounts_below(root) == []
