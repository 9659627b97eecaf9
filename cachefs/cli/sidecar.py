"""`cachefs sidecar`: what the container runs that `cachefs inject` puts into pods.

`cachefs mount --foreground` does the work. The mount is made in a directory that the other containers do not see, and
once it answers it is bound to the place where they do. Three things follow:

* A container that is started again after a crash binds the new mount *over* the dead one. By propagation that arrives
  wherever the dead one is seen, also in containers that run on: they see files again and need not be restarted. (Taking
  the dead one away first would take the way from them.)
* At SIGTERM the place is cleared at once, whoever uses it. kubelet sends it when the other containers are gone; what it
  leaves there would keep the pod from being deleted.
* The files that are still open then are nobody's: the connection is ended instead of served for ten seconds more.

It may be process 1 of the container, and buries what the mount leaves behind.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

import click

from cachefs.cli.output import plain
from cachefs.errors import MountError, UsageError
from cachefs.mount import kernel, mountinfo

CHECK_S = 5.0
POLL_S = 0.1
ABORT_S = 1.0
"""How long the mount may take to end before the rest is taken from whoever holds it."""
END_S = 20.0
MOST_LAYERS = 256
DEFAULT_RUN_DIR = "/run/cachefs"
_MS_BIND = 4096


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]})
@click.option("--check", is_flag=True, help="Only say whether the mount at PLACE answers (exit code 0 or 1).")
@click.option("--run-dir", metavar="DIR", default=DEFAULT_RUN_DIR, help="Directory for sockets, on no shared mount.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SOURCE PLACE [MOUNT OPTIONS]")
def sidecar(words: tuple[str, ...], *, check: bool, run_dir: str) -> int:
    """Mount SOURCE for the other containers of a pod, at PLACE in a volume with Bidirectional propagation.

    Runs until SIGTERM. Options are those of `cachefs mount`. `cachefs inject` writes the container that runs this.
    """
    if check:
        if len(words) != 1:
            raise UsageError("--check needs the place, and nothing else")
        return _check(words[0])
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise UsageError("write: cachefs sidecar SOURCE PLACE [options of cachefs mount]")
    return Sidecar(words[0], words[1], words[2:], run_dir).run()


def _check(place: str) -> int:
    place = mountinfo.canonical(place)
    mount = mountinfo.find_mount(place)
    if mount is None or not mount.is_cachefs:
        click.echo(f"cachefs: nothing is mounted at {plain(place)} yet", err=True)
        return 1
    answer = mountinfo.probe(place, CHECK_S)
    if answer is not mountinfo.Answer.ALIVE:
        click.echo(f"cachefs: the mount at {plain(place)} is {answer.value}", err=True)
        return 1
    return 0


class Sidecar:
    """One mount, from start to end, as the process of a container."""

    def __init__(self, source: str, place: str, options: Sequence[str], run_dir: str) -> None:
        self._source = source
        self._place = mountinfo.canonical(place)
        self._options = options
        self._run_dir = run_dir
        self._told_to_end = False
        self._pid = 0
        self._status: int | None = None

    def run(self) -> int:
        """Serve until SIGTERM; return the exit code. Raises MountError, UsageError."""
        waker, wakes = socket.socketpair()
        for end in (waker, wakes):
            end.setblocking(False)
        with waker, wakes:
            former = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
            kept = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
            kept[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, self._on_signal)
            try:
                own, mountpoint = self._make_directories()
                self._start(own, mountpoint)
                return self._serve(mountpoint, waker)
            finally:
                self._end()
                for number, action in kept.items():
                    signal.signal(number, action)
                signal.set_wakeup_fd(former)

    def _make_directories(self) -> tuple[str, str]:
        """Return a runtime directory that is new with every start (process numbers of a container come again), and an
        empty directory to mount on.
        """
        try:
            os.makedirs(self._run_dir, exist_ok=True)
            own = tempfile.mkdtemp(prefix="s-", dir=self._run_dir)
            mountpoint = f"{own}/mount"
            os.mkdir(mountpoint)
            os.makedirs(os.path.dirname(self._place), exist_ok=True)
        except OSError as error:
            raise MountError(f"{error.filename}: {error.strerror}") from error
        try:
            os.mkdir(self._place, 0o755)
        except FileExistsError:
            pass  # with a dead mount on it, perhaps: it must not be looked at
        except OSError as error:
            raise MountError(f"{self._place}: {error.strerror}") from error
        return own, mountpoint

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._told_to_end = True

    def _start(self, own: str, mountpoint: str) -> None:
        command = [sys.executable, "-m", "cachefs.cli.main", "mount", "--foreground", f"--runtime-dir={own}"]
        # a session of its own: Ctrl-C in a terminal comes to us, and the order in which things end is ours
        child = subprocess.Popen([*command, *self._options, self._source, mountpoint], start_new_session=True)
        self._pid = child.pid
        child.returncode = 0  # buried by `_bury`, like all others

    def _serve(self, mountpoint: str, waker: socket.socket) -> int:
        shown = False
        while not self._told_to_end:
            self._bury()
            if self._status is not None:
                return self._status or 1  # its own words are in the log
            if not shown and self._answers(mountpoint):
                self._show(mountpoint)
                shown = True
            select.select([waker], [], [], None if shown else POLL_S)
            try:
                waker.recv(4096)
            except BlockingIOError:
                pass
        self._clear_place()
        return 0

    def _answers(self, mountpoint: str) -> bool:
        mount = mountinfo.find_mount(mountpoint)
        return mount is not None and mountinfo.probe(mountpoint, CHECK_S) is mountinfo.Answer.ALIVE

    def _show(self, mountpoint: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = ctypes.c_ulong(_MS_BIND)
        if libc.mount(os.fsencode(mountpoint), os.fsencode(self._place), None, flags, None):
            reason = os.strerror(ctypes.get_errno())
            raise MountError(f"the mount cannot be shown at {self._place}: {reason} (the container must be privileged)")
        click.echo(plain(f"cachefs: {self._source} is mounted at {self._place}"), err=True)

    def _clear_place(self) -> None:
        """Take away what is mounted at the place, dead ones of earlier starts included."""
        for _ in range(MOST_LAYERS):
            mount = mountinfo.find_mount(self._place)
            if mount is None or not mount.is_cachefs:
                return
            try:
                kernel.unmount(self._place, detach=True)
            except kernel.MountFailure as error:
                click.echo(f"cachefs: {plain(error.text)}", err=True)
                return

    def _end(self) -> None:
        """End the mount: politely, then whoever holds it, then without it."""
        for number, patience_s in ((signal.SIGTERM, ABORT_S), (signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
            if not self._pid or self._ended_within(0.0):
                return
            try:
                os.kill(self._pid, number)
            except ProcessLookupError:
                pass
            self._ended_within(patience_s)

    def _ended_within(self, patience_s: float) -> bool:
        until = time.monotonic() + patience_s
        self._bury()
        while self._status is None and time.monotonic() < until:
            time.sleep(0.02)
            self._bury()
        return self._status is not None

    def _bury(self) -> None:
        """Collect children that ended, the orphans of the mount as well; note how the mount ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._status = 1 if self._status is None else self._status  # somebody else has buried it
                return
            if not pid:
                return
            if pid == self._pid:
                self._status = os.waitstatus_to_exitcode(status)
