"""Starts the supervisor of a mount and waits until the mount answers, or leaves nothing behind.

Detached (the usual way) the supervisor gets a session of its own, its plan on stdin and a log file as stdout and
stderr; a pipe brings back one line that says how it went. In the foreground this process becomes the supervisor
(exec).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import cachefs
from cachefs import errors
from cachefs.config import Config, as_plain
from cachefs.errors import MountError
from cachefs.mount import kernel, mountinfo, registry
from cachefs.runtime import RuntimeDir, mount_id

_MIN_PROBE_S = 5.0
_END_S = 5.0


def make_plan(
    config: Config, mountpoint: str, *, flags: Sequence[str] = (), mounted_at_s: float = 0.0
) -> dict[str, Any]:
    """Return the plan of a mount at `mountpoint` (canonical). `flags` may have "noexec" and "noatime"; `mounted_at_s`
    is what the agent was told when it checked the bucket.
    """
    identity = mount_id(mountpoint)
    own_log = f"{config.cache.runtime_dir}/mounts/{identity}.log"
    return {
        "config": as_plain(config),
        "mountpoint": mountpoint,
        "mount_id": identity,
        "runtime_dir": config.cache.runtime_dir,
        "source": config.s3.source,
        "python": sys.executable,
        "version": cachefs.__version__,
        "log_file": config.log.log_file or ("" if config.fuse.foreground else own_log),
        "mount_flags": list(flags),
        "mounted_at_s": mounted_at_s,
    }


def start_detached(plan: dict[str, Any], environment: Mapping[str, str], timeout_s: float) -> int:
    """Start the supervisor and return its pid when the mount answers.

    Raises the error of `cachefs.errors` that the supervisor reported, or MountError. Whatever is raised,
    KeyboardInterrupt included, no process, mount or state file of this try is left.
    """
    deadline = time.monotonic() + timeout_s
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        child = _spawn(plan, environment, writer)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    try:
        _wait_until_ready(reader, plan, timeout_s, deadline)
        _check_answers(plan, deadline)
    except BaseException:
        _take_back(child, plan)
        raise
    finally:
        os.close(reader)
    child.returncode = 0  # it stays, on purpose: Popen shall not complain about a child that nobody waits for
    return child.pid


def _spawn(plan: dict[str, Any], environment: Mapping[str, str], writer: int) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as stack:
        log = _open_log(plan["log_file"])
        stack.callback(os.close, log)
        stdin = _plan_file(plan)
        stack.callback(os.close, stdin)
        return subprocess.Popen(
            [*_command(plan["python"]), "--ready-fd", str(writer), plan["mountpoint"]],
            env=environment,
            stdin=stdin,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            start_new_session=True,
            cwd="/",
        )


def become_supervisor(plan: dict[str, Any], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by the supervisor, which logs to stderr (or to the log file that was asked for)."""
    os.dup2(_plan_file(plan), 0)
    if plan["log_file"]:
        log = _open_log(plan["log_file"])
        os.dup2(log, 1)
        os.dup2(log, 2)
    command = [*_command(plan["python"]), plan["mountpoint"]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, dict(environment))  # noqa: S606 - an argument list, and no shell is wanted


def _command(python: str) -> list[str]:
    return [python, "-m", registry.SUPERVISOR_MODULE]


def _plan_file(plan: dict[str, Any]) -> int:
    descriptor = os.memfd_create("plan")
    os.write(descriptor, json.dumps(plan).encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _open_log(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MountError(f"cannot write the log file {path}: {error.strerror}") from error


def _wait_until_ready(reader: int, plan: dict[str, Any], timeout_s: float, deadline: float) -> None:
    received = b""
    while not received.endswith(b"\n"):
        readable, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise MountError(
                f"{plan['mountpoint']} was not ready within {timeout_s:g} s (--ready-timeout); see {plan['log_file']}"
            )
        piece = os.read(reader, 64 << 10)
        if not piece:
            raise MountError(f"the supervisor of {plan['mountpoint']} ended without a word; see {plan['log_file']}")
        received += piece
    line = json.loads(received)
    if not line["ok"]:
        kind = getattr(errors, str(line["kind"]), MountError)
        known = isinstance(kind, type) and issubclass(kind, errors.CachefsError)
        raise (kind if known else MountError)(line["text"])


def _check_answers(plan: dict[str, Any], deadline: float) -> None:
    answer = mountinfo.probe(plan["mountpoint"], max(_MIN_PROBE_S, deadline - time.monotonic()))
    if answer is not mountinfo.Answer.ALIVE:
        raise MountError(f"{plan['mountpoint']} was mounted, but it is {answer.value}; see {plan['log_file']}")


def _take_back(child: subprocess.Popen[bytes], plan: dict[str, Any]) -> None:
    """End the supervisor of a failed try, politely, then firmly, then without it."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            break
        child.send_signal(number)
        try:
            child.wait(_END_S)
        except subprocess.TimeoutExpired:
            continue
    _clear_after_death(plan["mountpoint"], RuntimeDir(plan["runtime_dir"]))


def _clear_after_death(mountpoint: str, runtime: RuntimeDir) -> None:
    """Remove what a supervisor that was killed has left: its mount, its worker, its files."""
    known = registry.look_up(runtime, mountpoint)
    if known.alive or known.pids:
        return
    mount = mountinfo.find_mount(mountpoint)
    if mount is not None and mount.is_cachefs:
        try:
            kernel.unmount(mountpoint, detach=True)
        except kernel.MountFailure as error:
            raise MountError(error.text) from error
    end_orphan(known.state.get("worker_pid"), _END_S, kill=True)
    registry.forget(runtime, known.identity)


def end_orphan(worker_pid: int | None, timeout_s: float, *, kill: bool) -> bool:
    """Wait for the end of a worker without supervisor, or `kill` it; returns whether it has ended."""
    if worker_pid is None or b"--device-fd" not in registry.command_line(worker_pid):
        return True
    if kill:
        try:
            os.kill(worker_pid, signal.SIGKILL)
        except OSError:
            pass
    return registry.wait_for_end(worker_pid, timeout_s)
