"""Members of a cluster in tests: one in this process, or one in a process of its own that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import trio

from cachefs.metrics import Counters
from peer.etcd_settings import EtcdSettings
from peer.members import Member, View
from peer.membership import Membership, Pace
from tests.support.programs import REPOSITORY

TTL_S = 2
PACE = Pace(refused_s=0.6, timeout_s=1.0)
VOLUME = "ab" * 8

_PROGRAM = """
import sys, time
skew = float(sys.argv[1])
if skew:
    true_time = time.time
    time.time = lambda: true_time() + skew
import trio
from cachefs.metrics import Counters
from peer.etcd_settings import EtcdSettings
from peer.members import Member
from peer.membership import Membership
settings = EtcdSettings(endpoints=(sys.argv[2],), cluster=sys.argv[3])
member = Member(node_id=sys.argv[4], name=sys.argv[5], address="127.0.0.1:1", instance="child")
membership = Membership(settings, member, redraw_id=lambda: "0" * 16, counters=Counters(), ttl_s=int(sys.argv[6]))
membership.set_volumes(frozenset({sys.argv[7]}))
async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(membership.run)
        print("joined", len(membership.view.members), flush=True)
trio.run(main)
"""


def node_id(number: int) -> str:
    return f"{number:016x}"


def a_member(number: int, **more: Any) -> Member:
    fields = {
        "node_id": node_id(number),
        "name": f"node-{number}",
        "address": f"127.0.0.1:{9000 + number}",
        "instance": f"instance-{number}",
    }
    return Member(**{**fields, **more})


class Node:
    """A membership with what tests look at."""

    def __init__(self, settings: EtcdSettings, member: Member, *, redrawn: str = "f" * 16, **more: Any) -> None:
        self.counters = Counters()
        self.views: list[View] = []
        self.redraws = 0
        self._redrawn = redrawn
        options = {"ttl_s": TTL_S, "pace": PACE, **more}
        self.membership = Membership(
            settings, member, redraw_id=self._redraw, counters=self.counters, on_change=self.views.append, **options
        )
        self._nursery: trio.Nursery | None = None

    def _redraw(self) -> str:
        self.redraws += 1
        return self._redrawn

    @property
    def ids(self) -> set[str]:
        return set(self.membership.view.members)

    @property
    def holders(self) -> set[str]:
        return {member.node_id for member in self.membership.view.holders.get(VOLUME, ())}

    @property
    def connected(self) -> bool:
        return bool(self.membership.state()["connected"])

    def count(self, name: str) -> int:
        return int(self.counters.get(name))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self.membership.run)
            task_status.started()

    def leave(self) -> None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """Have members run, all begun, until the end of the block."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.run)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def child(
    endpoint: str, cluster: str, number: int, *, skew_s: float = 0, ttl_s: int = TTL_S
) -> AsyncIterator[subprocess.Popen[str]]:
    """A member in a process of its own, whose clock is `skew_s` ahead."""
    words = [str(skew_s), endpoint, cluster, node_id(number), f"node-{number}", str(ttl_s), VOLUME]
    program = subprocess.Popen(  # noqa: ASYNC220 - starting one takes a millisecond
        [sys.executable, "-c", _PROGRAM, *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        line = await trio.to_thread.run_sync(program.stdout.readline)
        assert line.startswith("joined"), line
        yield program
    finally:
        program.kill()
        program.wait()
        if program.stdout is not None:
            program.stdout.close()


async def until(true: Callable[[], object], within_s: float = 10.0) -> float:
    """Wait until something is true; return how many seconds that took."""
    began = trio.current_time()
    while not true():
        assert trio.current_time() < began + within_s, f"not true within {within_s:g} s"
        await trio.sleep(0.01)
    return trio.current_time() - began


async def until_all(nodes: Iterable[Node], true: Callable[[Node], object], within_s: float = 10.0) -> None:
    """Wait until something is true of every node."""
    await until(lambda: all(true(node) for node in nodes), within_s)
