"""What requests to the keeper must look like, and what it says of a mount."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from cachefs.keeper.kept import KeptMount
from cachefs.keeper.records import KEY
from cachefs.mount.loop import Loop

NO_RUNNER = "no node service is connected to the keeper: look at the cachefs-node pod of this node"
_PLAN_TEXTS = ("python", "version", "source")
_MAX_TIMEOUT_S = 3600.0


class Wrong(Exception):
    """The request cannot be used; the text says why."""


class WantedMount(NamedTuple):
    """A request for a mount."""

    key: str
    plan: dict[str, Any]
    environment: dict[str, str]
    fingerprint: str
    labels: dict[str, str]
    timeout_s: float


def key_of(request: dict[str, Any]) -> str:
    """Return the key. Raises Wrong."""
    key = request.get("key")
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise Wrong(f"key {key!r}: 1 to 64 of a-z, 0-9 and -")
    return key


def path_of(request: dict[str, Any]) -> str:
    """Return the target. Raises Wrong."""
    target = request.get("target")
    if not isinstance(target, str) or not target:
        raise Wrong("target is missing")
    return target


def labels_of(request: dict[str, Any], *, removing: bool = False) -> dict[str, Any]:
    """Return the labels; `removing`: a label may be null. Raises Wrong."""
    labels = request.get("labels", {})
    if not isinstance(labels, dict) or not all(
        isinstance(text, str) or (removing and text is None) for text in labels.values()
    ):
        raise Wrong("labels must map names to texts")
    return labels


def mount_of(request: dict[str, Any]) -> WantedMount:
    """Return a request for a mount. Raises Wrong."""
    environment, fingerprint = request.get("environment", {}), request.get("fingerprint")
    if not isinstance(environment, dict) or not all(
        isinstance(text, str) and name and "=" not in name and "\0" not in name + text
        for name, text in environment.items()
    ):
        raise Wrong("environment must map names to texts")
    if not isinstance(fingerprint, str):
        raise Wrong("fingerprint is missing")
    timeout_s = request.get("timeout_s", 30.0)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 <= timeout_s <= _MAX_TIMEOUT_S:
        raise Wrong(f"timeout_s {timeout_s!r}: a number of seconds, at most {_MAX_TIMEOUT_S:g}")
    plan = _plan_of(request)
    return WantedMount(key_of(request), plan, environment, fingerprint, labels_of(request), float(timeout_s))


def _plan_of(request: dict[str, Any]) -> dict[str, Any]:
    plan = request.get("plan")
    if not isinstance(plan, dict) or not all(isinstance(plan.get(name), str) for name in _PLAN_TEXTS):
        raise Wrong("plan is missing, or no plan of a mount")
    try:
        fuse = plan["config"]["fuse"]
        float(fuse["ready_timeout_s"]), bool(fuse["read_only"]), bool(fuse["allow_other"])
        int(fuse["read_ahead_bytes"]), str(fuse["engine"])
        str(plan["config"]["cache"]["cache_dir"]), str(plan["config"]["metadata"]["consistency"])
    except (KeyError, TypeError, ValueError) as error:
        raise Wrong(f"plan has no complete configuration: {error}") from error
    return plan


def state_of(kept: KeptMount) -> dict[str, Any]:
    """Return what `status` says of a mount."""
    record, supervision, worker = kept.record, kept.supervision, kept.worker
    state = supervision.state if supervision is not None else {}
    crash = state.get("last_crash")
    return {
        "key": record.key,
        "mountpoint": kept.place,
        "state": "unmounting" if record.leaving else kept.state,
        "fingerprint": record.fingerprint,
        "labels": record.labels,
        "targets": [{"path": path, "read_only": mode} for path, mode in record.targets.items()],
        "worker_pid": worker.pid or worker.remote_pid if worker is not None and worker.launched else None,
        "worker_version": state.get("version") if worker is not None else None,
        "restarts": state.get("restarts", record.restarts),
        "last_crash": crash["what"] if crash else None,
        "connection": state.get("connection"),
        "started_at": record.started_at,
        "source": record.plan["source"],
    }


def end_stray(loop: Loop, pidfd: int, on_dead: Callable[[], None]) -> None:
    """Kill a worker that is not the one of its mount, and say when it is dead. The pidfd is ours."""
    loop.watch(pidfd, functools.partial(_stray_dead, loop, pidfd, on_dead))
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass  # dead already


def _stray_dead(loop: Loop, pidfd: int, on_dead: Callable[[], None]) -> None:
    loop.unwatch(pidfd)
    os.close(pidfd)
    on_dead()
