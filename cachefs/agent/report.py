"""What an agent says of itself: the document of `cachefs status`, and what somebody who mounts should know."""

from __future__ import annotations

import os
import time
from typing import Any

from cachefs import __version__
from cachefs.agent.memory import anonymous_bytes
from cachefs.agent.messages import PROTOCOL_VERSION
from cachefs.agent.places import AgentPaths
from cachefs.agent.volumes import Volumes
from cachefs.block.block_cache import BlockCache
from cachefs.config import CacheConfig
from cachefs.metrics import Counters


class Report:
    """Of one agent. Any thread."""

    def __init__(self, config: CacheConfig, counters: Counters, reasons: dict[str, str], log_file: str) -> None:
        """`reasons`: why a tier could not be opened, by its name."""
        self._config = config
        self._counters = counters
        self._reasons = reasons
        self._log_file = log_file
        self._started = time.monotonic()

    def handicaps(self, paths: AgentPaths, cache: BlockCache) -> list[str]:
        """Return what somebody who mounts should know of this agent."""
        off = [(name, tier.get("reason")) for name, tier in self.tiers(cache).items() if tier.get("state") == "off"]
        said = [f"the {name} tier is off, and reads do without it: {why}" for name, why in off if why]
        if not paths.volumes.at_home:
            where = f"{paths.volumes.home} cannot be written"
            said.append(f"{where}: what is known of names is kept in memory, {paths.volumes.in_use}")
        return said

    def tiers(self, cache: BlockCache) -> dict[str, Any]:
        """Return the tiers as `cachefs status` shows them; one that could not be opened keeps its limit."""
        stats = cache.stats()
        for name, limit_bytes in (("shm", self._config.shm_size_bytes), ("disk", self._config.cache_size_bytes)):
            if stats[name]["state"] == "off":
                stats[name]["limit_bytes"] = limit_bytes
                stats[name]["reason"] = self._reasons.get(name) or stats[name].get("reason")
            elif stats[name]["state"] == "full":
                stats[name]["reason"] = "its file system has no more room for it: what is left is for others"
        return stats

    def status(self, cache: BlockCache, volumes: Volumes) -> dict[str, Any]:
        """Return everything but the cluster, as docs/STATUS.md describes it."""
        counters = self._counters.snapshot()
        served = list(volumes.by_id.values())  # a copy: this runs in a thread
        asked = {volume.volume_id: volume.store.now.counters.snapshot() for volume in served}
        for counted in asked.values():
            for name, value in counted.items():
                counters[name] = counters.get(name, 0) + value
        mounts: dict[str, Any] = {}
        described: dict[str, Any] = {}
        for volume in served:
            used, objects = volume.writer.reader.counts()
            described[volume.volume_id] = {
                "source": volume.source, "objects": objects, "bytes": used,
                "hidden_keys": volume.writer.reader.hidden(), "limits": cache.limits_of(volume.owner),
                "origin": volume.store.now.counters.condition.describe(), "counters": asked[volume.volume_id],
            }  # fmt: skip
            for mount in list(volume.mounts.values()):
                mounts[mount.mount_id] = {
                    "mountpoint": mount.mountpoint, "volume_id": volume.volume_id, "counters": mount.counters,
                    "version": mount.version, "protocol": mount.protocol,
                }  # fmt: skip
        return {
            "agent_pid": os.getpid(),
            "version": __version__,
            "protocol": PROTOCOL_VERSION,
            "cache_dir": self._config.cache_dir,
            "log_file": self._log_file or None,
            "uptime_s": time.monotonic() - self._started,
            "block_size_bytes": self._config.block_size_bytes,
            "rss_anon_bytes": anonymous_bytes(),
            "memory_limit_bytes": self._config.memory_limit_bytes,
            "tiers": self.tiers(cache),
            "counters": counters,
            "mounts": mounts,
            "volumes": described,
        }
