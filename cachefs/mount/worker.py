"""The worker's composition root: `python -m cachefs.mount.worker --device-fd N --plan-fd P --report-fd R --control-fd
C`.

A worker owns nothing that matters: inodes, listings and blocks belong to the agent, the mount to the supervisor. It
may be killed at any moment; the next one gets the same device, replays the kept INIT to its own libfuse and goes on.
It tells the supervisor "prepared" when everything is loaded, and touches the device only after "go".

The first worker of a mount needs an agent: without one the mount fails. Every later one is told what the worker before
it was attached to. If no agent answers soon, it serves what is in those files (they outlive agents), and what has to be
asked waits as it does whenever an agent dies: until another one is there, or the reader's time is over.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from cachefs import __version__, errors
from cachefs.agent import launch, messages, succession
from cachefs.agent.client import AgentClient
from cachefs.agent.hang_watch import HangWatch
from cachefs.config import Config, Engine, Prefetch, from_plain
from cachefs.fuse.access_log import AccessLog
from cachefs.fuse.channel import Channel
from cachefs.fuse.kernel_names import KernelNames
from cachefs.fuse.operations import Operations
from cachefs.fuse.session import Session
from cachefs.logs import configure
from cachefs.metrics import (
    FRESH_READS,
    FUSE_ERRORS,
    FUSE_READ_BYTES,
    FUSE_READS,
    FUSE_REQUESTS,
    GUARD_HELD_SECONDS,
    HUNG_AGENTS,
    READ_MISSES,
    SHM_HIT_BYTES,
    SHM_HITS,
    Counters,
)
from cachefs.mount import ground
from cachefs.mount.beginnings import Beginnings
from cachefs.mount.control_files import access_log_path, virtual_directory, warn_of_hidden
from cachefs.mount.disk_reads import DiskReads
from cachefs.mount.heartbeat import Heartbeat
from cachefs.mount.misses import Misses
from cachefs.mount.wakeup import WakeUpGuard
from cachefs.vfs.attributes import AttributeRules
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.reading import ReadPath
from metadata.freshness import Freshness
from metadata.store import MetadataReader

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0002
"""How long the trio thread may keep the interpreter while the channel has a request (Python's default is 5 ms)."""
REPORT_S = 1.0
SEEK_TIER_S = 5.0
HEAD_START_S = 1.0
"""How long an agent may take to answer before a worker that knows its predecessor's files opens them unasked. An agent
has looked at them first, and starts in half of this.
"""
WARY_CRASHES = 3
"""After so many crashes within a minute a worker does not read the disk tier itself."""
NOTHING_TO_READ_S = 10.0
"""How long it waits for an agent when it cannot open them. Five such workers are the failed state: no reader hangs."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What the supervisor handed over."""

    device: int
    plan: int
    report: int
    control: int


class Worker:
    """One worker process."""

    def __init__(self, descriptors: Descriptors, plan: dict[str, Any], environment: dict[str, str]) -> None:
        self._fds = descriptors
        self._plan = plan
        self._config: Config = from_plain(Config, plan["config"])
        self._environment = environment
        self._wary = int(plan.get("crashes", 0)) >= WARY_CRASHES
        self._counters = Counters()
        self._reads: ReadPath | None = None
        self._attached: messages.Attached | None = None
        self._opening = trio.Lock()
        self._opened = trio.Event()
        self._kernel_names: KernelNames | None = None
        self._lineage = ""
        """Of the metadata that the kernel has its names from; "" while it has none."""
        self._channel: Channel | None = None
        self._guard: WakeUpGuard | None = None
        self._served: Channel | Operations | None = None
        self._nursery: trio.Nursery | None = None
        self._hang_watch: HangWatch | None = None

    def report(self, event: str, **more: Any) -> None:
        """Tell the supervisor something; when it is gone there is nobody to tell."""
        try:
            os.write(self._fds.report, json.dumps({"event": event, **more}).encode() + b"\n")
        except OSError:
            pass

    async def run(self) -> None:
        """Prepare, wait for "go", serve until the mount is gone."""
        # An agent that this mount starts is everybody's: with a keeper it has the node's keys, not those of the mount.
        environment = self._plan.get("agent_environment", self._environment)
        launch_plan = launch.AgentPlan(
            self._config.cache, self._config.peer, self._config.log, sys.executable, environment
        )
        attach = functools.partial(
            launch.attach_message,
            self._config,
            self._environment,
            self._plan["mount_id"],
            self._plan["mountpoint"],
            check=False,
            mounted_at_s=float(self._plan.get("mounted_at_s", 0.0)),
        )
        former = self._former()
        self._lineage = former.lineage if former is not None else ""
        client = AgentClient(
            lambda: launch.ensure_agent(launch_plan, self._config.fuse.ready_timeout_s),
            lambda: succession.take_over(launch_plan, self._plan["mount_id"], self._config.fuse.ready_timeout_s),
            lambda request_id: attach(request_id=request_id),
            self._on_attached, self._config.s3.io_timeout_s, patient=former is not None,
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._hang_watch = watch = HangWatch(launch_plan, self._config.fuse.hang_timeout_s)
            nursery.start_soon(watch.run, client)
            if former is None:
                await nursery.start(client.run)
            else:
                nursery.start_soon(client.run)
                await self._go_on(client, former)
            assert self._reads is not None
            assert self._kernel_names is not None
            rules = AttributeRules.create(self._config.fuse, os.getuid(), os.getgid())
            filesystem = FileSystem(self._reads, client, Freshness(self._config.metadata), rules)
            filesystem.keeps = self._config.fuse.cache
            filesystem.virtual = virtual_directory(
                self._config, self._plan["mount_id"], rules, functools.partial(self._counts, filesystem)
            )
            filesystem.virtual.on_first_use = functools.partial(nursery.start_soon, warn_of_hidden, filesystem)
            operations = Operations(filesystem, self._kernel_names, self._counters)
            session = Session(operations)
            misses = Misses(filesystem, self._kernel_names, nursery, self._counters)
            self.report("prepared")
            await self._wait_for_go()
            nursery.start_soon(self._serve_libfuse, session)
            await self._begin(session, filesystem, misses)
            self.report("serving", agent_pid=client.pid or None, version=__version__)
            nursery.start_soon(Heartbeat(self._fds.report, self._config.fuse.hang_timeout_s, self._moves).run)
            nursery.start_soon(self._report_counters, client, filesystem, misses.disk)
            nursery.start_soon(self._seek_tier, self._reads)
            if self._config.fuse.prefetch is not Prefetch.OFF and self._config.fuse.cache:
                nursery.start_soon(Beginnings(self._reads, client.tell, self._tells_beginnings).run)

    def _tells_beginnings(self) -> bool:
        return self._attached is not None and self._attached.begun

    def _moves(self) -> bool:
        return self._channel is None or self._channel.moves()

    def _former(self) -> messages.Attached | None:
        """Return what the last worker of this mount was attached to; None for the first, and for one that takes over
        from a living one: if that one finds no agent, it had better not take over.
        """
        try:
            return msgspec.convert(self._plan.get("attached"), messages.Attached)
        except msgspec.ValidationError:
            return None  # a supervisor of another version

    async def _go_on(self, client: AgentClient, former: messages.Attached) -> None:
        """Attach, or open what the last worker had. Raises AgentUnavailable when there is nothing to read from."""
        with trio.move_on_after(HEAD_START_S):
            await client.tried.wait()
        async with self._opening:
            if self._reads is None:
                try:
                    await self._open(former)
                    self._attached = former
                except errors.StorageUnavailable as error:
                    log.warning("no agent yet, and the files of the last worker cannot be read: %s", error)
                else:
                    log.warning("no agent yet: serving what is cached")
        with trio.move_on_after(NOTHING_TO_READ_S):
            await self._opened.wait()
        if self._reads is None:
            raise errors.AgentUnavailable("there is no agent, and nothing to read from without one")

    async def _open(self, attached: messages.Attached) -> None:
        """Open the files that an agent offers, or has offered. Raises StorageUnavailable."""
        attached = self._trusted(attached)
        names = await trio.to_thread.run_sync(MetadataReader, attached.metadata_path)
        shm = await trio.to_thread.run_sync(ground.open_tier, attached, self._counters)
        disk = await trio.to_thread.run_sync(ground.open_disk, attached, self._counters)
        self._reads = ReadPath(names, shm, attached.endpoint, attached.bucket, attached.block_size)
        self._reads.disk = disk
        self._kernel_names = KernelNames(self._fds.device, names)
        self._opened.set()

    async def _on_attached(self, attached: messages.Attached) -> None:
        """Open what the agent offers; after a restart of the agent, only what is another file now.

        Raises MountError when the agent was started again with settings under which this worker would read wrong
        bytes (blocks of another size) or nothing (metadata elsewhere): the next worker begins with them.
        """
        attached = self._trusted(attached)
        self._lineage = self._lineage or attached.lineage
        renewed = attached.lineage != self._lineage
        self._report_agent(attached)
        async with self._opening:
            if renewed and self._kernel_names is not None:
                await trio.to_thread.run_sync(self._kernel_names.note_top)
            if self._reads is None or self._attached is None:
                await self._open(attached)
            elif ground.of(attached) != ground.of(self._attached):
                now, mine = ground.of(attached), ground.of(self._attached)
                raise errors.MountError(
                    f"the agent works with {now} now, and this worker with {mine}: another worker has to take over"
                )
            elif await trio.to_thread.run_sync(ground.follow, self._reads, attached, self._counters):
                log.warning("the agent began new environments")
                if self._channel is not None:
                    self._channel.forget_listings()
            self._attached = attached
            assert self._reads is not None
            self._reads.shm_limit_bytes = attached.shm_limit_bytes
        if renewed and self._kernel_names is not None:
            log.warning("the metadata begins anew: the kernel has to look up every name again")
            await self._kernel_names.let_go_of_all()
            self._lineage = attached.lineage
            self._report_agent(attached)

    def _trusted(self, attached: messages.Attached) -> messages.Attached:
        """Leave the disk to the agent after crashes: a device that cannot read a page of LMDB's map is a crash."""
        if self._wary and attached.disk_path is not None:
            log.warning("workers crashed: this one leaves the disk tier to the agent")
            return msgspec.structs.replace(attached, disk_path=None)
        return attached

    async def _seek_tier(self, reads: ReadPath) -> None:
        """Look for tiers again that could not be opened (no reader slot, no room for the map), and let go of a disk
        tier that was removed: its room is wanted by others.
        """
        while True:
            await trio.sleep(SEEK_TIER_S)
            if reads.disk is not None:
                await trio.to_thread.run_sync(reads.disk.follow)
            if (reads.blocks is None or reads.disk is None) and self._attached is not None:
                async with self._opening:
                    await trio.to_thread.run_sync(ground.open_missing_tiers, reads, self._attached, self._counters)

    def _report_agent(self, attached: messages.Attached) -> None:
        """Say what the next worker may begin with: the agent's files, and the lineage of the kernel's names."""
        kept = msgspec.structs.replace(attached, lineage=self._lineage)
        self.report("agent", agent_pid=attached.pid, attached=msgspec.to_builtins(kept))

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
        path = access_log_path(self._config, self._plan["mount_id"])
        assert self._nursery is not None
        self._nursery.start_soon(AccessLog(path, channel, filesystem.reads.names).run)
        misses.disk.start()
        self._watch_over(channel)
        channel.start()

    def _watch_over(self, served: Channel | Operations) -> None:
        """Let the wake-up guard follow whoever takes the kernel's requests."""
        self._guard = guard = WakeUpGuard(
            self._config.fuse.low_latency,
            requests=lambda: served.requests,
            set_asleep=lambda asleep: setattr(served, "asleep", asleep),
            on_change=lambda held: self.report("guard", held=held),
            lent=int(self._plan.get("guard_fd", -1)),
        )
        served.on_activity = guard.activity
        self._served = served
        guard.start()

    def _unmounted(self) -> None:
        self.report("unmounted")
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()

    async def _report_counters(self, client: AgentClient, filesystem: FileSystem, disk: DiskReads) -> None:
        """Send to the agent what was counted here, when it changed, and which blocks were used."""
        last: dict[str, float] = {}
        while True:
            await trio.sleep(REPORT_S)
            client.expire()
            values = self._counts(filesystem)
            if values != last:
                client.tell(messages.Counters(values=values))
                last = values
            for source in (self._channel, filesystem):  # the engines
                if source is not None and source.touched:
                    touched, source.touched = source.touched, set()
                    client.tell(messages.Touched(keys=list(touched)))
            hits, hit_bytes, touched = disk.take_counts()
            if hits:
                client.tell(messages.Touched(keys=list(touched), disk_hits=hits, disk_hit_bytes=hit_bytes))

    def _counts(self, filesystem: FileSystem) -> dict[str, float]:
        """Return the worker's counters: what trio counted, and the plain integers of the hot paths."""
        values = self._counters.snapshot()
        hits, hit_bytes = filesystem.copied_hits, filesystem.copied_hit_bytes
        misses, miss_bytes = filesystem.copied_misses, filesystem.copied_miss_bytes
        fresh = filesystem.copied_fresh
        channel = self._channel
        if channel is not None:
            hits, hit_bytes = hits + channel.hits, hit_bytes + channel.hit_bytes
            misses, miss_bytes = misses + channel.misses, miss_bytes + channel.miss_bytes
            fresh += channel.fresh
            values[FUSE_ERRORS.name] = values.get(FUSE_ERRORS.name, 0) + channel.errors
        values[FUSE_READS.name], values[FUSE_READ_BYTES.name] = hits + misses + fresh, hit_bytes + miss_bytes
        values[FRESH_READS.name] = fresh
        values[SHM_HITS.name], values[SHM_HIT_BYTES.name] = hits, hit_bytes
        values[READ_MISSES.name] = misses
        values[FUSE_REQUESTS.name] = self._served.requests if self._served is not None else 0
        values[HUNG_AGENTS.name] = self._hang_watch.killed if self._hang_watch is not None else 0
        values[GUARD_HELD_SECONDS.name] = round(self._guard.held_s, 3) if self._guard is not None else 0.0
        return values


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
