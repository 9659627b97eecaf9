"""libfuse behind a socket: how a worker gets a running pyfuse3 session on a mount that it did not make.

The supervisor has mounted and read the kernel's INIT. A SOCK_SEQPACKET pair keeps message borders; libfuse gets one
end as a ready descriptor and never knows that the other end is not the kernel. INIT is replayed to it; only the first
worker's reply reaches the kernel, with our limits.
"""

from __future__ import annotations

import os
import socket
import struct

import pyfuse3

from cachefs.fuse.operations import Operations
from cachefs.fuse.protocol import IN_HEADER, IN_HEADER_SIZE, INIT_OUT, OUT_HEADER_SIZE, Opcode

SO_SNDBUFFORCE = 32
MESSAGE_BYTES = (1 << 20) + (64 << 10)
SOCKET_BUFFER_BYTES = 4 << 20
MAX_BACKGROUND = 128
"""Reads ahead that the kernel may have in flight; libfuse's 12 would keep it from filling the readahead window."""
MAX_TASKS = 16384
"""Requests that may wait in pyfuse3 at once; tasks are made on demand. At the limit the socket fills up, and the
channel with it would wait for the store.
"""

FUSE_AUTO_INVAL_DATA = 1 << 12
FUSE_READDIRPLUS_AUTO = 1 << 14


class Session:
    """The socket pair and the pyfuse3 session on its far end. One per process (pyfuse3 keeps it in globals)."""

    def __init__(self, operations: Operations) -> None:
        self.near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.near, self._far):
            try:
                end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BUFFER_BYTES)
            except PermissionError:
                # Without the right the system's limit holds: enough for all messages but writes, which are not offered.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self.operations = operations
        pyfuse3.init(operations, f"/dev/fd/{self._far.fileno()}", set())

    async def serve(self) -> None:
        """Run pyfuse3 until the mount is gone."""
        await pyfuse3.main(max_tasks=MAX_TASKS)

    def replay_init(self, init: bytes) -> None:
        """Send the kept INIT message of the kernel to libfuse."""
        self.near.send(init)

    def receive_init_reply(self, read_ahead_bytes: int) -> bytes:
        """Return libfuse's reply to INIT, with our flags and limits. Blocks until the session runs."""
        return adjust_init_reply(self.near.recv(4096), read_ahead_bytes)

    def hand_over(self, device_fd: int) -> None:
        """Make libfuse read the device itself from its next message on (engine pyfuse3).

        dup2 must not happen while libfuse waits in a read of the old descriptor, so it happens inside of a handler: a
        FORGET that only exists for this.
        """
        self.operations.takeover = lambda: self._change_over(device_fd)
        forget = IN_HEADER.pack(IN_HEADER_SIZE + 8, Opcode.FORGET, 0, 1) + bytes(16) + struct.pack("<Q", 0)
        self.near.send(forget)

    def _change_over(self, device_fd: int) -> None:
        os.dup2(device_fd, self._far.fileno(), inheritable=False)


def adjust_init_reply(reply: bytes, read_ahead_bytes: int) -> bytes:
    """Return libfuse's INIT reply with cachefs's own limits.

    max_readahead and max_background go up. AUTO_INVAL_DATA goes: an inode is one object version, its pages are never
    stale, and with the flag a time stamp that a HEAD made more exact would throw them away. READDIRPLUS is always
    wanted.
    """
    if len(reply) < OUT_HEADER_SIZE + INIT_OUT.size:
        return reply
    fields = list(INIT_OUT.unpack_from(reply, OUT_HEADER_SIZE))
    fields[2] = max(fields[2], read_ahead_bytes)
    fields[3] &= ~(FUSE_AUTO_INVAL_DATA | FUSE_READDIRPLUS_AUTO)
    fields[4], fields[5] = MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4
    return reply[:OUT_HEADER_SIZE] + INIT_OUT.pack(*fields) + reply[OUT_HEADER_SIZE + INIT_OUT.size :]
