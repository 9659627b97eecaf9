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
from typing import Any, NamedTuple

from cachefs.mount import journal
from cachefs.mount.loop import Loop
from cachefs.mount.vigil import Vigil

_MAX_LINE_BYTES = 1 << 20
_TAIL_BYTES = 2048
_TAIL_LINES = 3
_TAIL_CHARACTERS = 500
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


class Worker:
    """A running worker.

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
        self._reports = bytearray()
        self._tail = b""
        self._log_start = journal.stderr_size()
        self._stderr = -1
        self._pidfd = -1
        self._child = self._spawn(launch)
        self.pid = self._child.pid
        loop.children.add(self.pid)
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._child.kill()
            self._wait()
            self._close_pipes()
            raise
        limit_s = float(launch.plan["config"]["fuse"].get("hang_timeout_s", HANG_S))
        self._vigil = Vigil(loop, limit_s, self.pid, self._hangs)
        loop.watch(self._report, self._read_reports)
        loop.watch(self._pidfd, self._ended)
        if self._stderr >= 0:
            loop.watch(self._stderr, self._relay)

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
            errors = None
            if not journal.stderr_is_file():
                self._stderr, errors = os.pipe2(os.O_CLOEXEC)
                mine.append(self._stderr)
                theirs.append(errors)
                os.set_blocking(self._stderr, False)
            arguments = {"device": launch.device, "plan": plan, "report": report, "control": control}
            return subprocess.Popen(
                [*launch.command, *(part for name, fd in arguments.items() for part in (f"--{name}-fd", str(fd)))],
                env=launch.environment,
                pass_fds=list(arguments.values()),
                stdin=subprocess.DEVNULL,
                stdout=errors if errors is not None else journal.STDERR,
                stderr=errors,
                start_new_session=True,
                cwd="/",
            )
        except BaseException:
            for descriptor in mine:
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)

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

    def last_words(self) -> str:
        """Return the last lines of its stderr as one line, empty when there are none."""
        raw = self._tail if self._stderr >= 0 else journal.read_back(self._log_start, _TAIL_BYTES)
        lines = [line.strip() for line in raw.decode("utf-8", "replace").splitlines()]
        own = [line for line in lines if line.strip("^~ ") and "supervisor[" not in line]
        return " | ".join(own[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]

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
        words = self.last_words()
        return f"{what}: {words}" if words and not (code is not None and code == -signal.SIGKILL) else what

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it. Only after `on_exit`."""
        return (self._child.returncode or 0) < 0

    # -- callbacks of the loop ----------------------------------------------------------------------------------------

    def _read_reports(self) -> bool:
        """Read what it has reported; returns False when there is nothing more for now."""
        try:
            piece = os.read(self._report, 64 << 10)
        except BlockingIOError:
            return False
        except OSError:
            piece = b""
        if not piece:
            self._loop.unwatch(self._report)
            return False
        self._reports += piece
        *lines, rest = self._reports.split(b"\n")
        self._reports = rest if len(rest) <= _MAX_LINE_BYTES else bytearray()
        for line in lines:
            self._take_report(bytes(line))
        return True

    def _take_report(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and event.get("event") == "beat":
            self._vigil.heard()
        elif isinstance(event, dict) and isinstance(event.get("event"), str):
            self._on_event(self, event)
        else:
            self._log.warning(f"worker {self.pid} reported what nobody understands: {line[:200]!r}")

    def _relay(self) -> bool:
        """Pass its stderr on; returns False when there is nothing more for now."""
        try:
            piece = os.read(self._stderr, 64 << 10)
        except BlockingIOError:
            return False
        except OSError:
            piece = b""
        if not piece:
            self._loop.unwatch(self._stderr)
            return False
        self._tail = (self._tail + piece)[-_TAIL_BYTES:]
        self._log.write(piece)
        return True

    def _ended(self) -> None:
        self._loop.unwatch(self._pidfd)
        self._wait()
        while self._read_reports():
            pass
        self._vigil.end()
        while self._stderr >= 0 and self._relay():
            pass
        self._close_pipes()
        self._on_exit(self)

    def _wait(self, timeout_s: float | None = None) -> None:
        self._child.wait(timeout_s)
        self._loop.children.discard(self.pid)

    def _close_pipes(self) -> None:
        self._loop.unwatch(self._report)
        os.close(self._report)
        os.close(self._control)
        if self._stderr >= 0:
            self._loop.unwatch(self._stderr)
            os.close(self._stderr)
        if self._pidfd >= 0:
            os.close(self._pidfd)
