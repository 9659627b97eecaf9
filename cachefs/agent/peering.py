"""The agent's part in a cluster: built here, plugged into volumes, and taken down. Only imported with `--etcd`.

    Membership  <- etcd: who is there, who holds which volume; this node with what it holds
    PeerServer  -> what others ask of this node (`cachefs.agent.peer_holdings`), in a thread of its own
    Neighbours  -> whom the volumes of this node ask (`peer.source`, `peer.listings`)

A node without etcd, or with nobody there, works as one without peers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import trio
import xxhash

from cachefs import __version__, errors
from cachefs.agent.commissions import Order, Report
from cachefs.agent.crew import Colleague
from cachefs.agent.inheritance import living_mounts
from cachefs.agent.peer_census import PeerCensus
from cachefs.agent.peer_holdings import PeerHoldings, job_request
from cachefs.agent.volumes import CurrentStore, Sources, Volume, Volumes
from cachefs.block.block_cache import BlockCache
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.ports import BlockSource
from cachefs.config import CacheConfig, MetadataConfig, PeerConfig, join_address, split_address, split_endpoint
from cachefs.metrics import Counters
from cachefs.store.port import ObjectStore
from cachefs.types import Consistency, ObjectId
from peer.client import PeerClient
from peer.credentials import PeerCredentials, check_listen
from peer.etcd_settings import EtcdSettings
from peer.identity import NodeIdentity
from peer.listings import MAX_AGE_S, ListingPages, PeerListings, shared_age_s
from peer.members import Member
from peer.membership import Membership
from peer.placement import unit_of
from peer.server import PeerServer
from peer.source import Neighbours, PeerSource
from peer.tree import TreeSource
from peer.wire import NotHeld

log = logging.getLogger(__name__)

MIB = 1 << 20
ASKED_AT_ONCE = 16
LEAVE_S = 2.0
JOIN_WAIT_S = 3.0
"""How long a new agent waits to know the cluster before it serves: it would ask the store for what others have."""
REJOIN_WAIT_S = 0.3
"""The same when there are mounts already, whose readers wait for it."""


class Peering:
    """Peers of one agent. Made in the trio thread, before the volumes."""

    def __init__(
        self,
        config: PeerConfig,
        cache: CacheConfig,
        counters: Counters,
        ordered: Callable[[Volume, Order], Report],
    ) -> None:
        """`ordered`: does what other nodes ask for. Raises UsageError for settings that cannot work."""
        self._ordered = ordered
        self._config = config
        self._cache = cache
        self._counters = counters
        self._credentials = PeerCredentials(config.peer_cert, config.peer_key, config.peer_ca, config.peer_secret_file)
        self._pages = ListingPages()
        self.client = PeerClient(self._credentials, counters=counters)
        self._volumes: Volumes | None = None
        self._server: PeerServer | None = None
        self._membership: Membership | None = None
        self._neighbours: Neighbours | None = None
        self._mounts_changed_at = time.monotonic()
        self._census = PeerCensus((None, None), tuple)
        self._joined = trio.Event()
        self._staying = trio.CancelScope()
        self._left: trio.Event | None = None

    async def start(
        self,
        nursery: trio.Nursery,
        cache: BlockCache,
        tiers: tuple[TierWriter | None, TierWriter | None],
        volumes: Volumes,
        summary: Callable[[], dict[str, Any]],
    ) -> None:
        """Listen, and join the cluster. Raises UsageError, also when it cannot listen there."""
        self._volumes = volumes
        self._census = PeerCensus(tiers, self._shared_volumes)
        host, port = await trio.to_thread.run_sync(self._own_address, abandon_on_cancel=True)
        listen, listen_port = split_address(self._config.peer_listen) if self._config.peer_listen else (host, port)
        listen_port = listen_port or port
        check_listen(listen, self._credentials, self._config.peer_insecure)
        holdings = PeerHoldings(
            cache, tiers, self._held, self._pages, lambda: summary_of(summary()), self._level, nursery, self._ordered
        )
        server = PeerServer(holdings, credentials=self._credentials, counters=self._counters)
        try:
            bound = await trio.to_thread.run_sync(server.start, listen, listen_port)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            where = join_address(listen, listen_port)
            raise errors.UsageError(f"other nodes cannot be served at {where}: {why} (--peer-listen)") from error
        self._server = server
        try:
            await self._join(nursery, cache, join_address(host, port or bound))
        except BaseException:
            await self.leave()
            raise

    async def _join(self, nursery: trio.Nursery, cache: BlockCache, address: str) -> None:
        """Become a member who is reached at `address`."""
        identity = NodeIdentity(Path(self._cache.cache_dir))
        member = Member(
            node_id=await trio.to_thread.run_sync(identity.node_id),
            name=self._config.node_name or platform.node(),
            address=address,
            zone=self._config.zone,
            groups=self._config.groups,
            weight=max(1, (self._cache.shm_size_bytes + self._cache.cache_size_bytes) // MIB),
            instance=secrets.token_hex(8),
            version=__version__,
            tls=self._credentials.tls,
        )
        membership = Membership(self._etcd_settings(), member, redraw_id=identity.redraw, counters=self._counters)
        self._membership = membership
        self._neighbours = Neighbours(
            self.client,
            lambda: membership.view,
            lambda: membership.member.node_id,
            zone=self._config.zone,
            block_size=cache.block_size,
            counters=self._counters,
        )
        self._left = trio.Event()
        nursery.start_soon(self._stay, self._left)
        reading = await trio.to_thread.run_sync(living_mounts, self._cache)
        with trio.move_on_after(REJOIN_WAIT_S if reading else JOIN_WAIT_S):
            await self._joined.wait()
        log.info("peers of cluster %r reach this node at %s", self._config.cluster, member.address)

    async def _stay(self, left: trio.Event) -> None:
        """Be a member until `leave`."""
        assert self._membership is not None
        with self._staying:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._membership.run)
                self._joined.set()
                nursery.start_soon(self._census.run, self._membership)
        left.set()

    def _etcd_settings(self) -> EtcdSettings:
        config = self._config
        return EtcdSettings(
            endpoints=config.etcd_endpoints,
            cluster=config.cluster,
            ca=_path(config.etcd_ca),
            cert=_path(config.etcd_cert),
            key=_path(config.etcd_key),
            user=config.etcd_user or None,
            password_file=_path(config.etcd_password_file),
        )

    def _own_address(self) -> tuple[str, int]:
        """Return where others reach this node; port 0: any. BLOCKS (a name may have to be looked up)."""
        if self._config.advertise:
            return split_address(self._config.advertise)
        return address_towards(*self._config.etcd_endpoints), 0

    # -- for volumes ---------------------------------------------------------------------------------------------------

    def sources(self, store: CurrentStore, prefix: str, rules: MetadataConfig) -> Sources:
        """Return where the blocks and listings of a volume come from."""
        if self._neighbours is None or not is_shared(store):
            return Sources(store)
        name = volume_name(store, prefix, store.view)
        blocks = PeerSource(name, store, self._neighbours, lambda: store.max_requests)
        ttl_s = math.inf if rules.consistency is Consistency.IMMUTABLE else rules.metadata_ttl_s
        if rules.consistency is Consistency.STRICT or not ttl_s or store.view:
            return Sources(blocks)
        age_s = shared_age_s(ttl_s)
        max_age_s = self._since_mounts_changed if math.isinf(ttl_s) else lambda: age_s
        return Sources(blocks, PeerListings(name, store, self._neighbours, self._pages, max_age_s), age_s)

    def _since_mounts_changed(self) -> float:
        """Return how old a page may be that is kept for ever: what was there when somebody mounted is in it."""
        return min(MAX_AGE_S, time.monotonic() - self._mounts_changed_at)

    def volumes_changed(self) -> None:
        """Mounts came or went: tell the cluster what this node holds."""
        self._mounts_changed_at = time.monotonic()
        if self._membership is not None and self._volumes is not None:
            keeps = self._cache.shm_size_bytes or self._cache.cache_size_bytes
            held = [volume for volume in self._volumes.mounted() if keeps and is_shared(volume.store)]
            self._membership.set_volumes(frozenset(map(_name, held)))

    def _shared_volumes(self) -> list[tuple[str, Volume]]:
        mounted = [] if self._volumes is None else self._volumes.mounted()
        return [(_name(volume), volume) for volume in mounted if is_shared(volume.store)]

    def _level(self, volume: str, oid: ObjectId, index: int) -> int:
        neighbours = self._neighbours
        if neighbours is None:
            return 0  # nobody is asked yet
        return neighbours.candidates(volume, unit_of(oid, index, neighbours.block_size)).level

    def _held(self, name: str) -> list[Volume]:
        mounted = [] if self._volumes is None else self._volumes.mounted()
        return [volume for volume in mounted if is_shared(volume.store) and _name(volume) == name]

    # -- for jobs on several nodes -------------------------------------------------------------------------------------

    def colleagues(self, volume: Volume) -> list[Colleague]:
        """See `Colleagues.colleagues`."""
        assert self._membership is not None
        mine = self._membership.member.node_id
        holders = self._membership.view.holders.get(_name(volume), ())
        return [Colleague(each.node_id, each.name, each.groups, each.node_id == mine) for each in holders]

    def send_order(self, volume: Volume, node_id: str, order: Order) -> Report:
        """See `Colleagues.send_order`."""
        assert self._membership is not None
        member = self._membership.view.members.get(node_id)
        if member is None:
            raise errors.StorageUnavailable("it has left the cluster")
        try:
            answer = self.client.job(member, job_request(_name(volume), order))
        except NotHeld as error:
            raise errors.NotFound("it has a version of cachefs that cannot be asked for that") from error
        if isinstance(answer, str):
            raise errors.NotFound(answer)
        return Report(answer.job, answer.over, answer.parts)

    def crew_source(self, volume: Volume, crew: Sequence[str]) -> BlockSource:
        """See `Colleagues.crew_source`."""
        usual = volume.blocks_from
        return TreeSource(usual, crew) if isinstance(usual, PeerSource) else usual

    # -- for people ----------------------------------------------------------------------------------------------------

    def status(self, *, ask: bool) -> dict[str, Any]:
        """Return the cluster as this node sees it; with `ask` every member is asked how it is. BLOCKS."""
        membership = self._membership
        assert membership is not None
        state = membership.state()
        view = membership.view
        held = {volume: [member.name for member in holders] for volume, holders in view.holders.items()}
        members = sorted(view.members.values(), key=lambda member: (member.name, member.node_id))
        described = [self._describe(member) for member in members]
        if ask:
            with ThreadPoolExecutor(ASKED_AT_ONCE, thread_name_prefix="ask-peers") as threads:
                described = [
                    {**known, **told} for known, told in zip(described, threads.map(self._ask, members), strict=True)
                ]
        return {
            "cluster": self._config.cluster,
            "node_id": membership.member.node_id,
            "etcd": state,
            "server": {} if self._server is None else self._server.state(),
            "volumes": held,
            "datasets": self._census.datasets(),
            "members": described,
        }

    def _describe(self, member: Member) -> dict[str, Any]:
        assert self._membership is not None
        mine = member.node_id == self._membership.member.node_id
        return {
            "node_id": member.node_id,
            "name": member.name,
            "address": member.address,
            "zone": member.zone,
            "groups": list(member.groups),
            "version": member.version,
            "protocol": member.protocol,
            "weight": member.weight,
            "self": mine,
            **self.client.health(member),
        }

    def _ask(self, member: Member) -> dict[str, Any]:
        try:
            return {"summary": self.client.status(member)}
        except errors.CachefsError as error:
            return {"error": str(error)}

    # -- the end -------------------------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Leave the cluster, and stop serving it, as far as it was joined. Takes at most some seconds."""
        self._staying.cancel()
        if self._left is not None:
            with trio.move_on_after(LEAVE_S, shield=True):
                await self._left.wait()
        self.client.close()
        if self._server is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._server.close)


def summary_of(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return what other nodes are told of this one: no paths and no names of mounts."""
    counters = status["counters"]
    hits = counters.get("disk_hits", 0) + sum(
        mount["counters"].get("shm_hits", 0) for mount in status["mounts"].values()
    )
    fills = counters.get("origin_fills", 0) + counters.get("peer_fills", 0)
    tiers = {
        name: {key: status["tiers"][name].get(key) for key in ("state", "used_bytes", "limit_bytes", "blocks")}
        for name in ("shm", "disk")
    }
    return {
        "version": status["version"],
        "uptime_s": status["uptime_s"],
        "tiers": tiers,
        "counters": counters,
        "hit_ratio": hits / (hits + fills) if hits + fills else None,
    }


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def is_shared(store: ObjectStore) -> bool:
    """Whether this store is the same one for all nodes. A directory of one node is another directory on the next."""
    return store.endpoint.startswith(("http://", "https://"))


def volume_name(store: ObjectStore, prefix: str, view: str = "") -> str:
    """Return what a volume is called among peers: nodes that reach it at the same address share it, and only those that
    see the same `view` of it (`RetryingStore.view`), with credentials of the same identity, which the endpoint says.
    """
    parts = (store.endpoint, store.bucket, prefix, *((view,) if view else ()))
    return xxhash.xxh3_64_hexdigest("\0".join(parts).encode("utf-8", "surrogateescape"))


def _name(volume: Volume) -> str:
    return volume_name(volume.store, volume.prefix, volume.store.view)


def address_towards(*urls: str) -> str:
    """Return the local address from which packets to the host of a URL would leave, the first of them to which there is
    a way. BLOCKS. Raises UsageError when there is none to any.
    """
    reasons = []
    for url in urls:
        _, host, port = split_endpoint(url)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            for family, kind, protocol, _, address in found:
                with socket.socket(family, kind, protocol) as probe, contextlib.suppress(OSError):
                    probe.connect(address)  # sends nothing: it only chooses a route
                    return str(probe.getsockname()[0])
            reasons.append(f"{url}: no route")
        except OSError as error:
            reasons.append(f"{url}: {error.strerror or error}")
    raise errors.UsageError(
        f"no way to etcd can be found ({'; '.join(reasons)}): say with --advertise where others reach this node"
    )
