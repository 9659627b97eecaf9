"""The supervisor: one process per mount that outlives every worker, `python -m cachefs.mount.supervisor`.

It opens /dev/fuse, mounts, keeps the kernel's first message (INIT) and starts a worker, which gets the device and the
message. When the worker dies, readers wait while another one starts; then NOTIFY_RESEND makes the kernel queue again
what the dead one had taken, so nobody sees an error. It never touches data, and imports the standard library only:
its anonymous memory stays below 10 MiB.

States (the state file and `cachefs status` show them):

    starting     mounted, no worker has served yet; any failure ends the mount and is reported through --ready-fd
    serving      a worker takes requests
    restarting   the worker died, and the next one is on its way
    failed       five crashes within a minute: every request is answered with EIO, until `cachefs upgrade`
    unmounting   on its way out; a detached mount still serves files that are open

INVARIANTS
* It holds nothing on its own mount: no descriptor, no working directory. With the worker dead, even the closing of an
  inherited descriptor would wait for ever.
* At most one worker takes requests. The next one gets "go" only after the death of the last was seen, and after RESEND.
* INIT is answered once: workers are told `first` until one has reported "init-answered".
* It ends only when the connection is gone, and leaves no mount, worker, socket or state file behind.

Killed with -9 itself, it takes nothing along: the worker holds the device too, goes on serving and ends when somebody
unmounts; only the restart is lost. Kernels before 6.9 have no RESEND: there every worker gets a device queue of its
own (`kernel.clone_device`), and the requests that it had taken fail with it, instead of hanging for ever.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
from typing import Any

from cachefs.mount import kernel, mountinfo
from cachefs.mount.control import Caller, ControlServer
from cachefs.mount.crashes import CrashHistory
from cachefs.mount.departure import Departure
from cachefs.mount.device import Device
from cachefs.mount.journal import LOG_CHECK_S, Journal, shorten_stderr
from cachefs.mount.loop import Loop
from cachefs.mount.publication import ReadyLine, StateFile
from cachefs.mount.worker_link import Launch, Software, Worker
from cachefs.runtime import RuntimeDir

FATAL_GRACE_S = 2.0
"""How long a worker may take to end after it has reported why it cannot serve."""


class Supervisor:
    """The state machine. Everything happens in callbacks of one loop; nothing waits.

    INVARIANT: `_worker` is the only one that has, or is next to get, the right to take requests; `_candidate` is the
    worker of an upgrade until the moment when it replaces `_worker`.
    """

    def __init__(self, plan: dict[str, Any], ready: ReadyLine, journal: Journal) -> None:
        self._plan = plan
        self._ready = ready
        self._journal = journal
        self._loop = Loop(journal)
        self._runtime = RuntimeDir(plan["runtime_dir"])
        self._state = StateFile(self._runtime, plan, journal)
        self._software = Software(plan["python"], None, plan["version"])
        self._crashes = CrashHistory()
        self._limit_s = float(plan["config"]["fuse"]["ready_timeout_s"])
        self._device: Device
        self._control: ControlServer
        self._departure: Departure
        self._worker: Worker | None = None
        self._candidate: Worker | None = None
        self._upgrade: tuple[Software, Caller] | None = None
        self._refuser: kernel.Refuser | None = None
        self._init_answered = False
        self._attached: dict[str, Any] | None = None
        """What the last worker was attached to: the next one can begin with it while there is no agent."""
        self._exit_code: int | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Mount, serve, and return the exit code when the mount is gone."""
        fuse = self._plan["config"]["fuse"]
        options = kernel.MountOptions(
            self._plan["source"],
            self._plan["mountpoint"],
            fuse["read_only"],
            fuse["allow_other"] or os.getuid() == 0,
            *(name in self._plan.get("mount_flags", ()) for name in ("noexec", "noatime")),
        )
        self._loop.catch_signals((signal.SIGTERM, signal.SIGINT), lambda number: self._departure.on_signal(number))
        try:
            self._mount(options)
        except OSError as error:
            self._ready.fail("MountError", error.strerror or str(error))
            return 1
        self._start_worker()
        if self._plan.get("log_file", "").startswith(f"{self._runtime.path}/"):
            self._shorten_log()
        if self._exit_code is None:
            self._loop.run()
        self._clean_up()
        self._control.close()
        self._state.remove()
        self._journal.info(f"{self._device.mountpoint} is unmounted, the supervisor ends")
        return self._exit_code or 0

    def _mount(self, options: kernel.MountOptions) -> None:
        there = mountinfo.find_mount(options.mountpoint)
        if there is not None and there.is_cachefs:
            raise kernel.MountFailure(errno.EBUSY, f"{options.mountpoint} is already mounted: {there.source}")
        can_resend = kernel.supports_resend() and not self._plan.get("without_resend", False)
        if not can_resend:
            self._journal.warning("no RESEND before Linux 6.9: when a worker dies, the requests it was answering fail")
        self._device = Device(options, can_resend=can_resend)
        try:
            self._control = ControlServer(self._runtime.mount(self._plan["mount_id"], "sock"), self._loop, self._serve)
        except OSError as error:
            self._device.unmount(detach=True)
            self._device.close()
            text = f"cannot listen below {self._runtime.path}: {error.strerror or error}"
            raise kernel.MountFailure(error.errno, text) from error
        self._departure = Departure(
            self._loop,
            self._journal,
            self._device,
            self._state,
            self._control,
            finish=lambda: self._finish(0),
            is_serving=lambda: self._worker is not None and self._worker.started,
        )
        self._state.update(connection=self._device.connection)

    def _shorten_log(self) -> None:
        """Bound our own log file, which lies in memory (/run) on most systems; other files belong to who named them."""
        shorten_stderr()
        self._loop.after("log", LOG_CHECK_S, self._shorten_log)

    def _finish(self, exit_code: int) -> None:
        if self._exit_code is None:
            self._exit_code = exit_code
            self._loop.stop()

    def _clean_up(self) -> None:
        """Leave nothing behind: no worker, no mount (a dead one, after an abort, included), no connection."""
        if not self._ready.sent:
            self._ready.fail("MountError", f"{self._device.mountpoint} was unmounted while it was being mounted")
        for worker in (self._worker, self._candidate):
            if worker is not None:
                worker.end()
        try:
            if self._device.is_mounted():
                self._device.unmount(detach=True)
        except OSError as error:
            self._journal.warning(f"cannot unmount {self._device.mountpoint}: {error.strerror}")
        self._device.close()

    # -- workers ------------------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        if self._worker is not None or self._candidate is not None or self._exit_code is not None:
            return  # the worker of an upgrade was faster than the timer of a restart
        try:
            self._worker = self._spawn(self._software, self._attached if self._init_answered else None)
        except OSError as error:
            self._crashed(f"a worker cannot be started: {error}", final=True)
            return
        self._state.update(worker_pid=self._worker.pid)

    def _spawn(self, software: Software, attached: dict[str, Any] | None) -> Worker:
        extra = {
            "init": self._device.init.hex(),
            "first": not self._init_answered,
            "crashes": self._crashes.recent(time.monotonic()),
            "attached": attached,
            "connection": self._device.connection,
            "supervisor_pid": os.getpid(),
        }
        command = self._plan.get("worker_argv") or [software.python, "-m", "cachefs.mount.worker"]
        with self._device.lend() as device:
            launch = Launch(command, software.environment, {**self._plan, **extra}, device)
            worker = Worker(self._loop, self._journal, launch, self._on_event, self._on_exit)
        self._loop.after(worker, self._limit_s, lambda: self._too_slow(worker))
        return worker

    def _too_slow(self, worker: Worker) -> None:
        worker.fatal = worker.fatal or ("MountError", f"the worker was not ready within {self._limit_s:g} s")
        worker.kill()

    def _on_event(self, worker: Worker, event: dict[str, Any]) -> None:
        name = event["event"]
        if name == "prepared":
            worker.prepared = True
            self._hand_over()
        elif name == "init-answered":
            self._init_answered = True
            self._device.set_read_ahead(int(self._plan["config"]["fuse"]["read_ahead_bytes"]), self._journal)
        elif name == "serving":
            self._is_serving(worker, event)
        elif name == "agent":
            self._attached = event.get("attached", self._attached)
            self._state.update(agent_pid=event.get("agent_pid"))
        elif name == "hung":
            self._state.update(state="unmounting" if self._departure.begun else "restarting")
        elif name == "guard":
            self._state.update(guard_held=bool(event.get("held")))
        elif name == "fatal":
            worker.fatal = (str(event.get("kind", "MountError")), str(event.get("text", "no reason given")))
            self._loop.after(worker, FATAL_GRACE_S, worker.kill)
        elif name != "unmounted":  # its exit follows, and then the device says whether that is true
            self._journal.debug(f"worker {worker.pid} reports {name!r}, which this version does not know")

    def _hand_over(self) -> None:
        """Give the right to take requests to a worker that waits for it, once nobody else can have it."""
        if self._candidate is not None and self._candidate.prepared:
            if self._worker is not None:
                self._worker.kill()  # its exit leads back to here
                return
            self._worker, self._candidate = self._candidate, None
            self._crashes.clear()
        worker = self._worker
        if worker is None or not worker.prepared or worker.started:
            return
        self._leave_failed()
        if self._init_answered:
            self._resend()
        worker.go()

    def _is_serving(self, worker: Worker, event: dict[str, Any]) -> None:
        if worker is not self._worker:
            return
        self._loop.cancel(worker)
        if self._upgrade is not None and self._candidate is None:
            self._software, caller = self._upgrade
            self._upgrade = None
            self._loop.after(caller, 0, lambda: caller.answer({"ok": True, "version": self._software.version}))
        version = str(event.get("version", self._software.version))  # its own word: files may change under a path
        self._software = self._software._replace(version=version)
        self._state.update(
            state="unmounting" if self._departure.begun else "serving",
            worker_pid=worker.pid,
            agent_pid=event.get("agent_pid", self._state.values["agent_pid"]),
            version=version,
        )
        self._journal.info(f"{self._device.mountpoint} is served by worker {worker.pid}, version {version}")
        self._ready.succeed()

    def _on_exit(self, worker: Worker) -> None:
        self._loop.cancel(worker)
        if worker is self._candidate:
            self._candidate = None
            self._refuse_upgrade(worker.what_happened())
            if self._worker is None and self._refuser is None:
                self._start_worker()
            return
        self._worker = None
        if not self._device.is_connected():
            self._finish(0)
        elif self._candidate is not None and self._candidate.prepared:
            self._hand_over()
        else:
            if worker.started and self._candidate is None:
                self._refuse_upgrade(worker.what_happened())
            self._crashed(
                worker.what_happened(), final=worker.fatal is not None or not worker.was_killed, worker=worker
            )

    def _crashed(self, what: str, *, final: bool, worker: Worker | None = None) -> None:
        """Go on after the death of the worker. `final`: at the first start, trying again would not help."""
        if not self._ready.sent and (final or not (self._init_answered or self._device.can_resend)):
            kind, text = (
                worker.fatal if worker is not None and worker.fatal else ("MountError", f"the worker ended: {what}")
            )
            self._fail_start(kind, text)
            return
        self._state.values["last_crash"] = {"at": time.time(), "what": what}
        delay_s = self._crashes.record(time.monotonic())
        if delay_s is None:
            self._too_many_crashes(what)
            return
        self._journal.warning(f"worker {worker.pid if worker else '-'} died ({what}); starting another")
        self._state.values["restarts"] += 1
        if delay_s:
            self._loop.after("restart", delay_s, self._start_worker)
        else:
            self._start_worker()
        self._state.update(state="unmounting" if self._departure.begun else "restarting")

    def _fail_start(self, kind: str, text: str) -> None:
        self._ready.fail(kind, text)
        self._finish(1)

    # -- the failed state ---------------------------------------------------------------------------------------------

    def _too_many_crashes(self, what: str) -> None:
        if not self._ready.sent:
            self._fail_start("MountError", f"the worker died again and again: {what}")
            return
        directory = self._device.mountpoint
        self._journal.error(
            f"{directory}: too many crashes, giving up; the last: {what}. Every access now fails with EIO. "
            f"Get out with `cachefs upgrade {directory}` (starts a worker again) or `cachefs umount {directory}`"
        )
        self._resend()
        self._refuser = kernel.Refuser(self._device.descriptor)
        self._loop.watch(self._device.descriptor, self._refuse)
        self._state.update(state="failed", worker_pid=None)

    def _refuse(self) -> None:
        if self._refuser is not None and not self._refuser.refuse_waiting():
            self._finish(0)

    def _leave_failed(self) -> None:
        if self._refuser is not None:
            self._loop.unwatch(self._device.descriptor)
            self._journal.info(f"{self._refuser.answered} requests were refused meanwhile")
            self._refuser.close()
            self._refuser = None

    def _resend(self) -> None:
        try:
            self._device.resend()
        except OSError as error:
            self._journal.warning(f"requests in flight are lost: the kernel refused to resend them: {error.strerror}")

    # -- commands ----------------------------------------------------------------------------------------

    def _serve(self, request: dict[str, Any], caller: Caller) -> None:
        command = request.get("command")
        if command == "status":
            self._departure.notice()
            caller.answer({"ok": True, "status": self._state.values})
        elif command == "upgrade":
            self._start_upgrade(request, caller)
        elif command == "unmount":
            try:
                detached = self._departure.take_away(lazy=bool(request.get("lazy")), force=bool(request.get("force")))
            except kernel.MountFailure as error:
                caller.fail("busy" if error.errno == errno.EBUSY else "MountError", error.text)
            else:
                caller.answer({"ok": True, "detached": detached})
        else:
            caller.fail("usage", f"unknown command {command!r}")

    def _start_upgrade(self, request: dict[str, Any], caller: Caller) -> None:
        if self._upgrade is not None:
            caller.fail("busy", "another upgrade is running")
        elif not self._ready.sent or self._exit_code is not None:
            caller.fail("busy", "the mount is starting or ending")
        else:
            try:
                software = self._software.replaced_by(request)
                self._candidate = self._spawn(software, None)
            except (OSError, ValueError) as error:
                caller.fail("MountError", f"the new worker cannot be started: {error}")
            else:
                self._upgrade = (software, caller)

    def _refuse_upgrade(self, why: str) -> None:
        if self._upgrade is not None:
            _, caller = self._upgrade
            self._upgrade = None
            self._journal.warning(f"the upgrade failed: {why}")
            caller.fail("MountError", f"the new worker did not start, nothing was changed: {why}")


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
