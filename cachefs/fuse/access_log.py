"""`.cachefs/accesslog`: the requests of a mount as lines, for as long as somebody reads them.

It is a pipe in the runtime directory. Once a second somebody looks whether it has a reader; while it has none, requests
know nothing of it. A reader who is too slow loses lines, never a request its time.

    2026-11-23 11:18:19.003330 [uid:0,gid:0,pid:4403] READ (4295032841,131072,0) train/000001.tar <0.000010>

The numbers in brackets are inode, size and offset, or a name; the last one is the time in the requests thread, in
seconds: of a read that has to be fetched only that of its question.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import stat
import struct
import time
from collections import deque
from datetime import datetime

import trio

from cachefs import errors
from cachefs.fuse.channel import Channel
from cachefs.fuse.protocol import IN_HEADER_SIZE, READ_IN, Opcode
from cachefs.types import Ino
from metadata.store import MetadataReader

log = logging.getLogger(__name__)

LOOK_S = 1.0
WRITE_S = 0.05
KEPT_LINES = 8192
PIPE_BYTES = 1 << 20
F_SETPIPE_SZ = 1031
_CALLER = struct.Struct("<III")
_CALLER_OFFSET = 24
_NAMED = frozenset({Opcode.LOOKUP, Opcode.GETXATTR})
_SIZED = frozenset({Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS})
_Noted = tuple[float, int, int, tuple[int, int, int], bytes | tuple[int, int], float]


def make_pipe(path: str) -> bool:
    """Have a pipe there that is ours; returns False when that cannot be. Never raises."""
    try:
        try:
            os.mkfifo(path, 0o600)
        except FileExistsError:
            if not stat.S_ISFIFO(os.lstat(path).st_mode):
                os.unlink(path)
                os.mkfifo(path, 0o600)
    except OSError as error:
        log.info("there is no pipe %s: %s", path, error)
        return False
    return True


class AccessLog:
    """The log of one channel."""

    def __init__(self, path: str, channel: Channel, names: MetadataReader) -> None:
        self._path = path
        self._channel = channel
        self._names = names
        self._noted: deque[_Noted] = deque()
        self._lost = 0

    async def run(self) -> None:
        """Look for readers, for ever. Never raises."""
        while True:
            await trio.sleep(LOOK_S)
            try:
                pipe = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    make_pipe(self._path)
                continue
            try:
                await self._write(pipe)
            except OSError as error:
                log.debug("the reader of the access log is gone: %s", error)
            finally:
                self._channel.trace(None)
                self._noted.clear()
                os.close(pipe)

    async def _write(self, pipe: int) -> None:
        """Write lines until the reader is gone. Raises OSError then."""
        fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE_BYTES)
        self._channel.trace(self._note)
        rest = b"# uid, gid, pid; inode, size, offset or name; path; seconds\n"
        while True:
            room = not rest  # else the reader is slow, and what comes waits, or is lost
            lines = [self._line(self._noted.popleft()) for _ in range(len(self._noted) if room else 0)]
            if self._lost and room:
                lines.append(f"# {self._lost} lines were lost\n".encode())
                self._lost = 0
            rest += b"".join(lines)
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(pipe, rest) :] if rest else rest
            await trio.sleep(WRITE_S)
            _check_reader(pipe)

    def _note(self, opcode: int, ino: int, message: memoryview, n: int, seconds: float) -> None:
        """A request was dealt with. In the requests thread."""
        if len(self._noted) >= KEPT_LINES:
            self._lost += 1
            return
        caller = _CALLER.unpack_from(message, _CALLER_OFFSET)
        what: bytes | tuple[int, int] = b""
        if opcode in _SIZED:
            _, offset, size = READ_IN.unpack_from(message, IN_HEADER_SIZE)
            what = (size, offset)
        elif opcode in _NAMED:
            skipped = 8 if opcode == Opcode.GETXATTR else 0
            what = bytes(message[IN_HEADER_SIZE + skipped : n]).split(b"\0", 1)[0]
        self._noted.append((time.time(), opcode, ino, (caller[0], caller[1], caller[2]), what, seconds))

    def _line(self, noted: _Noted) -> bytes:
        at, opcode, ino, (uid, gid, pid), what, seconds = noted
        if isinstance(what, tuple):
            arguments = f"{ino},{what[0]},{what[1]}"
        else:
            arguments = f"{ino},{what.decode('utf-8', 'backslashreplace')}" if what else f"{ino}"
        when = datetime.fromtimestamp(at).astimezone()
        return (
            f"{when:%Y-%m-%d %H:%M:%S.%f} [uid:{uid},gid:{gid},pid:{pid}] {Opcode(opcode).name} ({arguments}) "
            f"{self._path_of(ino)} <{seconds:.6f}>\n"
        ).encode("utf-8", "backslashreplace")

    def _path_of(self, ino: int) -> str:
        try:
            return self._names.key_of(Ino(ino)).replace("\n", "\\n") or "/"
        except errors.CachefsError:
            return "-"


def _check_reader(pipe: int) -> None:
    """Raises BrokenPipeError when nobody reads a pipe any more."""
    poll = select.poll()
    poll.register(pipe, 0)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        raise BrokenPipeError(errno.EPIPE, "nobody reads it")
