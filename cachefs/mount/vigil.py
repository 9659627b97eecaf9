"""Watching over a worker that may hang instead of dying: stopped, in a deadlock, or in the kernel behind a sick disk.

A worker that lives writes a beat into its report pipe six times within the limit, if both its event loop and its
channel move (`cachefs.mount.heartbeat`). While beats come, the supervisor wakes up for them and for nothing else. When
they stay out, it counts the silence in small steps of its own clock. A step that took much longer than it should says
that the whole machine slept or was stopped, or has no CPU for anybody: then the count begins anew.

INVARIANT: a worker is only judged after its first beat (workers of other versions may have none), and never while a
debugger holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cachefs.mount.loop import Loop
from cachefs.runtime import TRACED, process_state

BEATS = 6
"""Beats within the limit."""
_STEPS = 30
_SLACK_S = 1.0
"""How late a step may be."""
WORDS = {"T": "it is stopped", "D": "it waits in the kernel", "R": "it runs"}


class Vigil:
    """Counts the silence of one process. `on_silence` is called once, with what is known of it."""

    def __init__(self, loop: Loop, limit_s: float, pid: int, on_silence: Callable[[str], None]) -> None:
        self._loop = loop
        self._limit_s = limit_s
        self._pid = pid
        self._on_silence = on_silence
        self._silent_s = 0.0

    def heard(self) -> None:
        """There was a sign of life."""
        self._silent_s = 0.0
        self._wait(self._limit_s * 2 / BEATS)

    def end(self) -> None:
        """Stop watching."""
        self._loop.cancel(self)

    def _wait(self, delay_s: float) -> None:
        began = time.monotonic()
        self._loop.after(self, delay_s, lambda: self._step(time.monotonic() - began, delay_s))

    def _step(self, took_s: float, meant_s: float) -> None:
        if took_s > meant_s + _SLACK_S or process_state(self._pid) == TRACED:
            self.heard()
            return
        self._silent_s += took_s
        if self._silent_s < self._limit_s:
            self._wait(self._limit_s / _STEPS)
            return
        word = WORDS.get(process_state(self._pid), "")
        self._on_silence(f"no sign of life for {self._limit_s:g} s{word and f' ({word})'}")
