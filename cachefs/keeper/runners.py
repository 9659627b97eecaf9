"""The node services that are connected, and the workers that wait to be started by one.

Usually there is one. During an update that begins the next before it ends the last there are two: the newest that is
not leaving gets the orders, and mounts move to it. Each of them keeps a duplicate of every device, so that mounts
outlive this process.

    keeper to node service                                      descriptors
    {"do": "start", "order": N, "mount": M, "plan": {...}, "environment": {...}}   device, report, control,
                                                                and the wake-up guard, if there is one
    {"do": "keep", "mount": M, "state": {...}}                  device
    {"do": "drop", "mount": M}
    {"do": "kill", "pid": P}                                    P as the node service sees it
    {"do": "farewell"}                                          nothing of it is needed any more

    node service to keeper
    {"say": "kept", "mount": M, "pid": P or 0}                  device, and the worker's pidfd if there is one
    {"say": "here"}                                             that was all that it has kept
    {"say": "started", "order": N, "pid": P}                    pidfd
    {"say": "refused", "order": N, "text": "..."}
    {"say": "ended", "pid": P, "code": C, "words": "..."}
    {"say": "leaving"}
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cachefs.keeper.passing import Channel, Message
from cachefs.keeper.remote_worker import RemoteWorker, pid_of
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop

STARTING_AT_ONCE = max(4, 2 * (os.cpu_count() or 1))
"""Workers that may be starting at the same time: each takes half a second of a CPU until it is prepared."""
FAREWELL_S = 0.05
"""How long what a leaving node service is told last may wait behind what becomes of its workers."""
STARTING_S = 10.0
"""After which one that is not prepared makes room for the next."""


class Household(Protocol):
    """Whom the node services tell what concerns mounts."""

    def devices(self) -> list[tuple[str, dict[str, Any], int]]:
        """Return every mount, what a node service should know of it, and its device."""

    def given_back(self, runner: Runner, mount: str, remote_pid: int, device: int, pidfd: int) -> None:
        """A node service has kept a device (and runs a worker: `pidfd`, else -1). Both are the household's now."""

    def runner_here(self, runner: Runner) -> None:
        """It has said all, and can be given orders."""

    def runner_leaves(self, runner: Runner) -> None:
        """It wants to end, or has gone."""


class Runner:
    """One connected node service."""

    def __init__(self, hello: Message, uid: int, runners: Runners, household: Household, log: Journal) -> None:
        self.uid = uid
        self.version = str(hello.get("version", ""))
        self.pid = int(hello.get("pid", 0))
        self.here = False
        self.leaving = False
        self.channel: Channel
        self.workers: set[RemoteWorker] = set()
        self._ordered: dict[int, RemoteWorker] = {}
        self._runners = runners
        self._household = household
        self._log = log

    @property
    def connected(self) -> bool:
        """Whether it can be talked to."""
        return not self.channel.closed

    def give(self, number: int, worker: RemoteWorker) -> None:
        """Have a worker started."""
        try:
            message, descriptors = worker.order()
        except OSError as error:
            worker.refused(f"no pipe for a worker: {error.strerror}")
            return
        worker.runner = self
        self.workers.add(worker)
        self._ordered[number] = worker
        self.channel.send({**message, "order": number}, descriptors)
        for lent in descriptors[1:]:
            os.close(lent)

    def keep(self, mount: str, state: dict[str, Any], device: int) -> None:
        """Let it keep a duplicate of a device."""
        self.channel.send({"do": "keep", "mount": mount, "state": state}, [device])

    def drop(self, mount: str) -> None:
        """A mount is gone: nothing has to be kept of it."""
        self.channel.send({"do": "drop", "mount": mount})

    def kill(self, worker: RemoteWorker) -> None:
        """Have a worker killed."""
        self.channel.send({"do": "kill", "pid": worker.remote_pid})

    def forget(self, worker: RemoteWorker) -> None:
        """A worker is over."""
        self.workers.discard(worker)
        if self.leaving and not self.workers:
            self._runners.later((self, "farewell"), self._say_farewell)

    def _say_farewell(self) -> None:
        """After the end of the worker's mount, if that ends with it: what is to be dropped has to be said before."""
        if not self.workers:
            self.channel.send({"do": "farewell"})

    # -- what it says -------------------------------------------------------------------------------------------------

    def take(self, message: Message, descriptors: list[int]) -> None:
        """Take one message and its descriptors; hang up on what makes no sense."""
        left = list(descriptors)
        try:
            self._take(message, left)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self._log.error(f"node service {self.pid} sent what cannot be used ({error!r}): hanging up")
            self.channel.close()
            self.gone()
        finally:
            for descriptor in left:
                os.close(descriptor)

    def _take(self, message: Message, descriptors: list[int]) -> None:
        """What is used of the descriptors is taken from the list."""
        word = message["say"]
        if word == "kept":
            device, *pidfds = descriptors
            pidfd = self._own_process(*pidfds) if pidfds else -1
            mount, pid = str(message["mount"]), int(message["pid"])
            descriptors.clear()
            self._household.given_back(self, mount, pid, device, pidfd)
        elif word == "started":
            pidfd, pid = self._own_process(*descriptors), int(message["pid"])
            worker = self._ordered.pop(int(message["order"]), None)
            if worker is not None:
                descriptors.clear()
                worker.launch_seen(pid, pidfd)
        elif word == "refused":
            self._refused(message)
        elif word == "ended":
            self._ended(message)
        elif word == "here":
            self._is_here()
        elif word == "leaving":
            self._leave()

    def _own_process(self, pidfd: int) -> int:
        """Return the pidfd if it is of a process of this node service's user: we kill as root. Raises ValueError."""
        pid = pid_of(pidfd)
        try:
            owner = os.stat(f"/proc/{pid}").st_uid if pid else self.uid  # what cannot be seen cannot be killed either
        except OSError:
            owner = self.uid  # dead already
        if owner != self.uid:
            raise ValueError(f"process {pid} belongs to user {owner}, not {self.uid}")
        return pidfd

    def gone(self) -> None:
        """It hung up."""
        if not self.leaving:
            self._log.warning(f"node service {self.pid} is gone")
        self._runners.remove(self)
        self.leaving = True
        for worker in list(self.workers):
            worker.runner_lost()
        self.workers.clear()
        self._household.runner_leaves(self)

    def _refused(self, message: Message) -> None:
        worker = self._ordered.pop(int(message["order"]), None)
        if worker is not None:
            worker.refused(str(message.get("text", "no reason given")))

    def _ended(self, message: Message) -> None:
        for worker in list(self.workers):
            if worker.remote_pid == message.get("pid"):
                worker.ended(int(message["code"]), str(message.get("words", "")))

    def _is_here(self) -> None:
        self.here = True
        self._log.info(f"node service {self.pid}, version {self.version}, is here")
        for mount, state, device in self._household.devices():
            self.keep(mount, state, device)
        self._household.runner_here(self)
        self._runners.give_orders()

    def _leave(self) -> None:
        self.leaving = True
        self._log.info(f"node service {self.pid} leaves")
        self._household.runner_leaves(self)
        if not self.workers:
            self.channel.send({"do": "farewell"})


class Runners:
    """All of them, and the line of workers that wait. Fulfils `remote_worker.Orders`."""

    def __init__(self, loop: Loop, log: Journal) -> None:
        self._loop = loop
        self._log = log
        self._runners: list[Runner] = []
        self._line: deque[RemoteWorker] = deque()
        self._starting: set[RemoteWorker] = set()
        self._orders = 0

    @property
    def current(self) -> Runner | None:
        """The one that gets orders."""
        staying = [runner for runner in self._runners if runner.here and not runner.leaving]
        return staying[-1] if staying else None

    @property
    def all(self) -> Sequence[Runner]:
        """All that are connected and have said what they kept."""
        return [runner for runner in self._runners if runner.here]

    def welcome(
        self,
        hello: Message,
        uid: int,
        household: Household,
        open_channel: Callable[[Callable[[Message, list[int]], object], Callable[[], object]], Channel],
    ) -> None:
        """A node service has come, whose user the kernel says is `uid`."""
        runner = Runner(hello, uid, self, household, self._log)
        runner.channel = open_channel(runner.take, runner.gone)
        self._runners.append(runner)

    def later(self, name: object, callback: Callable[[], object]) -> None:
        """Call back when everything has happened that is due now."""
        self._loop.after(name, FAREWELL_S, callback)

    def remove(self, runner: Runner) -> None:
        """It has gone."""
        self._runners.remove(runner)

    def close(self) -> None:
        """Hang up."""
        for runner in self._runners:
            runner.channel.close()
        self._runners.clear()

    def submit(self, worker: RemoteWorker) -> None:
        """Have a worker started, now or later."""
        self._starting.discard(worker)
        if worker not in self._line:
            self._line.append(worker)
        self._loop.after(self, 0, self.give_orders)

    def withdraw(self, worker: RemoteWorker) -> None:
        """It is not wanted any more, or has been started: there is room for the next."""
        if worker in self._line:
            self._line.remove(worker)
        if worker in self._starting:
            self._starting.discard(worker)
            self._loop.cancel((self, worker))
            self._loop.after(self, 0, self.give_orders)

    def give_orders(self) -> None:
        """Let the node service start what waits, as far as there is room."""
        runner = self.current
        while runner is not None and self._line and len(self._starting) < STARTING_AT_ONCE:
            worker = self._line.popleft()
            self._starting.add(worker)
            self._loop.after((self, worker), STARTING_S, functools.partial(self.withdraw, worker))
            self._orders += 1
            runner.give(self._orders, worker)
