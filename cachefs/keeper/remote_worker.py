"""A worker that the node service runs, as the keeper sees it.

The keeper makes its pipes and orders it; the node service starts it with them and passes back its pidfd. From then on
the worker reports to the keeper directly, and the keeper sees its death by the pidfd: the node service may come and go.

    waiting    no node service is there, or too many workers are being started
    ordered    the node service has been told
    launched   it runs
    over       `on_exit` has been called, or `end`

INVARIANT: an order that is given again has pipes of its own: a worker of the first, should there be one, reads the end
of its control pipe and ends without ever having touched the device.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from typing import Any, Protocol

from cachefs.keeper.passing import Message
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop
from cachefs.mount.reports import ReportPipe
from cachefs.mount.vigil import Vigil
from cachefs.mount.worker_link import HANG_S, Launch, WorkerLink

GUARD_DEVICE = "/dev/cpu_dma_latency"
WORDS_S = 0.1
"""How long the node service may take to say how a worker ended that is dead already."""


class RunnerLink(Protocol):
    """The node service that runs a worker."""

    version: str
    leaving: bool

    @property
    def connected(self) -> bool:
        """Whether it can be talked to."""

    def forget(self, worker: RemoteWorker) -> None:
        """It is over."""

    def kill(self, worker: RemoteWorker) -> None:
        """Kill it: we may not."""


class Orders(Protocol):
    """Who finds a node service for workers that wait."""

    def submit(self, worker: RemoteWorker) -> None:
        """Have it started, now or later."""

    def withdraw(self, worker: RemoteWorker) -> None:
        """It is not wanted any more, or is not starting any more."""


class RemoteWorker:
    """One worker. Fulfils `cachefs.mount.worker_link.WorkerLink`."""

    def __init__(
        self,
        loop: Loop,
        log: Journal,
        orders: Orders,
        mount: str,
        environment: dict[str, str],
        launch: Launch,
        on_event: Callable[[WorkerLink, dict[str, Any]], None],
        on_exit: Callable[[WorkerLink], None],
    ) -> None:
        """Nothing is started yet: `submit` it. Raises OSError."""
        self.mount = mount
        self.prepared = False
        self.started = False
        self.fatal: tuple[str, str] | None = None
        self.runner: RunnerLink | None = None
        self.remote_pid = 0
        """Its process, as the node service sees it."""
        self.inherited = False
        """It was started for an earlier keeper, and has no pipes to us."""
        self._loop = loop
        self._log = log
        self._orders = orders
        self._on_event = on_event
        self._on_exit = on_exit
        self._plan = launch.plan
        self._environment = environment
        self._device = os.dup(launch.device) if launch.device >= 0 else -1
        self._reports: ReportPipe | None = None
        self._control = -1
        self._pidfd = -1
        self._pid = 0
        self._code: int | None = None
        self._words = ""
        self._hung = ""
        self._dead = False
        self._over = False
        limit_s = float(launch.plan["config"]["fuse"].get("hang_timeout_s", HANG_S))
        self._limit_s = limit_s
        self._vigil: Vigil | None = None

    # -- what a supervision asks ---------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Its process as this one sees it; 0 while there is none, or when it cannot be seen from here."""
        return self._pid

    @property
    def launched(self) -> bool:
        """Whether it runs."""
        return self._pidfd >= 0

    @property
    def over(self) -> bool:
        """Whether it has ended, or was given up."""
        return self._over

    @property
    def abandoned(self) -> bool:
        """Whether the node service that ran it has gone, or is going."""
        return self.fatal is None and not self._hung and (self.runner is None or self.runner.leaving)

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it. Unknown ends count as such: trying again may help."""
        return self._code is None or self._code < 0

    @property
    def version(self) -> str:
        """Of the software that it was started with."""
        return "" if self.runner is None else self.runner.version

    def what_happened(self) -> str:
        """Say why it ended, for a person."""
        if self.fatal is not None:
            return self.fatal[1]
        if self._hung:
            return self._hung
        if self._code is None:
            return self._words or "it ended with the node service"
        if self._code < 0:
            try:
                what = f"killed by signal {signal.Signals(-self._code).name}"
            except ValueError:
                what = f"killed by signal {-self._code}"
        else:
            what = f"exit code {self._code}"
        return f"{what}: {self._words}" if self._words and self._code != -signal.SIGKILL else what

    def go(self) -> None:
        """Let it take requests."""
        self.started = True
        try:
            os.write(self._control, b"go\n")
        except OSError:
            pass  # it is dead, which `on_exit` will say

    def kill(self) -> None:
        """Kill it at once; `on_exit` follows."""
        if self._over:
            return
        if not self.launched:
            self._loop.after((self, "over"), 0, self._finish)
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it is dead already
        except OSError:  # another name space of processes, or not the right to
            if self.runner is not None and self.runner.connected:
                self.runner.kill(self)

    def end(self) -> None:
        """Kill it, without `on_exit`."""
        self.kill()
        self._close()

    # -- what the node service says -----------------------------------------------------------------------------------

    def order(self) -> tuple[Message, list[int]]:
        """Return what the node service is told and given; all descriptors but the first are for it alone, and are to be
        closed here. Raises OSError.
        """
        self._close_pipes()
        report, lent_report = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._reports = ReportPipe(self._loop, self._log, report, self._reported, self._heard)
        os.set_blocking(lent_report, True)
        try:
            lent_control, self._control = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(lent_report)
            raise
        message = {"do": "start", "mount": self.mount, "plan": self._plan, "environment": self._environment}
        return message, [self._device, lent_report, lent_control, *self._wake_up_guard()]

    def _wake_up_guard(self) -> list[int]:
        """The device that keeps idle CPUs awake is root's: workers get it opened, if they may want it."""
        if self._plan["config"]["fuse"].get("low_latency") == "off":
            return []
        try:
            return [os.open(GUARD_DEVICE, os.O_WRONLY | os.O_CLOEXEC)]
        except OSError:
            return []  # there is none: virtual machines and containers

    def launch_seen(self, remote_pid: int, pidfd: int) -> None:
        """It runs. The pidfd is ours now."""
        if self._over:
            _kill(pidfd)
            os.close(pidfd)
            return
        self.remote_pid, self._pidfd, self._pid = remote_pid, pidfd, pid_of(pidfd)
        self._vigil = Vigil(self._loop, self._limit_s, self._pid, self._hangs)
        if self._reports is not None:
            self._reports.name = f"worker {self._pid or remote_pid}"
        self._close_device()
        self._loop.watch(pidfd, self._died)
        self._on_event(self, {"event": "launched"})

    def refused(self, text: str) -> None:
        """The node service could not start it."""
        self._code, self._words = 1, text
        self._finish()

    def ended(self, code: int, words: str) -> None:
        """The node service has buried it."""
        self._code, self._words = code, words
        if self._dead:
            self._finish()

    def runner_lost(self) -> None:
        """The node service hung up. It may live on without it."""
        self.runner = None
        if self._dead:
            self._finish()
        elif not self.launched and not self._over:
            self._orders.submit(self)

    def taken_over(self, remote_pid: int, pidfd: int, runner: RunnerLink | None) -> None:
        """It runs, and takes requests, since before this keeper was started: it has no pipes to us. `runner`: None when
        nobody has told of it yet.
        """
        self.prepared = self.started = self.inherited = True
        self.runner = runner
        self.launch_seen(remote_pid, pidfd)

    def is_process(self, pidfd: int) -> bool:
        """Whether a pidfd is of this worker."""
        if not self.launched:
            return False
        return os.path.samestat(os.fstat(pidfd), os.fstat(self._pidfd)) and pid_of(pidfd) == self._pid

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def _reported(self, event: dict[str, Any]) -> None:
        if event["event"] in ("prepared", "fatal"):
            self._orders.withdraw(self)
        self._on_event(self, event)

    def _heard(self) -> None:
        if self._vigil is not None:
            self._vigil.heard()

    def _hangs(self, how: str) -> None:
        self._hung = f"killed, {how}"
        self._log.warning(f"worker {self._pid or self.remote_pid} hangs: {how}")
        self._on_event(self, {"event": "hung"})
        self.kill()

    def _died(self) -> None:
        self._loop.unwatch(self._pidfd)
        self._dead = True
        if self._code is not None or self.runner is None:
            self._finish()
        else:
            self._loop.after((self, "over"), WORDS_S, self._finish)

    def _finish(self) -> None:
        if self._over:
            return
        if self._reports is not None:
            self._reports.drain()
        self._close()
        self._on_exit(self)

    def _close(self) -> None:
        self._over = True
        self._loop.cancel((self, "over"))
        if self._vigil is not None:
            self._vigil.end()
        self._orders.withdraw(self)
        if self.runner is not None:
            self.runner.forget(self)
        self._close_device()
        self._close_pipes()
        if self._pidfd >= 0:
            self._loop.unwatch(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _close_device(self) -> None:
        if self._device >= 0:
            os.close(self._device)
            self._device = -1

    def _close_pipes(self) -> None:
        if self._reports is not None:
            self._reports.close()
            self._reports = None
        if self._control >= 0:
            os.close(self._control)
            self._control = -1


def pid_of(pidfd: int) -> int:
    """Return the process of a pidfd, as this process sees it; 0 when it is dead, or cannot be seen from here."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
            found = re.search(rb"^Pid:\s*(-?\d+)", file.read(), re.MULTILINE)
    except OSError:
        return 0
    return max(0, int(found[1])) if found else 0


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass  # dead, or the node service's to end: it reads the end of its pipe
