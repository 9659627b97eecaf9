"""A node with a keeper and an agent that are not real: many volumes in no time, and failures as a test wants them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cachefs.config import CacheConfig, Config, S3Config
from csi.node_mounts import NodeSettings
from csi.records import VolumeRecords
from tests.csi.fake_agent import FakeAgent
from tests.csi.fake_keeper import FakeKeeper
from tests.csi.node_rig import KubeletVolume, Plugin


@dataclass
class FakeNode:
    """What a test works with."""

    base: Path
    settings: NodeSettings
    keeper: FakeKeeper
    agent: FakeAgent
    plugin: Plugin

    def volume(self, volume_id: str = "v1", parameters: dict[str, str] | None = None, **more: Any) -> KubeletVolume:
        """Return a volume as the kubelet sees it; its parameters name a bucket at least."""
        return self.plugin.volume(volume_id, {"bucket": "bucket-1", **(parameters or {})}, **more)

    def restart_plugin(self, records: VolumeRecords | None = None) -> None:
        """End the plugin, and start one that knows nothing, but what the controller's records say."""
        self.plugin.__exit__()
        self.plugin = Plugin(self.settings, str(self.keeper.path), self.base / "csi.sock", records=records)
        self.plugin.__enter__()

    def credential_files(self) -> dict[str, bytes]:
        """Return all files of credentials by their names below the directory."""
        directory = Path(self.settings.credentials_dir)
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def node_settings(base: Path, **changes: Any) -> NodeSettings:
    """Return settings of a node whose directories are all below `base`."""
    config = Config(
        s3=S3Config(), cache=CacheConfig(cache_dir=f"{base}/cache", runtime_dir=f"{base}/node", shm_size_bytes=0)
    )
    made = NodeSettings(
        node_id="node-a",
        config=config,
        credentials_dir=f"{base}/credentials",
        node_uid=os.geteuid(),
        kubelet_dir=f"{base}/kubelet",
        zone="zone-1",
        max_volumes=110,
    )
    return replace(made, **changes)


@pytest.fixture
def fake() -> Iterator[FakeNode]:
    """A node service with a keeper and an agent that are not real."""
    base = Path(tempfile.mkdtemp(prefix="csi-", dir="/tmp"))  # short: a socket's address has 107 bytes
    try:
        settings = node_settings(base)
        (base / "kubelet").mkdir()
        with (
            FakeAgent(settings.config.cache) as agent,
            FakeKeeper(base / "keeper.sock", base / "kubelet") as keeper,
        ):
            node = FakeNode(base, settings, keeper, agent, Plugin(settings, str(keeper.path), base / "csi.sock"))
            node.plugin.__enter__()
            try:
                yield node
            finally:
                node.plugin.__exit__()
    finally:
        shutil.rmtree(base, ignore_errors=True)
