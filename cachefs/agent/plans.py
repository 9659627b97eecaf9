"""Plans that jobs write: `MOUNT/.cachefs/plan` is a pipe, and each writer of it, from open to close, is one plan.

    job --lines--> pipe --> names (Walk.resolve) --> Spool --> Plan --> prefetcher (the order), tiers (next uses)

A line is a path, relative to the root of the mount or absolute in it. `listing DIRECTORY` names a listing, all files
below a directory in the order of a walk, and `index N` is the N-th file of it (from 0; without a listing, of the root).
A path that looks like one of those is written as `./index 5`. A plan without lines takes the last one away.

The pipe is read as fast as names are found, so a plan of any length costs no more memory than the `Plan` itself, and
the job that writes it waits meanwhile. A plan lives in the agent: after kill -9 of that there is none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from array import array
from collections.abc import Callable
from typing import Any

import trio

from cachefs import errors
from cachefs.agent.guidance import Guidance
from cachefs.agent.spool import Spool
from cachefs.agent.volumes import Volume, Volumes
from cachefs.agent.walking import Walk
from cachefs.prefetch.plan import UNKNOWN, Plan
from cachefs.runtime import RuntimeDir
from cachefs.types import Ino, ObjectId

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
BATCH = 256
MOST_LINE = 1 << 13
TURN = 64
MOST_TOGETHER = 1 << 21
"""Lines of a plan and the one that takes its place: 44 MiB."""
GONE_S = 60.0
"""A mount whose worker is away for longer has no plan any more."""
SWEEP_S = 10.0
AGAIN_S = 5.0
Follow = Callable[[Volume, Plan | None], object]


class MountPlan:
    """What one mount was told. `describe` may be called in any thread."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.reading = 0
        """Lines of a plan that is being written."""
        self.error = ""
        self.unlinked_at: float | None = None
        self.task: trio.CancelScope | None = None

    def describe(self) -> dict[str, Any]:
        """Return what `stats` shows."""
        plan = self.plan
        told: dict[str, Any] = {"reading": self.reading, "error": self.error or None}
        if plan is not None:
            told |= {
                "lines": len(plan), "unknown": plan.unknown, "position": plan.position, "finished": plan.finished
            }  # fmt: skip
        return told


class Plans:
    """The plans of all mounts of an agent. Trio thread."""

    def __init__(
        self,
        volumes: Volumes,
        runtime: RuntimeDir,
        block_size: int,
        guidance: Guidance,
        follow: Follow,
        spool_dir: str,
        nursery: trio.Nursery,
    ) -> None:
        """`follow` gets a volume and the plan that its prefetcher follows from now on."""
        self._volumes = volumes
        self._runtime = runtime
        self._block_size = block_size
        self._guidance = guidance
        self._follow = follow
        self._spool_dir = spool_dir
        self._nursery = nursery
        self._known: dict[str, MountPlan] = {}

    def describe(self) -> dict[str, Any]:
        """Return the plans by mount. Any thread."""
        return {mount_id: known.describe() for mount_id, known in list(self._known.items())}

    def mounts_changed(self) -> None:
        """Mounts came or went."""
        attached = self._attached()
        for mount_id, volume in attached.items():
            known = self._known.setdefault(mount_id, MountPlan())
            known.unlinked_at = None
            if known.task is None:
                known.task = trio.CancelScope()
                self._nursery.start_soon(self._serve, mount_id, volume, known, known.task)
        for mount_id, known in self._known.items():
            if mount_id not in attached and known.unlinked_at is None:
                known.unlinked_at = trio.current_time()

    def _attached(self) -> dict[str, Volume]:
        return {mount.mount_id: volume for volume in self._volumes.by_id.values() for mount in volume.mounts.values()}

    async def watch(self) -> None:
        """Forget, for ever, the plans of mounts that are gone."""
        while True:
            await trio.sleep(SWEEP_S)
            for mount_id, known in list(self._known.items()):
                if known.unlinked_at is not None and trio.current_time() > known.unlinked_at + GONE_S:
                    del self._known[mount_id]
                    if known.task is not None:
                        known.task.cancel()
                    if known.plan is not None:
                        await self._guidance.leave(known.plan.next_use)

    # -- the pipe ------------------------------------------------------------------------------------------------------

    async def _serve(self, mount_id: str, volume: Volume, known: MountPlan, scope: trio.CancelScope) -> None:
        """Read plans of a mount until it is gone. Never raises."""
        path = self._runtime.mount(mount_id, "plan")
        with scope:
            while True:
                try:
                    pipe = _open(path)
                except OSError as error:
                    known.error = str(error)
                    await trio.sleep(AGAIN_S)
                    continue
                try:
                    pipe = await self._read_plans(pipe, path, mount_id, volume, known)
                except (errors.CachefsError, OSError, ValueError) as error:
                    known.error, known.reading = str(error), 0
                    log.warning("the plan of %s cannot be used: %s", self._mountpoint(volume, mount_id), error)
                except Exception as error:
                    known.error, known.reading = repr(error), 0
                    log.exception("a plan cannot be used")
                finally:
                    os.close(pipe)

    async def _read_plans(self, pipe: int, path: str, mount_id: str, volume: Volume, known: MountPlan) -> int:
        """Read one plan after the other. Raises CachefsError, OSError; returns the pipe when another one is there."""
        while True:
            with Spool(self._spool_dir) as spool:
                async with _Lines.opened(volume, self._mountpoint(volume, mount_id), spool, self._spool_dir) as lines:
                    while raw := await _some(pipe):
                        await lines.take(raw)
                        known.reading = len(spool)
                    await lines.end()
                if known.plan is not None and len(known.plan) + len(spool) > MOST_TOGETHER:
                    await self._publish(Plan(0), volume, known)  # there is no room for two of them
                await self._publish(await self._plan_of(volume, spool), volume, known)
            other = _open(path)  # before this one is closed: what the next writer has written already stays in it
            os.dup2(other, pipe, inheritable=False)
            os.close(other)

    async def _plan_of(self, volume: Volume, spool: Spool) -> Plan:
        plan = Plan(len(spool))
        at = 0
        while chunk := await spool.read(at):
            for number, ino in enumerate(map(Ino, chunk)):
                if number % TURN == 0:
                    await trio.lowlevel.checkpoint()
                plan.append(ino, self._oid(volume, ino))
            at += len(chunk)
        return plan

    def _oid(self, volume: Volume, ino: Ino) -> ObjectId | None:
        if ino == UNKNOWN:
            return None
        try:
            return volume.file(ino, self._block_size).oid
        except errors.CachefsError:
            return None

    async def _publish(self, plan: Plan, volume: Volume, known: MountPlan) -> None:
        last, known.plan = known.plan, plan if len(plan) else None
        known.reading, known.error = 0, ""
        self._follow(volume, known.plan)
        if last is not None:
            await self._guidance.leave(last.next_use)
        if known.plan is not None:
            await self._guidance.follow(known.plan.next_use)
            log.info("a plan of %d lines, %d of them unknown, for %s", len(plan), plan.unknown, volume.source)

    def _mountpoint(self, volume: Volume, mount_id: str) -> bytes:
        found = [mount.mountpoint for mount in volume.mounts.values() if mount.mount_id == mount_id]
        return os.fsencode(found[0]) if found else b""


class _Lines:
    """Turns the bytes of a plan into numbers of files."""

    def __init__(self, volume: Volume, mountpoint: bytes, spool: Spool, spool_dir: str, walk: Walk) -> None:
        self._volume = volume
        self._mountpoint = mountpoint
        self._spool = spool
        self._spool_dir = spool_dir
        self._walk = walk
        self._rest = b""
        self._paths: list[bytes] = []
        self._listing: array[int] | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, volume: Volume, mountpoint: bytes, spool: Spool, spool_dir: str) -> Any:
        """A reader of one plan."""
        async with Walk.opened(volume, lambda ino, size: None, lambda path, why: None, spool.settle) as walk:
            yield cls(volume, mountpoint, spool, spool_dir, walk)

    async def take(self, raw: bytes) -> None:
        """Some more of the plan has come."""
        *lines, rest = (self._rest + raw).split(b"\n")
        self._rest = rest[: MOST_LINE + 1]  # longer than any path: unknown
        for number, line in enumerate(lines):
            if number % TURN == 0:
                await trio.lowlevel.checkpoint()
            await self._line(line.rstrip(b"\r"))

    async def end(self) -> None:
        """The writer is gone: what is left is a line as well."""
        if self._rest:
            await self._line(self._rest.rstrip(b"\r"))
        await self._resolve()

    async def _line(self, line: bytes) -> None:
        if line.startswith(b"index ") and line[6:].strip().isdigit():
            await self._resolve()
            await self._index(int(line[6:]))
        elif line.startswith(b"listing "):
            await self._resolve()
            await self._list(self._inside(line[8:]) or b"")
        elif line:
            self._paths.append(line)
            if len(self._paths) >= BATCH:
                await self._resolve()

    def _inside(self, line: bytes) -> bytes | None:
        """Return the path in the mount; None: it is elsewhere, or none at all."""
        if len(line) > MOST_LINE:
            return None
        if line.startswith(b"/"):
            if not self._mountpoint or not (line + b"/").startswith(self._mountpoint + b"/"):
                return None
            line = line[len(self._mountpoint) :]
        parts = [part for part in line.split(b"/") if part not in (b"", b".")]
        return None if b".." in parts else b"/".join(parts)

    async def _resolve(self) -> None:
        """Find the files of the paths that have come."""
        paths, self._paths = self._paths, []
        inside = [self._inside(path) for path in paths]
        inos = iter(await self._walk.resolve([path for path in inside if path]))
        for path in inside:
            found = next(inos) if path else None
            self._spool.append(found or UNKNOWN)
        await self._spool.settle()

    async def _list(self, directory: bytes) -> None:
        found = array("Q")
        async with Walk.opened(
            self._volume, lambda ino, size: found.append(ino), lambda path, why: None, self._spool.settle
        ) as walk:
            for ino in await walk.resolve([directory]):
                await walk.take(directory, ino)
        self._listing = found

    async def _index(self, number: int) -> None:
        if self._listing is None:
            await self._list(b"")
        listing = self._listing
        assert listing is not None
        self._spool.append(listing[number] if number < len(listing) else UNKNOWN)


def _open(path: str) -> int:
    """Open the pipe for reading, made if needed; without waiting for a writer. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    if not stat.S_ISFIFO(os.lstat(path).st_mode):
        os.unlink(path)
        os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)


async def _some(pipe: int) -> bytes:
    """Return some bytes of the pipe, nothing when its last writer is gone. Raises OSError."""
    while True:
        await trio.lowlevel.wait_readable(pipe)
        with contextlib.suppress(BlockingIOError):
            return os.read(pipe, READ_BYTES)
