"""Jobs that other nodes of the cluster ask for: `cachefs warmup --nodes` makes one on each of them.

Such a job is an ordinary one of this agent: it walks by itself, brings what this node does not have, and is shown by
`cachefs status` here. Whoever asked for it hands over the paths in numbered parts and asks how far it is twice a
second (`cachefs.agent.crew`).

What always holds: a job whose asker is not heard of for `LEASE_S` ends, and everything here may be asked again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from cachefs import errors
from cachefs.agent.jobs import Job
from cachefs.agent.volumes import Volume

LEASE_S = 30.0
KEPT = 64
MOST_UNDER_WAY = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one node asks another, about one job. See `peer.jobs.JobRequest`."""

    job: str
    begin: bool
    verb: str
    tier: str
    force: bool
    crew: tuple[str, ...] = ()
    part: int = 0
    paths: tuple[bytes, ...] = ()
    filled: bool = False
    last: bool = False
    stop: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """How such a job is."""

    job: dict[str, Any]
    over: bool
    parts: int


class _Commission:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.parts = 0
        self.asked = trio.Event()


class Commissions:
    """Those of one agent. Trio thread."""

    def __init__(self, begin: Callable[[Volume, Order], Job], nursery: trio.Nursery) -> None:
        """`begin` makes a job, and shows it from then on. It raises CachefsError."""
        self._begin = begin
        self._nursery = nursery
        self._known: OrderedDict[str, _Commission] = OrderedDict()

    def take(self, volume: Volume, order: Order) -> Report:
        """Do what is asked; never waits. Raises CachefsError: there is no such job."""
        known = self._known.get(order.job)
        if known is None:
            if not order.begin:
                raise errors.NotFound("the job ended with the agent that had it (run it again: what came is left out)")
            known = self._made(volume, order)
        known.asked.set()
        if order.stop:
            known.job.stop()
        elif order.filled and order.part == known.parts and known.job.offer(list(order.paths), last=order.last):
            known.parts += 1
        over = known.job.over.is_set()
        return Report(known.job.describe(len(known.job.problems.examples) if over else 0), over, known.parts)

    def _made(self, volume: Volume, order: Order) -> _Commission:
        under_way = sum(not each.job.over.is_set() for each in self._known.values())
        if under_way >= MOST_UNDER_WAY:
            raise errors.StorageUnavailable(f"it has {under_way} jobs of other nodes to do already")
        known = self._known[order.job] = _Commission(self._begin(volume, order))
        for job in [job for job, each in self._known.items() if each.job.over.is_set()][
            : max(0, len(self._known) - KEPT)
        ]:
            del self._known[job]
        self._nursery.start_soon(known.job.run)
        self._nursery.start_soon(self._watch, known)
        return known

    async def _watch(self, known: _Commission) -> None:
        """End a job that nobody asks about any more."""
        while not known.job.over.is_set():
            known.asked = trio.Event()
            with trio.move_on_after(LEASE_S) as lease:
                await known.asked.wait()
            if lease.cancelled_caught:
                known.job.error = "whoever asked for it is gone"
                known.job.stop()
                await known.job.over.wait()
            else:
                await trio.sleep(LEASE_S / 10)
