"""What this node gives to its peers: the blocks of its tiers, fills by its block cache, pages of listings.

The peer server asks from a thread of its own. Blocks that are in memory it gets at once, straight from the shm tier's
map; what has to be fetched goes through the trio thread, as a question of a worker does, and joins what is on its way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from cachefs import errors
from cachefs.agent.commissions import Order, Report
from cachefs.agent.volumes import Volume
from cachefs.block.block_cache import BlockCache
from cachefs.block.codec import HEADER_SIZE
from cachefs.block.flights import Filled
from cachefs.block.lmdb_tier import TierWriter
from cachefs.prefetch.ports import Outcome, Piece
from cachefs.store.port import ListPage
from cachefs.types import BlockKey, ObjectId, ObjectVersion, object_id
from peer.jobs import JobAnswer, JobRequest
from peer.listings import ListingPages
from peer.ports import Fetched
from peer.wire import ListingRequest

log = logging.getLogger(__name__)

TRY_AGAIN_S = 5.0
_ORDER_FIELDS = tuple(field.name for field in dataclasses.fields(Order))


class PeerHoldings:
    """See `peer.ports.Holdings`."""

    def __init__(
        self,
        cache: BlockCache,
        tiers: tuple[TierWriter | None, TierWriter | None],
        volumes: Callable[[str], list[Volume]],
        pages: ListingPages,
        summary: Callable[[], dict[str, Any]],
        level: Callable[[str, ObjectId, int], int],
        nursery: trio.Nursery,
        ordered: Callable[[Volume, Order], Report],
    ) -> None:
        """`tiers`: shm and disk; `volumes`: those with this name among peers that are held now; `level`: as below;
        `ordered`: does what other nodes ask for, in the trio thread.
        """
        self._ordered = ordered
        self._behind: list[_Behind] = []
        """What is to be fetched for others behind readers, until the event loop comes to it."""
        self._cache = cache
        self._shm, self._disk = tiers
        self._volumes = volumes
        self._pages = pages
        self._summary = summary
        self._level = level
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._try_again: dict[str, float] = {}
        """By volume whose store fails: when it is tried for others again."""

    @property
    def block_size(self) -> int:
        """See `Holdings.block_size`."""
        return self._cache.block_size

    @contextlib.contextmanager
    def lend(self, key: BlockKey, length: int) -> Iterator[memoryview | None]:
        """See `Holdings.lend`."""
        if self._shm is None or key not in self._shm:
            yield None
            return
        with self._shm.lend(key, length) as payload:
            if payload is not None:
                self._shm.touch([key])
            yield payload

    def level(self, volume: str, oid: ObjectId, index: int) -> int:
        """See `Holdings.level`."""
        return self._level(volume, oid, index)

    def stored(self, key: BlockKey) -> bool:
        """See `Holdings.stored`."""
        return self._disk is not None and key in self._disk

    def load(self, key: BlockKey, length: int) -> bytes | None:
        """See `Holdings.load`."""
        for tier in (self._shm, self._disk):
            value = None if tier is None or key not in tier else tier.read(key, length)
            if tier is not None and value is not None:
                tier.touch([key])
                return bytes(memoryview(value)[HEADER_SIZE:])
        return None

    def fetch(
        self, volume: str, version: ObjectVersion, first: int, count: int, fetched: Fetched, *, behind: bool = False
    ) -> None:
        """See `Holdings.fetch`."""
        start = self._start_behind if behind else self._start
        try:
            self._token.run_sync_soon(start, volume, version, first, count, fetched)
        except trio.RunFinishedError:
            fetched(errors.AgentUnavailable("this node is going away"))

    def _start(self, volume: str, version: ObjectVersion, first: int, count: int, fetched: Fetched) -> None:
        """In the trio thread."""
        with _failures_told(fetched):
            held = self._source_of(volume, version)
            if self._cache.carries:
                self._nursery.start_soon(self._carry, held, version, first, count, fetched)
                return
            oid = object_id(held.store.endpoint, held.store.bucket, version)
            self._cache.start(oid, version, held.blocks_from, first, count, lambda found: _tell(fetched, found))

    def _source_of(self, volume: str, version: ObjectVersion) -> Volume:
        """Return the volume whose sources give this version. Raises NotFound, StorageUnavailable."""
        held = self._held(volume, version.key)
        if held.store.now.counters.condition.failing and not self._may_try(volume):
            raise errors.StorageUnavailable("the store does not answer here", retryable=False)
        return held

    def _start_behind(self, volume: str, version: ObjectVersion, first: int, count: int, fetched: Fetched) -> None:
        """Note what nobody waits for; all that comes in one turn of the event loop is asked for together."""
        if self._cache.carries:
            self._start(volume, version, first, count, fetched)
            return
        with _failures_told(fetched):
            held = self._source_of(volume, version)
            oid = object_id(held.store.endpoint, held.store.bucket, version)
            if not self._behind:
                self._token.run_sync_soon(self._fetch_behind)
            self._behind.append(_Behind(held, Piece(oid, version, first, count), fetched))

    def _fetch_behind(self) -> None:
        noted, self._behind = self._behind, []
        by_volume: dict[Volume, list[_Behind]] = {}
        for each in noted:
            by_volume.setdefault(each.volume, []).append(each)
        for volume, some in by_volume.items():
            pieces = [each.piece for each in some]
            self._cache.prefetch(pieces, volume.blocks_from, functools.partial(_tell_outcomes, some))

    def _may_try(self, volume: str) -> bool:
        """Whether to try a store that fails, so that others learn when it is back: not often, since who asks waits."""
        now = trio.current_time()
        may = now >= self._try_again.get(volume, 0.0)
        if may:
            self._try_again[volume] = now + TRY_AGAIN_S
        return may

    async def _carry(self, held: Volume, version: ObjectVersion, first: int, count: int, fetched: Fetched) -> None:
        """There is no shm tier that would hold the blocks until they are sent."""
        cache = self._cache
        oid = object_id(held.store.endpoint, held.store.bucket, version)
        with _failures_told(fetched):
            async with cache.carriage.room(self, cache.carried_bytes(version, first, count)):
                _tell(fetched, await cache.fill(oid, version, held.blocks_from, first, count, inline=True))

    def _held(self, volume: str, key: str) -> Volume:
        """Return the volume of this name. Raises NotFound."""
        for held in self._volumes(volume):
            if key.startswith(held.prefix):
                return held
        raise errors.NotFound("this node does not hold that volume")

    def list_page(
        self, volume: str, prefix: str, delimiter: str, token: str | None, limit: int, max_age_s: float
    ) -> tuple[ListPage, float]:
        """See `Holdings.list_page`."""
        held = self._held(volume, prefix)
        request = ListingRequest(
            volume=volume, prefix=prefix, delimiter=delimiter, token=token, limit=limit, max_age_s=max_age_s
        )
        return self._pages.page(held.store, request)

    def job(self, request: JobRequest) -> JobAnswer:
        """See `Holdings.job`."""
        try:
            return trio.from_thread.run_sync(self._take_order, request, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled) as error:
            raise errors.AgentUnavailable("this node is going away") from error

    def _take_order(self, request: JobRequest) -> JobAnswer:
        """In the trio thread."""
        mounted = [volume for volume in self._volumes(request.volume) if volume.mounts]
        if not mounted:
            raise errors.NotFound("it is not mounted there")
        fields = {name: getattr(request, name) for name in _ORDER_FIELDS}
        report = self._ordered(mounted[0], Order(**fields))
        return JobAnswer(job=report.job, over=report.over, parts=report.parts)

    def summary(self) -> dict[str, Any]:
        """See `Holdings.summary`."""
        return self._summary()


@dataclass(frozen=True, slots=True)
class _Behind:
    """Blocks that somebody wants of us who does not wait for them."""

    volume: Volume
    piece: Piece
    fetched: Fetched


def _tell_outcomes(asked: Sequence[_Behind], outcomes: Sequence[tuple[Piece, Outcome]]) -> None:
    for each, (piece, outcome) in zip(asked, outcomes, strict=True):
        match outcome:
            case Outcome.THERE | Outcome.FETCHED | Outcome.JOINED:
                each.fetched(dict.fromkeys(range(piece.first, piece.first + piece.count)))
            case Outcome.GONE:
                each.fetched(errors.StaleObject(f"{piece.version.key!r} was deleted or replaced"))
            case _:
                each.fetched(errors.StorageUnavailable(f"{piece.version.key!r} did not come", retryable=False))


def job_request(volume: str, order: Order) -> JobRequest:
    """Return an order as it travels; `volume`: its name among peers."""
    return JobRequest(volume=volume, **{name: getattr(order, name) for name in _ORDER_FIELDS})


def _tell(fetched: Fetched, found: list[Filled] | Exception) -> None:
    fetched(found if isinstance(found, Exception) else {block.index: block.payload for block in found})


@contextlib.contextmanager
def _failures_told(fetched: Fetched) -> Iterator[None]:
    """Let who asked know what goes wrong inside: it leaves as an answer, not as an exception."""
    try:
        yield
    except errors.CachefsError as error:
        fetched(error)
    except Exception as error:
        log.exception("a question of another node failed")
        fetched(errors.StorageUnavailable(f"{type(error).__name__}: {error}"))
