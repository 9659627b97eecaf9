"""Brings records and mounts together again: at the start of the keeper, and when somebody asks for it.

    a mount whose worker has outlived its keeper               gives its device back
    a mount whose device nobody has any more (ENOTCONN)        is made anew, and bound again where it was
    a mount that was taken from its place, but is still bound  is put back there
    a target that somebody has unmounted                       is forgotten
    a record without any mount                                 is dropped
    a mount below the places of our own, without a record      is detached, with all its binds
    a dead mount of cachefs anywhere else below the root       is detached
    an empty directory among our places, as a boot leaves it   is removed

A living mount of cachefs that lies elsewhere, and is not in the records, is not ours (a sidecar has made it): it stays.
Whether a mount is dead is asked by child processes; everything else is read from /proc.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cachefs.keeper.binds import Ground, Occupied, PathRefused
from cachefs.keeper.kept import KeptMount
from cachefs.keeper.places import WHOLE_MACHINE, below
from cachefs.keeper.probing import Prober
from cachefs.mount import mountinfo
from cachefs.mount.journal import Journal
from cachefs.mount.mountinfo import Answer, Mount


@dataclass(slots=True)
class Done:
    """What was done, by key or path."""

    repaired: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)

    def as_plain(self) -> dict[str, Any]:
        """Return it as `reconcile` answers."""
        return {"repaired": self.repaired, "dropped": self.dropped, "detached": self.detached}

    def __bool__(self) -> bool:
        return bool(self.repaired or self.dropped or self.detached)

    def __str__(self) -> str:
        parts = [f"{name} {', '.join(found)}" for name, found in self.as_plain().items() if found]
        return "; ".join(parts) or "nothing to repair"


class Inventory(Protocol):
    """Who has the mounts."""

    @property
    def mounts(self) -> list[KeptMount]:
        """All of them."""

    @property
    def informed(self) -> bool:
        """Whether a node service has given back what it had kept."""


class Repair:
    """One repair. `begin` it once."""

    def __init__(self, inventory: Inventory, ground: Ground, prober: Prober, journal: Journal) -> None:
        self._inventory = inventory
        self._ground = ground
        self._prober = prober
        self._journal = journal
        self._done = Done()
        self._open = 1
        self._on_done: Callable[[Done], object]

    def begin(self, on_done: Callable[[Done], object]) -> None:
        """Repair; `on_done` gets what was done, which may be at once."""
        self._on_done = on_done
        there = [mount for mount in mountinfo.mounts() if mount.is_cachefs and self._is_below(mount)]
        for kept in self._inventory.mounts:
            self._settle(kept, [mount for mount in there if mount.device == kept.record.identity])
        known = {kept.record.identity for kept in self._inventory.mounts}
        strangers = [mount for mount in there if mount.device not in known]
        ours = {mount.device for mount in strangers if mount.mountpoint.startswith(f"{self._ground.places}/")}
        for mount in strangers:
            if mount.device in ours:
                self._detach(mount)
            elif self._ground.root != WHOLE_MACHINE:  # there, others look after their own
                self._ask(mount.mountpoint, functools.partial(self._detach_if_dead, mount))
        self._remove_places({kept.record.key for kept in self._inventory.mounts})
        self._close_one()

    def _remove_places(self, used: set[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._ground.places):
                if name not in used:
                    self._ground.remove_directory(self._ground.place(name))  # one that is mounted on stays

    def _is_below(self, mount: Mount) -> bool:
        return mount.mountpoint.startswith(below(self._ground.root))

    def _ask(self, path: str, on_answer: Callable[[Answer], None]) -> None:
        self._open += 1

        def answered(answer: Answer) -> None:
            on_answer(answer)
            self._close_one()

        self._prober.ask(path, answered)

    def _close_one(self) -> None:
        self._open -= 1
        if not self._open:
            self._on_done(self._done)

    # -- mounts that are recorded -------------------------------------------------------------------------------------

    def _settle(self, kept: KeptMount, there: list[Mount]) -> None:
        places = {mount.mountpoint for mount in there}
        for target in [target for target in kept.record.targets if target not in places]:
            kept.forget_target(target)
            self._done.dropped.append(target)
        if kept.supervision is not None:
            self._put_back(kept, places)
        elif self._salvage(kept):
            self._done.repaired.append(kept.record.key)
        elif not there:
            if self._inventory.informed:  # else it may be a detached one, whose device comes back
                self._drop(kept)
        else:
            self._ask(there[-1].mountpoint, functools.partial(self._revive_if_dead, kept))

    def _salvage(self, kept: KeptMount) -> bool:
        try:
            return kept.salvage()
        except OSError as error:
            self._journal.warning(f"{kept.record.key}: its device cannot be used: {error}")
            return False

    def _put_back(self, kept: KeptMount, places: set[str]) -> None:
        bound = [target for target in kept.record.targets if target in places]
        if kept.place in places or kept.record.leaving or not bound:
            return
        try:
            self._ground.bind(bound[0], kept.place, read_only=kept.read_only)
        except (OSError, PathRefused, Occupied) as error:
            self._journal.warning(f"{kept.record.key} cannot be put back to its place: {error}")
        else:
            self._done.repaired.append(kept.record.key)

    def _drop(self, kept: KeptMount) -> None:
        kept.drop()
        self._done.dropped.append(kept.record.key)

    def _revive_if_dead(self, kept: KeptMount, answer: Answer) -> None:
        if answer is not Answer.DEAD or kept.supervision is not None:
            return  # somebody has its device: a node service that will give it back
        if kept not in self._inventory.mounts:
            return  # it has ended while it was asked, and its place may be that of another by now
        if kept.record.leaving:
            for target in kept.bound():
                self._detach_path(target)
            self._drop(kept)
        elif kept.revive():
            self._done.repaired.append(kept.record.key)

    # -- mounts that are not ------------------------------------------------------------------------------------------

    def _detach_if_dead(self, mount: Mount, answer: Answer) -> None:
        if answer is Answer.DEAD:
            self._detach(mount)

    def _detach(self, mount: Mount) -> None:
        top = mountinfo.find_mount(mount.mountpoint)
        if top is not None and top.device == mount.device:
            self._detach_path(mount.mountpoint)

    def _detach_path(self, path: str) -> None:
        try:
            self._ground.detach(path)
        except (OSError, PathRefused) as error:
            self._journal.warning(f"{path} cannot be detached: {error}")
        else:
            self._ground.remove_directory(path)
            self._done.detached.append(path)
