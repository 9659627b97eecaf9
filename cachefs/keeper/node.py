"""The node service: runs the agent of the node and, on order of the keeper, the workers of all mounts.

It needs no rights: devices come opened from the keeper. It connects to the keeper again and again, keeps a duplicate
of every device (a keeper that was restarted gets them back, with the workers that run), and tells how workers ended.
When it is killed, mounts wait in the kernel for the next one; on SIGTERM it tells the keeper, which moves its workers
to another node service if there is one, and ends when nothing is left to do or the grace time is over.

    <runtime>/mounts/<mount id>.json    beside the agent's socket: which mounts the agent must expect to come back

INVARIANT: workers get the cache, the peers and the log of this node's settings, whatever a plan says of them: one node
has one cache.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachefs import __version__
from cachefs.agent.launch import AgentPlan
from cachefs.config import Config, as_plain
from cachefs.keeper.agent_watch import AgentWatch
from cachefs.keeper.children import Child
from cachefs.keeper.passing import Channel, Message
from cachefs.mount.control import socket_address
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop
from cachefs.runtime import RuntimeDir, write_state

FIRST_STEP_S, LAST_STEP_S = 0.1, 2.0
HELLO_S = 5.0
AGENT_END_S = 10.0
MOUNT_FILES = ("accesslog", "plan")
"""What workers make beside the state file (`cachefs.mount.control_files`)."""
_MAX_ANSWER_BYTES = 64 << 10


class NodeService:
    """One node service. `run` it once."""

    def __init__(
        self, config: Config, keeper_socket: str, environment: Mapping[str, str], *, grace_s: float, journal: Journal
    ) -> None:
        """Raises OSError when the runtime directory cannot be used."""
        self._config = config
        self._keeper_socket = keeper_socket
        self._environment = dict(environment)
        self._grace_s = grace_s
        self._journal = journal
        self._loop = Loop(journal)
        self._runtime = RuntimeDir(config.cache.runtime_dir)
        plan = AgentPlan(config.cache, config.peer, config.log, sys.executable, self._environment)
        self._agent = AgentWatch(plan)
        self._channel: Channel | None = None
        self._step_s = FIRST_STEP_S
        self._complained = ""
        self._leaving = False
        self._kept: dict[str, int] = {}
        """Mount to the duplicate of its device."""
        self._states: dict[str, dict[str, Any]] = {}
        self._children: dict[int, Child] = {}

    def run(self) -> int:
        """Serve until SIGTERM, and return the exit code."""
        self._loop.catch_signals((signal.SIGTERM, signal.SIGINT), lambda _: self._leave())
        self._forget_states()
        self._agent.begin()
        self._connect()
        self._loop.run()
        for child in list(self._children.values()):
            child.end()
        self._agent.end(AGENT_END_S)
        self._journal.info("the node service ends; mounts wait for the next one")
        return 0

    # -- the keeper ---------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(HELLO_S)
            with socket_address(self._keeper_socket) as address:
                connection.connect(address)
            hello = {"command": "runner", "version": __version__, "pid": os.getpid()}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            answer = _read_line(connection)
        except (OSError, ValueError) as error:
            connection.close()
            self._try_again(f"no keeper at {self._keeper_socket}: {error}")
            return
        if not answer.get("ok"):
            connection.close()
            self._try_again(f"the keeper at {self._keeper_socket} refuses: {answer.get('text')}")
            return
        self._step_s, self._complained = FIRST_STEP_S, ""
        self._channel = Channel(self._loop, connection, self._take, self._hung_up)
        self._introduce(self._channel)

    def _try_again(self, why: str) -> None:
        if why != self._complained:
            self._journal.warning(f"{why}; trying again")
        self._complained = why
        self._loop.after("connect", self._step_s, self._connect)
        self._step_s = min(2 * self._step_s, LAST_STEP_S)

    def _introduce(self, channel: Channel) -> None:
        """Give back what an earlier keeper has given."""
        for mount, device in self._kept.items():
            running = [child for child in self._children.values() if child.mount == mount]
            for child in running:
                channel.send({"say": "kept", "mount": mount, "pid": child.pid}, [device, child.pidfd])
            if not running:
                channel.send({"say": "kept", "mount": mount, "pid": 0}, [device])
        channel.send({"say": "here"})
        if self._leaving:
            channel.send({"say": "leaving"})
        self._journal.info(f"connected to the keeper, {len(self._kept)} mounts kept")

    def _hung_up(self) -> None:
        self._channel = None
        self._try_again("the keeper hung up")

    def _say(self, message: Message, *descriptors: int) -> None:
        if self._channel is not None:
            self._channel.send(message, descriptors)

    def _take(self, message: Message, descriptors: list[int]) -> None:
        word = message.get("do")
        if word == "start" and 3 <= len(descriptors) <= 4:
            self._start(message, descriptors)
        elif word == "keep" and len(descriptors) == 1:
            self._keep(str(message["mount"]), message["state"], descriptors.pop())
        elif word == "drop":
            self._drop(str(message["mount"]))
        elif word == "kill":
            child = self._children.get(int(message["pid"]))
            if child is not None:
                child.kill()
        elif word == "farewell" and self._leaving:
            self._loop.stop()
        for descriptor in descriptors:
            os.close(descriptor)

    # -- devices ------------------------------------------------------------------------------------------------------

    def _keep(self, mount: str, state: Mapping[str, Any], device: int) -> None:
        former = self._kept.pop(mount, -1)
        if former >= 0:
            os.close(former)
        self._kept[mount] = device
        self._states[mount] = dict(state)
        self._write_state(mount, 0)

    def _drop(self, mount: str) -> None:
        """Nobody needs this mount any more, nor a worker of it."""
        device = self._kept.pop(mount, -1)
        if device >= 0:
            os.close(device)
        for child in self._children.values():
            if child.mount == mount:
                child.kill()
        state = self._states.pop(mount, None)
        if state is None or any(other["mount_id"] == state["mount_id"] for other in self._states.values()):
            return  # the next mount at the same place has taken the files over
        for suffix in ("json", *MOUNT_FILES):
            Path(self._runtime.mount(state["mount_id"], suffix)).unlink(missing_ok=True)

    def _write_state(self, mount: str, worker_pid: int) -> None:
        """Let the agent know of a mount that it serves: its tiers stay while there is one."""
        state = {
            **self._states[mount],
            "state": "serving",
            "supervisor_pid": os.getpid(),
            "worker_pid": worker_pid,
            "cache_dir": self._config.cache.cache_dir,
            "runtime_dir": self._runtime.path,
        }
        try:
            write_state(self._runtime.mount(state["mount_id"], "json"), state)
        except OSError as error:
            self._journal.warning(f"the state of a mount cannot be written: {error}")

    def _forget_states(self) -> None:
        """Files of the node service before this one: the keeper says which mounts there are."""
        for path in Path(self._runtime.path, "mounts").glob("*.json"):
            path.unlink(missing_ok=True)

    # -- workers ------------------------------------------------------------------------------------------------------

    def _start(self, message: Message, descriptors: list[int]) -> None:
        mount = str(message["mount"])
        plan = self._own_plan(message["plan"])
        environment = worker_environment(self._environment, message["environment"])
        try:
            child = Child(self._loop, self._journal, mount, plan, environment, descriptors, self._ended)
        except OSError as error:
            self._say({"say": "refused", "order": message["order"], "text": f"a worker cannot be started: {error}"})
            return
        self._children[child.pid] = child
        self._say({"say": "started", "order": message["order"], "pid": child.pid}, child.pidfd)
        if mount in self._states:
            self._write_state(mount, child.pid)

    def _own_plan(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: as_plain(getattr(self._config, name)) for name in ("cache", "peer", "log")}
        return {
            **plan,
            "config": {**plan["config"], **own},
            "runtime_dir": self._runtime.path,
            "python": sys.executable,
            "version": __version__,
            "log_file": self._config.log.log_file,
            "agent_environment": self._environment,
        }

    def _ended(self, child: Child) -> None:
        self._children.pop(child.pid, None)
        self._say({"say": "ended", "pid": child.pid, "code": child.code, "words": child.last_words()})

    # -- the end ------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self._leaving:
            self._loop.stop()  # told twice: at once
            return
        self._leaving = True
        self._journal.info(f"leaving; workers go on for {self._grace_s:g} s at most")
        self._say({"say": "leaving"})
        if not self._children:
            self._loop.stop()
        self._loop.after("grace", self._grace_s, self._loop.stop)


def worker_environment(own: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker: a mount that brings credentials of its own sees none of the node's."""
    brings = any(name.startswith("AWS_") for name in extra)
    kept = {name: text for name, text in own.items() if not (brings and name.startswith("AWS_"))}
    return {**kept, **extra}


def _read_line(connection: socket.socket) -> dict[str, Any]:
    """Return the keeper's answer. By bytes: what follows has descriptors with it. Raises OSError, ValueError."""
    received = b""
    while not received.endswith(b"\n"):
        piece = connection.recv(1)
        if not piece or len(received) > _MAX_ANSWER_BYTES:
            raise ConnectionError("it hung up")
        received += piece
    answer = json.loads(received)
    return answer if isinstance(answer, dict) else {}
