"""The keeper: one process per node that makes all mounts, holds their devices, and outlives everything else.

It never touches a byte of a file, asks nothing of its mounts, and waits for nobody: one loop, callbacks only, standard
library only. Workers are started by the node service, which may come and go; so may this process, because the node
service keeps a duplicate of every device and records say the rest.

    {"command": "mount", "key": K, "plan": {...}, "environment": {}, "fingerprint": F, "labels": {}, "timeout_s": N}
    {"command": "unmount", "key": K, "force": false}
    {"command": "bind", "key": K, "target": PATH, "read_only": true}
    {"command": "unbind", "target": PATH}
    {"command": "label", "key": K, "labels": {"name": "text" or null}}
    {"command": "status"}
    {"command": "reconcile"}
    {"command": "runner", "version": V, "pid": P}       the node service: the connection stays open

INVARIANT: a key names one mount at most that is not leaving; `_mounts` has every mount by its own name.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from cachefs import __version__
from cachefs.keeper import requests
from cachefs.keeper.binds import Ground, Occupied, PathRefused
from cachefs.keeper.door import Door, Visitor
from cachefs.keeper.kept import House, KeptMount
from cachefs.keeper.moves import Moves
from cachefs.keeper.probing import Prober
from cachefs.keeper.records import Record, Records
from cachefs.keeper.repair import Repair
from cachefs.keeper.runners import Runner, Runners
from cachefs.mount import kernel, mountinfo
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop
from cachefs.runtime import RuntimeDir, mount_id

LOOK_S = 1.0
"""How often mounts are looked after that end unasked: detached ones, and those without a worker."""
SEEK_S = 5.0
"""How often is looked whether a mount is dead whose device nobody has given back yet."""


class Keeper:
    """The composition root below the process. Fulfils `runners.Household`, `kept.Owner` and `repair.Inventory`."""

    def __init__(self, runtime_dir: str, ground: Ground, node_uid: int, loop: Loop, journal: Journal) -> None:
        """Raises OSError when it cannot listen or write."""
        self._loop = loop
        self._journal = journal
        self._ground = ground
        runtime = RuntimeDir(f"{runtime_dir}/keeper")
        runners = Runners(loop, journal)
        self._prober = Prober(loop)
        self._house = House(loop, journal, runtime, Records(f"{runtime.path}/records"), runners, ground, self._prober)
        self._runners = runners
        self._moves = Moves(loop, journal, runners)
        self._mounts: dict[str, KeptMount] = {}
        self._looking = False
        self._waiting: list[Callable[[], None]] = []
        """Mounts that can be made as soon as there is a node service."""
        records, wrong = self._house.records.load()
        for path in wrong:
            journal.error(f"{path} makes no sense and is ignored: what it describes is detached as an orphan")
        for record in records:
            self._mounts[record.mount] = KeptMount(record, self._house, self)
        self._door = Door(f"{runtime_dir}/keeper.sock", loop, self._serve, node_uid=node_uid)
        self._commands: dict[str, Callable[[dict[str, Any], Visitor], None]] = {
            "mount": self._mount,
            "unmount": self._unmount,
            "bind": self._bind,
            "unbind": self._unbind,
            "label": self._label,
            "status": self._status,
            "reconcile": self._reconcile,
            "runner": self._welcome,
        }
        self._repair(lambda done: journal.info(f"at the start: {done}"))
        self._loop.after("seek", SEEK_S, self._seek)

    def close(self) -> None:
        """Stop listening. All mounts stay, and are served on."""
        self._door.close()
        self._runners.close()

    # -- what is kept -------------------------------------------------------------------------------------------------

    @property
    def mounts(self) -> list[KeptMount]:
        """Every mount, those that are leaving as well."""
        return list(self._mounts.values())

    @property
    def informed(self) -> bool:
        """Whether a node service has given back what it had kept."""
        return bool(self._runners.all)

    def find(self, key: str) -> KeptMount | None:
        """Return the mount that a key names."""
        return next(
            (kept for kept in self._mounts.values() if kept.record.key == key and not kept.record.leaving), None
        )

    def mount_gone(self, kept: KeptMount) -> None:
        """A mount has ended."""
        self._mounts.pop(kept.record.mount, None)

    def devices(self) -> list[tuple[str, dict[str, Any], int]]:
        """Return every mount with a device."""
        return [
            (kept.record.mount, kept.public_state(), kept.supervision.device.descriptor)
            for kept in self.mounts
            if kept.supervision is not None
        ]

    def given_back(self, runner: Runner, mount: str, remote_pid: int, device: int, pidfd: int) -> None:
        """A node service has kept a device, and perhaps its worker, over the death of a keeper."""
        kept = self._mounts.get(mount)
        if kept is None:
            self._journal.info(f"nothing is known of {mount}: it is let go")
            runner.drop(mount)
        elif kept.supervision is None:
            try:
                if kept.adopt(device, runner, remote_pid, pidfd):
                    self._journal.info(f"{kept.record.key}: its device is back")
                else:
                    runner.drop(mount)
            except OSError as error:
                self._journal.error(f"{kept.record.key}: its device cannot be used: {error.strerror or error}")
            return
        else:
            self._reunite(kept, runner, remote_pid, pidfd)
            pidfd = -1
        for descriptor in (device, pidfd):
            if descriptor >= 0:
                os.close(descriptor)

    def _reunite(self, kept: KeptMount, runner: Runner, remote_pid: int, pidfd: int) -> None:
        """We have the device. If the worker is ours too, its node service only was away; any other must not go on."""
        if pidfd < 0:
            return
        worker = kept.worker
        if worker is not None and worker.runner is None and worker.is_process(pidfd):
            worker.runner, worker.remote_pid = runner, remote_pid
            runner.workers.add(worker)
            os.close(pidfd)
        else:
            requests.end_stray(self._loop, pidfd, kept.resend)

    def runner_here(self, runner: Runner) -> None:
        """There is somebody who starts workers."""
        waiting, self._waiting = self._waiting, []
        for begin in waiting:
            begin()
        self._moves.begin(self.mounts)
        if any(kept.supervision is None for kept in self.mounts):
            self._repair(lambda done: self._journal.info(f"with the node service: {done}"))

    def runner_leaves(self, runner: Runner) -> None:
        """Its workers have to go elsewhere, if there is an elsewhere."""
        self._moves.begin(self.mounts)

    def _seek(self) -> None:
        """Look after mounts of an earlier keeper, until each has its device back or is made anew."""
        if any(kept.supervision is None for kept in self.mounts):
            self._repair(lambda done: self._journal.info(f"looked again: {done}") if done else None)
            self._loop.after("seek", SEEK_S, self._seek)

    def _look(self) -> None:
        """Notice mounts that have ended without a word: nobody serves them who could say so."""
        self._looking = False
        restless = False
        for kept in self.mounts:
            supervision = kept.supervision
            if supervision is None:
                continue
            worker = supervision.worker
            if kept.record.leaving or worker is None or not worker.launched:
                restless = True
                supervision.notice()
        if restless:
            self._look_soon(LOOK_S)

    def _look_soon(self, delay_s: float) -> None:
        """A look that is due already stays due: requests that come all the time must not put it off."""
        if not self._looking:
            self._looking = True
            self._loop.after("look", delay_s, self._look)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _serve(self, request: dict[str, Any], visitor: Visitor) -> None:
        command = self._commands.get(str(request.get("command")))
        if command is None:
            visitor.fail("usage", f"unknown command {request.get('command')!r}")
            return
        try:
            command(request, visitor)
        except (requests.Wrong, PathRefused) as error:
            visitor.fail("usage", str(error))
        except Occupied as error:
            visitor.fail("exists", str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            visitor.fail("MountError", f"{where}{error.strerror or error}")
        except Exception as error:
            visitor.fail("MountError", f"an error in the keeper itself: {type(error).__name__}: {error}")
            raise  # the loop says where
        self._look_soon(LOOK_S / 10)

    def _named(self, request: dict[str, Any]) -> KeptMount | None:
        return self.find(requests.key_of(request))

    def _standing(self, key: str) -> KeptMount | None:
        """Return the mount that a key names, at its place: one that somebody has unmounted everywhere is let go."""
        kept = self.find(key)
        if kept is None or kept.supervision is None or kept.stand():
            return kept
        self._journal.warning(f"{key} was unmounted by somebody else: it is let go")
        kept.take_away()
        return None

    def _mount(self, request: dict[str, Any], visitor: Visitor) -> None:
        wanted = requests.mount_of(request)
        kept = self._standing(wanted.key)
        if kept is not None and kept.record.fingerprint != wanted.fingerprint:
            visitor.fail("exists", f"{wanted.key} is mounted with other settings")
        elif kept is not None and kept.serving:
            visitor.answer({"ok": True})
        elif kept is not None and kept.state == "failed" and kept.supervision is not None:
            kept.supervision.replace_worker({}, visitor.answer)
        elif kept is not None:
            self._wait(kept, visitor, wanted.timeout_s)
        elif self._runners.current is None:
            self._wait_for_runner(request, visitor, wanted.timeout_s)
        else:
            self._make(wanted, visitor)

    def _make(self, wanted: requests.WantedMount, visitor: Visitor) -> None:
        place = self._ground.place(wanted.key)
        plan = {**wanted.plan, "mountpoint": place, "mount_id": mount_id(place)}
        record = Record.create(wanted.key, plan, wanted.environment, wanted.fingerprint, wanted.labels)
        kept = KeptMount(record, self._house, self)
        try:
            kept.mount()
        except kernel.MountFailure as error:
            visitor.fail("MountError", error.text)
            return
        self._mounts[record.mount] = kept
        self._wait(kept, visitor, wanted.timeout_s)

    def _wait(self, kept: KeptMount, visitor: Visitor, timeout_s: float) -> None:
        """Answer when the mount is served, or will not be; after the time it goes on, and whoever asks again joins."""

        def outcome(kind: str, text: str) -> None:
            self._loop.cancel(visitor)
            visitor.answer({"ok": True}) if not kind else visitor.fail(kind, text)

        def too_late() -> None:
            kept.give_up(outcome)
            visitor.fail("unavailable", f"{kept.record.key} is not served within {timeout_s:g} s: {kept.explain()}")

        kept.wait(outcome)
        self._loop.after(visitor, timeout_s, too_late)

    def _wait_for_runner(self, request: dict[str, Any], visitor: Visitor, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s

        def begin() -> None:
            self._loop.cancel(visitor)
            self._serve({**request, "timeout_s": max(0.0, deadline - time.monotonic())}, visitor)

        def too_late() -> None:
            self._waiting.remove(begin)
            visitor.fail("unavailable", requests.NO_RUNNER)

        self._waiting.append(begin)
        self._loop.after(visitor, timeout_s, too_late)

    def _unmount(self, request: dict[str, Any], visitor: Visitor) -> None:
        kept = self._named(request)
        if kept is None:
            found = self._ground.detach(self._ground.place(requests.key_of(request)))
            self._ground.remove_directory(self._ground.place(requests.key_of(request)))
            visitor.answer({"ok": True, "found": bool(found)})
            return
        bound = kept.bound()
        if bound and not request.get("force"):
            visitor.fail("busy", f"{kept.record.key} is bound to {', '.join(bound[:3])}")
            return
        for target in bound:
            self._ground.detach(target)
            self._ground.remove_directory(target)
        kept.take_away()
        visitor.answer({"ok": True, "found": True})

    def _bind(self, request: dict[str, Any], visitor: Visitor) -> None:
        kept = self._standing(requests.key_of(request))
        target, read_only = requests.path_of(request), bool(request.get("read_only"))
        if kept is None:
            visitor.fail("missing", f"nothing is mounted as {requests.key_of(request)}")
            return
        self._ground.check_target(target)
        top = mountinfo.find_mount(target)
        if top is not None and kept.owns(top):
            self._bound_already(kept, top, visitor, read_only=read_only)
        elif top is None:
            kept.bind(target, read_only=read_only)
            visitor.answer({"ok": True})
        elif not top.is_cachefs or self._owner_of(top) is not None:
            raise Occupied(f"something else is mounted on {target}: {top.source}")
        else:
            self._prober.ask(target, functools.partial(self._bind_over, request, visitor))

    def _bound_already(self, kept: KeptMount, top: mountinfo.Mount, visitor: Visitor, *, read_only: bool) -> None:
        target = top.mountpoint
        if top.read_only != (read_only or kept.read_only):
            raise Occupied(f"{target} is bound {'read-only' if top.read_only else 'writable'} already")
        if kept.record.targets.get(target) != read_only:
            kept.record.targets[target] = read_only
            kept.save()
        visitor.answer({"ok": True})

    def _bind_over(self, request: dict[str, Any], visitor: Visitor, answer: mountinfo.Answer) -> None:
        """Bind where a mount of an earlier life is, if that is dead."""
        target = requests.path_of(request)
        if answer is not mountinfo.Answer.DEAD:
            visitor.fail("exists", f"an unknown mount of cachefs is on {target}, and it is {answer.value}")
            return
        self._journal.info(f"a dead mount of an earlier life is taken from {target}")
        self._ground.detach(target)
        self._serve(request, visitor)

    def _owner_of(self, mount: mountinfo.Mount) -> KeptMount | None:
        return next((kept for kept in self.mounts if kept.record.identity == mount.device), None)

    def _unbind(self, request: dict[str, Any], visitor: Visitor) -> None:
        target = requests.path_of(request)
        self._ground.check_target(target)
        layers = self._ground.detach(target)
        left = mountinfo.find_mount(target)
        if left is not None:
            raise Occupied(f"something else is mounted on {target}: {left.source}")
        self._ground.remove_directory(target)
        for kept in self.mounts:
            kept.forget_target(target)
        visitor.answer({"ok": True, "found": layers > 0})

    def _label(self, request: dict[str, Any], visitor: Visitor) -> None:
        kept = self._named(request)
        if kept is None:
            visitor.fail("missing", f"nothing is mounted as {requests.key_of(request)}")
            return
        merged = {**kept.record.labels, **requests.labels_of(request, removing=True)}
        kept.record.labels = {name: text for name, text in merged.items() if text is not None}
        kept.save()
        visitor.answer({"ok": True})

    def _status(self, request: dict[str, Any], visitor: Visitor) -> None:
        runner = self._runners.current
        shown = None if runner is None else {"pid": runner.pid, "version": runner.version, "connected": True}
        states = [requests.state_of(kept) for kept in self.mounts]
        visitor.answer({"ok": True, "version": __version__, "runner": shown, "mounts": states})

    def _reconcile(self, request: dict[str, Any], visitor: Visitor) -> None:
        self._repair(lambda done: visitor.answer({"ok": True, **done.as_plain()}))

    def _repair(self, on_done: Callable[[Any], object]) -> None:
        Repair(self, self._ground, self._prober, self._journal).begin(on_done)

    def _welcome(self, request: dict[str, Any], visitor: Visitor) -> None:
        seen = {**request, "pid": visitor.pid or request.get("pid", 0)}  # 0: of another name space
        self._runners.welcome(seen, visitor.uid, self, visitor.become_channel)
