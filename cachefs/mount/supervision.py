"""Supervision of one mount: keeps a worker at its device, whatever becomes of workers.

It lives on somebody's loop, beside others or alone, with workers that a factory makes: children of this process
(`cachefs.mount.worker_link`) or processes that somebody else starts (`cachefs.keeper.remote_worker`). Standard library
only.

States (the state file and `cachefs status` show them):

    starting     mounted, no worker has served yet; any failure ends the mount and is reported to who asked for it
    serving      a worker takes requests
    restarting   the worker died, and the next one is on its way
    failed       five crashes within a minute: every request is answered with EIO, until `cachefs upgrade`
    unmounting   on its way out; a detached mount still serves files that are open

INVARIANTS
* It holds nothing on its own mount: no descriptor, no working directory. With the worker dead, even the closing of an
  inherited descriptor would wait for ever.
* At most one worker takes requests. The next one gets "go" only after the death of the last was seen, and after RESEND.
* INIT is answered once: workers are told `first` until one has reported "init-answered".
* It ends (`on_end`, exactly once) only when the connection is gone, or when the first start has failed; `close` leaves
  no mount, worker, socket or state file behind.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from cachefs.mount import commands, kernel
from cachefs.mount.control import ControlServer
from cachefs.mount.crashes import CrashHistory
from cachefs.mount.departure import Departure
from cachefs.mount.device import Device
from cachefs.mount.publication import StateFile
from cachefs.mount.refusal import Refusal
from cachefs.mount.surroundings import Ready, Surroundings
from cachefs.mount.worker_link import Launch, OnEvent, OnExit, Software, WorkerLink

FATAL_GRACE_S = 2.0
"""How long a worker may take to end after it has reported why it cannot serve."""
WORKER_COMMAND = ("-m", "cachefs.mount.worker")


class Replacement(NamedTuple):
    """An upgrade under way."""

    software: Software
    done: Callable[[dict[str, Any]], None]
    """Gets the answer of the control socket: {"ok": True, ...} or {"ok": False, ...}."""


class Supervision:
    """The state machine. Everything happens in callbacks of the loop; nothing waits.

    INVARIANT: `_worker` is the only one that has, or is next to get, the right to take requests; `_candidate` is the
    worker of an upgrade until the moment when it replaces `_worker`.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        device: Device,
        around: Surroundings,
        ready: Ready,
        on_end: Callable[[int], None],
        *,
        name_apart: str = "",
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over the device. `on_end` gets 0, or 1 for a start that failed; `on_news` comes when `init_answered`,
        `attached` or the state is another. Raises `kernel.MountFailure`: then the device is still the caller's.
        """
        self._plan = plan
        self._device = device
        self._loop, self._journal, self._runtime, self._make_worker = around
        self._ready = ready
        self._on_end = on_end
        self._on_news = on_news
        self._state = StateFile(self._runtime, plan, self._journal)
        self._software = Software(plan["python"], None, plan["version"])
        self._crashes = CrashHistory()
        self._limit_s = float(plan["config"]["fuse"]["ready_timeout_s"])
        self._worker: WorkerLink | None = None
        self._candidate: WorkerLink | None = None
        self._upgrade: Replacement | None = None
        self._refusal = Refusal(self._loop, self._journal, self._device, lambda: self._finish(0))
        self._ended = False
        self.init_answered = False
        self.attached: dict[str, Any] | None = None
        """What the last worker was attached to: the next one can begin with it while there is no agent."""
        self._control = self._listen()
        self._departure = Departure(
            self._loop,
            self._journal,
            self._device,
            self._state,
            self._control,
            finish=lambda: self._finish(0),
            is_serving=lambda: self._worker is not None and self._worker.started,
            name_apart=name_apart,
        )
        self._state.update(connection=self._device.connection)

    def _listen(self) -> ControlServer:
        try:
            path = self._runtime.mount(self._plan["mount_id"], "sock")
            return ControlServer(path, self._loop, functools.partial(commands.serve, self))
        except OSError as error:
            text = f"cannot listen below {self._runtime.path}: {error.strerror or error}"
            raise kernel.MountFailure(error.errno, text) from error

    # -- life ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        """The device."""
        return self._device

    @property
    def departure(self) -> Departure:
        """The ways to end it."""
        return self._departure

    @property
    def state(self) -> dict[str, Any]:
        """What the state file says."""
        return self._state.values

    @property
    def worker(self) -> WorkerLink | None:
        """The one that takes requests, or is next to."""
        return self._worker

    @property
    def upgrading(self) -> bool:
        """Whether the worker is being replaced."""
        return self._upgrade is not None

    def begin(self) -> None:
        """Start the first worker."""
        self._start_worker()

    def take_over(self, inherit: Callable[[OnEvent, OnExit], WorkerLink]) -> None:
        """Go on with a worker that takes requests already."""
        self._worker = inherit(self._on_event, self._on_exit)
        self._state.update(state="serving", worker_pid=self._worker.pid)

    def notice(self) -> None:
        """End, if the mount has ended, and there is no worker who would tell by its own end."""
        if not self._device.is_connected() and (self._worker is None or not self._worker.launched):
            self._finish(0)

    def _finish(self, exit_code: int) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(exit_code)

    def close(self) -> None:
        """Leave nothing behind: no worker, no mount (a dead one, after an abort, included), no connection, no file."""
        self._ended = True
        self._leave_behind()
        if not self._ready.sent:
            self._ready.fail("MountError", f"{self._device.mountpoint} was unmounted while it was being mounted")
        try:
            if self._device.is_mounted():
                self._device.unmount(detach=True)
        except OSError as error:
            self._journal.warning(f"cannot unmount {self._device.mountpoint}: {error.strerror}")
        self._device.close()
        self._control.close()
        self._state.remove()

    def _leave_behind(self) -> None:
        for worker in (self._worker, self._candidate):
            if worker is not None:
                self._loop.cancel(worker)
                worker.end()
        self._worker = self._candidate = None
        self._loop.cancel((self, "restart"))
        self._departure.close()
        self._refusal.end()
        self._refuse_upgrade("the mount ends")

    # -- workers ------------------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        if self._worker is not None or self._candidate is not None or self._ended:
            return  # the worker of an upgrade was faster than the timer of a restart
        try:
            self._worker = self._spawn(self._software, self.attached if self.init_answered else None)
        except OSError as error:
            self._crashed(f"a worker cannot be started: {error}", final=True)
            return
        self._state.update(worker_pid=self._worker.pid or None)

    def _spawn(self, software: Software, attached: dict[str, Any] | None) -> WorkerLink:
        extra = {
            "init": self._device.init.hex(),
            "first": not self.init_answered,
            "crashes": self._crashes.recent(time.monotonic()),
            "attached": attached,
            "connection": self._device.connection,
            "supervisor_pid": os.getpid(),
        }
        command = self._plan.get("worker_argv") or [software.python, *WORKER_COMMAND]
        with self._device.lend() as device:
            launch = Launch(command, software.environment, {**self._plan, **extra}, device)
            worker = self._make_worker(launch, self._on_event, self._on_exit)
        if worker.launched:
            self._limit(worker)
        return worker

    def _limit(self, worker: WorkerLink) -> None:
        self._loop.after(worker, self._limit_s, lambda: self._too_slow(worker))

    def _too_slow(self, worker: WorkerLink) -> None:
        worker.fatal = worker.fatal or ("MountError", f"the worker was not ready within {self._limit_s:g} s")
        worker.kill()

    def _on_event(self, worker: WorkerLink, event: dict[str, Any]) -> None:
        self._take_report(worker, event["event"], event)
        self._on_news()

    def _take_report(self, worker: WorkerLink, name: str, event: dict[str, Any]) -> None:
        if name == "launched" and not worker.started:
            self._limit(worker)
            if worker is self._worker:
                self._state.update(worker_pid=worker.pid)
        elif name == "prepared":
            worker.prepared = True
            self._hand_over()
        elif name == "init-answered":
            self.init_answered = True
            self._device.set_read_ahead(int(self._plan["config"]["fuse"]["read_ahead_bytes"]), self._journal)
        elif name == "serving":
            self._is_serving(worker, event)
        elif name == "agent":
            self.attached = event.get("attached", self.attached)
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
        self._refusal.end()
        if self.init_answered:
            self._resend()
        worker.go()

    def _is_serving(self, worker: WorkerLink, event: dict[str, Any]) -> None:
        if worker is not self._worker:
            return
        self._loop.cancel(worker)
        self._upgraded()
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

    def _on_exit(self, worker: WorkerLink) -> None:
        self._loop.cancel(worker)
        self._replace_dead(worker)
        self._on_news()

    def _replace_dead(self, worker: WorkerLink) -> None:
        if worker is self._candidate:
            self._candidate = None
            self._refuse_upgrade(worker.what_happened())
            if self._worker is None and not self._refusal.begun:
                self._start_worker()
            return
        self._worker = None
        if not self._device.is_connected():
            self._finish(0)
        elif self._candidate is not None and self._candidate.prepared:
            self._hand_over()
        elif worker.abandoned:
            self._state.update(state="unmounting" if self._departure.begun else "restarting", worker_pid=None)
            self._start_worker()
        else:
            if worker.started and self._candidate is None:
                self._refuse_upgrade(worker.what_happened())
            self._crashed(
                worker.what_happened(), final=worker.fatal is not None or not worker.was_killed, worker=worker
            )

    def _crashed(self, what: str, *, final: bool, worker: WorkerLink | None = None) -> None:
        """Go on after the death of the worker. `final`: at the first start, trying again would not help."""
        if not self._ready.sent and (final or not (self.init_answered or self._device.can_resend)):
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
            self._loop.after((self, "restart"), delay_s, self._start_worker)
        else:
            self._start_worker()
        self._state.update(state="unmounting" if self._departure.begun else "restarting")

    def _fail_start(self, kind: str, text: str) -> None:
        self._ready.fail(kind, text)
        self._finish(1)

    def _too_many_crashes(self, what: str) -> None:
        if not self._ready.sent:
            self._fail_start("MountError", f"the worker died again and again: {what}")
            return
        directory = self._device.mountpoint
        self._journal.error(
            f"{directory}: too many crashes, giving up; the last: {what}. Every access now fails with EIO. "
            f"Get out with `cachefs upgrade {directory}` (starts a worker again) or `cachefs umount {directory}`"
        )
        if not self.init_answered:  # the kernel holds back every request until then: an EIO would reach nobody
            self._departure.abort()
            return
        self._resend()
        self._refusal.begin()
        self._state.update(state="failed", worker_pid=None)

    def _resend(self) -> None:
        try:
            self._device.resend()
        except OSError as error:
            self._journal.warning(f"requests in flight are lost: the kernel refused to resend them: {error.strerror}")

    # -- upgrades -----------------------------------------------------------------------------------------------------

    def replace_worker(self, request: dict[str, Any], done: Callable[[dict[str, Any]], None]) -> None:
        """Put a worker of other software in the place of the one that serves: `request` is what the control socket
        takes. `done` gets the answer, which may be at once.
        """
        if self._upgrade is not None:
            done(_failure("busy", "another upgrade is running"))
        elif not self._ready.sent or self._ended:
            done(_failure("busy", "the mount is starting or ending"))
        else:
            try:
                software = self._software.replaced_by(request)
                self._candidate = self._spawn(software, None)
            except (OSError, ValueError) as error:
                done(_failure("MountError", f"the new worker cannot be started: {error}"))
            else:
                self._upgrade = Replacement(software, done)

    def _upgraded(self) -> None:
        if self._upgrade is None or self._candidate is not None:
            return
        self._software, done = self._upgrade
        self._upgrade = None
        self._loop.after((self, "upgraded"), 0, lambda: done({"ok": True, "version": self._software.version}))

    def _refuse_upgrade(self, why: str) -> None:
        if self._upgrade is not None:
            _, done = self._upgrade
            self._upgrade = None
            self._journal.warning(f"the upgrade failed: {why}")
            done(_failure("MountError", f"the new worker did not start, nothing was changed: {why}"))


def _failure(kind: str, text: str) -> dict[str, Any]:
    return {"ok": False, "kind": kind, "text": text}
