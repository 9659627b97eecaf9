"""How a mount ends: on command, on a signal, or behind its supervisor's back.

    plain     unmount, unless it is in use
    lazy      if it is in use, detach it: the path is free at once, open files are served until the last is closed
    force     abort the connection: everybody who uses it gets errors
    SIGTERM   plain; if it is in use, say by whom, detach it, and abort it 10 s later (or at the next signal)

A mount that was detached gives the names of its socket and state file free (both get a name apart, usually the
supervisor's pid), so that the directory can be mounted anew at once while the old files are still served.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

from cachefs.mount import mountinfo
from cachefs.mount.control import ControlServer
from cachefs.mount.device import Device
from cachefs.mount.journal import Journal
from cachefs.mount.kernel import MountFailure
from cachefs.mount.loop import Loop
from cachefs.mount.publication import StateFile

EXIT_GRACE_S = 2.0
"""How long a worker may take to end by itself once there is nothing left to serve."""
LINGER_S = 10.0
"""How long open files are served after SIGTERM."""


class Departure:
    """Ends the mount of a supervisor. `finish` is called when nothing is left to serve and a grace time is over."""

    def __init__(
        self,
        loop: Loop,
        journal: Journal,
        device: Device,
        state: StateFile,
        control: ControlServer,
        *,
        finish: Callable[[], None],
        is_serving: Callable[[], bool],
        name_apart: str = "",
    ) -> None:
        """`name_apart`: what tells a detached mount from others of the same name (default: the pid)."""
        self._loop = loop
        self._journal = journal
        self._device = device
        self._state = state
        self._control = control
        self._finish = finish
        self._is_serving = is_serving
        self._name_apart = name_apart or str(os.getpid())
        self._detached = False
        self._terminating = False

    @property
    def begun(self) -> bool:
        """Whether the mount is on its way out."""
        return self._detached or self._terminating

    def close(self) -> None:
        """Nothing is left to end: forget what was meant to happen later."""
        for name in ("linger", "end"):
            self._loop.cancel((self, name))

    def notice(self) -> None:
        """Find out whether somebody else has detached the mount (umount -l)."""
        if not self._detached and not self._device.is_mounted():
            self._become_detached()

    def take_away(self, *, lazy: bool, force: bool) -> bool:
        """Unmount; return whether open files, or other name spaces, still hold it. Raises MountFailure (EBUSY)."""
        if force:
            self.abort()
        try:
            if self._device.is_mounted():
                self._device.unmount()
        except MountFailure as error:
            if error.errno != errno.EBUSY or not (lazy or force):
                raise
            self._device.unmount(detach=True)
        if self._device.is_connected():
            self._become_detached()
            return True
        self._end_soon()
        return False

    def on_signal(self, number: int) -> None:
        """SIGTERM or SIGINT: leave, with regard for open files the first time."""
        name = signal.Signals(number).name
        if self._terminating:
            self._journal.warning(f"{name} again: aborting the connection")
            self.abort()
            return
        self._terminating = True
        self._state.update(state="unmounting")  # at once: an agent that was told to end as well looks who stays
        self._journal.info(f"{name}: unmounting {self._device.mountpoint}")
        try:
            held = self.take_away(lazy=False, force=False)
        except MountFailure as error:
            users = "; ".join(str(holder) for holder in mountinfo.holders(self._device.mountpoint)) or "somebody"
            self._journal.warning(f"{error.text}, held by {users}; open files are served for {LINGER_S:g} s more")
            held = self._detach()
        if held:
            self._loop.after((self, "linger"), LINGER_S, self.abort)

    def _detach(self) -> bool:
        try:
            return self.take_away(lazy=True, force=False)
        except MountFailure as error:
            self._journal.error(error.text)
            return True

    def _become_detached(self) -> None:
        if self._detached:
            return
        self._detached = True
        mount_id = f"{self._state.values['mount_id']}-{self._name_apart}"
        try:
            self._control.rename(mount_id)
        except OSError as error:
            self._journal.warning(f"cannot rename {self._control.path}: {error.strerror}")
        self._state.move(mount_id)
        self._state.update(state="unmounting")
        self._journal.info(f"{self._device.mountpoint} is detached; it is served until its last file is closed")

    def abort(self) -> None:
        """Fail every request, now and later, and end soon."""
        try:
            self._device.abort()
        except MountFailure as error:
            self._journal.warning(f"{error.text}; ending the worker instead")
        self._end_soon()

    def _end_soon(self) -> None:
        """The connection is gone: the worker notices and ends, which ends the supervisor; but not for ever."""
        self._state.update(state="unmounting")
        self._loop.after((self, "end"), EXIT_GRACE_S if self._is_serving() else 0.0, self._finish)
