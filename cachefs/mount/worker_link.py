"""One worker, as its supervisor sees it: a child process, its reports, its death and its last words.

The worker is started with four descriptors:

    --device-fd   the connection to the kernel
    --plan-fd     one JSON document, then end of file
    --report-fd   the worker writes one JSON object per line: {"event": "prepared"}, {"event": "serving"}, ...
                  and beats, if it has any: then it is killed when they stay out (`cachefs.mount.vigil`)
    --control-fd  the worker reads "go" when it may take requests, and end of file when its supervisor is gone

It gets a session of its own, so that a Ctrl-C in the terminal reaches the supervisor only. Its stderr is the
supervisor's when that is a file: then the worker goes on logging even when the supervisor is killed. Otherwise
(terminal, pipe) the supervisor passes it on line by line. Either way the last lines are kept to say what happened
when the worker dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from cachefs.mount import journal
from cachefs.mount.loop import Loop
from cachefs.mount.relay import StderrRelay
from cachefs.mount.reports import ReportPipe
from cachefs.mount.vigil import Vigil

_DEATH_S = 5.0
HANG_S = 30.0
"""After how long without a beat a worker is replaced, when the plan does not say."""


class Software(NamedTuple):
    """Which cachefs the workers run."""

    python: str
    environment: dict[str, str] | None
    """None: the supervisor's own."""
    version: str

    def replaced_by(self, request: Mapping[str, Any]) -> Software:
        """Return what an upgrade asks for; what it does not mention stays. Raises ValueError."""
        python, environment = request.get("python", self.python), request.get("env", self.environment)
        if not isinstance(python, str):
            raise ValueError("python must be a path")
        if environment is not None and not (
            isinstance(environment, dict) and all(isinstance(value, str) for value in environment.values())
        ):
            raise ValueError("env must map names to texts")
        return Software(python, environment, str(request.get("version") or self.version))


class Launch(NamedTuple):
    """What it takes to start a worker."""

    command: Sequence[str]
    """Program and arguments before the descriptors."""
    environment: Mapping[str, str] | None
    """None: the supervisor's own."""
    plan: dict[str, Any]
    device: int


class WorkerLink(Protocol):
    """A worker, as the supervision of a mount sees it, wherever it runs."""

    prepared: bool
    """It has reported that it can take over."""
    started: bool
    """It was given the right to take requests."""
    fatal: tuple[str, str] | None
    """Kind and text of the error that kept it from serving."""

    @property
    def pid(self) -> int:
        """Its process; 0 while it is still to be started."""

    @property
    def launched(self) -> bool:
        """Whether it was started; if not, "launched" is reported when it is."""

    @property
    def abandoned(self) -> bool:
        """Whether it ended because what it ran in did: that is no crash."""

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it. Only after `on_exit`."""

    def what_happened(self) -> str:
        """Say why it ended, for a person. Only after `on_exit`."""

    def go(self) -> None:
        """Let it take requests."""

    def kill(self) -> None:
        """Kill it at once; `on_exit` follows."""

    def end(self) -> None:
        """Kill it, without `on_exit`."""


OnEvent = Callable[[WorkerLink, dict[str, Any]], None]
OnExit = Callable[[WorkerLink], None]
MakeWorker = Callable[[Launch, OnEvent, OnExit], WorkerLink]
"""Starts a worker: what to start, who gets its reports, and who is told of its end (exactly once, after the last of
its reports). Raises OSError.
"""


class Worker:
    """A running worker, a child of this process.

    `on_event(worker, event)` gets its reports; `on_exit(worker)` comes exactly once, after the last of them.
    """

    def __init__(
        self,
        loop: Loop,
        log: journal.Journal,
        launch: Launch,
        on_event: Callable[[Worker, dict[str, Any]], None],
        on_exit: Callable[[Worker], None],
    ) -> None:
        self.launch = launch
        self.prepared = False
        """It has reported that it can take over."""
        self.started = False
        """It was given the right to take requests."""
        self.fatal: tuple[str, str] | None = None
        """Kind and text of the error that kept it from serving."""
        self.hung = ""
        """Why it was killed, if it did not move any more."""
        self._loop = loop
        self._log = log
        self._on_event = on_event
        self._on_exit = on_exit
        self._reports: ReportPipe
        self._stderr = StderrRelay(loop, log)
        self._pidfd = -1
        self._child = self._spawn(launch)
        loop.children.add(self.pid)
        self._reports = ReportPipe(loop, log, self._report, self._reported, self._heard)
        self._reports.name = f"worker {self.pid}"
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._child.kill()
            self._wait()
            self._close_pipes()
            raise
        limit_s = float(launch.plan["config"]["fuse"].get("hang_timeout_s", HANG_S))
        self._vigil = Vigil(loop, limit_s, self.pid, self._hangs)
        loop.watch(self._pidfd, self._ended)
        self._stderr.begin()

    def _spawn(self, launch: Launch) -> subprocess.Popen[bytes]:
        mine: list[int] = []
        theirs: list[int] = []
        try:
            plan = os.memfd_create("plan")  # a file and not a pipe: written in one go, whatever its size
            theirs.append(plan)
            os.write(plan, json.dumps(launch.plan).encode())
            os.lseek(plan, 0, os.SEEK_SET)
            self._report, report = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            mine.append(self._report)
            theirs.append(report)
            os.set_blocking(report, True)
            control, self._control = os.pipe2(os.O_CLOEXEC)
            mine.append(self._control)
            theirs.append(control)
            arguments = {"device": launch.device, "plan": plan, "report": report, "control": control}
            return subprocess.Popen(
                [*launch.command, *(part for name, fd in arguments.items() for part in (f"--{name}-fd", str(fd)))],
                env=launch.environment,
                pass_fds=list(arguments.values()),
                stdin=subprocess.DEVNULL,
                stdout=self._stderr.lent,
                stderr=self._stderr.lent,
                start_new_session=True,
                cwd="/",
            )
        except BaseException:
            for descriptor in mine:
                os.close(descriptor)
            self._stderr.close()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._child.pid

    @property
    def launched(self) -> bool:
        """Always: it is started at once."""
        return True

    @property
    def abandoned(self) -> bool:
        """Never: it does not need anybody else."""
        return False

    def go(self) -> None:
        """Let it take requests."""
        self.started = True
        try:
            os.write(self._control, b"go\n")
        except OSError:
            pass  # it is dead, which `on_exit` will say

    def kill(self) -> None:
        """Kill it at once."""
        self._child.kill()

    def _hangs(self, how: str) -> None:
        self.hung = f"killed, {how}"
        self._log.warning(f"worker {self.pid} hangs: {how}")
        self._on_event(self, {"event": "hung"})
        self.kill()

    def end(self) -> None:
        """Kill it and see it dead, without `on_exit`."""
        self._vigil.end()
        self._loop.unwatch(self._pidfd)
        self._child.kill()
        try:
            self._wait(_DEATH_S)
        except subprocess.TimeoutExpired:
            self._log.warning(f"worker {self.pid} does not die: it waits in the kernel")
        self._close_pipes()

    def what_happened(self) -> str:
        """Say why it ended, for a person. Only after `on_exit`."""
        code = self._child.returncode
        if self.fatal is not None:
            return self.fatal[1]
        if self.hung:
            return self.hung
        if code is not None and code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = str(-code)
            what = f"killed by signal {name}"
        else:
            what = f"exit code {code}"
        words = self._stderr.last_words()
        return f"{what}: {words}" if words and not (code is not None and code == -signal.SIGKILL) else what

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it. Only after `on_exit`."""
        return (self._child.returncode or 0) < 0

    # -- callbacks of the loop ----------------------------------------------------------------------------------------

    def _reported(self, event: dict[str, Any]) -> None:
        self._on_event(self, event)

    def _heard(self) -> None:
        self._vigil.heard()

    def _ended(self) -> None:
        self._loop.unwatch(self._pidfd)
        self._wait()
        self._reports.drain()
        self._vigil.end()
        self._stderr.drain()
        self._close_pipes()
        self._on_exit(self)

    def _wait(self, timeout_s: float | None = None) -> None:
        self._child.wait(timeout_s)
        self._loop.children.discard(self.pid)

    def _close_pipes(self) -> None:
        self._reports.close()
        os.close(self._control)
        self._stderr.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
