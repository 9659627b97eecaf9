"""Keeper and node service for a driver that finds none: `cachefs csi --mode all` on a machine without Kubernetes.

For tests of the driver (csi-sanity, for one) and to try it. They are processes of their own, as everywhere, and survive
the driver; when it ends in order and nothing is mounted any more, they end as well.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from cachefs.agent.launch import answers
from cachefs.config import Config
from cachefs.errors import ConfigError, MountError
from cachefs.keeper.client import KeeperClient, KeeperError
from cachefs.settings import SETTINGS, render

log = logging.getLogger(__name__)

_SOCKET = "keeper.sock"
_START_S = 20.0
_END_S = 15.0
_LEAVE_S = 3.0
_STEP_S = 0.05
_ASK_S = 1.0


class NodeAlone:
    """A keeper and a node service that this process starts."""

    def __init__(
        self, keeper: str, config: Config, *, root: str, driver_name: str, environment: Mapping[str, str]
    ) -> None:
        """Raises ConfigError when they cannot be started like this."""
        self._directory, name = os.path.split(keeper)
        if name != _SOCKET or not self._directory.startswith("/"):
            raise ConfigError(f"--keeper {keeper}: nobody listens there, and a keeper would listen at DIR/{_SOCKET}")
        self._client = KeeperClient(keeper, 5.0)
        self._keeper = keeper
        self._root = root
        self._driver_name = driver_name
        given = config.cache.runtime_dir
        runtime = f"{self._directory}/node"
        if given not in (runtime, self._directory):
            log.info("--runtime-dir %s is not used: agent and workers meet in %s", given, runtime)
        self.config = replace(config, cache=replace(config.cache, runtime_dir=runtime))
        """That of the node service, and so of the driver."""
        self._environment = {**environment, **_variables(self.config)}
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """BLOCKS. Start both, and return when a volume can be mounted: the keeper knows the node service, and the agent
        answers. Raises MountError.
        """
        try:
            self._spawn(
                "keeper",
                f"--runtime-dir={self._directory}",
                f"--root={self._root}",
                f"--driver-name={self._driver_name}",
                f"--node-uid={os.geteuid()}",
            )
            self._wait("keeper", lambda: True)
            self._spawn("node", f"--keeper={self._keeper}")
            self._wait(
                "node service", lambda: self._client.status().runner is not None and answers(self.config.cache, _ASK_S)
            )
        except BaseException:
            self._end_all()
            raise
        log.info("no keeper ran: started one, and a node service (log and sockets in %s)", self._directory)

    def stop(self) -> None:
        """BLOCKS. End both if nothing is mounted."""
        left = self._left()
        if left:
            log.info("what is mounted is left (%d): keeper and node service stay", left)
            for child in self._children:
                child.returncode = 0  # on purpose: Popen shall not complain about children that nobody waits for
        else:
            self._end_all()

    def _left(self) -> int:
        """Return how many mounts there are; one that was just given back has a moment to end."""
        deadline = time.monotonic() + _LEAVE_S
        while True:
            try:
                mounts = self._client.status().mounts
            except KeeperError:
                return 0
            leaves = all(mount.state == "unmounting" for mount in mounts)
            if not mounts or not leaves or time.monotonic() > deadline:
                return len(mounts)
            time.sleep(_STEP_S)

    def _spawn(self, command: str, *arguments: str) -> None:
        os.makedirs(self._directory, mode=0o755, exist_ok=True)
        with open(f"{self._directory}/{command}.log", "ab", opener=_private) as own:
            child = subprocess.Popen(
                [sys.executable, "-m", "cachefs.cli.main", command, *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=own,
                stderr=own,
                start_new_session=True,
                cwd="/",
            )
        self._children.append(child)

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        child = self._children[-1]
        while True:
            try:
                self._client.status()
                if condition():
                    return
            except KeeperError:
                pass  # not yet
            if child.poll() is not None or time.monotonic() > deadline:
                raise MountError(f"the {what} does not start: {_last_line(self._directory, what.split()[0])}")
            time.sleep(_STEP_S)

    def _end_all(self) -> None:
        for child in reversed(self._children):
            child.terminate()
            try:
                child.wait(_END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()


def listens(keeper: str) -> bool:
    """BLOCKS. Return whether a keeper answers at this socket."""
    try:
        KeeperClient(keeper, 5.0).status()
    except KeeperError:
        return False
    return True


def _variables(config: Config) -> dict[str, str]:
    """Return the settings of the node service as variables."""
    found = {}
    for setting in SETTINGS:
        if setting.section in ("cache", "peer", "log"):
            value = getattr(getattr(config, setting.section), setting.field)
            if value != setting.default:
                found[setting.variable] = render(setting, value)
    return found


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _last_line(directory: str, name: str) -> str:
    try:
        with open(f"{directory}/{name}.log", "rb") as file:
            lines = file.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it says nothing"
