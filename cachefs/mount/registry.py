"""Which mounts and supervisors this node knows: state files, control sockets and process titles put together.

Any of the three can be stale: a supervisor that was killed leaves its state file, a mount may have been made with
another runtime directory, and a process number may be in use again. So "alive" means that the socket answers, or that
a process exists which says by its command line that it supervises this very directory.
"""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any, NamedTuple

from cachefs.mount.control import ControlError, ask
from cachefs.runtime import RuntimeDir, mount_id

SUPERVISOR_MODULE = "cachefs.mount.supervisor"
_ASK_S = 3.0


class Supervised(NamedTuple):
    """What is known of the mount at one directory."""

    identity: str
    state: dict[str, Any]
    """The state file, or what the supervisor answered; empty when there is neither."""
    answers: bool
    """Whether the supervisor answers at its socket."""
    pids: tuple[int, ...]
    """Supervisors of this directory that are running; not those of earlier mounts that still serve open files."""

    @property
    def alive(self) -> bool:
        """Whether somebody supervises the mount at its place now."""
        return self.answers or self.state.get("supervisor_pid") in self.pids


def look_up(runtime: RuntimeDir, mountpoint: str) -> Supervised:
    """Return what is known of `mountpoint` (canonical). A detached supervisor frees its names when it is asked here."""
    identity = mount_id(mountpoint)
    try:
        reply = ask(runtime.mount(identity, "sock"), {"command": "status"}, _ASK_S)
        state = reply.get("status", {})
        answers = state.get("mount_id") == identity
    except ControlError:
        answers, state = False, {}
    if not answers:
        state = _read_state(runtime.mount(identity, "json"))
    earlier = {other.get("supervisor_pid") for other in _earlier(runtime, mountpoint)}
    pids = tuple(pid for pid in supervisors_of(mountpoint) if pid not in earlier)
    return Supervised(identity, state, answers, pids)


def detached(runtime: RuntimeDir, mountpoint: str) -> list[dict[str, Any]]:
    """Return the states of supervisors that still serve open files of an earlier mount of `mountpoint`."""
    alive = supervisors_of(mountpoint)
    return [state for state in _earlier(runtime, mountpoint) if state.get("supervisor_pid") in alive]


def _earlier(runtime: RuntimeDir, mountpoint: str) -> list[dict[str, Any]]:
    identity = mount_id(mountpoint)
    return [
        state
        for state in runtime.mount_states()
        if state.get("mountpoint") == mountpoint and state.get("mount_id") != identity
    ]


def forget(runtime: RuntimeDir, identity: str) -> None:
    """Remove what a supervisor that is gone has left in the runtime directory; its log stays."""
    for suffix in ("json", "sock"):
        try:
            os.unlink(runtime.mount(identity, suffix))
        except OSError:
            pass  # not there, or not ours to remove: neither keeps anybody from mounting


def supervisors_of(mountpoint: str) -> tuple[int, ...]:
    """Return the supervisors of `mountpoint` (canonical) that run now, whatever their runtime directory."""
    wanted = os.fsencode(mountpoint)
    found = []
    for pid in _pids():
        words = command_line(pid)
        if SUPERVISOR_MODULE.encode() in words[:4] and words[-1] == wanted:
            found.append(pid)
    return tuple(found)


def command_line(pid: int) -> list[bytes]:
    """Return the arguments of a process, nothing when it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().removesuffix(b"\0").split(b"\0")
    except OSError:
        return []


def wait_for_end(pid: int, timeout_s: float) -> bool:
    """Wait until process `pid` has ended; returns False when it has not. A zombie has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:
        return _poll_for_end(pid, timeout_s)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


def _poll_for_end(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while command_line(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _pids() -> list[int]:
    with os.scandir("/proc") as entries:
        return sorted(int(entry.name) for entry in entries if entry.name.isdigit())


def _read_state(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
