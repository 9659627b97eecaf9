"""One mount of the keeper: its record, its device, its supervision, and who waits for it.

    recorded    known from a record; its device is somewhere (a node service gives it back), or nowhere (it is dead)
    supervised  this process holds the device, and a supervision keeps a worker at it
    leaving     taken from its place; served until its last file is closed

INVARIANT: the record is written when any of it changes, before anybody is told. A mount or a bind that cannot be
recorded is not made: the next keeper would take it for an orphan.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from cachefs.keeper import salvage
from cachefs.keeper.binds import Ground, Occupied, PathRefused
from cachefs.keeper.copies import copies_of, follow
from cachefs.keeper.probing import Prober
from cachefs.keeper.records import Record, Records
from cachefs.keeper.remote_worker import RemoteWorker
from cachefs.keeper.runners import Runner, Runners
from cachefs.mount import kernel, mountinfo
from cachefs.mount.crashes import CrashHistory
from cachefs.mount.device import Device, can_resend, mount_options
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop
from cachefs.mount.supervision import Supervision
from cachefs.mount.surroundings import Surroundings
from cachefs.mount.worker_link import Launch, OnEvent, OnExit, WorkerLink
from cachefs.runtime import RuntimeDir

Outcome = Callable[[str, str], None]
"""Gets kind and text of what went wrong, or two empty texts."""


class House(NamedTuple):
    """What all mounts of the keeper share."""

    loop: Loop
    journal: Journal
    runtime: RuntimeDir
    records: Records
    runners: Runners
    ground: Ground
    prober: Prober


class Owner(Protocol):
    """Who has the mount."""

    def mount_gone(self, kept: KeptMount) -> None:
        """It has ended, and its record is removed."""


class KeptMount:
    """One mount. Fulfils `cachefs.mount.surroundings.Ready` for its supervision."""

    def __init__(self, record: Record, house: House, owner: Owner) -> None:
        self.record = record
        self.supervision: Supervision | None = None
        self._house = house
        self._owner = owner
        self._waiting: list[Outcome] = []
        self._failed = False
        self._revivals = CrashHistory()
        self._copies: list[mountinfo.Mount] = []
        """What is to follow when it is served."""

    @property
    def place(self) -> str:
        """Where it is mounted itself."""
        return self._house.ground.place(self.record.key)

    @property
    def worker(self) -> RemoteWorker | None:
        """Its worker."""
        worker = self.supervision.worker if self.supervision is not None else None
        return worker if isinstance(worker, RemoteWorker) else None

    @property
    def serving(self) -> bool:
        """Whether it has been served, and nothing says that it is not now."""
        return self.supervision is not None and self.record.served and self.state != "failed"

    @property
    def state(self) -> str:
        """What it does, in one word."""
        if self.supervision is None:
            return "waiting"
        state = str(self.supervision.state["state"])
        worker = self.supervision.worker
        waits = state in ("starting", "restarting") and (worker is None or not worker.launched)
        return "waiting" if waits and self._house.runners.current is None else state

    @property
    def read_only(self) -> bool:
        """Whether the file system itself takes no writes."""
        return bool(self.record.plan["config"]["fuse"]["read_only"])

    def explain(self) -> str:
        """Say what a mount waits for that is not served."""
        if self._house.runners.current is None:
            return "no node service is connected: look at the cachefs-node pod of this node"
        crash = self.supervision.state["last_crash"] if self.supervision is not None else None
        return f"its worker ended: {crash['what']}" if crash else "its worker is still starting"

    def resend(self) -> None:
        """Have requests that were taken by somebody who is dead now given out again."""
        if self.supervision is not None:
            try:
                self.supervision.device.resend()
            except OSError as error:
                self._house.journal.warning(f"{self.record.key}: requests in flight are lost: {error.strerror}")

    def is_there(self, path: str) -> bool:
        """Whether this mount is on top at a path."""
        return self.owns(mountinfo.find_mount(path))

    def owns(self, mount: mountinfo.Mount | None) -> bool:
        """Whether this is a place of this mount."""
        return mount is not None and mount.is_cachefs and mount.device == self.record.identity

    # -- who waits ----------------------------------------------------------------------------------------------------

    @property
    def sent(self) -> bool:
        """Whether it is known how the start went."""
        return self.record.served or self._failed

    def wait(self, outcome: Outcome) -> None:
        """Tell somebody how the start goes."""
        self._waiting.append(outcome)

    def give_up(self, outcome: Outcome) -> None:
        """Somebody waits no more."""
        if outcome in self._waiting:
            self._waiting.remove(outcome)

    def succeed(self) -> None:
        """It is served."""
        self.record.served = True
        self.save()
        self._tell("", "")
        copies, self._copies = self._copies, []
        follow(copies, self.place, self._house.ground, self._house.prober, self._house.journal)

    def fail(self, kind: str, text: str) -> None:
        """It will not be."""
        self._failed = True
        self._house.journal.error(f"{self.record.key}: {text}")
        self._tell(kind, text)

    def _tell(self, kind: str, text: str) -> None:
        waiting, self._waiting = self._waiting, []
        for outcome in waiting:
            outcome(kind, text)

    def save(self) -> None:
        """Write down what is new of a mount that is recorded. A full file system costs only what of it would be known
        after the death of the keeper.
        """
        try:
            self._house.records.save(self.record)
        except OSError as error:
            self._house.journal.warning(f"cannot write the record of {self.record.mount}: {error.strerror}")

    # -- beginning ----------------------------------------------------------------------------------------------------

    def mount(self) -> None:
        """Mount, and have a worker started. Raises OSError, PathRefused; nothing is left mounted then."""
        ground = self._house.ground
        ground.make_directory(self.place)
        ground.detach(self.place)
        device = Device.mount(mount_options(self.record.plan), can_resend=can_resend(self.record.plan))
        self.record.init, self.record.identity = device.init.hex(), device.identity
        self.record.init_answered, self.record.attached = False, None
        try:
            if self.record.served:  # and recorded: made anew, it is better served than well recorded
                self.save()
            else:
                self._house.records.save(self.record)
            self._supervise(device)
        except OSError:
            device.unmount(detach=True)
            device.close()
            if not self.record.served:
                self._house.records.remove(self.record)
            raise
        if self.supervision is not None:
            self.supervision.begin()

    def salvage(self) -> bool:
        """Take the device from the last worker, if that lives. Returns whether that worked."""
        found = salvage.device_of(self.record.worker_pid)
        return found is not None and self.adopt(found[0], None, 0, found[1])

    def adopt(self, descriptor: int, runner: Runner | None, remote_pid: int, pidfd: int) -> bool:
        """Go on with a device that a node service has kept, and with the worker that it runs (`pidfd`, else -1). Takes
        both descriptors over. Returns False when nobody is at the other end of that device any more.
        """
        if not salvage.is_device_of(descriptor, self.record.identity) or not kernel.is_connected(descriptor):
            _close(descriptor, pidfd)
            return False
        plan, record = self.record.plan, self.record
        if pidfd >= 0 and not (record.served or record.init_answered):
            self._discard(descriptor, pidfd)
            return False
        init = bytes.fromhex(record.init)
        device = Device(self.place, descriptor, init, record.identity, can_resend=can_resend(plan))
        try:
            supervision = self._supervise(device)
        except OSError:  # the mount stays: somebody else has its device too, and it will be tried again
            device.close()
            _close(pidfd)
            raise
        supervision.init_answered, supervision.attached = record.init_answered, record.attached
        supervision.state["restarts"] = record.restarts
        if pidfd >= 0:
            supervision.take_over(lambda event, end: self._inherit(event, end, runner, remote_pid, pidfd))
            if not record.served:  # the last keeper died before it was told
                self.succeed()
        else:
            supervision.begin()
        if record.leaving:
            supervision.departure.notice()
        return True

    def _discard(self, descriptor: int, pidfd: int) -> None:
        """The last keeper died in the middle of the start: nobody was promised anything, and whether the kernel's first
        message is answered is not known. Whoever wants it asks again. Raises PathRefused, OSError.
        """
        try:
            with contextlib.suppress(OSError):  # dead, or the node service's to end, which is told to drop the mount
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            self._house.ground.detach(self.place)
        finally:
            _close(descriptor, pidfd)

    def _inherit(self, on_event: OnEvent, on_exit: OnExit, runner: Runner | None, pid: int, pidfd: int) -> RemoteWorker:
        worker = self._worker(Launch((), None, self.record.plan, -1), on_event, on_exit)
        worker.taken_over(pid, pidfd, runner)
        if runner is not None:
            runner.workers.add(worker)
        return worker

    def _supervise(self, device: Device) -> Supervision:
        house = self._house
        around = Surroundings(house.loop, house.journal, house.runtime, self._order_worker)
        self.supervision = Supervision(
            self.record.plan, device, around, self, self._on_end,
            name_apart=self.record.mount.rpartition(".")[2], on_news=self._on_news,
        )  # fmt: skip
        for runner in house.runners.all:
            runner.keep(self.record.mount, self.public_state(), device.descriptor)
        return self.supervision

    def public_state(self) -> dict[str, Any]:
        """Return what a node service should know of it."""
        plan = self.record.plan
        return {name: plan[name] for name in ("mount_id", "mountpoint", "source")}

    def _worker(self, launch: Launch, on_event: OnEvent, on_exit: OnExit) -> RemoteWorker:
        house, record = self._house, self.record
        return RemoteWorker(
            house.loop, house.journal, house.runners, record.mount, record.environment, launch, on_event, on_exit
        )

    def _order_worker(self, launch: Launch, on_event: OnEvent, on_exit: OnExit) -> WorkerLink:
        worker = self._worker(launch, on_event, on_exit)
        self._house.runners.submit(worker)
        return worker

    def _on_news(self) -> None:
        supervision, record = self.supervision, self.record
        if supervision is None:
            return
        pid = supervision.worker.pid if supervision.worker is not None else 0
        now = (supervision.init_answered, supervision.attached, pid, supervision.state["restarts"])
        if now != (record.init_answered, record.attached, record.worker_pid, record.restarts):
            record.init_answered, record.attached, record.worker_pid, record.restarts = now
            self.save()

    # -- binds --------------------------------------------------------------------------------------------------------

    def bind(self, target: str, *, read_only: bool, over: bool = False) -> None:
        """Bind it somewhere; `over` what is mounted there. Raises PathRefused, Occupied, OSError."""
        former = dict(self.record.targets)
        self.record.targets[target] = read_only
        try:
            self._house.records.save(self.record)
        except OSError:
            self.record.targets = former
            raise
        try:
            self._house.ground.bind(self.place, target, read_only=read_only, over=over)
        except (PathRefused, Occupied, OSError):
            self.forget_target(target)
            raise

    def stand(self) -> bool:
        """Whether it is at its place. If somebody has taken it from there, it is put back from one of its binds; False:
        there is none, and only open files are left of it. Raises PathRefused, Occupied, OSError.
        """
        if self.is_there(self.place):
            return True
        bound = self.bound()
        if bound:
            self._house.ground.bind(bound[0], self.place, read_only=self.read_only)
            self._house.journal.warning(f"{self.record.key} was taken from its place, and is put back there")
        return bool(bound)

    def forget_target(self, target: str) -> None:
        """It is not bound there any more."""
        if self.record.targets.pop(target, None) is not None:
            self.save()

    def bound(self) -> list[str]:
        """Return where it is bound at this moment, of what was asked for."""
        return [target for target in self.record.targets if self.is_there(target)]

    # -- ending -------------------------------------------------------------------------------------------------------

    def take_away(self) -> None:
        """Take it from its place; it is served until its last file is closed. Raises OSError."""
        self.record.leaving = True
        self.save()
        if self.supervision is None:
            self._house.ground.detach(self.place)
            self._forget()
        else:
            try:
                self.supervision.departure.take_away(lazy=True, force=False)
            except kernel.MountFailure:
                if self.is_there(self.place):
                    raise
                self.supervision.departure.notice()  # somebody else has taken it from there
        self._house.ground.remove_directory(self.place)

    def _on_end(self, exit_code: int) -> None:
        self._house.loop.after((self, "end"), 0, self._end)  # not from within a callback of the supervision

    def _end(self) -> None:
        supervision, self.supervision = self.supervision, None
        if supervision is None:
            return
        # One that is leaving is not: the kernel may have given its device number to the next mount at this place.
        leaves = self.record.leaving or supervision.departure.begun
        wanted = self.record.served and not leaves and self.is_there(self.place)
        if self.record.leaving:
            supervision.device.leave_place()
        supervision.close()
        for runner in self._house.runners.all:
            runner.drop(self.record.mount)
        if wanted and self._revivals.record(time.monotonic()) is not None:
            self._house.journal.warning(f"{self.record.key}: its connection was aborted; it is made anew")
            if self.revive():
                return
        self._forget()

    def revive(self) -> bool:
        """Make a dead mount anew, and its binds. Returns whether it is mounted.

        The dead binds stay below the new ones, until `Ground.detach` takes all layers away: what a container has of a
        target is a copy of the bind (`HostToContainer`: a slave), and shows just what is mounted upon that
        (mount_namespaces(7)).
        """
        journal = self._house.journal
        self._copies = copies_of(self.record.identity, self._house.ground.root)
        targets = {target: mode for target, mode in self.record.targets.items() if self.is_there(target)}
        try:
            self.mount()
        except (OSError, PathRefused) as error:
            journal.error(f"{self.record.key} cannot be made anew: {error}")
            return False
        self.record.targets = {}
        for target, read_only in targets.items():
            try:
                self.bind(target, read_only=read_only, over=True)
            except (OSError, PathRefused, Occupied) as error:
                journal.error(f"{self.record.key} cannot be bound to {target} again: {error}")
        self.save()
        return True

    def drop(self) -> None:
        """Nothing is mounted of it any more, and nobody has its device."""
        self._forget()

    def _forget(self) -> None:
        self._house.records.remove(self.record)
        if not self.record.leaving:
            self._house.ground.remove_directory(self.place)
        self._owner.mount_gone(self)
        self._tell("unavailable", f"{self.record.key} was unmounted while it was being mounted")


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
