"""The channel: one plain thread that answers the kernel's reads before libfuse sees them.

    kernel <-> /dev/fuse <-> requests thread --READ hit--> shm tier's memory map, answered by writev without a copy
                                |        \\--READ miss--> trio task: the agent fills, then it answers the same way
                                | everything else, unchanged
                                v
                         socket pair <-> libfuse, pyfuse3 <-> replies thread --> /dev/fuse

Why: a request through libfuse, pyfuse3 and trio costs about 20 us of CPU and two wake-ups; here it costs about 5 us
and none.

OPEN is answered with ENOSYS once, so the kernel opens files without a message from then on: an inode is one version
of one object for ever, READ carries the inode, and there is nothing else that a handle would have to say. OPENDIR is
answered here because its flags decide whether the kernel may keep its copy of the listing.

INVARIANT: no message can end a thread; what goes wrong with one request is the answer to that request.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from cachefs.block.codec import HEADER_SIZE
from cachefs.fuse.dirents import DOTDOT_COOKIE, SMALLEST_ENTRY, dots_behind, entry_before, pack_direntplus
from cachefs.fuse.errno_map import to_errno
from cachefs.fuse.interrupts import Interrupts
from cachefs.fuse.protocol import (
    FOPEN_CACHE_DIR,
    FOPEN_KEEP_CACHE,
    GETXATTR_IN,
    IN_HEADER,
    IN_HEADER_SIZE,
    IN_PID,
    IN_PID_OFFSET,
    INTERRUPT_IN,
    OPEN_OUT,
    OUT_HEADER,
    OUT_HEADER_SIZE,
    READ_FLAGS,
    READ_IN,
    UNMOUNTED,
    Opcode,
    error_reply,
)
from cachefs.prefetch.window import PROOF
from cachefs.types import Ino
from cachefs.vfs.filesystem import XATTR_PREFIX, FileSystem
from cachefs.vfs.reading import MAX_TOUCHED, FileView
from cachefs.vfs.virtual import END as VIRTUAL_END

log = logging.getLogger(__name__)

BUFFER_BYTES = (1 << 20) + (64 << 10)
_pack_index = struct.Struct(">I").pack
_pack_out = OUT_HEADER.pack
_unpack_read = READ_FLAGS.unpack_from
_DIRECT = os.O_DIRECT
_GONE = frozenset({errno.ENOENT, errno.EINTR})
"""write(2) on the device: nobody waits for that answer any more."""


class MissSink(Protocol):
    """Who takes what the requests thread can't answer at once. All methods return at once and may be called from any
    thread.
    """

    def miss(self, unique: int, view: FileView, start: int, end: int) -> None:
        """A READ whose blocks are not in the shm tier."""
        ...

    def fresh(self, unique: int, view: FileView, start: int, end: int) -> None:
        """A READ past the tiers: of a file that was opened with O_DIRECT, or of a mount that keeps nothing."""
        ...

    def wish(self, view: FileView, ask: tuple[int, int]) -> None:
        """The window of a file has asked for these bytes, and maybe for others (`ReadWindow.more`)."""
        ...


class Channel:
    """Owns the device descriptor of one worker. Counters are plain integers that only the requests thread writes."""

    def __init__(
        self,
        device_fd: int,
        near: socket.socket,
        filesystem: FileSystem,
        sink: MissSink,
        on_unmounted: Callable[[], None],
    ) -> None:
        self._device = device_fd
        self._near = near
        self._filesystem = filesystem
        self._reads = filesystem.reads
        self._sink = sink
        self._on_unmounted = on_unmounted
        self.interrupts = Interrupts(self._write)
        self.on_activity: Callable[[], None] = lambda: None
        self.asleep = False
        """Set by the wake-up guard when it has gone to sleep: the next request wakes it."""
        self.requests = self.hits = self.hit_bytes = self.misses = self.miss_bytes = self.errors = self.fresh = 0
        self.touched: set[bytes] = set()
        self._threads: tuple[threading.Thread, ...] = ()
        self._seen = -1
        self._opened_generation: dict[int, int] = {}
        self._answers: dict[int, Callable[[int, int, memoryview, int], None]] = {
            Opcode.READ: self._read,
            Opcode.OPEN: self._refuse_for_ever,
            Opcode.FLUSH: self._refuse_for_ever,
            Opcode.ACCESS: self._refuse_for_ever,
            Opcode.RELEASE: self._acknowledge,
            Opcode.OPENDIR: self._opendir,
            Opcode.RELEASEDIR: self._acknowledge,
            Opcode.FORGET: self._drop,
            Opcode.BATCH_FORGET: self._drop,
            Opcode.INTERRUPT: self._interrupt,
            Opcode.GETXATTR: self._getxattr,
            Opcode.READDIRPLUS: self._readdirplus,
        }
        self._plain_answers = dict(self._answers)

    def trace(self, note: Callable[[int, int, memoryview, int, float], object] | None) -> None:
        """Tell `note` of every request from now on (None: of none any more): opcode, inode, the message and its length,
        and the seconds that this thread had to do with it. Requests that nobody is told of pay nothing.
        """
        for opcode in Opcode:
            plain = self._plain_answers.get(opcode)
            if note is not None:
                self._answers[opcode] = functools.partial(self._traced, note, opcode, plain or self._pass_on)
            elif plain is not None:
                self._answers[opcode] = plain
            else:
                self._answers.pop(opcode, None)

    def _traced(
        self,
        note: Callable[[int, int, memoryview, int, float], object],
        opcode: int,
        answer: Callable[[int, int, memoryview, int], None],
        unique: int,
        ino: int,
        message: memoryview,
        n: int,
    ) -> None:
        began = time.monotonic()
        try:
            answer(unique, ino, message, n)
        finally:
            note(opcode, ino, message, n, time.monotonic() - began)

    def _pass_on(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        self._forward(unique, message[:n])

    def start(self) -> None:
        """Begin to take requests. The threads end when the mount does."""
        self._threads = (
            threading.Thread(target=self._take_requests, name="channel-requests", daemon=True),
            threading.Thread(target=self._carry_replies, name="channel-replies", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    def moves(self) -> bool:
        """Whether the requests thread waits for a request, or has taken one since this was asked last.

        Costs a request nothing: it looks at where the thread is. One that waits for room in libfuse's socket is
        excused, because who empties that socket is the event loop, and the event loop asks.
        """
        if not all(thread.is_alive() for thread in self._threads):
            return False
        frame = sys._current_frames().get(self._threads[0].ident or 0)
        idle = frame is None or frame.f_code in _WAITING
        before, self._seen = self._seen, self.requests
        return idle or self._seen != before

    # -- the requests thread
    # --------------------------------------------------------------------------------------------

    def _take_requests(self) -> None:
        buffer = bytearray(BUFFER_BYTES)
        view, buffers = memoryview(buffer), [buffer]
        unpack, answers, readv, device = IN_HEADER.unpack_from, self._answers, os.readv, self._device
        while True:
            try:
                n = readv(device, buffers)
            except OSError as error:
                if error.errno in _GONE or error.errno == errno.EAGAIN:
                    continue
                if error.errno not in UNMOUNTED:
                    log.error("reading requests failed: %s", error)
                self._on_unmounted()
                return
            _, opcode, unique, ino = unpack(buffer)
            self.requests += 1
            if self.asleep:
                self.on_activity()
            answer = answers.get(opcode)
            try:
                if answer is None:
                    self._forward(unique, view[:n])
                else:
                    answer(unique, ino, view, n)
            except Exception as error:  # noqa: BLE001 - the boundary of this thread
                self.errors += 1
                self._write(error_reply(unique, to_errno(error, f"request {opcode}")))

    def _read(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        offset, size, flags = _unpack_read(message, IN_HEADER_SIZE)
        reads = self._reads
        view = reads.views_by_ino.get(ino)
        if view is None:
            if ino < VIRTUAL_END:
                self._read_virtual(unique, ino, offset, size)
                return
            view = reads.file(ino)
        end = offset + size
        if end > view.size:
            end = view.size
            if end <= offset:
                self._write(OUT_HEADER.pack(OUT_HEADER_SIZE, 0, unique))
                return
        size = end - offset
        if flags & _DIRECT or not self._filesystem.keeps:
            self.fresh += 1
            self.interrupts.waits(unique, IN_PID.unpack_from(message, IN_PID_OFFSET)[0])
            self._sink.fresh(unique, view, offset, end)
            return
        if not offset:
            reads.note_begun(ino, 0)
        if view.size > PROOF:  # no sequence is seen in less
            if view.window.position < 0 and offset:
                reads.note_begun(ino, offset)  # at its end, or somewhere within
            ask = view.window.note(offset, size, view.size)
            if ask is not None:
                self._sink.wish(view, ask)
        blocks = reads.blocks
        if blocks is not None:
            shift = reads.shift
            index = offset >> shift
            if index == (end - 1) >> shift:  # by far the most common: one block
                key = view.oid + _pack_index(index)
                found = blocks.find(key, HEADER_SIZE + (offset & reads.mask), size)
                if found is not None:
                    piece, close = found
                    try:
                        self._send(unique, (_pack_out(OUT_HEADER_SIZE + size, 0, unique), piece))
                    finally:
                        close()
                    self.hits += 1
                    self.hit_bytes += size
                    if len(self.touched) < MAX_TOUCHED:
                        self.touched.add(key)
                    return
            elif self._answer_several(unique, view, offset, end):
                return
        self.misses += 1
        self.interrupts.waits(unique, IN_PID.unpack_from(message, IN_PID_OFFSET)[0])
        self._sink.miss(unique, view, offset, end)

    def _read_virtual(self, unique: int, ino: int, offset: int, size: int) -> None:
        """Answer a READ of a text of `.cachefs`, which is in memory."""
        content = self._filesystem.virtual_bytes(ino, offset, size)
        self._send(unique, (OUT_HEADER.pack(OUT_HEADER_SIZE + len(content), 0, unique), content))

    def _answer_several(self, unique: int, view: FileView, offset: int, end: int) -> bool:
        """Answer a READ that lies in more than one block, if all of them are in the shm tier."""
        assert self._reads.blocks is not None
        with self._reads.blocks.snapshot() as snapshot:
            slices = self._reads.views(snapshot, view, offset, end)
            if slices is None:
                return False
            self._send(unique, (OUT_HEADER.pack(OUT_HEADER_SIZE + end - offset, 0, unique), *slices))
        self.hits += 1
        self.hit_bytes += end - offset
        return True

    def _refuse_for_ever(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        """ENOSYS: the kernel does without this request from now on (fs/fuse: no_open, no_flush, no_access)."""
        self._write(error_reply(unique, errno.ENOSYS))

    def _acknowledge(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        self._write(OUT_HEADER.pack(OUT_HEADER_SIZE, 0, unique))

    def _drop(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        """FORGET has no answer, and nothing to free: inodes are persistent."""

    def _opendir(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        """The handle is the inode. The kernel may use its copy of the listing again while ours is the same and still
        valid.
        """
        flags = 0
        generation = self._filesystem.listing_generation(Ino(ino))
        if generation is None:
            self._opened_generation.pop(ino, None)
        else:
            flags = FOPEN_CACHE_DIR
            if self._opened_generation.get(ino) == generation:
                flags |= FOPEN_KEEP_CACHE
            if len(self._opened_generation) > 100_000:
                self._opened_generation.clear()
            self._opened_generation[ino] = generation
        self._write(OUT_HEADER.pack(OUT_HEADER_SIZE + OPEN_OUT.size, 0, unique) + OPEN_OUT.pack(ino, flags, 0))

    def forget_listings(self) -> None:
        """The metadata begins anew, and so do the numbers of listings: no copy of the kernel's is one of them."""
        self._opened_generation.clear()

    def _readdirplus(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        """A listing that is known goes out from here; one that has to be made is libfuse's and the agent's business."""
        _, cookie, size = READ_IN.unpack_from(message, IN_HEADER_SIZE)
        limit = size // SMALLEST_ENTRY + 1
        entries = self._filesystem.entries_known(Ino(ino), entry_before(cookie), limit)
        if entries is None:
            self._forward(unique, message[:n])
            return
        dots = () if cookie > DOTDOT_COOKIE else dots_behind(cookie, Ino(ino), self._reads.names.inode(Ino(ino)))
        reply = pack_direntplus(entries, size, dots)
        self._send(unique, (OUT_HEADER.pack(OUT_HEADER_SIZE + len(reply), 0, unique), reply))

    def _interrupt(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        self.interrupts.add(INTERRUPT_IN.unpack_from(message, IN_HEADER_SIZE)[0])

    def _getxattr(self, unique: int, ino: int, message: memoryview, n: int) -> None:
        """`ls -l` asks two attributes of every file that a bucket never has: answered without libfuse."""
        name = bytes(message[IN_HEADER_SIZE + GETXATTR_IN.size : n]).split(b"\0", 1)[0]
        if name.startswith(XATTR_PREFIX):
            self._forward(unique, message[:n])
        else:
            code = errno.EOPNOTSUPP if name.startswith(b"system.") else errno.ENODATA
            self._write(error_reply(unique, code))

    def _forward(self, unique: int, message: memoryview) -> None:
        self.interrupts.waits(unique, IN_PID.unpack_from(message, IN_PID_OFFSET)[0])
        self._near.send(message)

    # -- answers, from any thread
    # ---------------------------------------------------------------------------------------

    def answer(self, unique: int, slices: list[memoryview]) -> None:
        """Answer a READ with these bytes. They must stay valid until this returns."""
        self.interrupts.done(unique)
        length = sum(map(len, slices))
        self.miss_bytes += length
        self._send(unique, (OUT_HEADER.pack(OUT_HEADER_SIZE + length, 0, unique), *slices))

    def fail(self, unique: int, code: int) -> None:
        """Answer a READ with an errno."""
        self.interrupts.done(unique)
        self.errors += 1
        self._write(error_reply(unique, code))

    def write_init_reply(self, reply: bytes) -> None:
        """Give the kernel the answer to its INIT."""
        os.write(self._device, reply)

    def _send(self, unique: int, parts: tuple[bytes | bytearray | memoryview, ...]) -> None:
        try:
            os.writev(self._device, parts)
        except OSError as error:
            if error.errno not in _GONE and error.errno not in UNMOUNTED:
                raise

    def _write(self, message: bytes | memoryview) -> None:
        try:
            os.write(self._device, message)
        except OSError as error:
            if error.errno not in _GONE and error.errno not in UNMOUNTED:
                log.warning("the kernel refused an answer of %d bytes: %s", len(message), error)

    def _carry_replies(self) -> None:
        """Carry libfuse's messages (replies and notifications) to the device."""
        buffer = bytearray(BUFFER_BYTES)
        view = memoryview(buffer)
        while True:
            n = self._near.recv_into(buffer)
            if n == 0:
                return
            self.interrupts.done(OUT_HEADER.unpack_from(buffer)[2])
            self._write(view[:n])


_WAITING = frozenset({Channel._take_requests.__code__, Channel._forward.__code__})
"""Where the requests thread may be for long."""
