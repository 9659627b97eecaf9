"""What volumes may do in the tiers: quotas and time to live, as their mounts ask for it (`cachefs.block.holdings`).

A volume is endpoint, bucket and prefix here, whatever its rules of freshness: those share their blocks. Of several
mounts of a volume the newest one's limits hold, as its keys do: whoever mounts with another quota sees that it counts,
and it counts until somebody mounts the volume with another one, even when nothing of it is mounted any more. That is
what keeps its time to live going. So the limits outlive the agent.

    <cache dir>/limits    msgpack; replaced by rename

Limits that cannot be read or written are said, and hold until the agent ends.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio
import xxhash

from cachefs.block.holdings import Limit
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.tier_files import boot_id
from cachefs.config import LimitsConfig, from_plain
from cachefs.durable import replace_durably
from cachefs.types import Tier

log = logging.getLogger(__name__)

FORMAT = 1
FILE = "limits"


class Entry(msgspec.Struct, frozen=True):
    """The limits of one volume."""

    owner: int
    source: str
    shm_quota_bytes: int
    disk_quota_bytes: int
    ttl_s: float
    mounted_at_s: float
    """When the mount was made that asked for them, by the clock since the boot `boot`."""
    boot: str

    def of(self, tier: Tier) -> Limit:
        """Return what the volume may do in a tier. The time to live is that of both: what only the shm tier has is
        written to the disk when it leaves.
        """
        return Limit(self.shm_quota_bytes if tier is Tier.SHM else self.disk_quota_bytes, self.ttl_s)


class _Kept(msgspec.Struct, frozen=True):
    format: int
    entries: list[Entry]


def owner_number(endpoint: str, bucket: str, prefix: str) -> int:
    """Return the number by which the tiers know a volume. Never 0; the same in every process."""
    return xxhash.xxh3_64_intdigest(f"{endpoint}\0{bucket}\0{prefix}".encode("utf-8", "surrogateescape")) or 1


class VolumeLimits:
    """The limits of all volumes of an agent. Changed in the trio thread."""

    def __init__(self, cache_dir: Path) -> None:
        """Take up what the last agent kept. BLOCKS; never raises."""
        self._path = cache_dir / FILE
        self._entries: dict[int, Entry] = {}
        self._boot = boot_id()
        self._changing = trio.Lock()
        self._tiers: list[TierWriter] = []
        try:
            kept = msgspec.msgpack.decode(self._path.read_bytes(), type=_Kept)
            if kept.format != FORMAT:
                raise ValueError("of another format")
            self._entries = {entry.owner: entry for entry in kept.entries}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.warning(
                "the limits of volumes cannot be read from %s (%s): they begin with the next mounts", FILE, error
            )

    def of(self, tier: Tier) -> dict[int, Limit]:
        """Return what volumes may do in a tier."""
        return {owner: entry.of(tier) for owner, entry in self._entries.items()}

    def govern(self, *tiers: TierWriter | None) -> None:
        """These are the tiers; they were opened with the limits that were known."""
        self._tiers = [tier for tier in tiers if tier is not None]

    async def ask(self, owner: int, source: str, plain: Mapping[str, Any], mounted_at_s: float) -> None:
        """A mount of a volume asks for limits (`plain`: its section "limits"). Never raises."""
        asked: LimitsConfig = from_plain(LimitsConfig, dict(plain))
        entry = Entry(
            owner, source, asked.shm_quota_bytes, asked.disk_quota_bytes, asked.disk_ttl_s, mounted_at_s, self._boot
        )
        async with self._changing:
            known = self._entries.get(owner)
            if known is not None and known.boot == self._boot and known.mounted_at_s > mounted_at_s:
                return
            limited = any(entry.of(tier) != Limit() for tier in (Tier.SHM, Tier.DISK))
            if entry == known or (known is None and not limited):
                return
            if limited:
                self._entries[owner] = entry
            else:
                del self._entries[owner]
            for tier in self._tiers:
                await trio.to_thread.run_sync(tier.limit, self.of(tier.tier))
            try:
                kept = msgspec.msgpack.encode(_Kept(FORMAT, list(self._entries.values())))
                await trio.to_thread.run_sync(replace_durably, self._path, kept)
            except OSError as error:
                log.warning("the limits of volumes cannot be kept (%s): the next agent begins without them", error)
        log.info("limits of %s: %s", source, entry)

    async def learn(self) -> None:
        """Find what volumes hold whose quotas are new, without holding up those who write to the tiers."""
        for tier in self._tiers:
            while await trio.to_thread.run_sync(tier.learn_holdings):
                await trio.lowlevel.checkpoint()
