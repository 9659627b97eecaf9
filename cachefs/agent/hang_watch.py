"""Watching over an agent that may hang instead of dying: stopped, in a deadlock, or in the kernel behind a sick disk.

While somebody waits for an answer and none comes to anything, the agent is called on a connection of its own. Any
reaction will do, also that of an agent which does not know the call and hangs up. One that shows none for the whole of
the limit is killed, which breaks all its connections: every worker then does what it does whenever an agent dies.

The kernel says whose socket that is (if there is no room for one more connection: who holds the agent's lock). It must
have been the same process during all of the silence: several workers come to the same verdict, and only the first acts.

The silence is counted in steps of our own clock. A step that took much longer than it should says that the whole
machine slept or was stopped, or has no CPU for anybody: then the count begins anew. An agent in a debugger is left
alone.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Protocol

import trio

from cachefs.agent.launch import AgentPlan, silent_listener
from cachefs.runtime import TRACED, process_state

log = logging.getLogger(__name__)

STEPS = 6
"""Looks within the limit."""
STRANGER_LIMITS = 4
"""An agent that this worker never heard may be starting still, with files to look at, and gets so much more time."""
SLACK_S = 1.0
"""How late a look may be."""
DEAD = ("", "Z", "X")


class Waiting(Protocol):
    """Whoever asks the agent."""

    received: int
    """Grows with everything that comes from the agent."""
    pid: int
    """The agent that was attached to, 0 while there is none."""

    @property
    def waits(self) -> bool:
        """Whether an answer is due."""
        ...


class HangWatch:
    """Watches over the agent of one cache directory, for one worker."""

    def __init__(self, plan: AgentPlan, limit_s: float) -> None:
        self._plan = plan
        self._limit_s = limit_s
        self._step_s = limit_s / STEPS
        self.killed = 0
        """How many agents it has killed."""

    async def run(self, asker: Waiting) -> None:
        """Watch for ever."""
        suspect, silent_s = 0, 0.0
        seen, known = asker.received, 0
        while True:
            known = asker.pid or known
            began = time.monotonic()
            await trio.sleep(self._step_s)
            if asker.received != seen or not (suspect or asker.waits):
                suspect, silent_s, seen = 0, 0.0, asker.received
                continue
            pid = await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)
            took_s = time.monotonic() - began
            if not pid or took_s > 2 * self._step_s + SLACK_S:
                suspect, silent_s = 0, 0.0
                continue
            silent_s = silent_s + took_s if pid == suspect else took_s
            suspect = pid
            if silent_s >= self._limit_s * (1 if pid == known else STRANGER_LIMITS):
                await trio.to_thread.run_sync(self._kill, pid)
                suspect, silent_s = 0, 0.0

    def _look(self) -> int:
        """Return the process of an agent that shows no sign of life, else 0. BLOCKS."""
        try:
            pid = silent_listener(self._plan.socket_path, self._plan.lock_path, self._step_s)
        except OSError as error:
            log.debug("it cannot be found out how the agent is: %s", error)
            return 0
        return 0 if pid and process_state(pid) == TRACED else pid

    def _kill(self, pid: int) -> None:
        """Kill the agent, unless somebody has done it. BLOCKS."""
        state = process_state(pid)
        if state in DEAD:
            return
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError as error:
            log.warning("the agent (pid %d) hangs, and cannot be killed: %s", pid, error)
            return
        self.killed += 1
        log.warning(
            "the agent (pid %d, state %s) shows no sign of life: killed, so that another can be started", pid, state
        )
