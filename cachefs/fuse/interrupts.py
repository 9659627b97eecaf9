"""Requests whose caller is dying.

The kernel waits for the answer to a request that was taken, even after kill -9 of the caller: a process that reads
while the store is away would hang as an unkillable one until the deadline. The kernel says so with one INTERRUPT
message, but it sends that for ANY signal, also for the harmless ones that runtimes use all day (SIGCHLD, Go's
SIGURG), and most programs do not expect EINTR from a file. So a request is given up only when its caller has a
SIGKILL pending, which is also how the kernel delivers every other fatal signal to the threads of a process
(kernel/signal.c, complete_signal).

Callers in a process namespace that we cannot see into (pods, when cachefs runs in another container) have the number 0,
and nothing can be found out about them. A killed pod that hangs for as long as the store does is worse than an EINTR
that comes of a harmless signal, so those get one when they still wait `UNSEEN_S` after the signal.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from cachefs.fuse.protocol import error_reply
from cachefs.runtime import process_alive

SIGKILL_BIT = 1 << (9 - 1)
POLL_S = 0.1
UNSEEN_S = 2.0
"""Most reads of a store that is well are over by then."""
MAX_WAITING = 65536

T = TypeVar("T")


def is_dying(pid: int) -> bool:
    """Return whether thread `pid` is gone or has a fatal signal pending."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(("SigPnd:", "ShdPnd:")) and int(line.split()[1], 16) & SIGKILL_BIT:
                    return True
                if line.startswith("State:") and line.split()[1] in "ZX":
                    return True
    except (FileNotFoundError, ProcessLookupError):
        return not process_alive(pid)  # /proc may hide the processes of other users (hidepid)
    except OSError:
        return False
    return False


class Interrupts:
    """Which requests wait, for whom, and which of them the kernel asked to interrupt. Safe from any thread."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._callers: dict[int, int] = {}
        self._interrupted: dict[int, tuple[int, float]] = {}
        """Caller, and when the kernel asked."""
        self._wake = threading.Event()
        self._started = False

    def waits(self, unique: int, pid: int) -> None:
        """Request `unique` of thread `pid` was taken and will be answered later."""
        if len(self._callers) < MAX_WAITING:
            self._callers[unique] = pid

    def done(self, unique: int) -> None:
        """Request `unique` is being answered."""
        self._callers.pop(unique, None)
        self._interrupted.pop(unique, None)

    def add(self, unique: int) -> None:
        """The kernel asks to interrupt `unique`."""
        pid = self._callers.get(unique)
        if pid is None:  # answered already
            return
        self._interrupted[unique] = (pid, time.monotonic())
        if unique not in self._callers:  # answered by another thread meanwhile: nobody else would take it out again
            self._interrupted.pop(unique, None)
            return
        if not self._started:
            self._started = True
            threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        self._wake.set()

    def _watch(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._interrupted:
                for unique, (pid, asked_at) in list(self._interrupted.items()):
                    if is_dying(pid) if pid else time.monotonic() - asked_at > UNSEEN_S:
                        self.done(unique)
                        self._write(error_reply(unique, errno.EINTR))
                time.sleep(POLL_S)


class DyingCallers:
    """The same for what trio serves without the channel (engine pyfuse3). Nobody shows us INTERRUPT there, so whoever
    waits for long is looked at. INVARIANT: while a caller waits, one task watches.
    """

    def __init__(self) -> None:
        self._waiting: dict[trio.CancelScope, int] = {}
        self._watched = False

    async def wait(self, pid: int, answer: Awaitable[T]) -> T:
        """Return the answer. Raises InterruptedError when thread `pid` is killed before it comes."""
        with trio.CancelScope() as scope:
            if pid:  # 0: a caller in a process namespace that we can't see into
                self._waiting[scope] = pid
                if not self._watched:
                    self._watched = True
                    trio.lowlevel.spawn_system_task(self._watch)
            try:
                return await answer
            finally:
                self._waiting.pop(scope, None)
        raise InterruptedError(errno.EINTR, "its caller is dying")

    async def _watch(self) -> None:
        while self._waiting:
            await trio.sleep(POLL_S)
            for scope, pid in list(self._waiting.items()):
                if is_dying(pid):
                    scope.cancel()
        self._watched = False
