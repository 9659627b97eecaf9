"""The peers of this agent: there, away for now, or never asked for.

An agent that cannot be a peer (its secret is gone, a certificate is broken, its port is taken) tells so whoever mounts
first. One that comes back for mounts which are there has readers, who need an agent more than peers: it serves them
from the store, says why where people look, and tries again by itself. When it succeeds, the volumes that are open get
their blocks and listings from other nodes as well.

What always holds: without `--etcd` no module of peers is loaded. Once an agent serves, nothing that goes wrong with
becoming a peer ends it. What is said in the log is one line when peers are given up, one for each new reason, and one
when they are back.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from cachefs import errors
from cachefs.agent.commissions import Order, Report
from cachefs.agent.crew import Colleague
from cachefs.agent.inheritance import living_mounts
from cachefs.agent.volumes import CurrentStore, Sources, Volume, Volumes
from cachefs.block.block_cache import BlockCache
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.ports import BlockSource
from cachefs.config import CacheConfig, MetadataConfig, PeerConfig
from cachefs.metrics import Counters

if TYPE_CHECKING:
    from cachefs.agent.peering import Peering

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0


class Peers:
    """See the module. Used in the trio thread; `sources` and `status` in any."""

    def __init__(self, config: PeerConfig, cache: CacheConfig, counters: Counters) -> None:
        self._config = config
        self._cache = cache
        self._counters = counters
        self._ready: Peering | None = None
        self._peering: Peering | None = None
        self._why = ""
        self._trying = trio.CancelScope()
        self._tries_over: trio.Event | None = None
        self.take_order: Callable[[Volume, Order], Report] | None = None
        """Who does what other nodes ask for."""

    @property
    def problem(self) -> str | None:
        """Why this node is no peer for now, though it was asked to be one. Any thread."""
        return self._why or None

    # -- becoming one --------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Look at the settings, before anything else is opened. Raises UsageError, see `_do_without`."""
        if not self._config.etcd_endpoints:
            return
        try:
            self._ready = await self._made()
        except Exception as error:  # noqa: BLE001 - readers need this agent, whatever is wrong with its peers
            await self._do_without(error)

    async def join(
        self,
        nursery: trio.Nursery,
        cache: BlockCache,
        tiers: tuple[TierWriter | None, TierWriter | None],
        volumes: Volumes,
        summary: Callable[[], dict[str, Any]],
    ) -> None:
        """Become a peer, now or, when that fails and there are readers, later. Raises UsageError, see `_do_without`.

        `summary`: what this agent says of itself.
        """
        if not self._config.etcd_endpoints:
            return

        async def start(peering: Peering) -> None:
            await peering.start(nursery, cache, tiers, volumes, summary)

        try:
            if self._ready is not None:
                await start(self._ready)
                self._peering = self._ready
                return
        except Exception as error:  # noqa: BLE001 - as above
            await self._do_without(error)
        self._tries_over = trio.Event()
        nursery.start_soon(self._try_again, start, volumes, self._tries_over)

    async def _made(self) -> Peering:
        """Return what makes this node a peer of others. Raises UsageError."""
        from cachefs.agent.peering import Peering  # what nobody asked for is not even imported

        make = functools.partial(Peering, self._config, self._cache, self._counters, self._ordered)  # reads files
        return await trio.to_thread.run_sync(make, abandon_on_cancel=True)

    async def _do_without(self, error: Exception) -> None:
        """Go on without peers, if there are readers. Raises `error` if not: somebody mounts, and is told."""
        if not await trio.to_thread.run_sync(living_mounts, self._cache):
            raise error
        self._why = _reason(error)
        text = "this node goes on without peers, and tries again by itself: %s"
        log.warning(text, self._why, exc_info=_strange(error))

    async def _try_again(self, start: Callable[[Peering], Awaitable[None]], volumes: Volumes, over: trio.Event) -> None:
        """Try until it works, or `leave`."""
        pause_s = FIRST_PAUSE_S
        try:
            with self._trying:
                while self._peering is None:
                    await trio.sleep(pause_s * random.uniform(0.8, 1.0))
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    await self._try_once(start)
                self._why = ""
                for volume in list(volumes.by_id.values()):
                    volume.renew_sources()
                self.volumes_changed()
                log.info("this node is a peer again")
        finally:
            over.set()

    async def _try_once(self, start: Callable[[Peering], Awaitable[None]]) -> None:
        try:
            peering = await self._made()
            await start(peering)
            self._peering = peering
        except Exception as error:
            known, self._why = self._why, _reason(error)
            level = logging.ERROR if _strange(error) else logging.INFO
            level = logging.DEBUG if self._why == known else level
            log.log(level, "this node is still without peers: %s", self._why, exc_info=_strange(error))

    # -- being one -----------------------------------------------------------------------------------------------------

    def sources(self, store: CurrentStore, prefix: str, rules: MetadataConfig) -> Sources:
        """Return where the blocks and listings of a volume come from now."""
        return Sources(store) if self._peering is None else self._peering.sources(store, prefix, rules)

    def volumes_changed(self) -> None:
        """Mounts came or went: tell the cluster what this node holds."""
        if self._peering is not None:
            self._peering.volumes_changed()

    def colleagues(self, volume: Volume) -> list[Colleague]:
        """See `Colleagues.colleagues`."""
        if self._peering is None:
            raise errors.UsageError(
                f"this node has no peers for now: {self._why}" if self._why else "this node has no peers (--etcd)"
            )
        return self._peering.colleagues(volume)

    def send_order(self, volume: Volume, node_id: str, order: Order) -> Report:
        """See `Colleagues.send_order`."""
        if self._peering is None:
            raise errors.StorageUnavailable("this node has no peers for now")
        return self._peering.send_order(volume, node_id, order)

    def crew_source(self, volume: Volume, crew: Sequence[str]) -> BlockSource:
        """See `Colleagues.crew_source`."""
        return volume.blocks_from if self._peering is None else self._peering.crew_source(volume, crew)

    def _ordered(self, volume: Volume, order: Order) -> Report:
        """Another node asks for something."""
        if self.take_order is None:
            raise errors.StorageUnavailable("this node is only just beginning")
        return self.take_order(volume, order)

    def handicaps(self) -> list[str]:
        """Return what somebody who mounts should know. Any thread."""
        return [f"this node has no peers for now, and tries again by itself: {self._why}"] if self._why else []

    def status(self, *, ask: bool) -> dict[str, Any] | None:
        """Return the cluster as this node sees it, None if there is none; with `ask` every member is asked. BLOCKS."""
        if not self._config.etcd_endpoints:
            return None
        if self._peering is not None:
            return {"problem": None, **self._peering.status(ask=ask)}
        return {
            "problem": self._why,
            "cluster": self._config.cluster,
            "node_id": None,
            "etcd": {"connected": False},
            "server": {},
            "volumes": {},
            "members": [],
        }

    async def leave(self) -> None:
        """Leave the cluster, or stop trying to join it. Takes at most some seconds."""
        self._trying.cancel()
        if self._tries_over is not None:
            await self._tries_over.wait()
        if self._peering is not None:
            await self._peering.leave()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, errors.CachefsError) else f"{type(error).__name__}: {error}"


def _strange(error: Exception) -> Exception | None:
    """Return an error that nobody foresaw, whose traceback is worth its lines."""
    return None if isinstance(error, errors.CachefsError) else error
