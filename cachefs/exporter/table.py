"""THE table of what the metrics endpoint serves: names, kinds, labels, meanings, and which counter becomes which.

docs/METRICS.md, the dashboard and the alert rules of the chart are held against it by tests. Names follow the
conventions of Prometheus: `cachefs_` in front, base units (bytes, seconds) behind, `_total` for what only grows.

Every counter of `cachefs.metrics` is in here, by who counts it, so a new one is served without a further line:

    a worker       cachefs_mount_<name>_total    labels mount, volume
    a store        cachefs_store_<name>_total    labels volume, volume_id    (`origin_` is cut off)
    the agent      cachefs_tier_<name>_total     label tier                  (`shm_`, `disk_`)
                   cachefs_fills_total, ...      label origin: store, peer   (`origin_fill...`, `peer_fill...`)
                   cachefs_<name>_total          the rest

INVARIANT: the values of all labels are bounded in number: those of mounts and volumes by `cachefs.exporter.samples`,
all others by this table.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cachefs import metrics
from cachefs.metrics import METRICS, Metric


class Kind(enum.StrEnum):
    """How a value behaves, in the words of the format."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Family:
    """All values of one name."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """Where a counter goes: its family, and the values of those of its labels that the counter itself decides."""

    family: Family
    labels: tuple[str, ...] = ()


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family(f"cachefs_{name}", Kind.GAUGE, text, labels)


# -- states ------------------------------------------------------------------------------------------------------------

AGENT_UP = _gauge("agent_up", "1 when the agent of this node answers; 0: nothing else of it is there.")
KEEPER_UP = _gauge("keeper_up", "1 when the keeper of this node answers; 0: nothing else of it is there.")
BUILD_INFO = _gauge("build_info", "1; the versions that run here. part: service, agent or keeper.", "part", "version")
SCRAPE_SECONDS = _gauge("scrape_duration_seconds", "How long the last question took. part: agent or keeper.", "part")
LEFT_OUT = _gauge("left_out", "Mounts or volumes that are not shown because there are too many. of: which.", "of")
UPTIME = _gauge("agent_uptime_seconds", "How long the agent has been running.")
MEMORY = _gauge("agent_memory_bytes", "Anonymous memory of the agent; what the tiers take is no part of it.")
MEMORY_LIMIT = _gauge("agent_memory_limit_bytes", "Limit of the anonymous memory of the agent (--memory-limit).")
TIER_STATE = _gauge("tier_state", "1 for the state that a tier is in: on, full or off.", "tier", "state")
TIER_USED = _gauge("tier_used_bytes", "Bytes that a tier holds.", "tier")
TIER_LIMIT = _gauge("tier_limit_bytes", "Bytes that a tier may hold.", "tier")
TIER_BLOCKS = _gauge("tier_blocks", "Blocks that a tier holds.", "tier")
SPILL_PENDING = _gauge("spill_pending_blocks", "Blocks of the shm tier that are to be written to the disk tier.")
FILLS_UNDER_WAY = _gauge("fills_under_way", "Blocks that are on their way to this node.")
FILL_MEMORY = _gauge("fill_memory_bytes", "Memory that blocks on their way hold.")
FILL_MEMORY_LIMIT = _gauge("fill_memory_limit_bytes", "Memory that there is for blocks on their way.")
PEERS = _gauge("peers", "Nodes of the cluster that this one knows, itself too.")
PEERING_UP = _gauge("peering_up", "1 when this node is one of the cluster; 0: it is to be one, and is not.")
ETCD_UP = _gauge("etcd_up", "1 when the agent has a connection to etcd.")

_VOLUME = ("volume", "volume_id")
STORE_FAILING = _gauge(
    "store_failing", "1 when the store of a volume does not answer, or refuses; what is cached is served.", *_VOLUME
)
VOLUME_OBJECTS = _gauge("volume_known_objects", "Objects of a volume, as far as listed.", *_VOLUME)
VOLUME_BYTES = _gauge("volume_known_bytes", "Bytes of a volume, as far as listed.", *_VOLUME)
VOLUME_QUOTA = _gauge("volume_quota_bytes", "What a volume may hold of a tier, if it has a quota.", *_VOLUME, "tier")
VOLUME_USED = _gauge("volume_used_bytes", "What a volume with a quota holds of a tier.", *_VOLUME, "tier")

_MOUNT = ("mount", "volume")
MOUNT_STATE = _gauge(
    "mount_state",
    "1 for the state that a mount is in: starting, serving, restarting, failed, unmounting or waiting.",
    *_MOUNT,
    "state",
)
MOUNT_TARGETS = _gauge("mount_targets", "Places of pods where a mount is bound.", *_MOUNT)
MOUNT_INFO = _gauge(
    "mount_info", "1; handle: name of the volume in Kubernetes (volumeHandle).", *_MOUNT, "handle", "version"
)
MOUNT_RESTARTS = Family(
    "cachefs_mount_restarts_total", Kind.COUNTER, "Times that the worker of a mount was started anew.", _MOUNT
)
NODE_SERVICE_UP = _gauge("node_service_connected", "1 when the keeper has a node service.")

STATES = tuple(value for value in list(globals().values()) if isinstance(value, Family))

# -- counters ----------------------------------------------------------------------------------------------------------

_OF_BOTH = (metrics.SHM_HITS, metrics.SHM_HIT_BYTES, metrics.SHM_FAULTS, metrics.DISK_FAULTS)
"""Counted by workers, for what they read, and by the agent, for what it does."""
_OF_MOUNTS = (
    *_OF_BOTH, metrics.FUSE_READS, metrics.FUSE_READ_BYTES, metrics.FUSE_REQUESTS, metrics.FUSE_ERRORS,
    metrics.READ_MISSES, metrics.FRESH_READS, metrics.READ_MISS_SECONDS, metrics.READAHEAD_REQUESTS,
    metrics.HUNG_AGENTS, metrics.GUARD_HELD_SECONDS,
)  # fmt: skip
_OF_STORES = (
    metrics.ORIGIN_REQUESTS, metrics.ORIGIN_BYTES, metrics.ORIGIN_LIST_REQUESTS, metrics.ORIGIN_HEAD_REQUESTS,
    metrics.ORIGIN_GET_REQUESTS, metrics.ORIGIN_RETRIES, metrics.ORIGIN_ERRORS, metrics.ORIGIN_THROTTLED,
)  # fmt: skip
_TIER_HELP = {
    "hits": "Fills that found their block in a tier (reads that the shm tier answered: cachefs_mount_shm_hits_total).",
    "hit_bytes": "Bytes that fills took from a tier.",
    "misses": "Blocks that were looked for in a tier and were not there.",
    "writes": "Blocks committed to a tier.",
    "write_bytes": "Bytes committed to a tier.",
    "evictions": "Blocks evicted from a tier to make room.",
    "corrupt": "Blocks of a tier that failed their check and were dropped.",
    "faults": "Operations that a tier could not do (full, gone, not readable); each was handled as a miss.",
}
_FILL_HELP = {
    "fills": "Blocks that came to this node. origin: store, or peer (another node).",
    "fill_bytes": "Bytes of the blocks that came to this node. origin: store, or peer (another node).",
}
_CLEARER = {
    metrics.RANGE_READ_BYTES: "Bytes of range reads past the tiers.",
    metrics.RANGES_AHEAD: "Ranges that readers got because they were fetched ahead of a reader with a stride.",
    metrics.BULK_TAKEN_OVER: "Blocks of bulk jobs that a reader wanted before their turn: they were fetched at once.",
    metrics.PREFETCH_ISSUED_BYTES: "Bytes that were fetched before a reader began them.",
    metrics.PREFETCH_USED: "Prefetched pieces that a reader then began.",
    metrics.PREFETCH_USED_BYTES: "Bytes of prefetched pieces that a reader then began.",
    metrics.PREFETCH_WASTED: "Prefetched pieces that were evicted, or given up, before a reader began them.",
    metrics.PREFETCH_WASTED_BYTES: "Bytes of prefetched pieces that were evicted, or given up, before a reader came.",
    metrics.PREFETCH_LATE: "Prefetched pieces that were still on their way when a reader began them.",
    metrics.PREFETCH_LATE_BYTES: "Bytes of prefetched pieces that were still on their way when a reader came.",
    metrics.SPILL_BYTES: "Bytes written from the shm tier to the disk tier in the background.",
    metrics.PEER_SERVED_BYTES: "Bytes of blocks that were sent to other nodes.",
    metrics.ORIGIN_LIST_REQUESTS: "Listing requests sent to the object store.",
    metrics.ORIGIN_HEAD_REQUESTS: "HEAD requests sent to the object store.",
    metrics.ORIGIN_GET_REQUESTS: "GET requests sent to the object store.",
    metrics.SHM_HITS: "READ requests that the shm tier answered.",
    metrics.READ_MISS_SECONDS: "Time that READ requests waited which the shm tier could not answer.",
}
"""What is said here, where a line stands alone, of counters whose meaning refers to the one before."""


def _help(metric: Metric) -> str:
    return _CLEARER.get(metric, metric.help)


def _counter(name: str, text: str, labels: tuple[str, ...]) -> Family:
    return Family(f"cachefs_{name}_total", Kind.COUNTER, text, labels)


def _agent_route(metric: Metric) -> Route:
    where, _, what = metric.name.partition("_")
    if where in ("shm", "disk") and what in _TIER_HELP:
        return Route(_counter(f"tier_{what}", _TIER_HELP[what], ("tier",)), (where,))
    if where in ("origin", "peer") and what in _FILL_HELP:
        origin = "store" if where == "origin" else "peer"
        return Route(_counter(what, _FILL_HELP[what], ("origin",)), (origin,))
    name = metric.name.removeprefix("origin_")
    return Route(_counter(name, _help(metric), ()))


MOUNT_COUNTERS: Mapping[str, Route] = {
    metric.name: Route(_counter(f"mount_{metric.name}", _help(metric), _MOUNT)) for metric in _OF_MOUNTS
}
STORE_COUNTERS: Mapping[str, Route] = {
    metric.name: Route(_counter(f"store_{metric.name.removeprefix('origin_')}", _help(metric), _VOLUME))
    for metric in _OF_STORES
}
AGENT_COUNTERS: Mapping[str, Route] = {
    metric.name: _agent_route(metric)
    for metric in METRICS.values()
    if metric not in _OF_STORES and (metric not in _OF_MOUNTS or metric in _OF_BOTH)
}


def _families() -> Iterator[Family]:
    yield from STATES
    for routes in (AGENT_COUNTERS, STORE_COUNTERS, MOUNT_COUNTERS):
        yield from (route.family for route in routes.values())


FAMILIES: Mapping[str, Family] = {family.name: family for family in _families()}
"""Everything that is served, by name and in this order."""


def markdown_table() -> str:
    """Return the table of docs/METRICS.md."""
    rows = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for family in FAMILIES.values():
        labels = ", ".join(f"`{label}`" for label in family.labels)
        rows.append(f"| `{family.name}` | {family.kind.value} | {labels} | {family.help} |")
    return "\n".join(rows) + "\n"
