"""The one mount of a supervisor: its device, its first message, and the ways to get rid of it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from cachefs.mount import kernel, mountinfo
from cachefs.mount.journal import Journal


class Device:
    """A mount and the descriptor that keeps it alive. Makes the mount; raises `kernel.MountFailure`.

    With `can_resend` all processes share one descriptor, and so one queue of requests that were taken. Without, the
    descriptor that made the mount goes to the first worker (only there INIT can be answered), later workers get
    clones, and this process keeps a clone: when a worker dies, the kernel fails what it had taken.
    """

    def __init__(self, options: kernel.MountOptions, *, can_resend: bool) -> None:
        self.mountpoint = options.mountpoint
        self.can_resend = can_resend
        self._held = kernel.mount(options)
        self._original = -1
        try:
            self.init = kernel.read_init(self._held)
            mount = mountinfo.find_mount(self.mountpoint)
            if mount is None or not mount.is_cachefs:
                raise kernel.MountFailure(errno.ENOENT, f"{self.mountpoint} was mounted and is gone again")
            self.identity = mount.device
            """ "0:52" """
            self.connection = mount.connection
            if not can_resend:
                self._original, self._held = self._held, kernel.clone_device(self._held)
        except OSError as error:
            with contextlib.suppress(OSError):
                kernel.unmount(self.mountpoint, detach=True)
            self.close()
            if isinstance(error, kernel.MountFailure):
                raise
            raise kernel.MountFailure(error.errno, f"cannot use {kernel.DEVICE}: {error.strerror}") from error

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
        return any(
            mount.mountpoint == self.mountpoint and mount.device == self.identity for mount in mountinfo.mounts()
        )

    def unmount(self, *, detach: bool = False) -> None:
        """Take the mount from its place. Raises `kernel.MountFailure`: EBUSY, or EINVAL when it is not on top there."""
        top = mountinfo.find_mount(self.mountpoint)
        if top is None or top.device != self.identity:
            raise kernel.MountFailure(
                errno.EINVAL, f"{self.mountpoint} is not mounted any more, or another mount covers it"
            )
        kernel.unmount(self.mountpoint, detach=detach)

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
