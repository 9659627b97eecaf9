"""How an agent is found, and how it stays the only one of its cache directory.

    <runtime>/agents/<id>.lock    flock: one agent for each cache directory in this runtime directory
    <cache dir>                   flock (the directory itself, so that a read-only one can be locked too): one agent for
                                  each cache directory, whatever their runtime directories are
    <cache dir>/agent             who that is: words for whoever comes second, nothing depends on them
    <runtime>/agents/<id>.sock    where it listens

Runtime directories lie in /run and /tmp, where cleaners remove what looks old to them. An agent whose socket is gone
serves its workers and is found by nobody else, so it looks every second, and listens again.

INVARIANT: the lock of the cache directory is held from before anything in it is opened until all of it is closed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from cachefs import errors
from cachefs.runtime import RuntimeDir

log = logging.getLogger(__name__)

WATCH_S = 1.0
"""How often the agent looks for its socket: one stat(2)."""
BACKLOG = 128
OWNER_FILE = "agent"
MAX_OWNER_BYTES = 8192
Handle = Callable[[trio.SocketStream], Awaitable[object]]


class AlreadyRunning(errors.AgentUnavailable):
    """Another agent of the same runtime directory serves this cache directory: it can be asked."""


class Presence:
    """The locks and the socket of one agent."""

    def __init__(self, runtime_dir: str, cache_dir: str) -> None:
        """Raises OSError for a runtime directory that cannot be used."""
        self._runtime = RuntimeDir(runtime_dir)
        self._cache_dir = cache_dir
        self._socket = self._runtime.agent(cache_dir, "sock")
        self._lock_file = self._runtime.agent(cache_dir, "lock")
        self._lock = self._cache_lock = -1
        self._listener: trio.SocketListener
        self._listening: tuple[int, int] | None = None
        self._hidden = False

    # -- the only one -------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Become the agent of the cache directory.

        Raises AlreadyRunning; AgentUnavailable when the other agent has another runtime directory, or nothing can be
        locked.
        """
        self._lock = self._lock_runtime()
        try:
            Path(self._cache_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # no such place: whoever wants to write there says so, and there is nothing that two could damage
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            self.release()
            raise self._taken() from error
        except OSError as error:  # file systems of other machines
            log.warning("%s cannot be locked (%s): no second agent must use it", self._cache_dir, error.strerror)
        self._cache_lock = descriptor
        self._sign()

    def _lock_runtime(self) -> int:
        try:
            descriptor = _private(self._lock_file, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise errors.AgentUnavailable(f"cannot lock {self._lock_file}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise AlreadyRunning(f"an agent serves {self._cache_dir} already") from error
        return descriptor

    def _sign(self) -> None:
        owner = {"pid": os.getpid(), "runtime_dir": self._runtime.path}
        try:
            with open(self._owner_file, "w", encoding="utf-8", opener=_private) as file:
                file.write(json.dumps(owner))
        except OSError as error:
            log.debug("%s cannot be written: %s", self._owner_file, error)

    def _taken(self) -> errors.AgentUnavailable:
        """Return what to say of the agent that holds the cache directory."""
        try:
            with open(self._owner_file, encoding="utf-8", opener=_private) as file:
                owner = json.loads(file.read(MAX_OWNER_BYTES))
            pid, runtime_dir = int(owner["pid"]), str(owner["runtime_dir"])
        except (OSError, ValueError, TypeError, KeyError):
            return errors.AgentUnavailable(
                f"another agent uses {self._cache_dir}: choose its --runtime-dir, or another --cache-dir"
            )
        if os.path.realpath(runtime_dir) == os.path.realpath(self._runtime.path):
            # The lock file was removed; the agent takes notice, and listens again.
            return AlreadyRunning(f"an agent serves {self._cache_dir} already")
        return errors.AgentUnavailable(
            f"{self._cache_dir} is used by agent {pid} with the runtime directory {runtime_dir}: "
            f"choose --runtime-dir {runtime_dir}, or another --cache-dir"
        )

    @property
    def _owner_file(self) -> str:
        return os.path.join(self._cache_dir, OWNER_FILE)

    def release(self) -> None:
        """Let the next agent in. Everything that it will open must be closed."""
        if self._cache_lock >= 0:
            try:
                os.unlink(self._owner_file)
            except OSError:
                pass  # read-only, or never written
        for descriptor in (self._cache_lock, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._cache_lock = -1

    # -- to be found --------------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Listen; whoever connects waits for `serve`. Raises AgentUnavailable."""
        try:
            self._listener = self._bind()
        except OSError as error:
            raise errors.AgentUnavailable(f"cannot listen at {self._socket}: {error.strerror or error}") from error

    async def serve(self, handle: Handle, connections: trio.Nursery) -> None:
        """Handle each connection in a task of `connections`, for ever; after `bind`."""
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_accept, handle, self._listener, connections)
                while self._is_there():  # noqa: ASYNC110 - the file system tells nobody
                    await trio.sleep(WATCH_S)
                nursery.cancel_scope.cancel()
            self._listener = await self._bind_again()

    def _bind(self) -> trio.SocketListener:
        temporary = f"{self._socket}.new"
        for path in (temporary, self._socket):  # left behind by an agent that was killed: the lock says that it is gone
            Path(path).unlink(missing_ok=True)
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            raw.bind(temporary)
            os.chmod(temporary, 0o600)
            raw.listen(BACKLOG)
            status = os.stat(temporary)
            os.rename(temporary, self._socket)  # nobody ever meets a socket that is not listening
        except BaseException:
            raw.close()
            raise
        self._listening = status.st_dev, status.st_ino
        return trio.SocketListener(trio.socket.from_stdlib_socket(raw))

    def _is_there(self) -> bool:
        return self._hidden or os.path.lexists(self._socket)

    async def _bind_again(self) -> trio.SocketListener:
        log.warning("%s was removed by somebody: listening there again", self._socket)
        complained = ""
        while True:
            try:
                RuntimeDir(self._runtime.path)
                self._lock_again()
                return self._bind()
            except (OSError, errors.AgentUnavailable) as error:
                if str(error) != complained:
                    log.warning("cannot listen at %s: %s", self._socket, error)
                complained = str(error)
            await trio.sleep(WATCH_S)

    def _lock_again(self) -> None:
        """Hold the lock file that has this name now. Raises AlreadyRunning while somebody who is about to notice us has
        it.
        """
        try:
            if os.path.samestat(os.fstat(self._lock), os.stat(self._lock_file)):
                return
        except FileNotFoundError:
            pass
        former, self._lock = self._lock, self._lock_runtime()
        os.close(former)

    def hide(self) -> None:
        """Take no more connections under the socket's name; those that are there go on."""
        self._hidden = True
        try:
            status = os.stat(self._socket)
            if (status.st_dev, status.st_ino) == self._listening:
                os.unlink(self._socket)
        except OSError:
            pass  # gone already


async def _accept(handle: Handle, listener: trio.SocketListener, connections: trio.Nursery) -> None:
    await trio.serve_listeners(handle, [listener], handler_nursery=connections)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
