"""The agent's side of the socket: one task per connection, one task per question that has to wait.

Fills, the questions of readers, have no task: they are answered by the thread that has committed the block. Only those
whose answer carries the bytes have one: it holds room for them until they were sent.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import trio

from cachefs import __version__, errors
from cachefs.agent import framing, messages
from cachefs.agent.errands import Errands
from cachefs.agent.limits import VolumeLimits
from cachefs.agent.sender import Sender
from cachefs.agent.volumes import AttachedMount, FileVersion, Volume, Volumes
from cachefs.block.block_cache import BlockCache, Priority
from cachefs.block.budget import CARRIED_TIMES
from cachefs.block.flights import Answer, Filled
from cachefs.block.holdings import NOBODY
from cachefs.types import BlockKey, Ino, Tier

log = logging.getLogger(__name__)

RECEIVE_BYTES = 256 << 10
MAX_FILL_BLOCKS = 256
MAX_RANGE_BYTES = 8 << 20


class Server:
    """Serves workers and `cachefs status`. `touched_at` tells the idle watch when somebody last needed this agent."""

    def __init__(
        self,
        cache: BlockCache,
        volumes: Volumes,
        block_size: int,
        shm_path: str | None,
        disk_path: str | None,
        status: Callable[[bool], dict[str, Any]],
        stop: Callable[[], None],
        mounts_changed: Callable[[], object] = lambda: None,
        errands: Errands | None = None,
    ) -> None:
        """`status` gets whether other nodes are to be asked as well."""
        self.cache = cache
        self.volumes = volumes
        self.block_size = block_size
        self.shm_path = shm_path
        self.disk_path = disk_path
        self.status = status
        self.stop = stop
        self.mounts_changed = mounts_changed
        self.errands = errands
        self._token = trio.lowlevel.current_trio_token()
        self.begun: Callable[[Volume, Sequence[tuple[int, int]]], None] | None = None
        """Who wants to know which files readers begin: (inode number, block); None: nobody."""
        self.environment: Mapping[str, str] = {}
        """Variables of this process that decide about credentials, for those who want to use its keys."""
        self.limits: VolumeLimits | None = None
        self.learn_holdings: Callable[[], None] = lambda: None
        """Called when limits may be new."""
        self.touched_at = time.monotonic()
        self.connections = 0
        """Open ones: a mount that is still being checked is not attached, and yet needs this agent."""

    def soon(self, call: Callable[..., object], *arguments: object) -> None:
        """Call in the trio thread, from any thread; not at all when the agent has ended."""
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call, *arguments)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection until it ends. Never raises."""
        connection = _Connection(self, stream)
        self.connections += 1
        try:
            await connection.run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError, errors.ProtocolError) as group:
            log.debug("connection ended: %s", group.exceptions[0])
        except* Exception:
            log.exception("connection failed")
        finally:
            self.connections -= 1
            self.touched_at = time.monotonic()
            if connection.volume is not None and connection.volume.mounts.pop(id(connection), None) is not None:
                log.info("mount %s detached", connection.mountpoint)
                self.mounts_changed()


class _Connection:
    """One worker (or one `cachefs status`)."""

    def __init__(self, server: Server, stream: trio.SocketStream) -> None:
        self._server = server
        self._stream = stream
        self._nursery: trio.Nursery | None = None
        self.volume: Volume | None = None
        self.mountpoint = ""
        self._mount: AttachedMount | None = None
        self._sender = Sender(stream)

    async def run(self) -> None:
        """Read questions until the other side goes away."""
        frames = framing.requests()
        async with self._stream, trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._sender.run)
            try:
                while received := await self._stream.receive_some(RECEIVE_BYTES):
                    for request in frames.feed(received):
                        self._take(request)
            finally:
                self._sender.stop()
                self._nursery = None
            nursery.cancel_scope.cancel()

    def _reply(self, answer: messages.Answer) -> None:
        self._sender.send(framing.encode(answer))

    def _tell(self, answer: messages.Answer) -> None:
        """Say how far something is, unless the other side has not even read what was said before."""
        if self._sender.idle:
            self._reply(answer)

    def _take(self, request: messages.Request) -> None:
        """Handle one message; what has to wait gets its own task."""
        match request:
            case messages.Fill():
                self._start_fill(request)
            case messages.FetchRange():
                if self._nursery is not None:
                    self._nursery.start_soon(self._fetch_range, request)
            case messages.Readahead():
                self._start_readahead(request)
            case messages.RangeAhead():
                self._start_range_ahead(request)
            case messages.Begun():
                if self.volume is not None and self._server.begun is not None:
                    self._server.begun(self.volume, request.files)
            case messages.Touched():
                keys = [BlockKey(key) for key in request.keys]
                owner = NOBODY if self.volume is None else self.volume.owner
                self._server.cache.touch(keys, request.disk_hits, request.disk_hit_bytes, owner)
            case messages.Counters():
                if self._mount is not None:
                    self._mount.counters = request.values
            case messages.Resolve():
                self._answer(request.id, self._resolve(request))
            case messages.ListDirectory():
                self._answer(request.id, self._list(request))
            case messages.Cached():
                self._answer(request.id, self._cached(request))
            case messages.Attach():
                self._answer(request.id, self._attach(request))
            case messages.Status():
                self._answer(request.id, self._status(request))
            case messages.Ping():
                self._reply(messages.Done(id=request.id))
            case messages.Stop():
                self._answer(request.id, self._stop(request))
            case _:
                if self._server.errands is not None:
                    self._answer(request.id, self._server.errands.answer(request, self._tell))

    def _answer(self, identity: int, work: Coroutine[Any, Any, messages.Answer]) -> None:
        if self._nursery is None:
            work.close()  # nobody is there any more
        else:
            self._nursery.start_soon(self._run, identity, work)

    async def _run(self, identity: int, work: Awaitable[messages.Answer]) -> None:
        try:
            self._reply(await work)
        except Exception as error:  # noqa: BLE001 - the boundary: one question, one answer
            self._reply(_failure(identity, error))

    # -- the questions
    # --------------------------------------------------------------------------------------------------

    def _attached(self) -> Volume:
        if self.volume is None:
            raise errors.ProtocolError("attach first")
        return self.volume

    async def _attach(self, request: messages.Attach) -> messages.Answer:
        if not messages.OLDEST_PROTOCOL <= request.protocol <= messages.PROTOCOL_VERSION:
            text = f"the agent that runs is version {__version__} with protocol {messages.PROTOCOL_VERSION}"
            return messages.Failure(id=request.id, kind=messages.OTHER_VERSION, text=text)
        environment = {**(self._server.environment if request.own_environment else {}), **request.environment}
        volume = await self._server.volumes.attach(
            request.volume, environment, check=request.check, mounted_at_s=request.mounted_at_s
        )
        notices = self._server.volumes.notices(request.volume, request.given)
        if not request.check:
            self.volume, self.mountpoint = volume, request.mountpoint
            self._mount = AttachedMount(
                request.mount_id, request.mountpoint, request.pid, request.version, request.protocol
            )
            await self._limit(volume, request)
            volume.mounts[id(self)] = self._mount
            self._server.mounts_changed()
            log.info("mount %s attached (worker %d, cachefs %s)", request.mountpoint, request.pid, request.version)
        return messages.Attached(
            id=request.id,
            pid=os.getpid(),
            version=__version__,
            shm_path=self._server.shm_path,
            disk_path=self._server.disk_path,
            shm_limit_bytes=self._server.cache.shm_limit_bytes,
            begun=self._server.begun is not None,
            ranges=True,
            metadata_path=volume.writer.path,
            volume_id=volume.volume_id,
            endpoint=volume.store.endpoint,
            bucket=volume.store.bucket,
            block_size=self._server.block_size,
            lineage=volume.writer.reader.lineage,
            notices=notices,
        )

    async def _limit(self, volume: Volume, request: messages.Attach) -> None:
        """Let the newest mount of a volume say what it may do in the tiers."""
        limits, asked = self._server.limits, request.volume.get("limits")
        if limits is not None and asked is not None:
            await limits.ask(volume.owner, volume.source, asked, request.mounted_at_s)
            self._server.learn_holdings()

    async def _resolve(self, request: messages.Resolve) -> messages.Answer:
        found = await self._attached().resolver.resolve(Ino(request.parent), request.name)
        return messages.Resolved(id=request.id, ino=found.ino, valid_s=found.valid_s)

    async def _list(self, request: messages.ListDirectory) -> messages.Answer:
        progress = await self._attached().lister.list_directory(Ino(request.ino), request.seen)
        return messages.Listed(
            id=request.id, complete=progress.complete, frontier=progress.frontier, valid_s=progress.valid_s
        )

    def _start_fill(self, request: messages.Fill) -> None:
        """Have blocks filled. A reader waits: without a task, and answered by the thread that has the last block."""
        if (request.inline or self._server.cache.carries) and self._nursery is not None:
            self._nursery.start_soon(self._fill_inline, request)
            return
        try:
            self._start(request, functools.partial(self._filled, request), Priority.DEMAND)
        except Exception as error:  # noqa: BLE001 - as in `_run`
            self._reply(_failure(request.id, error))

    def _filled(self, request: messages.Fill, outcome: list[Filled] | Exception) -> None:
        """Answer a fill, in any thread."""
        if isinstance(outcome, Exception):
            self._server.soon(self._answer, request.id, self._failed(request, outcome))
        else:
            self._reply(_filled(request.id, outcome))

    async def _failed(self, request: messages.Fill | messages.FetchRange, error: Exception) -> messages.Answer:
        if isinstance(error, errors.StaleObject):
            await self._attached().ask_again(Ino(request.ino))
        raise error

    async def _fill_inline(self, request: messages.Fill) -> None:
        """Answer with the bytes of the blocks: there is room for them before they come, until they were sent."""
        cache = self._server.cache
        try:
            volume, file, count = self._asked(request)
            async with cache.carriage.room(self, cache.carried_bytes(file.version, request.first, count)):
                blocks = await cache.fill(file.oid, file.version, volume.blocks_from, request.first, count, inline=True)
                payload_bytes = sum(len(block.payload or b"") for block in blocks)
                frame = framing.encode_large(_filled(request.id, blocks), payload_bytes)
                del blocks
                await self._sender.deliver(frame)
        except Exception as error:  # noqa: BLE001 - as in `_run`
            await self._run(request.id, self._failed(request, error))

    async def _fetch_range(self, request: messages.FetchRange) -> None:
        """Answer with a range of a file: as `_fill_inline`, whether or not there is a shm tier."""
        cache = self._server.cache
        try:
            volume, file, length = self._asked_range(request)
            if length <= 0:
                raise errors.ProtocolError(f"a range that is none: {request.length} bytes from {request.offset}")
            async with cache.carriage.room(self, length * CARRIED_TIMES):
                payload = await cache.read_range(
                    file.oid, file.version, volume.blocks_from, volume.store, request.offset, length, request.fresh
                )
                frame = framing.encode_large(messages.FetchedRange(id=request.id, payload=bytes(payload)), length)
                del payload
                await self._sender.deliver(frame)
        except Exception as error:  # noqa: BLE001 - as in `_run`
            await self._run(request.id, self._failed(request, error))

    def _start_range_ahead(self, request: messages.RangeAhead) -> None:
        try:
            volume, file, length = self._asked_range(request)
            if length > 0:
                self._server.cache.ranges.ahead(file.oid, file.version, volume.store, request.offset, length)
        except errors.CachefsError as error:
            log.debug("reading a range ahead: %s", error)
        except Exception:
            log.exception("reading a range ahead failed")

    def _asked_range(self, request: messages.FetchRange | messages.RangeAhead) -> tuple[Volume, FileVersion, int]:
        """Return which file is meant, and how much of the range asked for there is (as much as one answer takes)."""
        volume = self._attached()
        file = volume.file(Ino(request.ino), self._server.block_size)
        left = file.version.size - request.offset if request.offset >= 0 else 0
        return volume, file, min(request.length, left, MAX_RANGE_BYTES)

    def _start_readahead(self, request: messages.Readahead) -> None:
        try:
            self._start(request, lambda outcome: None, Priority.READAHEAD)
        except errors.CachefsError as error:
            log.debug("readahead: %s", error)
        except Exception:
            log.exception("readahead failed")

    def _start(self, request: messages.Fill | messages.Readahead, answer: Answer, priority: Priority) -> None:
        volume, file, count = self._asked(request)
        start = self._server.cache.start
        start(file.oid, file.version, volume.blocks_from, request.first, count, answer, priority=priority)

    def _asked(self, request: messages.Fill | messages.Readahead) -> tuple[Volume, FileVersion, int]:
        """Return which file is meant, and how many of the blocks asked for there are (as many as one answer takes)."""
        volume = self._attached()
        file = volume.file(Ino(request.ino), self._server.block_size)
        return volume, file, max(0, min(request.count, file.blocks - request.first, MAX_FILL_BLOCKS))

    async def _cached(self, request: messages.Cached) -> messages.Answer:
        file = self._attached().file(Ino(request.ino), self._server.block_size)
        held = self._server.cache.count_cached(file.oid, file.blocks)
        return messages.CachedBlocks(id=request.id, blocks={tier.value: count for tier, count in held.items()})

    async def _status(self, request: messages.Status) -> messages.Answer:
        status = await trio.to_thread.run_sync(self._server.status, request.peers)
        return messages.StatusReply(id=request.id, status=status)

    async def _stop(self, request: messages.Stop) -> messages.Answer:
        if self._server.volumes.mount_count and not request.force:
            raise errors.MountError("mounts are attached")
        self._server.stop()
        return messages.Done(id=request.id)


def _filled(identity: int, blocks: list[Filled]) -> messages.Filled:
    return messages.Filled(id=identity, blocks=[(block.index, _told(block.source), block.payload) for block in blocks])


def _told(source: Tier) -> str:
    """Return a tier as workers know it: to them, another node is as far away as the store."""
    return Tier.ORIGIN.value if source is Tier.PEER else source.value


def _failure(identity: int, error: Exception) -> messages.Failure:
    if isinstance(error, errors.CachefsError):
        return messages.Failure(id=identity, kind=type(error).__name__, text=str(error))
    log.error("a request failed", exc_info=error)
    return messages.Failure(id=identity, kind="StorageUnavailable", text=f"{type(error).__name__}: {error}")
