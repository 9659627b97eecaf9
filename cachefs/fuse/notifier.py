"""A process that writes notifications to the kernel: from standard input, one after the other, to standard output.

Run as a file (`python -I -S notifier.py`) with the device as standard output; it needs the standard library only.

Why a process: the kernel takes the lock of a directory to expire a name in it, and whoever writes the notification
waits for that lock like somebody in a disk sleep. A LOOKUP that waits for the store holds it. A thread of a worker that
waits there would keep a killed worker from ending, so no other would be started that could answer the LOOKUP: the mount
would hang. A process of its own is nobody's concern: it goes away when the LOOKUP is answered.

Exit code: 0, or the errno of the last notification that the kernel refused. A name that the kernel does not have
(ENOENT) is not refused, it is expired already.
"""

from __future__ import annotations

import errno
import os
import struct
import sys

_LENGTH = struct.Struct("<I")
"""Every message begins with its own length."""
_FINE = frozenset({errno.ENOENT, errno.ENOTDIR})


def main() -> int:
    """Write what comes in. Returns the exit code."""
    messages = sys.stdin.buffer.read()
    refused = start = 0
    while start + _LENGTH.size <= len(messages):
        end = start + max(_LENGTH.unpack_from(messages, start)[0], _LENGTH.size)
        try:
            os.write(sys.stdout.fileno(), messages[start:end])
        except OSError as error:
            if error.errno not in _FINE:
                refused = error.errno or errno.EIO
        start = end
    return refused


if __name__ == "__main__":
    sys.exit(main())
