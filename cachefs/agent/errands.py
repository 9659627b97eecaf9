"""What commands ask of the agent: warm up, check, evict, pin, unpin. One connection for each command.

A job that somebody waits for lives in the connection, and ends with it: Ctrl-C, and a command that is killed, stop it.
One in the background is the agent's, and `cachefs status` shows it.
"""

from __future__ import annotations

import functools
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import trio

from cachefs import errors
from cachefs.agent import messages
from cachefs.agent.commissions import Commissions, Order
from cachefs.agent.crew import Colleagues, CrewJob, choose
from cachefs.agent.jobs import Job, State, Verb
from cachefs.agent.pins import OID_BYTES, Pin, Pins
from cachefs.agent.spool import Spool
from cachefs.agent.volumes import FileVersion, Volume, Volumes
from cachefs.agent.warmup import WarmUp, check
from cachefs.block import codec
from cachefs.block.block_cache import BlockCache
from cachefs.block.ledger import value_cost
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.ports import BlockSource
from cachefs.types import BlockKey, Ino, Tier, block_key

log = logging.getLogger(__name__)

TELL_S = 0.5
KEPT_JOBS = 32
"""Jobs that are shown, those that are over included."""
EVICTED_AT_ONCE = 256
MOST_PATHS = 100_000
"""That one command may pin."""

J = TypeVar("J", Job, CrewJob)
Tell = Callable[[messages.Answer], object]
Tiers = tuple[TierWriter | None, TierWriter | None]


class Errands:
    """Answers commands. Trio thread, but for `describe`."""

    def __init__(
        self,
        cache: BlockCache,
        tiers: Tiers,
        volumes: Volumes,
        warm_up: WarmUp,
        pins: Pins,
        spool_dir: str,
        nursery: trio.Nursery,
        colleagues: Colleagues | None = None,
    ) -> None:
        """`tiers`: shm and disk; `spool_dir`: where a list of files can be; `colleagues`: other nodes."""
        self._cache = cache
        self._tiers = [tier for tier in tiers if tier is not None]
        self._volumes = volumes
        self._warm_up = warm_up
        self._pins = pins
        self._spool_dir = spool_dir
        self._nursery = nursery
        self._colleagues = colleagues
        self.commissions = Commissions(self._commissioned, nursery)
        """What other nodes ask for."""
        self._jobs: OrderedDict[str, Job | CrewJob] = OrderedDict()

    def describe(self) -> list[dict[str, Any]]:
        """Return the jobs, oldest first. Any thread."""
        return [job.describe() for job in list(self._jobs.values())]

    async def answer(self, request: messages.Errand, tell: Tell) -> messages.Answer:
        """Do what is asked. `tell` gets what is to be said before the answer. Raises CachefsError."""
        match request:
            case messages.Work():
                return await self._work(request, tell)
            case messages.Paths():
                await self._job(request.job).feed(request.paths, last=request.last)
            case messages.Proceed():
                self._job(request.job).consent.set()
            case messages.StopJob():
                job = self._job(request.job)
                job.stop()
                await job.over.wait()
            case messages.Pins():
                return messages.PinList(id=request.id, pins=self._pins.listed())
            case messages.Unpin():
                volume, _ = self._mount(request.mount_id)
                gone = await self._pins.remove(volume.volume_id, [path.strip(b"/") for path in request.paths])
                return messages.PinList(id=request.id, pins=[pin.describe() for pin in gone])
        return messages.Done(id=request.id)

    def _job(self, identity: str) -> Job | CrewJob:
        try:
            return self._jobs[identity]
        except KeyError:
            raise errors.NotFound(f"there is no job {identity}") from None

    def _mount(self, mount_id: str) -> tuple[Volume, str]:
        for volume in self._volumes.by_id.values():
            for mount in volume.mounts.values():
                if mount.mount_id == mount_id:
                    return volume, mount.mountpoint
        raise errors.MountError("the mount has no connection to its agent now: try again in a moment")

    async def _work(self, request: messages.Work, tell: Tell) -> messages.Answer:
        volume, mountpoint = self._mount(request.mount_id)
        job = self._job_of(request, volume, mountpoint)
        if request.background:
            return await self._leave(job, request.id, tell)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            while not job.over.is_set():
                tell(messages.JobState(id=request.id, job=job.describe()))
                with trio.move_on_after(TELL_S):
                    await job.over.wait()
        return self._last_word(job, request.id)

    def _job_of(self, request: messages.Work, volume: Volume, mountpoint: str) -> Job | CrewJob:
        """Make what is asked for. Raises UsageError."""
        if request.nodes < 0:
            return self._remember(self._made(request, volume, mountpoint))
        if self._colleagues is None or request.verb not in (Verb.WARM, Verb.CHECK):
            raise errors.UsageError(f"{request.verb} is for this node alone")
        found = self._colleagues.colleagues(volume)
        nodes = choose(found, request.nodes, request.group, f"{volume.store.endpoint}/{volume.store.bucket}")
        crew = tuple(node.node_id for node in nodes)
        order = Order(
            job=secrets.token_hex(16), begin=True, verb=request.verb, tier=request.tier, force=request.force, crew=crew
        )
        own = None
        if any(node.is_self for node in nodes):
            source = self._colleagues.crew_source(volume, crew)
            own = self._made(msgspec.structs.replace(request, background=True), volume, mountpoint, source)
        send, background = self._colleagues.send_order, request.background
        return self._remember(CrewJob(own, order, volume, mountpoint, nodes, send, background=background))

    def _made(self, request: messages.Work, volume: Volume, mountpoint: str, source: BlockSource | None = None) -> Job:
        return Job(
            Verb(request.verb), volume, mountpoint, self._cache.block_size, self._spool_dir, self._act(request),
            force=request.force, background=request.background, tier=Tier(request.tier) if request.tier else None,
            source=source,
        )  # fmt: skip

    def _commissioned(self, volume: Volume, order: Order) -> Job:
        """Make a job that another node asks for. Raises UsageError, NotFound."""
        mount = next(iter(volume.mounts.values()), None)
        if mount is None or self._colleagues is None:
            raise errors.NotFound("it is not mounted here")
        request = messages.Work(
            id=0, mount_id=mount.mount_id, verb=order.verb, force=order.force, background=True, tier=order.tier
        )
        source = self._colleagues.crew_source(volume, order.crew)
        return self._remember(self._made(request, volume, mount.mountpoint, source))

    async def _leave(self, job: Job | CrewJob, identity: int, tell: Tell) -> messages.Answer:
        """Begin a job that goes on by itself when all its paths are known; until then it needs who asked for it."""
        self._nursery.start_soon(job.run)
        tell(messages.JobState(id=identity, job=job.describe()))
        try:
            await job.fed.wait()
        except trio.Cancelled:
            if not job.fed.is_set():
                job.stop()
            raise
        return messages.JobState(id=identity, job=job.describe(), over=job.over.is_set())

    def _last_word(self, job: Job | CrewJob, identity: int) -> messages.Answer:
        return messages.JobState(id=identity, job=job.describe(job.examples), over=True)

    def _remember(self, job: J) -> J:
        self._jobs[job.identity] = job
        over = [each.identity for each in self._jobs.values() if each.over.is_set()]
        for identity in over[: max(0, len(self._jobs) - KEPT_JOBS)]:
            del self._jobs[identity]
        return job

    def _act(self, request: messages.Work) -> Callable[[Job, Spool], Any]:
        """Return what a job does. Raises UsageError."""
        match request.verb:
            case Verb.WARM:
                return self._warm_up.run
            case Verb.CHECK:
                return functools.partial(check, self._cache)
            case Verb.EVICT:
                return self._evict
            case Verb.PIN:
                return functools.partial(self._pin, request.for_s)
        raise errors.UsageError(f"nobody knows how to {request.verb}")

    # -- evict and pin -------------------------------------------------------------------------------------------------

    async def _evict(self, job: Job, spool: Spool) -> None:
        """Take the blocks of all files out of the tiers. Those of pinned files stay, and are named."""
        job.state = State.EVICTING
        keys: list[BlockKey] = []

        async def take(ino: Ino, file: FileVersion) -> None:
            job.figures.done_files += 1
            if self._pins.covers(file.oid):
                job.blame(ino, "it is pinned (`cachefs unpin` lets it go)")
                return
            for index in range(file.blocks):
                keys.append(block_key(file.oid, index))
                if len(keys) >= EVICTED_AT_ONCE:
                    await self._discard(job, keys)

        await job.each(spool, take)
        await self._discard(job, keys)

    async def _discard(self, job: Job, keys: list[BlockKey]) -> None:
        wanted, gone = list(keys), set()
        keys.clear()
        async with self._cache.spill_paused:
            for tier in self._tiers:
                held = [key for key in wanted if key in tier]
                if not held:
                    continue
                try:
                    await trio.to_thread.run_sync(tier.discard, held)
                except errors.TierUnavailable as error:
                    raise errors.StorageUnavailable(f"the {tier.tier} tier cannot be changed: {error}") from error
                gone.update(held)
        job.figures.evicted_blocks += len(gone)

    async def _pin(self, for_s: float, job: Job, spool: Spool) -> None:
        """Keep all files in the tiers, path by path. Raises UsageError, StorageUnavailable."""
        job.state = State.PINNING
        if len(job.sections) > MOST_PATHS:
            said = f"{len(job.sections)} paths: pin directories, or at most {MOST_PATHS} paths at a time"
            raise errors.UsageError(said)
        until = time.time() + for_s if for_s and math.isfinite(for_s) else None
        pins: list[Pin] = []
        start = 0
        for path, end in job.sections:
            pin = await self._pin_of(job, spool, path, range(start, end), until)
            if pin.files:
                pins.append(pin)
            start = end
        await self._pins.add(pins, job.volume.owner)

    async def _pin_of(self, job: Job, spool: Spool, path: bytes, numbers: range, until: float | None) -> Pin:
        """Return the pin of one path, for the files with these numbers."""
        oids, takes = bytearray(), 0

        async def take(ino: Ino, file: FileVersion) -> None:
            nonlocal takes
            job.figures.done_files += 1
            oids.extend(file.oid)
            takes += _cost(file, self._cache.block_size)

        await job.each(spool, take, numbers)
        meant = path.strip(b"/")
        return Pin(job.volume.volume_id, job.mountpoint, meant, until, len(oids) // OID_BYTES, takes, bytes(oids))


def _cost(file: FileVersion, block_size: int) -> int:
    """Return what a file takes of a tier."""
    whole, rest = divmod(file.version.size, block_size)
    cost = whole * value_cost(block_size + codec.HEADER_SIZE)
    return cost + (value_cost(rest + codec.HEADER_SIZE) if rest else 0)
