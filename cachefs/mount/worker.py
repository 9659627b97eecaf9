"""The worker's composition root: `python -m cachefs.mount.worker --device-fd N --plan-fd P --report-fd R --control-fd
C`.

A worker owns nothing that matters: inodes, listings and blocks belong to the agent, the mount to the supervisor. It
may be killed at any moment; the next one gets the same device, replays the kept INIT to its own libfuse and goes on.
It tells the supervisor "prepared" when everything is loaded, and touches the device only after "go".
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from cachefs import errors
from cachefs.agent import launch, messages
from cachefs.agent.client import AgentClient
from cachefs.block.tier_reader import TierReader
from cachefs.config import Config, Engine, from_plain
from cachefs.fuse.channel import Channel
from cachefs.fuse.errno_map import to_errno
from cachefs.fuse.operations import Operations
from cachefs.fuse.session import Session
from cachefs.logs import configure
from cachefs.metrics import (
    FUSE_ERRORS,
    FUSE_READ_BYTES,
    FUSE_READS,
    FUSE_REQUESTS,
    GUARD_HELD_SECONDS,
    READ_MISS_SECONDS,
    READ_MISSES,
    READAHEAD_REQUESTS,
    SHM_HIT_BYTES,
    SHM_HITS,
    Counters,
)
from cachefs.mount.wakeup import WakeUpGuard
from cachefs.vfs.attributes import AttributeRules
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.reading import FileView, ReadPath
from metadata.freshness import Freshness
from metadata.store import MetadataReader

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0002
"""How long the trio thread may keep the interpreter while the channel has a request (Python's default is 5 ms)."""
REPORT_S = 1.0


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What the supervisor handed over."""

    device: int
    plan: int
    report: int
    control: int


class Misses:
    """Takes READ misses from the channel thread to trio, where the agent is asked (implements `MissSink`)."""

    def __init__(self, filesystem: FileSystem, nursery: trio.Nursery, counters: Counters) -> None:
        self._filesystem = filesystem
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._counters = counters
        self.channel: Channel | None = None

    def miss(self, unique: int, view: FileView, start: int, end: int) -> None:
        """See `MissSink.miss`."""
        self._soon(self._serve, unique, view, start, end)

    def readahead(self, view: FileView, first: int, count: int) -> None:
        """See `MissSink.readahead`."""
        self._counters.add(READAHEAD_REQUESTS.name)
        self._soon(self._filesystem.readahead, view, first, count)

    def _soon(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        try:
            self._token.run_sync_soon(self._begin, work, arguments)
        except trio.RunFinishedError:
            pass  # this worker is ending: the request stays open, and the next worker gets it again

    def _begin(self, work: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        try:
            self._nursery.start_soon(work, *arguments)
        except RuntimeError:
            log.debug("a request came too late for this worker")  # the nursery is closed: as above

    async def _serve(self, unique: int, view: FileView, start: int, end: int) -> None:
        assert self.channel is not None
        began = time.monotonic()
        try:
            await self._filesystem.with_blocks(view, start, end, functools.partial(self.channel.answer, unique))
        except Exception as error:  # noqa: BLE001 - the boundary: one request, one answer
            self.channel.fail(unique, to_errno(error, f"read of {self._name(view)}"))
        self._counters.add(READ_MISS_SECONDS.name, time.monotonic() - began)

    def _name(self, view: FileView) -> str:
        try:
            return self._filesystem.reads.names.key_of(view.ino)
        except Exception:  # noqa: BLE001 - only words for a log line
            return f"inode {view.ino}"


class Worker:
    """One worker process."""

    def __init__(self, descriptors: Descriptors, plan: dict[str, Any], environment: dict[str, str]) -> None:
        self._fds = descriptors
        self._plan = plan
        self._config: Config = from_plain(Config, plan["config"])
        self._environment = environment
        self._counters = Counters()
        self._reads: ReadPath | None = None
        self._attached: messages.Attached | None = None
        self._channel: Channel | None = None
        self._guard: WakeUpGuard | None = None
        self._served: Channel | Operations | None = None
        self._nursery: trio.Nursery | None = None

    def report(self, event: str, **more: Any) -> None:
        """Tell the supervisor something; when it is gone there is nobody to tell."""
        try:
            os.write(self._fds.report, json.dumps({"event": event, **more}).encode() + b"\n")
        except OSError:
            pass

    async def run(self) -> None:
        """Prepare, wait for "go", serve until the mount is gone."""
        launch_plan = launch.AgentPlan(self._config.cache, self._config.log, sys.executable, self._environment)
        attach = functools.partial(
            self._attach_message, self._config, self._environment, self._plan["mount_id"], self._plan["mountpoint"]
        )
        client = AgentClient(
            lambda: launch.ensure_agent(launch_plan, self._config.fuse.ready_timeout_s),
            attach, self._on_attached, self._config.s3.io_timeout_s,
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(client.run)
            assert self._reads is not None
            rules = AttributeRules.create(self._config.fuse, os.getuid(), os.getgid())
            filesystem = FileSystem(self._reads, client, Freshness(self._config.metadata), rules)
            operations = Operations(filesystem, self._counters)
            session = Session(operations)
            misses = Misses(filesystem, nursery, self._counters)
            self.report("prepared")
            await self._wait_for_go()
            nursery.start_soon(self._serve_libfuse, session)
            await self._begin(session, filesystem, misses)
            self.report("serving", agent_pid=client.pid)
            nursery.start_soon(self._report_counters, client, filesystem)

    @staticmethod
    def _attach_message(
        config: Config, environment: dict[str, str], mount_id: str, mountpoint: str, request_id: int
    ) -> messages.Attach:
        return launch.attach_message(config, environment, mount_id, mountpoint, request_id=request_id, check=False)

    async def _on_attached(self, attached: messages.Attached) -> None:
        """Open what the agent offers; after a restart of the agent, only what is another file now.

        Raises MountError when the agent was started again with settings under which this worker would read wrong
        bytes (blocks of another size) or nothing (metadata elsewhere): the next worker begins with them.
        """
        self.report("agent", agent_pid=attached.pid)
        if self._reads is None or self._attached is None:
            self._attached = attached
            names = await trio.to_thread.run_sync(MetadataReader, attached.metadata_path)
            shm = await trio.to_thread.run_sync(_open_tier, attached)
            self._reads = ReadPath(names, shm, attached.endpoint, attached.bucket, attached.block_size)
        elif _ground(attached) != _ground(self._attached):
            raise errors.MountError(
                f"the agent works with {_ground(attached)} now, and this worker with {_ground(self._attached)}: "
                "another worker has to take over"
            )
        elif await trio.to_thread.run_sync(_follow, self._reads, attached):
            log.warning("the agent began new environments")
            if self._channel is not None:
                self._channel.forget_listings()

    async def _wait_for_go(self) -> None:
        await trio.lowlevel.wait_readable(self._fds.control)
        if os.read(self._fds.control, 16)[:2] != b"go":
            raise errors.MountError("the supervisor went away")

    async def _serve_libfuse(self, session: Session) -> None:
        await session.serve()
        self._unmounted()

    async def _begin(self, session: Session, filesystem: FileSystem, misses: Misses) -> None:
        session.replay_init(bytes.fromhex(self._plan["init"]))
        reply = await trio.to_thread.run_sync(session.receive_init_reply, self._config.fuse.read_ahead_bytes)
        if self._plan["first"]:
            try:
                os.write(self._fds.device, reply)
            except FileNotFoundError:
                # The worker before this one died between its answer and its report: the kernel has its answer already.
                log.info("INIT had been answered")
            self.report("init-answered")
        if self._config.fuse.engine is Engine.PYFUSE3:
            session.hand_over(self._fds.device)
            self._watch_over(session.operations)
            return
        token = trio.lowlevel.current_trio_token()
        self._channel = channel = Channel(
            self._fds.device,
            session.near,
            filesystem,
            misses,
            on_unmounted=lambda: token.run_sync_soon(self._unmounted),
        )
        misses.channel = channel
        self._watch_over(channel)
        channel.start()

    def _watch_over(self, served: Channel | Operations) -> None:
        """Let the wake-up guard follow whoever takes the kernel's requests."""
        self._guard = guard = WakeUpGuard(
            self._config.fuse.low_latency,
            requests=lambda: served.requests,
            set_asleep=lambda asleep: setattr(served, "asleep", asleep),
            on_change=lambda held: self.report("guard", held=held),
        )
        served.on_activity = guard.activity
        self._served = served
        guard.start()

    def _unmounted(self) -> None:
        self.report("unmounted")
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()

    async def _report_counters(self, client: AgentClient, filesystem: FileSystem) -> None:
        """Send to the agent what was counted here, when it changed, and which blocks were used."""
        last: dict[str, float] = {}
        while True:
            await trio.sleep(REPORT_S)
            values = self._counts(filesystem)
            if values != last:
                client.tell(messages.Counters(values=values))
                last = values
            if self._channel is not None and self._channel.touched:
                touched, self._channel.touched = self._channel.touched, set()
                client.tell(messages.Touched(keys=list(touched)))

    def _counts(self, filesystem: FileSystem) -> dict[str, float]:
        """Return the worker's counters: what trio counted, and the plain integers of the hot paths."""
        values = self._counters.snapshot()
        hits, hit_bytes = filesystem.copied_hits, filesystem.copied_hit_bytes
        misses, miss_bytes = filesystem.copied_misses, filesystem.copied_miss_bytes
        channel = self._channel
        if channel is not None:
            hits, hit_bytes = hits + channel.hits, hit_bytes + channel.hit_bytes
            misses, miss_bytes = misses + channel.misses, miss_bytes + channel.miss_bytes
            values[FUSE_ERRORS.name] = values.get(FUSE_ERRORS.name, 0) + channel.errors
        values[FUSE_READS.name], values[FUSE_READ_BYTES.name] = hits + misses, hit_bytes + miss_bytes
        values[SHM_HITS.name], values[SHM_HIT_BYTES.name] = hits, hit_bytes
        values[READ_MISSES.name] = misses
        values[FUSE_REQUESTS.name] = self._served.requests if self._served is not None else 0
        values[GUARD_HELD_SECONDS.name] = round(self._guard.held_s, 3) if self._guard is not None else 0.0
        return values


def _ground(attached: messages.Attached) -> tuple[int, str]:
    """Return what a worker cannot change once it reads: size of a block, directory of the metadata."""
    return attached.block_size, attached.metadata_path


def _open_tier(attached: messages.Attached) -> TierReader | None:
    if attached.shm_path is None:
        return None
    try:
        return TierReader(attached.shm_path, attached.block_size)
    except errors.TierUnavailable as error:
        log.warning("the shm tier cannot be read: %s", error)
        return None


def _follow(reads: ReadPath, attached: messages.Attached) -> bool:
    """Open what is new since the last agent; returns whether there was anything. BLOCKS."""
    fresh = reads.refresh()
    if attached.shm_path is None or (reads.blocks is not None and reads.blocks.directory == attached.shm_path):
        return fresh
    tier = _open_tier(attached)  # it was off, or elsewhere
    if tier is not None:
        reads.blocks = tier
    return fresh or tier is not None


def main() -> int:
    """Run one worker. Exit code 0: unmounted; anything else is a crash to the supervisor."""
    parser = argparse.ArgumentParser(prog="cachefs worker")
    for name in ("device", "plan", "report", "control"):
        parser.add_argument(f"--{name}-fd", type=int, required=True)
    arguments = parser.parse_args()
    descriptors = Descriptors(arguments.device_fd, arguments.plan_fd, arguments.report_fd, arguments.control_fd)
    with open(descriptors.plan, encoding="utf-8") as stream:
        plan = json.load(stream)
    worker = Worker(descriptors, plan, dict(os.environ))
    configure(from_plain(Config, plan["config"]).log, "worker", sys.stderr)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        trio.run(worker.run)
    except BaseExceptionGroup as group:
        cause = _first(group)
        worker.report("fatal", kind=type(cause).__name__, text=str(cause))
        log.error("%s: %s", type(cause).__name__, cause, exc_info=not isinstance(cause, errors.CachefsError))
        return 1
    return 0


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    code = main()
    # The channel's threads are blocked in the kernel; nothing of a worker needs an orderly end.
    logging.shutdown()
    os._exit(code)
