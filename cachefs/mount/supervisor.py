"""The supervisor: one process per mount that outlives every worker, `python -m cachefs.mount.supervisor`.

It opens /dev/fuse, mounts, keeps the kernel's first message (INIT) and starts a worker, which gets the device and the
message. When the worker dies, readers wait while another one starts; then NOTIFY_RESEND makes the kernel queue again
what the dead one had taken, so nobody sees an error (`cachefs.mount.supervision`). It never touches data, and imports
the standard library only: its anonymous memory stays below 10 MiB. It ends when its one mount does.

Killed with -9 itself, it takes nothing along: the worker holds the device too, goes on serving and ends when somebody
unmounts; only the restart is lost. Kernels before 6.9 have no RESEND: there every worker gets a device queue of its
own (`kernel.clone_device`), and the requests that it had taken fail with it, instead of hanging for ever.
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import signal
import sys
from typing import Any

from cachefs.mount import kernel, mountinfo
from cachefs.mount.device import Device, can_resend, mount_options
from cachefs.mount.journal import LOG_CHECK_S, Journal, shorten_stderr
from cachefs.mount.loop import Loop
from cachefs.mount.publication import ReadyLine
from cachefs.mount.supervision import Supervision
from cachefs.mount.surroundings import Surroundings
from cachefs.mount.worker_link import Worker
from cachefs.runtime import RuntimeDir


class Supervisor:
    """One supervision, with a loop and a process of its own."""

    def __init__(self, plan: dict[str, Any], ready: ReadyLine, journal: Journal) -> None:
        self._plan = plan
        self._ready = ready
        self._journal = journal
        self._loop = Loop(journal)
        self._runtime = RuntimeDir(plan["runtime_dir"])
        self._supervision: Supervision
        self._exit_code: int | None = None

    def run(self) -> int:
        """Mount, serve, and return the exit code when the mount is gone."""
        self._loop.catch_signals(
            (signal.SIGTERM, signal.SIGINT), lambda number: self._supervision.departure.on_signal(number)
        )
        try:
            self._supervision = self._mount()
        except OSError as error:
            self._ready.fail("MountError", error.strerror or str(error))
            return 1
        self._supervision.begin()
        if self._plan.get("log_file", "").startswith(f"{self._runtime.path}/"):
            self._shorten_log()
        if self._exit_code is None:
            self._loop.run()
        self._supervision.close()
        self._journal.info(f"{self._plan['mountpoint']} is unmounted, the supervisor ends")
        return self._exit_code or 0

    def _mount(self) -> Supervision:
        options = mount_options(self._plan)
        there = mountinfo.find_mount(options.mountpoint)
        if there is not None and there.is_cachefs:
            raise kernel.MountFailure(errno.EBUSY, f"{options.mountpoint} is already mounted: {there.source}")
        resends = can_resend(self._plan)
        if not resends:
            self._journal.warning("no RESEND before Linux 6.9: when a worker dies, the requests it was answering fail")
        device = Device.mount(options, can_resend=resends)
        make_worker = functools.partial(Worker, self._loop, self._journal)
        around = Surroundings(self._loop, self._journal, self._runtime, make_worker)
        try:
            return Supervision(self._plan, device, around, self._ready, self._finish)
        except kernel.MountFailure:
            device.unmount(detach=True)
            device.close()
            raise

    def _shorten_log(self) -> None:
        """Bound our own log file, which lies in memory (/run) on most systems; other files belong to who named them."""
        shorten_stderr()
        self._loop.after("log", LOG_CHECK_S, self._shorten_log)

    def _finish(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._loop.stop()


def main() -> int:
    """Read the plan from stdin, mount and serve."""
    parser = argparse.ArgumentParser(prog="cachefs.mount.supervisor")
    parser.add_argument("--ready-fd", type=int, default=-1)
    parser.add_argument("label", nargs="?", help="shown by ps")
    arguments = parser.parse_args()
    plan = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if arguments.ready_fd >= 0:
        os.set_inheritable(arguments.ready_fd, False)
    os.chdir("/")
    os.umask(0o077)
    for number in (signal.SIGPIPE, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log = plan["config"]["log"]
    journal = Journal(log["log_level"], log["log_format"] == "json")
    ready = ReadyLine(arguments.ready_fd, journal)
    try:
        return Supervisor(plan, ready, journal).run()
    except OSError as error:
        ready.fail("MountError", f"{error.filename or 'supervisor'}: {error.strerror or error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
