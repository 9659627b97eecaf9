"""The agent's composition root: everything is built here, top-down, and taken down in reverse.

`python -m cachefs.agent.main --ready-fd N` (started by a mount: configuration as JSON on stdin, ends itself when
idle) or `cachefs agent` (foreground, stays).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import trio

from cachefs import __version__, errors
from cachefs.agent import inheritance, launch
from cachefs.agent.crash_guard import CrashGuard
from cachefs.agent.instructions import Instructions
from cachefs.agent.limits import VolumeLimits
from cachefs.agent.memory import anonymous_bytes, give_back, tune_allocator
from cachefs.agent.peers import Peers
from cachefs.agent.places import AgentPaths, is_own
from cachefs.agent.prefetching import Prefetching
from cachefs.agent.presence import AlreadyRunning, Presence
from cachefs.agent.report import Report
from cachefs.agent.server import Server
from cachefs.agent.volumes import MANIFESTS, Volumes
from cachefs.block.block_cache import BlockCache
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.policies.choice import policy_maker
from cachefs.block.tier_opening import settled_block_size
from cachefs.config import CacheConfig, LogConfig, PeerConfig, from_plain
from cachefs.logs import configure
from cachefs.metrics import Counters
from cachefs.mount.journal import shorten_stderr
from cachefs.runtime import RuntimeDir, own_directory
from cachefs.types import Tier
from metadata.room import MetadataFull
from metadata.store import MetadataWriter

log = logging.getLogger(__name__)
T = TypeVar("T")

SWEEP_S = 5.0
LEAST_LIFE_S = 5.0
"""How long an agent lives that finds no room for metadata: a disk that fills and empties must not be a restart loop."""
PARTING_S = 0.5
"""How long an agent that was told to end waits for mounts that were told so as well."""
SETTLE_S = 60.0
QUIET_BYTES = 96 << 20
"""Over this much anonymous memory a quiet agent gives free pages back."""


class Agent:
    """One agent, from start to end."""

    def __init__(self, config: CacheConfig, peer: PeerConfig, *, idle_timeout_s: float, log_file: str) -> None:
        self._config = config
        self._peer = peer
        self._log_file = log_file
        self._own_log = log_file.startswith(f"{config.runtime_dir}/")
        self._reasons: dict[str, str] = {}
        """Why a tier could not be opened."""
        self._idle_timeout_s = idle_timeout_s
        self._presence = Presence(config.runtime_dir, config.cache_dir)
        self._counters = Counters()
        self._started = time.monotonic()
        self._stopped = trio.Event()
        self._signalled = False
        self._may_move = False
        self._housework_threads = trio.CapacityLimiter(8)

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until idle for too long, told to stop, or SIGTERM/SIGINT."""
        # Whoever started us has blocked it: ending before the tiers are adopted would leave them in memory.
        signal.signal(signal.SIGTERM, self._note_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            self._presence.claim()
            self._presence.bind()
            await self._live(on_ready)
        finally:
            self._presence.hide()
            self._presence.release()

    def _note_signal(self, *_: object) -> None:
        """SIGTERM while starting: start, and end in order."""
        self._signalled = True

    async def _live(self, on_ready: Callable[[], None]) -> None:
        paths = AgentPaths.create(self._config)
        peers = Peers(self._peer, self._config, self._counters)
        await peers.prepare()
        guard = CrashGuard(paths.cache_dir)
        guard.begin(
            [paths.disk, paths.volumes.in_use],
            in_memory=[paths.shm] if is_own(paths.shm) else [],
            copies=[paths.volumes.in_use.with_name(MANIFESTS)],
        )
        self._settle_block_size(paths.disk)
        inheritance.write_settings(self._config, self._peer)
        self._may_move = paths.volumes.at_home
        limits = VolumeLimits(paths.cache_dir)
        shm = self._open_tier(Tier.SHM, paths.shm, self._config.shm_size_bytes, limits)
        disk = self._open_tier(Tier.DISK, paths.disk, self._config.cache_size_bytes, limits)
        limits.govern(shm, disk)
        tiers = [tier for tier in (shm, disk) if tier is not None]
        attached = 0
        volumes: Volumes | None = None
        refused: Exception | None = None
        try:
            async with (
                BlockCache(
                    shm,
                    disk,
                    block_size=self._config.block_size_bytes,
                    memory_limit_bytes=self._config.memory_limit_bytes,
                    counters=self._counters,
                ) as cache,
                trio.open_nursery() as nursery,
            ):
                volumes = Volumes(
                    paths.volumes, self._config, self._run_blocking, self._housework, nursery,
                    None if disk is None else disk.give_back, self._peer, peers.sources,
                )  # fmt: skip
                cache.know_owners(volumes.owner_of)
                report = Report(self._config, self._counters, self._reasons, self._log_file)
                volumes.handicaps = lambda: [*report.handicaps(paths, cache), *peers.handicaps()]
                alone = functools.partial(report.status, cache, volumes)
                try:
                    await peers.join(nursery, cache, (shm, disk), volumes, alone)
                except errors.CachefsError as error:
                    refused = error  # a nursery would put it into a group
                    nursery.cancel_scope.cancel()
                prefetching = Prefetching(cache, self._counters, nursery)
                told = Instructions(
                    cache, (shm, disk), volumes, self._counters, paths, RuntimeDir(self._config.runtime_dir),
                    prefetching.follow, peers.volumes_changed, nursery, peers,
                )  # fmt: skip
                peers.take_order = told.errands.commissions.take
                await told.start()
                server = Server(
                    cache, volumes, self._config.block_size_bytes, None if shm is None else str(paths.shm),
                    None if disk is None else str(paths.disk),
                    lambda ask_peers: {**alone(), "cluster": peers.status(ask=ask_peers), **told.status()},
                    self._stopped.set, told.mounts_changed, told.errands,
                )  # fmt: skip
                server.begun = prefetching.note
                server.limits = limits
                server.environment = launch.aws_environment(os.environ)
                server.learn_holdings = functools.partial(nursery.start_soon, limits.learn)
                await trio.lowlevel.checkpoint()
                nursery.start_soon(prefetching.run)
                nursery.start_soon(self._presence.serve, server.serve, nursery)
                nursery.start_soon(self._keep_house, cache, disk, volumes)
                nursery.start_soon(self._watch_idle, server, volumes)
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(self._forget_unused, volumes)
                log.info("cachefs agent %s serves %s", __version__, paths.cache_dir)
                on_ready()
                await self._stopped.wait()
                # Hang up first: workers ask the next agent again, and none gets an error from a store that is closing.
                self._presence.hide()
                attached = await self._count_staying(volumes)
                await peers.leave()
                cache.flush_at_exit = not attached  # readers wait for the next agent, which adopts the shm tier
                nursery.cancel_scope.cancel()
        finally:
            if volumes is not None:
                volumes.close()
            for tier in tiers:
                tier.close()
            guard.end()
        if not attached or not inheritance.staying_mounts(self._config):
            # Else the next agent of these mounts goes on with the warm tier.
            inheritance.forget_settings(self._config)
            if is_own(paths.shm):
                shutil.rmtree(paths.shm, ignore_errors=True)
        if refused is not None:
            raise refused
        log.info("cachefs agent ends")

    async def _run_blocking(self, threads: trio.CapacityLimiter, function: Callable[..., T], *args: Any) -> T:
        """The one adapter through which the agent's trio thread uses blocking libraries. `threads`: those of a volume.

        When the agent ends, a request to a store that hangs is left behind. Writing metadata is waited for: LMDB must
        not be closed under a thread that is in it.
        """
        return await self._in_thread(
            functools.partial(function, *args), threads, abandon=not _writes_metadata(function)
        )

    async def _housework(self, function: Callable[..., T], *args: Any, abandon: bool = False) -> T:
        """The same for what must never wait behind look-ups that wait for a store: attaching, sweeping, settling.

        `abandon`: it asks a store, has a thread of its own (a store that hangs must not keep another mount from being
        made), and is left behind when the agent ends.
        """
        threads = trio.CapacityLimiter(1) if abandon else self._housework_threads
        return await self._in_thread(functools.partial(function, *args), threads, abandon=abandon)

    async def _in_thread(self, work: Callable[[], T], threads: trio.CapacityLimiter, *, abandon: bool) -> T:
        try:
            return await trio.to_thread.run_sync(work, limiter=threads, abandon_on_cancel=abandon)
        except MetadataFull as error:
            await self._go_elsewhere(error)
            raise

    async def _go_elsewhere(self, error: MetadataFull) -> None:
        """End, so that another agent keeps metadata where there is room. Who has asked asks that one: never returns.

        Returns when metadata is in the tmpfs already.
        """
        if not self._may_move:
            return
        log.warning("%s: another agent has to go on with it in the tmpfs", error)
        await trio.sleep(max(0.0, self._started + LEAST_LIFE_S - time.monotonic()))
        self._stopped.set()
        await trio.sleep_forever()

    async def _count_staying(self, volumes: Volumes) -> int:
        """Return how many mounts will need another agent.

        When everything on the node is told to end at once (shutdown, the end of a container), mounts are still attached
        at this moment, and will not be in the next.
        """
        if not self._signalled:
            return volumes.mount_count
        deadline = trio.current_time() + PARTING_S
        while True:  # mounts that have no agent yet count as well: the signal may come while we start for them
            staying: int = await self._housework(inheritance.staying_mounts, self._config)
            if not staying or trio.current_time() > deadline:
                return staying
            await trio.sleep(PARTING_S / 10)

    async def _forget_unused(self, volumes: Volumes) -> None:
        """Remove metadata that nobody uses, once the mounts that are there have come back to it."""
        try:
            if await self._housework(inheritance.living_mounts, self._config):
                await trio.sleep(SETTLE_S)
            await volumes.forget_unused()
        except Exception:
            log.exception("removing metadata that nobody uses failed")

    def _settle_block_size(self, disk: Path) -> None:
        """Keep the size of the blocks that the disk tier has, if it has any."""
        wanted, limit = self._config.block_size_bytes, self._config.cache_size_bytes
        found = settled_block_size(str(disk), wanted, limit) if limit else wanted
        if found != wanted:
            log.warning("blocks of %d bytes are in %s and are kept: not the %d of --block-size", found, disk, wanted)
            self._config = dataclasses.replace(self._config, block_size_bytes=found)

    def _open_tier(self, tier: Tier, path: Path, limit_bytes: int, limits: VolumeLimits) -> TierWriter | None:
        if limit_bytes <= 0:
            return None
        try:
            if tier is Tier.SHM:
                own_directory(path)
            opened = TierWriter(
                str(path),
                tier,
                limit_bytes=limit_bytes,
                block_size=self._config.block_size_bytes,
                counters=self._counters,
                policy=policy_maker(self._config.eviction),
                patient=True,
                limits=limits.of(tier),
            )
        except (errors.TierUnavailable, OSError) as error:
            log.warning("the %s tier is off: %s", tier.value, error)
            self._reasons[tier.value] = str(error)
            return None
        why = opened.stats().get("reason")
        if why:
            log.warning("the %s tier is off until that changes: %s", tier.value, why)
        return opened

    async def _keep_house(self, cache: BlockCache, disk: TierWriter | None, volumes: Volumes) -> None:
        """Free what killed workers left pinned, keep within the memory limit, use quiet times to get safe on disk.

        Nothing that goes wrong in here may end the agent: it is logged, and tried again.
        """
        settled = time.monotonic()
        while True:
            await trio.sleep(SWEEP_S)
            try:
                if self._own_log:
                    shorten_stderr()
                await self._housework(volumes.sweep)
                if anonymous_bytes() > (self._config.memory_limit_bytes * 0.8 if not cache.quiet else QUIET_BYTES):
                    await self._housework(give_back)
                if time.monotonic() - settled > SETTLE_S and cache.quiet:
                    settled = time.monotonic()
                    await self._housework(volumes.settle)
                    if disk is not None:
                        await self._housework(disk.sync_and_mark)
            except errors.CachefsError as error:
                log.warning("housekeeping: %s", error)
            except Exception:
                log.exception("housekeeping failed")

    async def _watch_idle(self, server: Server, volumes: Volumes) -> None:
        while True:
            await trio.sleep(min(self._idle_timeout_s / 4, 5.0) if math.isfinite(self._idle_timeout_s) else 3600)
            if volumes.mount_count or server.connections:
                server.touched_at = time.monotonic()
            elif time.monotonic() - server.touched_at > self._idle_timeout_s:
                log.info("nothing mounted for %g s", self._idle_timeout_s)
                self._stopped.set()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            if self._signalled:
                self._stopped.set()
            async for number in signals:
                log.info("%s", signal.Signals(number).name)
                self._signalled = True
                self._stopped.set()


def _writes_metadata(function: Callable[..., object]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return isinstance(getattr(function, "__self__", None), MetadataWriter)


def run(
    cache: CacheConfig,
    peer: PeerConfig,
    *,
    idle_timeout_s: float = math.inf,
    on_ready: Callable[[], None] = lambda: None,
    log_file: str = "",
) -> None:
    """Run an agent until it ends. `log_file`: where its log is, "" for a terminal. Raises CachefsError when it cannot
    start.
    """
    sys.setswitchinterval(0.001)
    tune_allocator()
    agent = Agent(cache, peer, idle_timeout_s=idle_timeout_s, log_file=log_file)
    trio.run(agent.run, on_ready)


def main(argv: list[str]) -> int:
    """Run the agent that a mount starts. Says on the ready descriptor whether it serves."""
    ready_fd = int(argv[argv.index("--ready-fd") + 1])
    plan = json.load(sys.stdin)
    logs: LogConfig = from_plain(LogConfig, plan["log"])
    configure(logs, "agent", sys.stderr)
    cache, peer = inheritance.inherited(
        from_plain(CacheConfig, plan["cache"]), from_plain(PeerConfig, plan.get("peer", {}))
    )

    def report(**outcome: Any) -> None:
        try:
            with open(ready_fd, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(outcome) + "\n")
        except BrokenPipeError:
            log.info("whoever started this agent is gone")  # others may find it; else it ends when it was idle

    try:
        ready = functools.partial(report, ok=True)
        run(cache, peer, idle_timeout_s=cache.agent_idle_timeout_s, on_ready=ready, log_file=plan.get("log_file", ""))
    except AlreadyRunning as error:
        report(ok=False, running=True, text=str(error))
        return 1
    except (errors.CachefsError, OSError) as error:
        log.error("cannot start: %s", error)
        report(ok=False, text=str(error))
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv)
    # Threads that still wait for a slow store must not keep a finished agent alive.
    logging.shutdown()
    os._exit(code)
