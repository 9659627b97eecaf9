"""Every counter of cachefs: its name, unit and meaning in one place, and the small class that counts.

Layers count at their boundary only, under the names declared here, so that `cachefs status` can describe each
figure and two layers never give one name to two things. Counters only grow; states (used bytes, blocks, pending
work) are no counters: they are asked for when somebody wants them.

INVARIANT: `Counters` is safe from any thread. A counter comes into being when it is first added to, so a snapshot
holds only what happened.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping
from dataclasses import dataclass


class Unit(enum.StrEnum):
    """What a counter counts."""

    COUNT = "count"
    BYTES = "bytes"
    SECONDS = "seconds"


@dataclass(frozen=True, slots=True)
class Metric:
    """One counter."""

    name: str
    unit: Unit
    help: str


def _bytes(name: str, text: str) -> Metric:
    return Metric(name, Unit.BYTES, text)


def _count(name: str, text: str) -> Metric:
    return Metric(name, Unit.COUNT, text)


# The shm tier: hits are counted by the worker, who reads it; the rest by the agent, who writes it; faults by both.
SHM_HITS = _count("shm_hits", "Reads or fills that found their block in the shm tier.")
SHM_HIT_BYTES = _bytes("shm_hit_bytes", "Bytes that came from the shm tier.")
SHM_MISSES = _count("shm_misses", "Blocks that were looked for in the shm tier and were not there.")
SHM_WRITES = _count("shm_writes", "Blocks committed to the shm tier.")
SHM_WRITE_BYTES = _bytes("shm_write_bytes", "Bytes committed to the shm tier.")
SHM_EVICTIONS = _count("shm_evictions", "Blocks evicted from the shm tier to make room.")
SHM_CORRUPT = _count("shm_corrupt", "Blocks of the shm tier that failed their check and were dropped.")
SHM_FAULTS = _count(
    "shm_faults", "Operations that the shm tier could not do (full, gone, not readable); each was handled as a miss."
)

# The disk tier.
DISK_HITS = _count("disk_hits", "Blocks that were read from the disk tier.")
DISK_HIT_BYTES = _bytes("disk_hit_bytes", "Bytes that came from the disk tier.")
DISK_MISSES = _count("disk_misses", "Blocks that were looked for in the disk tier and were not there.")
DISK_WRITES = _count("disk_writes", "Blocks committed to the disk tier.")
DISK_WRITE_BYTES = _bytes("disk_write_bytes", "Bytes committed to the disk tier.")
DISK_EVICTIONS = _count("disk_evictions", "Blocks evicted from the disk tier to make room.")
EXPIRED_BLOCKS = _count(
    "expired_blocks", "Blocks that left a tier because nobody had read them for the time to live of their volume."
)
DISK_CORRUPT = _count("disk_corrupt", "Blocks of the disk tier that failed their check and were dropped.")
DISK_FAULTS = _count(
    "disk_faults", "Operations that the disk tier could not do (full, read-only, cut); each was handled as a miss."
)

# Fills: what the agent does about a miss.
ORIGIN_FILLS = _count("origin_fills", "Blocks that came from the object store.")
ORIGIN_FILL_BYTES = _bytes("origin_fill_bytes", "Bytes of those blocks.")
ORIGIN_FILL_REQUESTS = _count(
    "origin_fill_requests", "Range reads for blocks that no tier had (neighbours share one), from peers or the store."
)
PEER_FILLS = _count("peer_fills", "Blocks that came from another node.")
PEER_FILL_BYTES = _bytes("peer_fill_bytes", "Bytes of those blocks.")
ORIGIN_FILL_ERRORS = _count("origin_fill_errors", "Blocks whose range read failed.")
FILLS_JOINED = _count("fills_joined", "Fills that waited for a block that was already on its way (single flight).")
FILLS_INLINE = _count("fills_inline", "Blocks whose bytes were handed over directly because no tier could take them.")
RANGE_READS = _count("range_reads", "Range reads past the tiers: pieces of blocks that nobody needs whole.")
RANGE_READ_BYTES = _bytes("range_read_bytes", "Bytes of those ranges.")
RANGES_JOINED = _count("ranges_joined", "Readers who got a range that was already on its way, or fetched ahead.")
RANGES_AHEAD = _count("ranges_ahead", "Ranges among them that were fetched ahead of a reader with a stride.")
RANGES_AHEAD_USED = _count("ranges_ahead_used", "Ranges fetched ahead that a reader then came for.")
READAHEAD_BLOCKS = _count("readahead_blocks", "Blocks that were asked for before a reader wanted them.")
READAHEAD_DROPPED = _count(
    "readahead_dropped", "Readahead blocks that were given up: too many waiting, no room, or the store failed."
)
BULK_BATCHES = _count("bulk_batches", "Jobs that fetched many small objects at once, before a reader wanted them.")
BULK_TAKEN_OVER = _count(
    "bulk_taken_over", "Blocks of such jobs that a reader wanted before their turn: they were fetched for it at once."
)
PREFETCH_ISSUED = _count(
    "prefetch_issued", "Pieces (small files, heads of large ones) that were fetched before a reader began them."
)
PREFETCH_ISSUED_BYTES = _bytes("prefetch_issued_bytes", "Bytes of those pieces.")
PREFETCH_USED = _count("prefetch_used", "Pieces among them that a reader then began.")
PREFETCH_USED_BYTES = _bytes("prefetch_used_bytes", "Bytes of those pieces.")
PREFETCH_WASTED = _count("prefetch_wasted", "Pieces that were evicted, or given up, before a reader began them.")
PREFETCH_WASTED_BYTES = _bytes("prefetch_wasted_bytes", "Bytes of those pieces.")
PREFETCH_LATE = _count("prefetch_late", "Pieces that were still on their way when a reader began them.")
PREFETCH_LATE_BYTES = _bytes("prefetch_late_bytes", "Bytes of those pieces.")
SPILLS = _count("spills", "Blocks written from the shm tier to the disk tier in the background.")
SPILL_BYTES = _bytes("spill_bytes", "Bytes of those blocks.")
SPILLS_DECLINED = _count("spills_declined", "Blocks that the disk tier did not take because it would not keep them.")
SPILLS_LOST = _count("spills_lost", "Blocks that left the shm tier before the disk tier could take them.")

# The object store, counted around every request (`cachefs.store.retry`).
ORIGIN_REQUESTS = _count("origin_requests", "Requests sent to the object store, retries included.")
ORIGIN_BYTES = _bytes("origin_bytes", "Bytes of object bodies received.")
ORIGIN_LIST_REQUESTS = _count("origin_list_requests", "Listing requests among them.")
ORIGIN_HEAD_REQUESTS = _count("origin_head_requests", "HEAD requests among them.")
ORIGIN_GET_REQUESTS = _count("origin_get_requests", "GET requests among them.")
ORIGIN_RETRIES = _count("origin_retries", "Requests that were repeated.")
ORIGIN_ERRORS = _count("origin_errors", "Requests that ended in an error other than 'not found'.")
ORIGIN_THROTTLED = _count(
    "origin_throttled", "Requests that the store refused because of their rate (503 SlowDown, 429)."
)

# etcd (`peer.membership`).
ETCD_CONNECTIONS = _count("etcd_connections", "Sessions opened with etcd.")
ETCD_FAULTS = _count("etcd_faults", "Sessions with etcd, or tries to open one, that ended with a fault.")
ETCD_LISTS = _count("etcd_lists", "Times that all records of the cluster were read.")
ETCD_EVENTS = _count("etcd_events", "Changes of records that etcd told of.")
ETCD_LEASES = _count("etcd_leases", "Leases granted to this node.")
ETCD_LEASES_LOST = _count("etcd_leases_lost", "Leases that were gone when they were to be renewed.")
ETCD_RENEWALS = _count("etcd_renewals", "Renewals of the lease that were asked for.")
ETCD_BAD_RECORDS = _count("etcd_bad_records", "Records of other nodes that were left out, because they make no sense.")

# Peers: what this node asks of others (`peer.source`), and what it serves to them.
PEER_REQUESTS = _count("peer_requests", "Requests for blocks that were sent to other nodes.")
PEER_FAILURES = _count("peer_failures", "Requests that another node did not answer well; the next source was asked.")
PEER_ABSENT = _count("peer_absent", "Requests to another node that did not have the block (asked as the one who may).")
PEER_HEDGES = _count("peer_hedges", "Second questions, to the next source, beside a node that was late with a block.")
PEER_HEDGES_WON = _count("peer_hedges_won", "Second questions that brought the block first.")
PEER_CORRUPT = _count("peer_corrupt", "Blocks from other nodes that failed their check.")
PEER_LISTING_PAGES = _count("peer_listing_pages", "Pages of listings that came from another node.")
PEER_LISTING_FAILURES = _count("peer_listing_failures", "Pages that another node did not give; the store was asked.")
PEER_OWNED_FILL_BYTES = _bytes(
    "peer_owned_fill_bytes", "Bytes that came from the object store for blocks that this node owns."
)
PEER_SERVED_BLOCKS = _count("peer_served_blocks", "Blocks that were sent to other nodes.")
PEER_SERVED_BYTES = _bytes("peer_served_bytes", "Bytes of those blocks.")
PEER_SERVED_REQUESTS = _count("peer_served_requests", "Requests of other nodes that were answered.")
PEER_REFUSED_REQUESTS = _count(
    "peer_refused_requests", "Requests that were refused: no proof of being a peer, bad, other version, too many."
)
PEER_SERVED_LISTING_PAGES = _count("peer_served_listing_pages", "Pages of listings that were given to other nodes.")

# The worker: what the kernel asked.
FUSE_READS = _count("fuse_reads", "READ requests of the kernel.")
FUSE_READ_BYTES = _bytes("fuse_read_bytes", "Bytes given to the kernel.")
FUSE_REQUESTS = _count("fuse_requests", "All requests of the kernel, READ included.")
FUSE_ERRORS = _count("fuse_errors", "Requests that were answered with an error other than ENOENT or ENODATA.")
READ_MISSES = _count("read_misses", "READ requests that the shm tier could not answer.")
FRESH_READS = _count("fresh_reads", "READ requests past the tiers: of files opened with O_DIRECT, and with --no-cache.")
READ_MISS_SECONDS = Metric("read_miss_seconds", Unit.SECONDS, "Time that those READ requests waited.")
READAHEAD_REQUESTS = _count("readahead_requests", "Readahead messages sent to the agent.")
HUNG_AGENTS = _count("hung_agents", "Agents that showed no sign of life while an answer was due, and were killed.")
GUARD_HELD_SECONDS = Metric("guard_held_seconds", Unit.SECONDS, "Time for which the wake-up guard was held.")

METRICS: Mapping[str, Metric] = {value.name: value for value in list(globals().values()) if isinstance(value, Metric)}
"""All counters by name."""


class Counters:
    """Named sums, safe from any thread. `add` costs about 0.2 us."""

    __slots__ = ("_lock", "_values")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}

    def add(self, name: str, n: float = 1) -> None:
        """Add `n` to the counter `name`."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + n

    def get(self, name: str) -> float:
        """Return the counter `name` (0 when nothing was added)."""
        return self._values.get(name, 0)

    def snapshot(self) -> dict[str, float]:
        """Return a copy of all counters."""
        with self._lock:
            return dict(self._values)
