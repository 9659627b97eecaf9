"""The kernel's side of a mount: mount(2), umount2(2), /dev/fuse, and the few messages that a supervisor needs.

Standard library only (`cachefs.fuse.protocol` is so too). Root (CAP_SYS_ADMIN) makes system calls; everybody else goes
through the set-user-id program `fusermount3`, which hands over the opened device through a socket (_FUSE_COMMFD).

Nothing in here opens, stats or lists anything below a mount point: with its worker dead, that would wait for ever.
All failures are `MountFailure`, an OSError with a sentence for a person.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import subprocess
from typing import NamedTuple

from cachefs.fuse.protocol import IN_HEADER, NOTIFY_RESEND, OUT_HEADER, UNANSWERED, Opcode, error_reply

DEVICE = "/dev/fuse"
FSTYPE = "fuse.cachefs"

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 1, 2, 4, 8, 1024
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8
_CAP_SYS_ADMIN = 21
_FUSE_DEV_IOC_CLONE = 0x8004E500
_RESEND_SINCE = (6, 9)
_INIT_BUFFER_BYTES = 64 << 10
_REQUEST_BUFFER_BYTES = 17 << 20
_ANSWERS_PER_TURN = 256
_FUSERMOUNT_S = 30.0


class MountFailure(OSError):
    """The kernel (or fusermount3) refused. `errno` is the reason, `text` a sentence for a person."""

    @property
    def text(self) -> str:
        """The sentence."""
        return self.strerror or str(self)


class MountOptions(NamedTuple):
    """What mount(2) is told."""

    source: str
    """Shown in the first column of /proc/mounts: "s3://bucket/prefix"."""
    mountpoint: str
    read_only: bool
    allow_other: bool
    noexec: bool = False
    noatime: bool = False


# -- rights -----------------------------------------------------------------------------------------------------------


def may_mount() -> bool:
    """Return whether this process has CAP_SYS_ADMIN, so that it can mount and unmount without fusermount3."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def find_fusermount() -> str | None:
    """Return the path of fusermount3, or None."""
    for directory in [*os.get_exec_path(), "/usr/bin", "/bin"]:
        path = f"{directory}/fusermount3"
        if os.access(path, os.X_OK):
            return path
    return None


def open_device() -> int:
    """Open /dev/fuse. Raises MountFailure with the remedy."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        remedy = {
            errno.ENOENT: "load the kernel module (modprobe fuse), or give the container the device",
            errno.ENODEV: "load the kernel module (modprobe fuse)",
            errno.ENXIO: "load the kernel module (modprobe fuse)",
            errno.EACCES: "run as root, or allow it with: chmod 666 /dev/fuse",
            errno.EPERM: "the container needs the device (docker run --device /dev/fuse --cap-add SYS_ADMIN)",
        }.get(error.errno or 0, "see dmesg")
        raise MountFailure(error.errno, f"cannot open {DEVICE}: {error.strerror}: {remedy}") from error


def check_rights() -> None:
    """Check that a mount can be made at all, before anything is started for it. Raises MountFailure."""
    os.close(open_device())  # fusermount3 opens it with the rights of its caller, too
    if not may_mount() and find_fusermount() is None:
        raise MountFailure(errno.EPERM, "mounting needs root, or the program fusermount3 (Debian package fuse3)")


# -- mount and unmount ------------------------------------------------------------------------------------------------


def mount(options: MountOptions) -> int:
    """Mount and return the descriptor of /dev/fuse that serves it (close-on-exec). Raises MountFailure."""
    return _mount_directly(options) if may_mount() else _mount_through_fusermount(options)


def _mount_directly(options: MountOptions) -> int:
    device = open_device()
    words = [
        f"fd={device}",
        "rootmode=40000",
        f"user_id={os.getuid()}",
        f"group_id={os.getgid()}",
        "default_permissions",
    ]
    if options.allow_other:
        words.append("allow_other")
    flags = _MS_NOSUID | _MS_NODEV
    for wanted, flag in (
        (options.read_only, _MS_RDONLY),
        (options.noexec, _MS_NOEXEC),
        (options.noatime, _MS_NOATIME),
    ):
        flags |= flag if wanted else 0
    result = _libc().mount(
        os.fsencode(options.source),
        os.fsencode(options.mountpoint),
        FSTYPE.encode(),
        ctypes.c_ulong(flags),
        ",".join(words).encode(),
    )
    if result:
        code = ctypes.get_errno()
        os.close(device)
        raise MountFailure(code, f"cannot mount on {options.mountpoint}: {os.strerror(code)}")
    return device


def _mount_through_fusermount(options: MountOptions) -> int:
    program = find_fusermount()
    if program is None:
        raise MountFailure(errno.EPERM, "mounting needs root, or the program fusermount3 (Debian package fuse3)")
    name = options.source.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={name}", "subtype=cachefs", "nosuid", "nodev", "default_permissions"]
    words.append("ro" if options.read_only else "rw")
    words += [name for name in ("allow_other", "noexec", "noatime") if getattr(options, name)]
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = subprocess.Popen(
                [program, "-o", ",".join(words), "--", options.mountpoint],
                env={"PATH": os.defpath, "LC_ALL": "C", "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        try:
            ours.settimeout(_FUSERMOUNT_S)
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
            _, complaint = child.communicate(timeout=_FUSERMOUNT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            child.kill()
            child.communicate()
            raise MountFailure(errno.EIO, f"fusermount3 did not answer: {error}") from error
    if not descriptors:
        reason = _last_line(complaint) or f"fusermount3 failed with exit code {child.returncode}"
        raise MountFailure(errno.EPERM, f"cannot mount on {options.mountpoint}: {reason}")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def unmount(mountpoint: str, *, detach: bool = False, force: bool = False) -> None:
    """Take the topmost mount at `mountpoint` away, without touching it.

    `detach`: now from the name space, the rest when its last file is closed. `force` aborts the connection as well
    (needs CAP_SYS_ADMIN; others use `abort_connection`). Raises MountFailure: EBUSY in use, EINVAL not a mount,
    EPERM.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0) | (_MNT_FORCE if force else 0)
    if may_mount():
        if _libc().umount2(os.fsencode(mountpoint), flags):
            code = ctypes.get_errno()
            raise MountFailure(code, f"cannot unmount {mountpoint}: {os.strerror(code)}")
        return
    program = find_fusermount()
    if program is None:
        raise MountFailure(errno.EPERM, "unmounting needs root, or the program fusermount3 (Debian package fuse3)")
    try:
        result = subprocess.run(
            [program, "-u", *(["-z"] if detach else []), "--", mountpoint],
            env={"PATH": os.defpath, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_FUSERMOUNT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountFailure(errno.EIO, f"fusermount3 did not answer: {error}") from error
    if result.returncode:
        # the only way to learn its reason is its text, which LC_ALL=C keeps in English
        busy = b"busy" in result.stderr.lower()
        reason = _last_line(result.stderr) or f"fusermount3 failed with exit code {result.returncode}"
        raise MountFailure(errno.EBUSY if busy else errno.EPERM, f"cannot unmount {mountpoint}: {reason}")


def abort_connection(connection: int) -> None:
    """End FUSE connection `connection` (the minor number of the mount's device): all its requests fail, now and later.

    Works for detached mounts too. Raises MountFailure.
    """
    control = f"/sys/fs/fuse/connections/{connection}/abort"
    try:
        _write(control, b"1")
    except FileNotFoundError as error:
        if not may_mount():
            raise MountFailure(errno.ENOENT, f"{control} does not exist (fusectl is not mounted)") from error
        _abort_through_own_fusectl(connection)
    except OSError as error:
        raise MountFailure(error.errno, f"cannot abort the connection: {control}: {error.strerror}") from error


def _abort_through_own_fusectl(connection: int) -> None:
    """Mount the fusectl file system at a private place for a moment: minimal containers have none."""
    import tempfile  # rarely needed, and its imports are worth 1 MiB of the supervisor

    directory = tempfile.mkdtemp(prefix="cachefs-fusectl-")
    try:
        if _libc().mount(b"fusectl", os.fsencode(directory), b"fusectl", ctypes.c_ulong(0), None):
            code = ctypes.get_errno()
            raise MountFailure(code, f"cannot abort the connection: mounting fusectl: {os.strerror(code)}")
        try:
            _write(f"{directory}/{connection}/abort", b"1")
        except OSError as error:
            raise MountFailure(error.errno, f"cannot abort connection {connection}: {error.strerror}") from error
        finally:
            _libc().umount2(os.fsencode(directory), _MNT_DETACH)
    finally:
        os.rmdir(directory)


def set_read_ahead(device: str, size_bytes: int) -> None:
    """Set the kernel's read-ahead for the mount on `device` ("0:52"), after INIT, which resets it. Raises OSError."""
    _write(f"/sys/class/bdi/{device}/read_ahead_kb", str(max(size_bytes, 0) >> 10).encode())


# -- the device -------------------------------------------------------------------------------------------------------


def supports_resend(release: str | None = None) -> bool:
    """Return whether the kernel can queue again what a dead worker had taken (6.9 and newer)."""
    numbers = (release or os.uname().release).split("-")[0].split(".")
    try:
        return (int(numbers[0]), int(numbers[1])) >= _RESEND_SINCE
    except (IndexError, ValueError):
        return False


def read_init(device: int) -> bytes:
    """Read the first message of a new mount, which is INIT and already waits there. Raises MountFailure."""
    message = os.read(device, _INIT_BUFFER_BYTES)
    if len(message) < IN_HEADER.size or IN_HEADER.unpack_from(message)[1] != Opcode.INIT:
        raise MountFailure(
            errno.EPROTO, f"the first message of {DEVICE} is not INIT: this kernel speaks another protocol"
        )
    return message


def clone_device(device: int) -> int:
    """Return a second descriptor of the same connection with a queue of its own for requests that were taken.

    When its last holder dies, the kernel fails exactly these requests (ECONNABORTED) instead of keeping them for
    ever: what kernels without NOTIFY_RESEND need. Raises OSError.
    """
    other = open_device()
    try:
        fcntl.ioctl(other, _FUSE_DEV_IOC_CLONE, struct.pack("I", device))
    except OSError:
        os.close(other)
        raise
    return other


def is_connected(device: int) -> bool:
    """Return False when the mount behind `device` is gone (unmounted everywhere, or aborted). Never waits."""
    poll = select.poll()
    poll.register(device, 0)
    return not poll.poll(0)


def resend(device: int) -> None:
    """Have the kernel queue again every request that was read from this connection and not answered. Raises OSError."""
    os.write(device, OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0))


class Refuser:
    """Answers requests with EIO, for a mount that has no worker any more.

    The buffer must be as large as the largest request that the kernel might send, but only touched pages of it cost
    memory.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._buffer = mmap.mmap(-1, _REQUEST_BUFFER_BYTES)
        self.answered = 0
        """How many requests were refused."""
        os.set_blocking(device, False)

    def close(self) -> None:
        """Stop, and make the device blocking again, as workers expect it."""
        os.set_blocking(self._device, True)
        self._buffer.close()

    def refuse_waiting(self) -> bool:
        """Refuse what waits now (at most a few hundred requests). Returns False when the mount is gone."""
        for _ in range(_ANSWERS_PER_TURN):
            try:
                os.readv(self._device, [self._buffer])
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # the request was interrupted before it was taken
                    continue
                return False
            _, opcode, unique, _ = IN_HEADER.unpack_from(self._buffer)
            if opcode not in UNANSWERED:
                self._refuse(unique)
        return True

    def _refuse(self, unique: int) -> None:
        try:
            os.write(self._device, error_reply(unique, errno.EIO))
            self.answered += 1
        except OSError:
            pass  # its reader was interrupted in the meantime, or the mount is gone (the next read says so)


# -- small parts ------------------------------------------------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _write(path: str, text: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


def _last_line(raw: bytes) -> str:
    lines = raw.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
