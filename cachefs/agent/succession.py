"""Versions of cachefs that meet at one cache directory: which of them is its agent.

A cache directory has one agent, and several mounts whose workers may be of different versions, because each of them is
upgraded on its own. An agent serves its own protocol and the one before (`messages.OLDEST_PROTOCOL`), so:

* A worker that is newer than the agent puts an agent of its own version in its place (`take_over`). This is how
  `cachefs upgrade` crosses a change of protocol: the workers of the other mounts lose their agent, which they survive
  at any time, and find the new one, which serves them.
* It does not do so while mounts are attached that the new agent could not serve; then the upgrade fails, and nothing
  was changed.
* A worker that is too old for the agent goes on with what is cached, and never ends the agent.
* `cachefs mount` leaves an agent alone that others use, whichever is newer; one that nobody uses is replaced
  (`replace_unused`).

INVARIANT: an agent is replaced only while the right to start one is held (`launch.turn`): the old workers, who want
another agent as soon as theirs is gone, wait for it, and find the new one.

Everything here BLOCKS.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

from cachefs import __version__, errors
from cachefs.agent import launch, messages

log = logging.getLogger(__name__)

SHOWN = 3
"""Mount points that a message names."""


def take_over(plan: launch.AgentPlan, mount_id: str, timeout_s: float) -> socket.socket:
    """Return a connection to an agent of our own version, which takes the place of an older one. Returns one to the
    agent that is there if that is ours by now.

    Raises OtherVersion when the agent is newer, or others need the old one; `mount_id` is who asks, and does not.
    """
    deadline = time.monotonic() + timeout_s
    with launch.turn(plan, deadline):
        connection = launch.connect(plan.socket_path)
        if connection is not None:
            status = _status(connection, timeout_s)
            if _protocol(status) < messages.PROTOCOL_VERSION:
                _refuse_to_strand(status, mount_id)
                log.warning("taking the place of the agent of version %s", status.get("version"))
                launch.stop_agent(plan.socket_path, timeout_s, force=True)
        return launch.start_agent(plan, deadline)


def replace_unused(plan: launch.AgentPlan, timeout_s: float) -> None:
    """Put an agent of our own version in the place of one that nothing is mounted through. Raises MountError when
    something is.
    """
    deadline = time.monotonic() + timeout_s
    with launch.turn(plan, deadline):
        if not launch.stop_agent(plan.socket_path, timeout_s, force=False):
            connection = launch.connect(plan.socket_path)
            raise errors.MountError(_in_the_way({} if connection is None else _status(connection, timeout_s)))
        launch.start_agent(plan, deadline).close()


def _status(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    answer = launch.ask(connection, messages.Status(id=1), timeout_s)
    return answer.status if isinstance(answer, messages.StatusReply) else {}


def _protocol(described: dict[str, Any]) -> int:
    return int(described.get("protocol", 1))


def _refuse_to_strand(status: dict[str, Any], mount_id: str) -> None:
    mounts: dict[str, Any] = status.get("mounts", {})
    stranded = [
        mount
        for identity, mount in mounts.items()
        if identity != mount_id and _protocol(mount) < messages.OLDEST_PROTOCOL
    ]
    if stranded:
        raise launch.OtherVersion(
            f"version {__version__} cannot serve {_described(stranded)}, which use this cache directory as well: "
            "unmount them, or upgrade them to a version in between first"
        )


def _in_the_way(status: dict[str, Any]) -> str:
    mounts = list(status.get("mounts", {}).values())
    if _protocol(status) > messages.PROTOCOL_VERSION:
        return (
            f"{_described(mounts)} use this cache directory with an agent of version {status.get('version')}, "
            f"which does not serve version {__version__}: mount with that version, or use another --cache-dir"
        )
    return (
        f"{_described(mounts)} use this cache directory, and this is version {__version__}: "
        "run `cachefs upgrade` for each of them first, or use another --cache-dir"
    )


def _described(mounts: list[dict[str, Any]]) -> str:
    """Return "2 mounts of version 1.0 (/a, /b)"."""
    versions = sorted({str(mount.get("version", "?")) for mount in mounts})
    places = sorted(str(mount.get("mountpoint")) for mount in mounts)
    shown = ", ".join(places[:SHOWN]) + (", ..." if len(places) > SHOWN else "")
    many = "1 mount" if len(mounts) == 1 else f"{len(mounts)} mounts"
    return f"{many} of version {' and '.join(versions)} ({shown})"
