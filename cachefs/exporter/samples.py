"""Turns what agent and keeper say of themselves into values.

Both may be of another version than this code: what they do not say is left out, and what is no number too.

INVARIANT: at most `MOST_MOUNTS` mounts and `MOST_VOLUMES` volumes are shown, whatever the node has; those with
something wrong come first, and `cachefs_left_out` counts the others.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cachefs.exporter import table
from cachefs.exporter.exposition import Sample
from cachefs.exporter.table import AGENT_COUNTERS, MOUNT_COUNTERS, STORE_COUNTERS, Family, Route
from cachefs.keeper.client import KeeperStatus, MountState

MOST_MOUNTS = 256
MOST_VOLUMES = 256
TIERS = ("shm", "disk")
TIER_STATES = ("on", "full", "off")
_LONGEST_LABEL = 512
"""Characters; what is longer is cut (a source may have a key of a kilobyte in it)."""
_OWN_PLACE = re.compile(r"/.*/(?:plugins|cachefs)/[^/]+/mounts/([a-z0-9-]{1,64})")
"""Where a keeper mounts (`cachefs.keeper.places`)."""
_WELL = frozenset({"serving"})


def own_samples(version: str) -> Iterator[Sample]:
    """Yield what is known without asking anybody."""
    yield Sample(table.BUILD_INFO, ("service", version), 1)


# -- the agent ---------------------------------------------------------------------------------------------------------


def agent_samples(status: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield what an agent's status (docs/STATUS.md) says."""
    yield Sample(table.BUILD_INFO, ("agent", str(status.get("version"))), 1)
    yield from _gauges(
        {table.UPTIME: "uptime_s", table.MEMORY: "rss_anon_bytes", table.MEMORY_LIMIT: "memory_limit_bytes"}, status
    )
    yield from _tiers(_part(status, "tiers"))
    yield from _cluster(status.get("cluster"))
    counted = _part(status, "counters")
    for (
        name,
        route,
    ) in AGENT_COUNTERS.items():  # 0 is said, too: a counter that comes into being later has no first step
        yield Sample(route.family, route.labels, _number(counted.get(name)) or 0)
    volumes = _part(status, "volumes")
    yield from _volumes(volumes)
    yield from _mount_counters(_part(status, "mounts"), volumes)


def _tiers(parts: Mapping[str, Any]) -> Iterator[Sample]:
    for name in TIERS:
        tier = _part(parts, name)
        if not tier:
            continue
        for state in TIER_STATES:
            yield Sample(table.TIER_STATE, (name, state), tier.get("state") == state)
        gauges = {table.TIER_USED: "used_bytes", table.TIER_LIMIT: "limit_bytes", table.TIER_BLOCKS: "blocks"}
        yield from _gauges(gauges, tier, name)
    yield from _gauges({table.SPILL_PENDING: "spill_pending"}, _part(parts, "disk"))
    fills = {
        table.FILLS_UNDER_WAY: "under_way", table.FILL_MEMORY: "held_bytes", table.FILL_MEMORY_LIMIT: "budget_bytes"
    }  # fmt: skip
    yield from _gauges(fills, _part(parts, "fills"))


def _cluster(cluster: object) -> Iterator[Sample]:
    if not isinstance(cluster, Mapping) or not cluster:
        return  # it is to have no peers
    yield Sample(table.PEERING_UP, (), not cluster.get("problem"))
    yield Sample(table.ETCD_UP, (), bool(_part(cluster, "etcd").get("connected")))
    yield Sample(table.PEERS, (), len(cluster.get("members") or ()))


def _volumes(volumes: Mapping[str, Any]) -> Iterator[Sample]:
    def rank(name: str) -> tuple[bool, str]:
        return not _failing(volumes[name]), name

    shown = sorted(volumes, key=rank)[:MOST_VOLUMES]
    yield Sample(table.LEFT_OUT, ("volumes",), len(volumes) - len(shown))
    for volume_id in shown:
        volume = _part(volumes, volume_id)
        labels = (_text(volume.get("source")), _text(volume_id))
        yield Sample(table.STORE_FAILING, labels, _failing(volume))
        yield from _gauges({table.VOLUME_OBJECTS: "objects", table.VOLUME_BYTES: "bytes"}, volume, *labels)
        for tier in TIERS:
            limits = _part(_part(volume, "limits"), tier)
            if _number(limits.get("quota_bytes")):
                gauges = {table.VOLUME_QUOTA: "quota_bytes", table.VOLUME_USED: "used_bytes"}
                yield from _gauges(gauges, limits, *labels, tier)
        yield from _counters(STORE_COUNTERS, _part(volume, "counters"), labels)


def _failing(volume: object) -> bool:
    return isinstance(volume, Mapping) and bool(_part(volume, "origin").get("failing"))


def _mount_counters(mounts: Mapping[str, Any], volumes: Mapping[str, Any]) -> Iterator[Sample]:
    yield Sample(table.LEFT_OUT, ("mounts",), max(0, len(mounts) - MOST_MOUNTS))
    for mount_id in sorted(mounts)[:MOST_MOUNTS]:
        mount = _part(mounts, mount_id)
        source = _part(volumes, str(mount.get("volume_id"))).get("source")
        labels = (mount_name(str(mount.get("mountpoint"))), _text(source))
        yield from _counters(MOUNT_COUNTERS, _part(mount, "counters"), labels)


def mount_name(mountpoint: str) -> str:
    """Return what a mount is called: its key if a keeper made it, else its mount point."""
    found = _OWN_PLACE.fullmatch(mountpoint)
    return found[1] if found else _text(mountpoint)


# -- the keeper --------------------------------------------------------------------------------------------------------


def keeper_samples(status: KeeperStatus) -> Iterator[Sample]:
    """Yield what the keeper says of itself and of its mounts."""
    yield Sample(table.BUILD_INFO, ("keeper", _text(status.version)), 1)
    yield Sample(table.NODE_SERVICE_UP, (), status.runner is not None and status.runner.connected)
    shown = _most_important(status.mounts)
    yield Sample(table.LEFT_OUT, ("mounts",), len(status.mounts) - len(shown))
    for mount in shown:
        labels = (_text(mount.key), _text(mount.source))
        yield Sample(table.MOUNT_STATE, (*labels, _text(mount.state)), 1)
        yield Sample(table.MOUNT_TARGETS, labels, len(mount.targets))
        yield Sample(table.MOUNT_RESTARTS, labels, _number(mount.restarts) or 0)
        handle, version = mount.labels.get("volume", ""), mount.worker_version or ""
        yield Sample(table.MOUNT_INFO, (*labels, _text(handle), _text(version)), 1)


def _most_important(mounts: Sequence[MountState]) -> list[MountState]:
    """Return as many as are shown. One that leaves does not hide another of the same name."""
    ordered = sorted(mounts, key=lambda mount: (mount.state in _WELL, mount.state == "unmounting", mount.key))
    return ordered[:MOST_MOUNTS]


# -- values ------------------------------------------------------------------------------------------------------------


def _gauges(gauges: Mapping[Family, str], found: Mapping[str, Any], *labels: str) -> Iterator[Sample]:
    for family, key in gauges.items():
        value = _number(found.get(key))
        if value is not None:
            yield Sample(family, labels, value)


def _counters(routes: Mapping[str, Route], found: Mapping[str, Any], labels: tuple[str, ...]) -> Iterator[Sample]:
    for name, route in routes.items():
        yield Sample(route.family, labels, _number(found.get(name)) or 0)


def _part(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = found.get(key)
    return part if isinstance(part, Mapping) else {}


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: object) -> str:
    return os.fsencode(str(value or "")).decode("utf-8", "replace")[:_LONGEST_LABEL]
