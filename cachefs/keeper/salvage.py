"""Takes the device of a mount from a worker that has outlived its keeper: root may open the descriptors of others.

So a keeper that was restarted has its mounts back before the node service has even noticed, and on a machine without
containers also when that was killed with it.
"""

from __future__ import annotations

import ctypes
import os
import stat

from cachefs.mount import kernel, registry

_SYS_PIDFD_GETFD = 438
"""The same number on all architectures."""
_OPTION = b"--device-fd"


def device_of(worker_pid: int) -> tuple[int, int] | None:
    """Return the device of a worker and a pidfd of it, both the caller's; None when there is no such worker, or it
    cannot be opened (not root, other name spaces). What the device belongs to has to be checked.
    """
    if worker_pid <= 0:
        return None
    try:
        pidfd = os.pidfd_open(worker_pid)
    except OSError:
        return None
    number = _device_number(registry.command_line(worker_pid))  # after pidfd_open: it is of the same process
    device = -1 if number is None else _take(pidfd, number)
    if device < 0:
        os.close(pidfd)
        return None
    return device, pidfd


def is_device_of(descriptor: int, identity: str) -> bool:
    """Whether a descriptor is /dev/fuse, and of this connection as far as the kernel says so."""
    try:
        status, device = os.fstat(descriptor), os.stat(kernel.DEVICE)
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != device.st_rdev:
            return False
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
            words = dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)
    except OSError:
        return False
    connection = words.get("fuse_connection", "").strip()
    return not connection or connection == identity.partition(":")[2]


def _device_number(words: list[bytes]) -> int | None:
    try:
        return int(words[words.index(_OPTION) + 1])
    except (ValueError, IndexError):
        return None


def _take(pidfd: int, number: int) -> int:
    """Return a duplicate of another process' descriptor (close-on-exec), -1 when that is not allowed."""
    return int(ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
