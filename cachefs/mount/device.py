"""The one mount of a supervisor: its device, its first message, and the ways to get rid of it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from cachefs.mount import kernel, mountinfo
from cachefs.mount.journal import Journal


def mount_options(plan: dict[str, Any]) -> kernel.MountOptions:
    """Return what the kernel is told of the mount of a plan."""
    fuse = plan["config"]["fuse"]
    return kernel.MountOptions(
        plan["source"],
        plan["mountpoint"],
        fuse["read_only"],
        fuse["allow_other"] or os.getuid() == 0,
        *(name in plan.get("mount_flags", ()) for name in ("noexec", "noatime")),
    )


def can_resend(plan: dict[str, Any]) -> bool:
    """Return whether requests of a dead worker can be queued again."""
    return kernel.supports_resend() and not plan.get("without_resend", False)


class Device:
    """A mount and the descriptor that keeps it alive.

    With `can_resend` all processes share one descriptor, and so one queue of requests that were taken. Without, the
    descriptor that made the mount goes to the first worker (only there INIT can be answered), later workers get
    clones, and this process keeps a clone: when a worker dies, the kernel fails what it had taken.
    """

    def __init__(self, mountpoint: str, held: int, init: bytes, identity: str, *, can_resend: bool) -> None:
        """Take over the descriptor `held` of a mount that is there. `mount` makes a new one."""
        self.mountpoint = mountpoint
        self.can_resend = can_resend
        self.init = init
        self.identity = identity
        """ "0:52" """
        self._held = held
        self._original = -1
        self._has_place = True

    @classmethod
    def mount(cls, options: kernel.MountOptions, *, can_resend: bool) -> Device:
        """Mount. Raises `kernel.MountFailure`; nothing is left then."""
        held = kernel.mount(options)
        original = -1
        try:
            init = kernel.read_init(held)
            mount = mountinfo.find_mount(options.mountpoint)
            if mount is None or not mount.is_cachefs:
                raise kernel.MountFailure(errno.ENOENT, f"{options.mountpoint} was mounted and is gone again")
            if not can_resend:
                original, held = held, kernel.clone_device(held)
        except OSError as error:
            with contextlib.suppress(OSError):
                kernel.unmount(options.mountpoint, detach=True)
            os.close(held)
            if isinstance(error, kernel.MountFailure):
                raise
            raise kernel.MountFailure(error.errno, f"cannot use {kernel.DEVICE}: {error.strerror}") from error
        made = cls(options.mountpoint, held, init, mount.device, can_resend=can_resend)
        made._original = original
        return made

    @property
    def connection(self) -> int:
        """The number of the FUSE connection below /sys/fs/fuse/connections."""
        return int(self.identity.partition(":")[2])

    @property
    def descriptor(self) -> int:
        """The descriptor that this process keeps."""
        return self._held

    @contextlib.contextmanager
    def lend(self) -> Iterator[int]:
        """Give the descriptor for a new worker, valid until the end of the block."""
        if self.can_resend:
            yield self._held
            return
        lent, self._original = self._original, -1
        if lent < 0:
            lent = kernel.clone_device(self._held)
        try:
            yield lent
        finally:
            os.close(lent)

    def resend(self) -> None:
        """Queue again what the last worker had taken. Raises OSError."""
        if self.can_resend:
            kernel.resend(self._held)

    def set_read_ahead(self, size_bytes: int, journal: Journal) -> None:
        """Let the kernel read ahead so far. Not being allowed to is no reason to fail."""
        try:
            kernel.set_read_ahead(self.identity, size_bytes)
        except OSError as error:
            journal.info(f"the kernel's read-ahead stays as it is ({error.strerror}): sequential reads may be slower")

    def is_connected(self) -> bool:
        """Return False when nothing can ever come from the kernel again."""
        return kernel.is_connected(self._held)

    def is_mounted(self) -> bool:
        """Return whether the mount is at its place (a detached one is not, although it may be served)."""
        if not self._has_place:
            return False
        top = mountinfo.find_mount(self.mountpoint)
        if top is None or top.device == self.identity:
            return top is not None
        return any(
            mount.mountpoint == self.mountpoint and mount.device == self.identity for mount in mountinfo.mounts()
        )

    def unmount(self, *, detach: bool = False) -> None:
        """Take the mount from its place. Raises `kernel.MountFailure`: EBUSY, or EINVAL when it is not on top there."""
        top = mountinfo.find_mount(self.mountpoint) if self._has_place else None
        if top is None or top.device != self.identity:
            raise kernel.MountFailure(
                errno.EINVAL, f"{self.mountpoint} is not mounted any more, or another mount covers it"
            )
        kernel.unmount(self.mountpoint, detach=detach)
        self.leave_place()

    def leave_place(self) -> None:
        """What is mounted at the place from now on is another mount, even with the same number: when this one has
        ended, the kernel gives its number to the next.
        """
        self._has_place = False

    def abort(self) -> None:
        """Fail every request, now and later. Raises `kernel.MountFailure`: then only closing all descriptors helps."""
        try:
            kernel.abort_connection(self.connection)
        except kernel.MountFailure:
            if not (kernel.may_mount() and self.is_mounted()):
                raise
            kernel.unmount(self.mountpoint, detach=True, force=True)

    def close(self) -> None:
        """Give up the device. The last descriptor that closes, here or in a worker, ends the connection."""
        for descriptor in (self._held, self._original):
            if descriptor >= 0:
                os.close(descriptor)
        self._held = self._original = -1
