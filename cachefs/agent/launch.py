"""Finding the agent of a cache directory, and starting it when none runs (as bazel and adb do with their servers).

Everything here BLOCKS; `cachefs mount` calls it before it mounts, workers call it in a thread when their agent has
died. Two callers at once start one agent: they take turns under a lock, and the second finds the first one's agent.
The agent itself holds other locks for as long as it lives (`cachefs.agent.presence`), so there is never a second one
even if somebody starts it by hand or with another runtime directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cachefs import __version__, errors
from cachefs.agent import framing, messages
from cachefs.config import CacheConfig, Config, LogConfig, PeerConfig, as_plain
from cachefs.runtime import RuntimeDir, agent_id, lock_holder

CONNECT_RETRY_S = 0.02
LIFE_S = 2.0
RUNNING_RETRY_S = 0.1
"""Another agent holds the lock and does not listen yet (or any more): each look starts a process."""
_PROXY_NAMES = frozenset({"http_proxy", "https_proxy", "all_proxy", "no_proxy"})
_CREDENTIALS = struct.Struct("3i")
"""struct ucred: process, user, group of whoever listens."""
_NOBODY = frozenset({errno.ENOENT, errno.ECONNREFUSED})


class OtherVersion(errors.AgentUnavailable):
    """The agent that runs does not speak our protocol (see `cachefs.agent.succession`)."""


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """How to start the agent of a cache directory."""

    cache: CacheConfig
    peer: PeerConfig
    log: LogConfig
    python: str
    environment: Mapping[str, str]

    @property
    def runtime(self) -> RuntimeDir:
        """The runtime directory (made if needed)."""
        return RuntimeDir(self.cache.runtime_dir)

    @property
    def lock_path(self) -> str:
        """What the running agent holds."""
        return self.runtime.agent(self.cache.cache_dir, "lock")

    @property
    def socket_path(self) -> str:
        """Where the agent listens."""
        return self.runtime.agent(self.cache.cache_dir, "sock")


def silent_listener(path: str, lock_path: str, timeout_s: float) -> int:
    """Return the process that listens at `path` and shows no reaction within this time; 0 for one that does, and when
    nobody listens. Raises OSError.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        pid = 0
        try:
            connection.connect(path)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid = _CREDENTIALS.unpack(credentials)[0]
            connection.sendall(framing.encode(messages.Ping(id=1)))
            connection.recv(1)
        except TimeoutError:
            return pid
        except BlockingIOError:  # so many wait already that there is no room for one more
            return lock_holder(lock_path)
        except (FileNotFoundError, ConnectionError):
            return 0
    return 0


def connect(path: str, timeout_s: float | None = None) -> socket.socket | None:
    """Return a connection to a listening agent, or None when there is none. Raises AgentUnavailable for other
    faults.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        if error.errno in _NOBODY:
            return None
        raise errors.AgentUnavailable(f"cannot reach the agent at {path}: {error.strerror or error}") from error
    return connection


def ensure_agent(plan: AgentPlan, timeout_s: float) -> socket.socket:
    """Return a connection to the agent, which is started if needed. Raises AgentUnavailable with the agent's own
    words.
    """
    path = plan.socket_path
    connection = connect(path)
    if connection is not None:
        return connection
    deadline = time.monotonic() + timeout_s
    with turn(plan, deadline):
        return start_agent(plan, deadline)


@contextlib.contextmanager
def turn(plan: AgentPlan, deadline: float) -> Iterator[None]:
    """Hold the right to start the agent of a cache directory. Raises AgentUnavailable when others hold it too long."""
    with open(plan.runtime.agent(plan.cache.cache_dir, "start"), "w", encoding="ascii") as file:
        _take_turn(file.fileno(), deadline)
        yield


def start_agent(plan: AgentPlan, deadline: float) -> socket.socket:
    """Return a connection to the agent, which is started if none listens. Only in one's turn. Raises AgentUnavailable
    with the agent's own words.
    """
    path = plan.socket_path
    while True:
        connection = connect(path)
        if connection is not None:
            return connection
        _start(plan, deadline)
        if time.monotonic() > deadline:
            raise errors.AgentUnavailable(f"the agent did not listen at {path} in time")


def _take_turn(descriptor: int, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise errors.AgentUnavailable("another process has been starting the agent for too long") from error
            time.sleep(CONNECT_RETRY_S)


def _start(plan: AgentPlan, deadline: float) -> None:
    """Start the agent and wait until it listens, fails, or the deadline is over."""
    log_path = _log_path(plan)
    ready, report = os.pipe()
    try:
        with open(log_path, "ab", opener=_private) as log, _sigterm_blocked():
            child = subprocess.Popen(
                [plan.python, "-m", "cachefs.agent.main", "--ready-fd", str(report)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[report],
                start_new_session=True,  # it outlives us, and a Ctrl-C at our terminal is not meant for it
                cwd="/",
                env=dict(plan.environment),
            )
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(report)
    # It outlives us, or it dies before us, and then somebody has to take note.
    threading.Thread(target=child.wait, name="agent-reaper", daemon=True).start()
    try:
        assert child.stdin is not None
        with child.stdin as stdin:
            sections = {"cache": as_plain(plan.cache), "peer": as_plain(plan.peer), "log": as_plain(plan.log)}
            stdin.write(json.dumps({**sections, "log_file": log_path}).encode())
    except BrokenPipeError:
        pass  # it has died already; its report says more
    with open(ready, "rb") as reports:
        # A pipe, not polling: a reader may be waiting behind us, and each millisecond is part of its stall.
        if not _readable(reports.fileno(), max(0.0, deadline - time.monotonic())):
            raise errors.AgentUnavailable(f"the agent was started but is not ready; its log: {log_path}")
        line = reports.readline()
    outcome: dict[str, Any] = (
        json.loads(line) if line else {"ok": False, "text": f"it ended at once; its log: {log_path}"}
    )
    if not outcome["ok"] and not outcome.get("running"):
        raise errors.AgentUnavailable(f"the agent cannot start: {outcome['text']}")
    if outcome.get("running"):
        time.sleep(RUNNING_RETRY_S)


def _readable(descriptor: int, timeout_s: float) -> bool:
    """Wait until there is something to read. (With select(2), numbers of descriptors would end at 1023.)"""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _log_path(plan: AgentPlan) -> str:
    """Return where the agent logs: to the log file that was asked for, if it can be written, for a worker that needs an
    agent is not to fail because of it (`cachefs mount` does).
    """
    own = plan.runtime.agent(plan.cache.cache_dir, "log")
    if not plan.log.log_file:
        return own
    try:
        os.close(_private(plan.log.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC))
    except OSError:
        return own
    return plan.log.log_file


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread, for a child that inherits that and unblocks it when it can end in order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def aws_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that decide about credentials, endpoints and proxies, to be sent to the agent."""
    return {
        name: value for name, value in environment.items() if name.startswith("AWS_") or name.lower() in _PROXY_NAMES
    }


def attach_message(
    config: Config,
    environment: Mapping[str, str],
    mount_id: str,
    mountpoint: str,
    *,
    request_id: int,
    check: bool,
    mounted_at_s: float,
    given: Collection[str] = (),
) -> messages.Attach:
    """Return the message by which a mount introduces itself. `given`: settings that somebody asked for.

    One that keeps nothing has no say in what its volume may keep.
    """
    sections = ["s3", "metadata", "cache", "peer", *(["limits"] if config.fuse.cache else [])]
    return messages.Attach(
        id=request_id,
        protocol=messages.PROTOCOL_VERSION,
        version=__version__,
        mount_id=mount_id,
        mountpoint=mountpoint,
        pid=os.getpid(),
        volume={name: as_plain(getattr(config, name)) for name in sections},
        environment=aws_environment(environment),
        check=check,
        mounted_at_s=mounted_at_s,
        given=sorted(given),
    )


def check_volume(
    config: Config,
    environment: Mapping[str, str],
    mount_id: str,
    mountpoint: str,
    python: str,
    mounted_at_s: float,
    given: Collection[str],
) -> list[str]:
    """Start the agent if needed and let it check that the bucket can be listed. Returns notices for the person who
    mounts.

    Raises BucketNotFound, CredentialsError, AccessDenied, StorageUnavailable, UsageError, OtherVersion or
    AgentUnavailable, each with a message for a person.
    """
    plan = AgentPlan(config.cache, config.peer, config.log, python, environment)
    timeout_s = config.fuse.ready_timeout_s
    attach = attach_message(
        config, environment, mount_id, mountpoint, request_id=1, check=True, mounted_at_s=mounted_at_s, given=given
    )
    try:
        answer = ask(ensure_agent(plan, timeout_s), attach, timeout_s)
    except errors.AgentUnavailable as error:
        raise errors.AgentUnavailable(_why_silent(plan) or str(error)) from error
    if isinstance(answer, messages.Failure):
        raise failure_error(answer)
    assert isinstance(answer, messages.Attached)
    return list(answer.notices)


def running_agent(cache: CacheConfig, timeout_s: float) -> socket.socket:
    """Return a connection to the agent that runs; none is ever started, and no directory made: whoever asks may be
    another user, and in another container. Raises AgentUnavailable.
    """
    path = f"{cache.runtime_dir}/agents/{agent_id(cache.cache_dir)}.sock"
    connection = connect(path, timeout_s)
    if connection is None:
        raise errors.AgentUnavailable(f"no agent listens at {path}")
    return connection


def ping(cache: CacheConfig, timeout_s: float) -> None:
    """Return when the agent that runs shows a sign of life. Raises AgentUnavailable when it does not within this
    time.
    """
    if not isinstance(ask(running_agent(cache, timeout_s), messages.Ping(id=1), timeout_s), messages.Done):
        raise errors.AgentUnavailable("the agent answered something else")


def answers(cache: CacheConfig, timeout_s: float) -> bool:
    """Return whether the agent that runs, if any, shows a sign of life within this time."""
    try:
        ping(cache, timeout_s)
    except errors.AgentUnavailable:
        return False
    return True


def check_running(
    config: Config,
    environment: Mapping[str, str],
    mount_id: str,
    mountpoint: str,
    *,
    timeout_s: float,
    mounted_at_s: float = 0.0,
    own_environment: bool = False,
) -> list[str]:
    """Let the agent that runs check that the bucket can be listed, and return its notices; none is ever started.

    `own_environment`: with the agent's own keys. Raises as `check_volume`.
    """
    attach = attach_message(
        config, environment, mount_id, mountpoint, request_id=1, check=True, mounted_at_s=mounted_at_s
    )
    if own_environment:
        attach = msgspec.structs.replace(attach, own_environment=True)
    answer = ask(running_agent(config.cache, timeout_s), attach, timeout_s)
    if isinstance(answer, messages.Failure):
        raise failure_error(answer)
    assert isinstance(answer, messages.Attached)
    return list(answer.notices)


def _why_silent(plan: AgentPlan) -> str:
    """Return what to do about an agent that hangs. (A worker replaces it; somebody who mounts waits less long.)"""
    try:
        pid = silent_listener(plan.socket_path, plan.lock_path, LIFE_S)
    except OSError:
        return ""
    return f"the agent of {plan.cache.cache_dir} hangs: end it with `kill -9 {pid}` and mount again" if pid else ""


def stop_agent(path: str, timeout_s: float, *, force: bool) -> bool:
    """Ask a running agent to end, and wait until it does not listen any more. Returns False when it stays because
    mounts are attached (never with `force`).
    """
    connection = connect(path)
    if connection is not None and isinstance(
        ask(connection, messages.Stop(id=1, force=force), timeout_s), messages.Failure
    ):
        return False
    deadline = time.monotonic() + timeout_s
    while (connection := connect(path)) is not None:
        connection.close()
        if time.monotonic() > deadline:
            raise errors.AgentUnavailable(f"the old agent at {path} does not end")
        time.sleep(CONNECT_RETRY_S)
    return True


def ask(connection: socket.socket, request: messages.Message, timeout_s: float) -> messages.Answer:
    """Send one request on a fresh connection, return its answer, close. Raises AgentUnavailable."""
    frames = framing.answers()
    with connection:
        connection.settimeout(timeout_s)
        try:
            connection.sendall(framing.encode(request))
            while received := connection.recv(65536):
                for answer in frames.feed(received):
                    return answer
        except OSError as error:
            raise errors.AgentUnavailable(f"the agent did not answer: {error}") from error
    raise errors.AgentUnavailable("the agent closed the connection without an answer")


def failure_error(failure: messages.Failure) -> errors.CachefsError:
    """Return the exception that a Failure stands for."""
    if failure.kind == messages.OTHER_VERSION:
        return OtherVersion(f"{failure.text}, and this is {__version__} with protocol {messages.PROTOCOL_VERSION}")
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, errors.CachefsError):
        return kind(failure.text)
    return errors.StorageUnavailable(f"{failure.kind}: {failure.text}")
