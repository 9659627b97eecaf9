"""The agent's composition root: everything is built here, top-down, and taken down in reverse.

`python -m cachefs.agent.main --ready-fd N` (started by a mount: configuration as JSON on stdin, ends itself when
idle) or `cachefs agent` (foreground, stays).
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from cachefs import __version__, errors
from cachefs.agent.crash_guard import CrashGuard
from cachefs.agent.memory import anonymous_bytes, give_back, tune_allocator
from cachefs.agent.server import Server
from cachefs.agent.volumes import Volumes
from cachefs.block.block_cache import BlockCache
from cachefs.block.lmdb_tier import TierWriter
from cachefs.config import CacheConfig, LogConfig, from_plain
from cachefs.logs import configure
from cachefs.metrics import Counters
from cachefs.runtime import RuntimeDir, shm_directory
from cachefs.types import Tier

log = logging.getLogger(__name__)
T = TypeVar("T")

SWEEP_S = 5.0
PROBE_BYTES = 1 << 20
"""A full disk lets files be made that nothing can be written to."""
SETTLE_S = 60.0
QUIET_BYTES = 96 << 20
"""Over this much anonymous memory a quiet agent gives free pages back."""
ORIGIN_THREADS = 32
"""Range reads in flight; each store's own limiter (`--max-requests`) decides how many of them really ask."""
METADATA_THREADS = 48
"""Listings and HEADs in flight; the store's own limiter decides how many of them really ask."""


@dataclass(frozen=True, slots=True)
class AgentPaths:
    """Where one agent keeps things."""

    cache_dir: Path
    disk: Path
    volumes: Path
    shm: Path

    @classmethod
    def create(cls, config: CacheConfig) -> AgentPaths:
        """Return the places. A cache directory that can't be written moves the metadata to the tmpfs."""
        cache_dir = Path(config.cache_dir)
        shm = Path(shm_directory(config.shm_dir, config.cache_dir, os.getuid()))
        volumes = cache_dir / "volumes"
        try:
            volumes.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = volumes / ".probe"
            try:
                probe.write_bytes(bytes(PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            volumes = shm / "volumes"
            log.warning("cache directory %s cannot be written (%s): metadata goes to %s", cache_dir, error, volumes)
            volumes.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(cache_dir, cache_dir / "disk", volumes, shm)


class Agent:
    """One agent, from start to end."""

    def __init__(self, config: CacheConfig, *, idle_timeout_s: float) -> None:
        self._config = config
        self._idle_timeout_s = idle_timeout_s
        self._runtime = RuntimeDir(config.runtime_dir)
        self._counters = Counters()
        self._started = time.monotonic()
        self._stopped = trio.Event()
        self._threads = trio.CapacityLimiter(METADATA_THREADS)
        self._housework_threads = trio.CapacityLimiter(8)

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until idle for too long, told to stop, or SIGTERM/SIGINT."""
        lock = self._take_lock()
        paths = AgentPaths.create(self._config)
        guard = CrashGuard(paths.cache_dir)
        guard.begin([paths.disk, paths.volumes], in_memory=[paths.shm])
        shm = self._open_tier(Tier.SHM, paths.shm, self._config.shm_size_bytes)
        disk = self._open_tier(Tier.DISK, paths.disk, self._config.cache_size_bytes)
        tiers = [tier for tier in (shm, disk) if tier is not None]
        attached = 0
        volumes: Volumes | None = None
        try:
            async with (
                BlockCache(
                    shm,
                    disk,
                    block_size=self._config.block_size_bytes,
                    memory_limit_bytes=self._config.memory_limit_bytes,
                    max_requests=ORIGIN_THREADS,
                    counters=self._counters,
                ) as cache,
                trio.open_nursery() as nursery,
            ):
                serving = volumes = Volumes(
                    str(paths.volumes), self._config, self._run_blocking, self._housework, nursery
                )
                server = Server(
                    cache, volumes, self._config.block_size_bytes, None if shm is None else str(paths.shm),
                    lambda: self._status(cache, serving), self._stopped.set,
                )  # fmt: skip
                listener = await self._listen()
                nursery.start_soon(trio.serve_listeners, server.serve, [listener])
                nursery.start_soon(self._keep_house, cache, disk, volumes)
                nursery.start_soon(self._watch_idle, server, volumes)
                nursery.start_soon(self._watch_signals)
                log.info("cachefs agent %s serves %s", __version__, paths.cache_dir)
                on_ready()
                await self._stopped.wait()
                # Hang up first: workers ask the next agent again, and none gets an error from a store that is closing.
                _remove(self._runtime.agent(self._config.cache_dir, "sock"))
                attached = volumes.mount_count
                cache.flush_at_exit = not attached  # readers wait for the next agent, which adopts the shm tier
                nursery.cancel_scope.cancel()
        finally:
            if volumes is not None:
                volumes.close()
            for tier in tiers:
                tier.close()
            guard.end()
        if not attached:  # else the next agent of these mounts goes on with the warm tier
            shutil.rmtree(paths.shm, ignore_errors=True)
        log.info("cachefs agent ends")
        os.close(lock)

    async def _run_blocking(self, function: Callable[..., T], *args: Any) -> T:
        """The one adapter through which the agent's trio thread uses blocking libraries."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._threads)

    async def _housework(self, function: Callable[..., T], *args: Any) -> T:
        """The same for what must never wait behind look-ups that wait for a store: attaching, sweeping, settling."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._housework_threads)

    def _open_tier(self, tier: Tier, path: Path, limit_bytes: int) -> TierWriter | None:
        if limit_bytes <= 0:
            return None
        try:
            if tier is Tier.SHM:
                _own(path)
            return TierWriter(
                str(path),
                tier,
                limit_bytes=limit_bytes,
                block_size=self._config.block_size_bytes,
                counters=self._counters,
            )
        except errors.TierUnavailable as error:
            log.warning("the %s tier is off: %s", tier.value, error)
            return None

    def _take_lock(self) -> int:
        descriptor = os.open(
            self._runtime.agent(self._config.cache_dir, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(f"an agent serves {self._config.cache_dir} already") from error
        return descriptor

    async def _listen(self) -> trio.SocketListener:
        path = self._runtime.agent(self._config.cache_dir, "sock")
        temporary = f"{path}.new"
        _remove(path, temporary)
        raw = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await raw.bind(temporary)
        os.chmod(temporary, 0o600)
        raw.listen(128)
        os.rename(temporary, path)  # nobody ever meets a socket that is not listening
        return trio.SocketListener(raw)

    async def _keep_house(self, cache: BlockCache, disk: TierWriter | None, volumes: Volumes) -> None:
        """Free what killed workers left pinned, keep within the memory limit, use quiet times to get safe on disk.

        Nothing that goes wrong in here may end the agent: it is logged, and tried again.
        """
        settled = time.monotonic()
        while True:
            await trio.sleep(SWEEP_S)
            try:
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
            async for number in signals:
                log.info("%s", signal.Signals(number).name)
                self._stopped.set()

    def _tiers(self, cache: BlockCache) -> dict[str, Any]:
        """Return the tiers as `cachefs status` shows them; one that could not be opened keeps its limit."""
        stats = cache.stats()
        for name, limit_bytes in (("shm", self._config.shm_size_bytes), ("disk", self._config.cache_size_bytes)):
            if stats[name]["state"] == "off":
                stats[name]["limit_bytes"] = limit_bytes
        return stats

    def _status(self, cache: BlockCache, volumes: Volumes) -> dict[str, Any]:
        counters = self._counters.snapshot()
        served = list(volumes.by_id.values())  # a copy: this runs in a thread
        for volume in served:
            for name, value in volume.store.now.counters.snapshot().items():
                counters[name] = counters.get(name, 0) + value
        mounts: dict[str, Any] = {}
        described: dict[str, Any] = {}
        for volume in served:
            used, objects = volume.writer.reader.counts()
            described[volume.volume_id] = {
                "source": volume.source, "objects": objects, "bytes": used,
                "hidden_keys": volume.writer.reader.hidden(),
            }  # fmt: skip
            for mount in list(volume.mounts.values()):
                mounts[mount.mount_id] = {
                    "mountpoint": mount.mountpoint, "volume_id": volume.volume_id, "counters": mount.counters,
                }  # fmt: skip
        return {
            "agent_pid": os.getpid(),
            "version": __version__,
            "cache_dir": self._config.cache_dir,
            "uptime_s": time.monotonic() - self._started,
            "rss_anon_bytes": anonymous_bytes(),
            "memory_limit_bytes": self._config.memory_limit_bytes,
            "tiers": self._tiers(cache),
            "counters": counters,
            "mounts": mounts,
            "volumes": described,
        }


def _own(directory: Path) -> None:
    """Make the shm tier's directory, or see that it is ours alone: /dev/shm is open to all, the name can be guessed.

    Raises TierUnavailable.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise errors.TierUnavailable(f"{directory} belongs to somebody else")
        if status.st_mode & 0o077:
            directory.chmod(0o700)
    except OSError as error:
        raise errors.TierUnavailable(f"{directory} cannot be used: {error.strerror or error}") from error


def _remove(*paths: str) -> None:
    """Remove sockets that an agent left behind; the lock says that it is gone."""
    for path in paths:
        Path(path).unlink(missing_ok=True)


class AlreadyRunning(errors.AgentUnavailable):
    """Another agent holds the lock of this cache directory."""


def run(cache: CacheConfig, *, idle_timeout_s: float = math.inf, on_ready: Callable[[], None] = lambda: None) -> None:
    """Run an agent until it ends. Raises CachefsError when it cannot start."""
    sys.setswitchinterval(0.001)
    tune_allocator()
    agent = Agent(cache, idle_timeout_s=idle_timeout_s)
    trio.run(agent.run, on_ready)


def main(argv: list[str]) -> int:
    """Run the agent that a mount starts. Says on the ready descriptor whether it serves."""
    ready_fd = int(argv[argv.index("--ready-fd") + 1])
    plan = json.load(sys.stdin)
    cache: CacheConfig = from_plain(CacheConfig, plan["cache"])
    logs: LogConfig = from_plain(LogConfig, plan["log"])
    configure(logs, "agent", sys.stderr)

    def report(**outcome: Any) -> None:
        with open(ready_fd, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(outcome) + "\n")

    try:
        run(cache, idle_timeout_s=cache.agent_idle_timeout_s, on_ready=lambda: report(ok=True))
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
