"""Tells the kernel that it has to ask again for names that it trusts.

The kernel keeps a name for as long as the answer to its LOOKUP said. Two things make it wrong before that:

* The store no longer has the version that a name led to. Whoever reads it gets ESTALE and opens the name again, and
  must find the new version then: `let_go` ends the time of that one name.
* The metadata begins anew, with other inode numbers: `let_go_of_all`. One message where the kernel knows it (Linux 6.16
  and later), which costs the kernel's pages of all files that nobody has open. On other kernels the names at the top of
  the mount are expired: the next walk finds other inodes there and drops everything below.

Expiring one name may wait for a lock of the kernel (`cachefs.fuse.notifier` says which), so it happens in a process of
its own, and nobody waits longer than `PATIENCE_S` for it.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import trio

from cachefs import errors
from cachefs.fuse import notifier
from cachefs.fuse.protocol import UNMOUNTED, all_names_expired, name_expired
from cachefs.types import ROOT_INO, Ino
from metadata.store import MetadataReader

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
MAX_AT_ONCE = 2
"""Notifiers at a time; each is a Python process of some 10 ms."""
MAX_REMEMBERED = 4096
MAX_TOP_NAMES = 10_000
"""What a kernel that cannot forget all at once is told to ask for again: 20 ms, if it has them all."""
_NOTIFIER = (sys.executable, "-I", "-S", str(Path(notifier.__file__)))


class KernelNames:
    """The kernel's names of one mount. Used by the trio thread."""

    def __init__(self, device_fd: int, names: MetadataReader) -> None:
        self._device = device_fd
        self._names = names
        self._threads = trio.CapacityLimiter(MAX_AT_ONCE)
        self._top: list[bytes] = []
        self._let_go: dict[Ino, trio.Event] = {}
        """Inodes whose names were expired, or are about to be: an inode that lost its name never gets it back."""

    async def let_go(self, ino: Ino) -> None:
        """Expire the name of a file, if it leads to another version now. Never raises.

        Returns when the kernel asks for the name again, or after `PATIENCE_S`; the expiry goes on then.
        """
        place = self._lost_name(ino)
        if place is None:
            return
        with trio.move_on_after(PATIENCE_S):
            if (expired := self._let_go.get(ino)) is not None:
                await expired.wait()
            else:
                await self._expire(ino, name_expired(*place))

    async def _expire(self, ino: Ino, message: bytes) -> None:
        begun = False

        def notify() -> None:
            nonlocal begun
            begun = True
            self._notify(message)

        if len(self._let_go) >= MAX_REMEMBERED:
            self._let_go.clear()
        self._let_go[ino] = expired = trio.Event()
        try:
            await trio.to_thread.run_sync(notify, abandon_on_cancel=True, limiter=self._threads)
        finally:
            expired.set()
            if not begun:  # all threads wait for the kernel: the next read tries again
                self._let_go.pop(ino, None)

    def _lost_name(self, ino: Ino) -> tuple[Ino, bytes] | None:
        try:
            inode = self._names.inode(ino)
            if inode is None:
                return None
            now = self._names.dentry(inode.parent, inode.name)
        except errors.StorageUnavailable:
            return None
        return None if now is not None and now.ino == ino else (inode.parent, inode.name)

    def note_top(self) -> None:
        """Remember which names the kernel may have at the top, before the metadata that knows them is left. BLOCKS."""
        try:
            self._top = self._names.names_in(ROOT_INO, MAX_TOP_NAMES)
        except errors.StorageUnavailable:
            self._top = []

    async def let_go_of_all(self) -> None:
        """Make the kernel look up every name again. Never raises; returns after `PATIENCE_S` at the latest.

        It must not wait for longer: what the kernel waits for may be a LOOKUP that only the caller can answer.
        """
        with trio.move_on_after(PATIENCE_S):
            await trio.to_thread.run_sync(self._notify_of_all, abandon_on_cancel=True)

    def _notify_of_all(self) -> None:
        try:
            os.write(self._device, all_names_expired())
        except OSError as error:
            if error.errno == errno.EINVAL:  # this kernel does not know it
                if self._top:
                    self._notify(b"".join(name_expired(ROOT_INO, name) for name in self._top))
            elif error.errno not in UNMOUNTED:
                log.warning("the kernel keeps its names: %s", error)

    def _notify(self, messages: bytes) -> None:
        """Have notifications written. BLOCKS for as long as the kernel likes."""
        try:
            done = subprocess.run(
                _NOTIFIER, input=messages, stdout=self._device, stderr=subprocess.DEVNULL, check=False
            )
        except OSError as error:
            log.warning("the kernel keeps names of files that changed: no notifier can be started: %s", error)
            return
        if done.returncode not in (0, *UNMOUNTED):
            log.warning("the kernel keeps names of files that changed (notifier: exit code %d)", done.returncode)
