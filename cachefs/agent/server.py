"""The agent's side of the socket: one task per connection, one task per question that has to wait."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from cachefs import __version__, errors
from cachefs.agent import framing, messages
from cachefs.agent.sender import Sender
from cachefs.agent.volumes import AttachedMount, Volume, Volumes
from cachefs.block.block_cache import BlockCache, Priority
from cachefs.types import BlockKey, Ino

log = logging.getLogger(__name__)

RECEIVE_BYTES = 256 << 10
MAX_FILL_BLOCKS = 256


class Server:
    """Serves workers and `cachefs status`. `touched_at` tells the idle watch when somebody last needed this agent."""

    def __init__(
        self,
        cache: BlockCache,
        volumes: Volumes,
        block_size: int,
        shm_path: str | None,
        status: Callable[[], dict[str, Any]],
        stop: Callable[[], None],
    ) -> None:
        self.cache = cache
        self.volumes = volumes
        self.block_size = block_size
        self.shm_path = shm_path
        self.status = status
        self.stop = stop
        self.touched_at = time.monotonic()
        self.connections = 0
        """Open ones: a mount that is still being checked is not attached, and yet needs this agent."""

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
            while received := await self._stream.receive_some(RECEIVE_BYTES):
                for request in frames.feed(received):
                    self._take(request)
            nursery.cancel_scope.cancel()

    def _reply(self, answer: messages.Answer) -> None:
        self._sender.send(framing.encode(answer))

    def _take(self, request: messages.Request) -> None:
        """Handle one message; what has to wait gets its own task."""
        match request:
            case messages.Fill():
                self._answer(request.id, self._fill(request))
            case messages.Readahead():
                self._background(self._readahead(request))
            case messages.Touched():
                self._server.cache.touch([BlockKey(key) for key in request.keys])
            case messages.Counters():
                if self._mount is not None:
                    self._mount.counters = request.values
            case messages.Resolve():
                self._answer(request.id, self._resolve(request))
            case messages.ListDirectory():
                self._answer(request.id, self._list(request))
            case messages.Cached():
                self._answer(request.id, self._cached(request))
            case messages.Usage():
                self._answer(request.id, self._usage(request))
            case messages.Attach():
                self._answer(request.id, self._attach(request))
            case messages.Status():
                self._answer(request.id, self._status(request))
            case messages.Stop():
                self._answer(request.id, self._stop(request))

    def _answer(self, identity: int, work: Awaitable[messages.Answer]) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._run, identity, work)

    async def _run(self, identity: int, work: Awaitable[messages.Answer]) -> None:
        try:
            self._reply(await work)
        except errors.CachefsError as error:
            self._reply(messages.Failure(id=identity, kind=type(error).__name__, text=str(error)))
        except Exception as error:
            log.exception("a request failed")
            self._reply(
                messages.Failure(id=identity, kind="StorageUnavailable", text=f"{type(error).__name__}: {error}")
            )

    def _background(self, work: Awaitable[None]) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._run_background, work)

    async def _run_background(self, work: Awaitable[None]) -> None:
        try:
            await work
        except errors.CachefsError as error:
            log.debug("readahead: %s", error)
        except Exception:
            log.exception("readahead failed")

    # -- the questions
    # --------------------------------------------------------------------------------------------------

    def _attached(self) -> Volume:
        if self.volume is None:
            raise errors.ProtocolError("attach first")
        return self.volume

    async def _attach(self, request: messages.Attach) -> messages.Answer:
        if request.protocol != messages.PROTOCOL_VERSION:
            return messages.Failure(
                id=request.id, kind="version", text=f"agent {__version__} speaks protocol {messages.PROTOCOL_VERSION}"
            )
        volume = await self._server.volumes.attach(request.volume, request.environment, check=request.check)
        notices = self._server.volumes.notices(request.volume)
        if not request.check:
            self.volume, self.mountpoint = volume, request.mountpoint
            self._mount = AttachedMount(request.mount_id, request.mountpoint, request.pid)
            volume.mounts[id(self)] = self._mount
            log.info("mount %s attached (worker %d, cachefs %s)", request.mountpoint, request.pid, request.version)
        return messages.Attached(
            id=request.id,
            pid=os.getpid(),
            version=__version__,
            shm_path=self._server.shm_path,
            metadata_path=volume.writer.path,
            volume_id=volume.volume_id,
            endpoint=volume.store.endpoint,
            bucket=volume.store.bucket,
            block_size=self._server.block_size,
            notices=notices,
        )

    async def _resolve(self, request: messages.Resolve) -> messages.Answer:
        found = await self._attached().resolver.resolve(Ino(request.parent), request.name)
        return messages.Resolved(id=request.id, ino=found.ino, valid_s=found.valid_s)

    async def _list(self, request: messages.ListDirectory) -> messages.Answer:
        progress = await self._attached().lister.list_directory(Ino(request.ino), request.seen)
        return messages.Listed(
            id=request.id, complete=progress.complete, frontier=progress.frontier, valid_s=progress.valid_s
        )

    async def _fill(self, request: messages.Fill) -> messages.Answer:
        volume = self._attached()
        file = volume.file(Ino(request.ino), self._server.block_size)
        count = min(request.count, file.blocks - request.first, MAX_FILL_BLOCKS)
        blocks = await self._server.cache.fill(
            file.oid, file.version, volume.store, request.first, count, inline=request.inline, priority=Priority.DEMAND
        )
        return messages.Filled(id=request.id, blocks=[(b.index, b.source.value, b.payload) for b in blocks])

    async def _readahead(self, request: messages.Readahead) -> None:
        volume = self._attached()
        file = volume.file(Ino(request.ino), self._server.block_size)
        count = min(request.count, file.blocks - request.first, MAX_FILL_BLOCKS)
        if count > 0:
            await self._server.cache.fill(
                file.oid, file.version, volume.store, request.first, count, priority=Priority.READAHEAD
            )

    async def _cached(self, request: messages.Cached) -> messages.Answer:
        file = self._attached().file(Ino(request.ino), self._server.block_size)
        held = self._server.cache.count_cached(file.oid, file.blocks)
        return messages.CachedBlocks(id=request.id, blocks={tier.value: count for tier, count in held.items()})

    async def _usage(self, request: messages.Usage) -> messages.Answer:
        used, objects = self._attached().writer.reader.counts()
        return messages.UsageReply(id=request.id, used_bytes=used, objects=objects)

    async def _status(self, request: messages.Status) -> messages.Answer:
        status = await trio.to_thread.run_sync(self._server.status)
        return messages.StatusReply(id=request.id, status=status)

    async def _stop(self, request: messages.Stop) -> messages.Answer:
        if self._server.volumes.mount_count and not request.force:
            raise errors.MountError("mounts are attached")
        self._server.stop()
        return messages.Done(id=request.id)
