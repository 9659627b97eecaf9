"""Workers as processes of the node service: started with the keeper's descriptors, buried, and their last words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop
from cachefs.mount.relay import StderrRelay
from cachefs.mount.supervision import WORKER_COMMAND

_DEATH_S = 5.0


class Child:
    """A running worker. `on_end(child)` comes once, when it is dead and buried."""

    def __init__(
        self,
        loop: Loop,
        log: Journal,
        mount: str,
        plan: Mapping[str, Any],
        environment: Mapping[str, str],
        descriptors: Sequence[int],
        on_end: Callable[[Child], None],
    ) -> None:
        """Start one. `descriptors`: device, report, control, and the wake-up guard if there is one; they stay the
        caller's. Raises OSError.
        """
        self.mount = mount
        self._loop = loop
        self._on_end = on_end
        self._stderr = StderrRelay(loop, log)
        try:
            self._child = self._spawn(plan, environment, descriptors)
        except OSError:
            self._stderr.close()
            raise
        self._stderr.begin()
        loop.children.add(self.pid)
        self.pidfd = os.pidfd_open(self.pid)
        loop.watch(self.pidfd, self._ended)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._child.pid

    @property
    def code(self) -> int:
        """Its exit code, negative for a signal. Only after its end."""
        return self._child.returncode or 0

    def kill(self) -> None:
        """Kill it at once."""
        self._child.kill()

    def end(self) -> None:
        """Kill it and see it dead, without `on_end`."""
        self._child.kill()
        try:
            self._child.wait(_DEATH_S)
        except subprocess.TimeoutExpired:
            self._child.returncode = -signal.SIGKILL  # it waits in the kernel; somebody else buries it
        self._close()

    def last_words(self) -> str:
        """Return the end of what it logged."""
        return self._stderr.last_words()

    def _spawn(
        self, plan: Mapping[str, Any], environment: Mapping[str, str], descriptors: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        device, report, control, *guard = descriptors
        plan = {**plan, "guard_fd": guard[0]} if guard else plan
        written = os.memfd_create("plan")  # a file and not a pipe: written in one go, whatever its size
        try:
            os.write(written, json.dumps(plan).encode())
            os.lseek(written, 0, os.SEEK_SET)
            passed = {"device": device, "plan": written, "report": report, "control": control}
            words = [part for name, number in passed.items() for part in (f"--{name}-fd", str(number))]
            return subprocess.Popen(
                [sys.executable, *WORKER_COMMAND, *words],
                env=dict(environment),
                pass_fds=[*passed.values(), *guard],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr.lent,
                stderr=self._stderr.lent,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(written)

    def _ended(self) -> None:
        self._loop.unwatch(self.pidfd)
        self._child.wait()
        self._stderr.drain()
        self._close()
        self._on_end(self)

    def _close(self) -> None:
        self._loop.children.discard(self.pid)
        self._loop.unwatch(self.pidfd)
        os.close(self.pidfd)
        self._stderr.close()
