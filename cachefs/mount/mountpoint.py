"""May something be mounted here? Checks a mount point before anything starts, and clears away a dead mount of ours."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

from cachefs.errors import MountError
from cachefs.mount import kernel, mountinfo, registry
from cachefs.runtime import RuntimeDir, mount_id

_PROBE_S = 5.0


def prepare_mountpoint(path: str, runtime: RuntimeDir, *, nonempty: bool, notify: Callable[[str], object]) -> str:
    """Return the canonical name of a directory on which can be mounted now.

    A mount of ours that nobody serves any more (ENOTCONN) is taken away, and `notify` is told. Raises MountError with a
    line for a person: missing, not a directory, not empty (unless `nonempty`), or mounted already.
    """
    try:
        mountpoint = mountinfo.canonical(path)
    except OSError as error:
        raise MountError(f"{path}: {error.strerror}") from error
    while (mount := mountinfo.find_mount(mountpoint)) is not None and mount.is_cachefs:
        _clear_dead(mount, runtime, notify)
    known = registry.look_up(runtime, mountpoint)
    if known.answers:
        raise MountError(
            f"{mountpoint}: its supervisor (pid {known.state.get('supervisor_pid')}) is just starting or ending"
        )
    registry.forget(runtime, known.identity)
    _check_directory(mountpoint, nonempty)
    return mountpoint


def _clear_dead(mount: mountinfo.Mount, runtime: RuntimeDir, notify: Callable[[str], object]) -> None:
    mountpoint = mount.mountpoint
    known = registry.look_up(runtime, mountpoint)
    if known.alive or known.pids:
        pid = known.state.get("supervisor_pid") if known.alive else known.pids[-1]
        state = known.state.get("state", "running")
        raise MountError(f"{mountpoint} is already mounted: {mount.source}, {state}, supervisor pid {pid}")
    # nobody supervises it, so asking is safe: it is answered by a worker that survived, by the kernel, or not in time
    answer = mountinfo.probe(mountpoint, _PROBE_S)
    if answer is not mountinfo.Answer.DEAD:
        if answer is mountinfo.Answer.ALIVE:
            found, option = f"worker {known.state.get('worker_pid', '?')} still serves it", ""
        else:
            found, option = "it does not answer", "--force "
        raise MountError(
            f"{mountpoint} is already mounted: {mount.source}; its supervisor is gone and {found}; "
            f"take it away with: cachefs umount {option}{mountpoint}"
        )
    try:
        kernel.unmount(mountpoint, detach=True)
    except kernel.MountFailure as error:
        raise MountError(f"a dead mount of an earlier life is in the way: {error.text}") from error
    registry.forget(runtime, known.identity)
    notify(f"took away a dead mount of an earlier life ({mount.source}) from {mountpoint}")


def _check_directory(mountpoint: str, nonempty: bool) -> None:
    try:
        with os.scandir(mountpoint) as entries:
            first = next(entries, None)
    except FileNotFoundError as error:
        raise MountError(f"{mountpoint} does not exist; create it with: mkdir -p {mountpoint}") from error
    except NotADirectoryError as error:
        raise MountError(f"{mountpoint} is not a directory") from error
    except OSError as error:
        raise MountError(f"{mountpoint} cannot be used: {error.strerror}") from error
    if first is not None and not nonempty:
        raise MountError(
            f"{mountpoint} is not empty (it has {first.name!r}), and its files would be hidden; "
            "use -o nonempty if that is meant"
        )


@contextlib.contextmanager
def claimed(mountpoint: str, runtime: RuntimeDir) -> Iterator[None]:
    """Keep a second `cachefs mount` of the same directory out for the time of the block. Raises MountError."""
    path = runtime.mount(mount_id(mountpoint), "lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours, there = os.fstat(descriptor), os.stat(path)
        except BlockingIOError as error:
            os.close(descriptor)
            raise MountError(f"another `cachefs mount` of {mountpoint} is running") from error
        except FileNotFoundError:
            os.close(descriptor)  # its last owner removed it between our open and our lock
            continue
        if ours.st_ino == there.st_ino:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.unlink(path)
        os.close(descriptor)
