"""A small single-threaded event loop: descriptors, timers and signals, and nothing that wakes up without a reason.

The supervisor's memory is counted in single MiB and it must never wait for anything, so neither threads nor trio.

It also buries children that nobody here started: in a container the supervisor may be process 1, which inherits every
orphan of it, and a mount in the foreground inherits the agent that its command had started.

INVARIANT: a callback that raises is logged and the loop goes on; a descriptor that was unwatched during a turn gets no
event any more, even when its number was used again in that turn.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable

from cachefs.mount.journal import Journal

Callback = Callable[[], object]
BURY_S = 0.1


class Loop:
    """Calls back when descriptors are readable, timers ring or signals arrive."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._selector = selectors.DefaultSelector()
        self._writers: dict[int, Callback] = {}
        self._timers: dict[object, tuple[float, Callback]] = {}
        self._running = False
        self._wakeup: tuple[socket.socket, ...] = ()
        self.children: set[int] = set()
        """Processes that are waited for elsewhere; not those that are waited for where they are started."""

    def watch(self, descriptor: int, callback: Callback) -> None:
        """Call `callback` whenever `descriptor` is readable, at its end or in error."""
        self._selector.register(descriptor, selectors.EVENT_READ, callback)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching; call it before the descriptor is closed. Unknown ones are ignored."""
        self._writers.pop(descriptor, None)
        try:
            self._selector.unregister(descriptor)
        except (KeyError, ValueError):
            pass

    def when_writable(self, descriptor: int, callback: Callback | None) -> None:
        """Call `callback` as well whenever a watched descriptor takes bytes; None: not any more."""
        key = self._selector.get_key(descriptor)
        if callback is None:
            self._writers.pop(descriptor, None)
        else:
            self._writers[descriptor] = callback
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if callback is not None else 0)
        self._selector.modify(descriptor, wanted, key.data)

    def after(self, name: object, delay_s: float, callback: Callback) -> None:
        """Call `callback` once after `delay_s`; a timer of the same name is replaced."""
        self._timers[name] = (time.monotonic() + delay_s, callback)

    def cancel(self, name: object) -> None:
        """Forget the timer called `name`."""
        self._timers.pop(name, None)

    def catch_signals(self, numbers: tuple[signal.Signals, ...], callback: Callable[[int], object]) -> None:
        """Call `callback` with the number of each signal that arrives, from the loop and not from a signal frame; from
        then on orphans are buried as well.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        for number in (*numbers, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = (ours, theirs)

        def arrived() -> None:
            for number in ours.recv(64):
                if number in numbers:
                    callback(number)
                elif number == signal.SIGCHLD:
                    self._bury_orphans()

        self.watch(ours.fileno(), arrived)
        self.after("orphans", 0.0, self._bury_orphans)  # those who ended before

    def _bury_orphans(self) -> None:
        """Take note of the end of children that nobody waits for: else they stay as zombies for ever."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid in self.children:  # it hides those behind it until its own callback has come
                self.after("orphans", BURY_S, self._bury_orphans)
                return
            os.waitpid(ended.si_pid, 0)

    def stop(self) -> None:
        """End `run` after the present callback."""
        self._running = False

    def close(self) -> None:
        """Release what the loop itself holds; signals are not caught any more."""
        if self._wakeup:
            signal.set_wakeup_fd(-1)
        for end in self._wakeup:
            end.close()
        self._selector.close()

    def run(self) -> None:
        """Call back until `stop`."""
        self._running = True
        while self._running:
            for key, mask in self._selector.select(self._wait_s()):
                if mask & selectors.EVENT_READ and self._is_current(key):
                    self._call(key.data)
                if mask & selectors.EVENT_WRITE and self._is_current(key) and key.fd in self._writers:
                    self._call(self._writers[key.fd])
            self._ring()

    def _is_current(self, key: selectors.SelectorKey) -> bool:
        current = self._selector.get_map().get(key.fd)
        return current is not None and current.data is key.data and self._is_running()

    def _is_running(self) -> bool:
        return self._running  # a callback may have changed it, which mypy cannot see in the loops above

    def _wait_s(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, min(due for due, _ in self._timers.values()) - time.monotonic())

    def _ring(self) -> None:
        now = time.monotonic()
        for name, (due, callback) in list(self._timers.items()):
            if due <= now and self._is_running() and self._timers.get(name) == (due, callback):
                del self._timers[name]
                self._call(callback)

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - the boundary: a mount must outlive an error in its supervisor
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
            self._journal.error(f"an error in the supervisor itself: {type(error).__name__}: {error} at {where}")
            time.sleep(0.05)  # should it repeat at once and for ever, it must not take a whole CPU
