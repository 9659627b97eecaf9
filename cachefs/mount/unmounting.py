"""Takes a mount away and waits for its processes to end: through its supervisor when that answers, else directly.

Works for live mounts, for mounts whose supervisor or worker is gone, and for dead ones; never touches the mount itself.
"""

from __future__ import annotations

import errno
import time

from cachefs.errors import MountError
from cachefs.mount import kernel, mountinfo, registry
from cachefs.mount.control import ControlError, ask
from cachefs.mount.launch import end_orphan
from cachefs.runtime import RuntimeDir

_ASK_S = 30.0


def unmount(path: str, runtime: RuntimeDir, *, lazy: bool = False, force: bool = False, timeout_s: float = 10.0) -> str:
    """Unmount `path` and return a line that says what was done.

    `lazy`: when it is in use, detach it and serve open files on. `force`: abort it, whoever uses it. Raises
    MountError: in use (says by whom), not a mount of ours, not allowed.
    """
    try:
        mountpoint = mountinfo.canonical(path)
    except OSError as error:
        raise MountError(f"{path}: {error.strerror}") from error
    mount = mountinfo.find_mount(mountpoint)
    if mount is None or not mount.is_cachefs:
        return _end_detached(mountpoint, mount, runtime, force=force, timeout_s=timeout_s)
    known = registry.look_up(runtime, mountpoint)
    if known.answers:
        return _through_supervisor(mountpoint, known, runtime, lazy=lazy, force=force, timeout_s=timeout_s)
    if known.alive and not force:
        pid = known.state["supervisor_pid"]
        raise MountError(
            f"the supervisor of {mountpoint} (pid {pid}) does not answer; use --force to unmount without it"
        )
    return _directly(mount, known, runtime, lazy=lazy, force=force, timeout_s=timeout_s)


def _through_supervisor(
    mountpoint: str, known: registry.Supervised, runtime: RuntimeDir, *, lazy: bool, force: bool, timeout_s: float
) -> str:
    request = {"command": "unmount", "lazy": lazy, "force": force}
    try:
        reply = ask(runtime.mount(known.identity, "sock"), request, _ASK_S)
    except ControlError as error:
        raise MountError(f"{error}; use --force to unmount without it") from error
    if not reply.get("ok"):
        if reply.get("kind") == "busy":
            raise _busy(mountpoint)
        raise MountError(str(reply.get("text")))
    pid = known.state["supervisor_pid"]
    if reply.get("detached"):
        return _detached_line(mountpoint, pid, lazy=lazy)
    if not registry.wait_for_end(pid, timeout_s):
        raise MountError(
            f"{mountpoint} is unmounted, but its supervisor (pid {pid}) has not ended within {timeout_s:g} s"
        )
    return f"{mountpoint} is unmounted"


def _detached_line(mountpoint: str, pid: int, *, lazy: bool) -> str:
    why = "its open files" if lazy else "other mount name spaces, or bind mounts, that still show it"
    return f"{mountpoint} is unmounted here; supervisor {pid} serves {why} until they are gone"


def _directly(
    mount: mountinfo.Mount,
    known: registry.Supervised,
    runtime: RuntimeDir,
    *,
    lazy: bool,
    force: bool,
    timeout_s: float,
) -> str:
    mountpoint = mount.mountpoint
    try:
        if force:
            _abort(mount)
        _unmount_or_detach(mountpoint, detach=lazy or force)
    except kernel.MountFailure as error:
        if error.errno == errno.EBUSY:
            raise _busy(mountpoint) from error
        raise MountError(error.text) from error
    deadline = time.monotonic() + (0.0 if lazy else timeout_s)
    left = [pid for pid in known.pids if not registry.wait_for_end(pid, max(0.0, deadline - time.monotonic()))]
    worker = known.state.get("worker_pid") if not known.pids else None
    if not end_orphan(worker, max(0.0, deadline - time.monotonic()), kill=force):
        left.append(worker or 0)
    if not left:
        registry.forget(runtime, known.identity)
        return f"{mountpoint} is unmounted"
    return _detached_line(mountpoint, left[0], lazy=lazy)


def _abort(mount: mountinfo.Mount) -> None:
    try:
        kernel.abort_connection(mount.connection)
    except kernel.MountFailure:
        if not kernel.may_mount():
            raise
        kernel.unmount(mount.mountpoint, detach=True, force=True)


def _unmount_or_detach(mountpoint: str, *, detach: bool) -> None:
    mount = mountinfo.find_mount(mountpoint)
    if mount is None or not mount.is_cachefs:
        return  # the abort has taken it along
    try:
        kernel.unmount(mountpoint)
    except kernel.MountFailure as error:
        if error.errno != errno.EBUSY or not detach:
            raise
        kernel.unmount(mountpoint, detach=True)


def _end_detached(
    mountpoint: str, mount: mountinfo.Mount | None, runtime: RuntimeDir, *, force: bool, timeout_s: float
) -> str:
    """Deal with a directory that has no mount of ours: only earlier ones, with files still open, can be meant."""
    registry.look_up(runtime, mountpoint)  # a supervisor that was detached behind its back notices it when it is asked
    earlier = registry.detached(runtime, mountpoint)
    if not earlier:
        if mount is not None:
            raise MountError(f"{mountpoint} is a mount of type {mount.fstype}, not of cachefs: use umount")
        raise MountError(f"{mountpoint} is not mounted")
    pids = ", ".join(str(state["supervisor_pid"]) for state in earlier)
    if not force:
        raise MountError(
            f"{mountpoint} is not mounted; supervisor {pids} still serves open files of it (--force ends it)"
        )
    for state in earlier:
        try:
            ask(runtime.mount(state["mount_id"], "sock"), {"command": "unmount", "force": True}, _ASK_S)
        except ControlError as error:
            raise MountError(str(error)) from error
        if not registry.wait_for_end(state["supervisor_pid"], timeout_s):
            raise MountError(f"supervisor {state['supervisor_pid']} of {mountpoint} has not ended")
    return f"ended supervisor {pids}, which still served open files of {mountpoint}"


def _busy(mountpoint: str) -> MountError:
    users = "; ".join(str(holder) for holder in mountinfo.holders(mountpoint))
    who = f"in use by {users}" if users else "in use, by processes that you may not see"
    return MountError(
        f"{mountpoint} is {who}. End them, or use --lazy (open files stay readable) or --force (they fail)"
    )
