"""Keeps an agent running for the node service, in a thread: starting one, and waiting for its end, BLOCKS.

It holds a connection to the agent, for two reasons: an agent to which somebody is connected never is idle, and the end
of the connection says at once that the agent is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import threading
import time
from pathlib import Path

from cachefs import errors
from cachefs.agent.launch import AgentPlan, connect, ensure_agent
from cachefs.mount import registry

log = logging.getLogger(__name__)

START_S = 30.0
FIRST_STEP_S, LAST_STEP_S = 0.1, 2.0
_CREDENTIALS = struct.Struct("3i")


class AgentWatch:
    """Starts the agent of a plan again and again. `begin` once, `end` once."""

    def __init__(self, plan: AgentPlan) -> None:
        self._plan = plan
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._watch, name="agent-watch", daemon=True)

    def begin(self) -> None:
        """Start watching; returns at once."""
        self._forget_settings()
        self._thread.start()

    def end(self, timeout_s: float) -> None:
        """Stop watching and end the agent, in order: what it has in memory is adopted by the next one."""
        self._ending.set()
        with self._lock:
            pid = 0 if self._connection is None else _peer(self._connection)
            if pid:  # not one in a container beside ours, which cannot be seen from here
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)
                    registry.wait_for_end(pid, timeout_s)
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout_s)

    def _forget_settings(self) -> None:
        """Let our settings hold: an agent that starts while mounts are there takes those of the one before it."""
        try:
            connection = connect(self._plan.socket_path)
        except errors.AgentUnavailable:
            return  # somebody is there, as `_watch` will find out too
        if connection is not None:
            connection.close()
            return
        Path(self._plan.runtime.agent(self._plan.cache.cache_dir, "json")).unlink(missing_ok=True)

    def _watch(self) -> None:
        step_s, complained = FIRST_STEP_S, ""
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                self._follow(ensure_agent(self._plan, START_S))
                complained = ""
            except (errors.CachefsError, OSError) as error:
                if str(error) != complained:
                    log.error("no agent: %s", error)
                complained = str(error)
            step_s = FIRST_STEP_S if time.monotonic() - began > LAST_STEP_S else min(2 * step_s, LAST_STEP_S)
            self._ending.wait(step_s)

    def _follow(self, connection: socket.socket) -> None:
        """Return when the agent hangs up."""
        with connection:
            with self._lock:
                self._connection = connection
            try:
                if self._ending.is_set():
                    return  # it ends by itself when it is idle
                log.info("agent %d is running", _peer(connection))
                connection.settimeout(None)
                while connection.recv(4096):
                    pass
            except OSError:
                pass  # the same as an end
            finally:
                with self._lock:
                    self._connection = None
        if not self._ending.is_set():
            log.warning("the agent is gone: starting another")


def _peer(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[0])
