"""Moves mounts to the node service that is there now: a fresh worker first, then the end of the old one.

Wanted for workers that an earlier keeper had started (they have no pipes to us), whose node service is gone or leaves,
and whose version is another than that of the newest node service. A few at a time; what fails is tried again, for the
old worker goes on meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from cachefs.keeper.kept import KeptMount
from cachefs.keeper.runners import Runners
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop

AT_ONCE = 4
AGAIN_S = 5.0


class Moves:
    """The mounts that are to be moved."""

    def __init__(self, loop: Loop, journal: Journal, runners: Runners) -> None:
        self._loop = loop
        self._journal = journal
        self._runners = runners
        self._line: dict[KeptMount, None] = {}
        self._under_way: set[KeptMount] = set()

    def begin(self, mounts: Iterable[KeptMount]) -> None:
        """Move those that want it."""
        for kept in mounts:
            if kept not in self._under_way:
                self._line[kept] = None
        self._loop.after(self, 0, self._next)

    def _next(self) -> None:
        while self._line and len(self._under_way) < AT_ONCE:
            kept = next(iter(self._line))
            del self._line[kept]
            if not self._is_wanted(kept) or kept.supervision is None or self._runners.current is None:
                continue
            self._under_way.add(kept)
            request = {"version": self._runners.current.version}
            kept.supervision.replace_worker(request, functools.partial(self._done, kept))

    def _is_wanted(self, kept: KeptMount) -> bool:
        current, worker, supervision = self._runners.current, kept.worker, kept.supervision
        if current is None or supervision is None or supervision.upgrading:
            return False
        if kept.state == "failed":
            return bool(supervision.state["version"] != current.version)
        if worker is None or not worker.launched:
            return False  # its start is under way, with the newest node service that there is
        return worker.inherited or (
            worker.runner is not current
            and (worker.runner is None or worker.runner.leaving or worker.version != current.version)
        )

    def _done(self, kept: KeptMount, answer: dict[str, Any]) -> None:
        self._under_way.discard(kept)
        if not answer["ok"]:
            self._journal.warning(f"{kept.record.key} stays with its worker for now: {answer['text']}")
            self._loop.after((self, kept), AGAIN_S, functools.partial(self.begin, [kept]))
        self._loop.after(self, 0, self._next)
