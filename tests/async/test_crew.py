"""A warm-up on several nodes without the network between them: parts, lost answers, slow and silent nodes, leases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import trio

from cachefs import errors
from cachefs.agent import commissions, crew
from cachefs.agent.commissions import Commissions, Order, Report
from cachefs.agent.crew import Colleague, CrewJob, choose
from cachefs.agent.jobs import Job
from cachefs.agent.volumes import Volume

VOLUME = cast("Volume", object())
ORDER = Order(job="ab" * 16, begin=True, verb="warm", tier="", force=False, crew=("a", "b"))


class FakeJob:
    """What `Commissions` needs of a `Job`: it takes paths until it is told that these were the last."""

    def __init__(self, *, takes: int = 1 << 30) -> None:
        self.paths: list[bytes] = []
        self.takes = takes
        self.error = ""
        self.over = trio.Event()
        self.stopped = False
        self.problems = type("Problems", (), {"examples": []})

    def offer(self, paths: list[bytes], *, last: bool) -> bool:
        if len(self.paths) + len(paths) > self.takes:
            return False
        self.paths += paths
        if last:
            self.over.set()
        return True

    def stop(self) -> None:
        self.stopped = True
        self.over.set()

    async def run(self) -> None:
        await self.over.wait()

    def describe(self, examples: int = 0) -> dict[str, Any]:
        state = "stopped" if self.stopped else "done" if self.over.is_set() else "fetching"
        return {"job": "1-x", "state": state, "error": self.error or None, "files": len(self.paths), "problems": 0}


class Node:
    """Another node: real commissions of a fake job."""

    def __init__(self, nursery: trio.Nursery, **more: Any) -> None:
        self.job = FakeJob(**more)
        self.began = 0
        self.commissions = Commissions(self._begin, nursery)

    def _begin(self, volume: Volume, order: Order) -> Job:
        self.began += 1
        return cast("Job", self.job)


def test_a_part_that_is_sent_again_counts_once() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Node(nursery)
            first = Order(**{**_plain(ORDER), "paths": (b"x", b"y"), "filled": True})
            assert node.commissions.take(VOLUME, first) == node.commissions.take(VOLUME, first)
            assert node.job.paths == [b"x", b"y"]
            second = Order(**{**_plain(first), "part": 1, "paths": (), "last": True})
            assert node.commissions.take(VOLUME, second).parts == 2
            assert node.commissions.take(VOLUME, second).over
            assert node.began == 1
            with pytest.raises(errors.NotFound, match="run it again"):
                node.commissions.take(VOLUME, Order(**{**_plain(second), "job": "cd" * 16, "begin": False}))
            nursery.cancel_scope.cancel()

    trio.run(main)


def _plain(order: Order) -> dict[str, Any]:
    return {name: getattr(order, name) for name in order.__slots__}


async def test_a_job_that_nobody_asks_about_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commissions, "LEASE_S", 0.2)
    async with trio.open_nursery() as nursery:
        node = Node(nursery)
        for _ in range(8):
            node.commissions.take(VOLUME, ORDER)
            await trio.sleep(0.05)
        assert not node.job.stopped
        with trio.fail_after(2):
            await node.job.over.wait()
        assert node.job.stopped
        assert "is gone" in node.job.error
        report = node.commissions.take(VOLUME, Order(**{**_plain(ORDER), "begin": False}))
        assert report.over, "and it can still be asked how it ended"


async def test_too_many_jobs_for_others_are_refused() -> None:
    async with trio.open_nursery() as nursery:
        made = Commissions(lambda volume, order: cast("Job", FakeJob()), nursery)
        for number in range(commissions.MOST_UNDER_WAY):
            made.take(VOLUME, Order(**{**_plain(ORDER), "job": f"{number:032x}"}))
        with pytest.raises(errors.StorageUnavailable, match="jobs of other nodes"):
            made.take(VOLUME, Order(**{**_plain(ORDER), "job": "f" * 32}))
        nursery.cancel_scope.cancel()


class Cluster:
    """Nodes by id; what `send` does to each of them can be changed."""

    def __init__(self, nursery: trio.Nursery, *names: str) -> None:
        self.nodes = {name: Node(nursery) for name in names}
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}
        self.token = trio.lowlevel.current_trio_token()

    def send(self, volume: Volume, node_id: str, order: Order) -> Report:
        self.before.get(node_id, lambda: None)()
        report = trio.from_thread.run_sync(self.nodes[node_id].commissions.take, volume, order, trio_token=self.token)
        self.after.get(node_id, lambda: None)()
        return report

    def job(self) -> CrewJob:
        nodes = [Colleague(name, name, (), is_self=False) for name in self.nodes]
        return CrewJob(None, ORDER, VOLUME, "/mnt", nodes, self.send, background=False)


async def test_answers_that_are_lost_lose_nothing_and_repeat_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "ASK_S", 0.01)
    count = 0

    def lose() -> None:
        nonlocal count
        count += 1
        if count % 3:
            raise errors.StorageUnavailable("the answer was lost")

    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, "a", "b")
        cluster.after["b"] = lose
        job = cluster.job()
        nursery.start_soon(job.run)
        paths = [b"%d" % number for number in range(40)]
        for at in range(0, 40, 4):
            await job.feed(paths[at : at + 4], last=at == 36)
        with trio.fail_after(10):
            await job.over.wait()
        assert [node.job.paths for node in cluster.nodes.values()] == [paths, paths]
        told = job.describe()
        assert (told["state"], told["files"], told["problems"]) == ("done", 80, 0)
        assert [node["node"] for node in told["nodes"]] == ["a", "b"]
        nursery.cancel_scope.cancel()


async def test_the_slowest_node_bounds_what_is_kept_and_a_dead_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "ASK_S", 0.01)
    monkeypatch.setattr(crew, "GONE_S", 0.5)

    def dead() -> None:
        raise errors.StorageUnavailable("no answer")

    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, "a", "b")
        cluster.nodes["b"].job.takes = 2
        job = cluster.job()
        nursery.start_soon(job.run)
        fed = 0

        async def feed() -> None:
            nonlocal fed
            for number in range(30):
                await job.feed([b"%d" % number], last=number == 29)
                fed += 1

        nursery.start_soon(feed)
        await trio.sleep(0.3)
        assert 2 < fed <= 2 + crew.WINDOW + 1
        cluster.before["b"] = dead
        with trio.fail_after(5):
            await job.over.wait()
        told = job.describe()
        assert fed == 30
        assert len(cluster.nodes["a"].job.paths) == 30
        assert told["state"] == "incomplete"
        assert [node["error"] for node in told["nodes"]] == [None, "it does not answer: no answer"]
        assert told["nodes"][1]["state"] == "failed"
        nursery.cancel_scope.cancel()


async def test_a_node_that_was_started_again_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "ASK_S", 0.01)
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, "a")
        job = cluster.job()
        nursery.start_soon(job.run)
        await job.feed([b"x"], last=False)
        await trio.sleep(0.1)
        cluster.nodes["a"] = Node(nursery)
        with trio.fail_after(5):
            await job.over.wait()
        assert job.describe()["state"] == "failed"
        assert "run it again" in job.describe()["nodes"][0]["error"]
        nursery.cancel_scope.cancel()


async def test_stop_tells_all_and_waits_for_nobody_who_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "STOP_S", 0.2)
    over = threading.Event()
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, "a", "b")
        job = cluster.job()
        nursery.start_soon(job.run)
        await job.feed([b"x"], last=False)
        await trio.sleep(0.2)
        cluster.before["b"] = lambda: cast("None", over.wait(5))
        began = time.monotonic()
        job.stop()
        with trio.fail_after(2):
            await job.over.wait()
        assert time.monotonic() - began < 1
        assert cluster.nodes["a"].job.stopped
        assert job.describe()["state"] == "stopped"
        over.set()
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()


def test_the_choice_of_nodes() -> None:
    nodes = [Colleague(f"{n:016x}", f"n{n}", ("g",) if n % 2 else (), is_self=n == 0) for n in range(20)]
    assert choose(nodes, 0, "", "s") == sorted(nodes, key=lambda each: each.name)
    five = choose(nodes, 5, "", "s")
    assert five == choose(nodes[::-1], 5, "", "s")
    assert five != choose(nodes, 5, "", "other")
    for gone in nodes:
        left = choose([each for each in nodes if each != gone], 5, "", "s")
        assert len(set(left) - set(five)) == (gone in five), "one that goes changes its own place only"
    assert {each.name for each in choose(nodes, 0, "g", "s")} == {f"n{n}" for n in range(1, 20, 2)}
    with pytest.raises(errors.UsageError, match="no node of group x"):
        choose(nodes, 0, "x", "s")
    with pytest.raises(errors.UsageError, match="11 nodes of group g were asked for, and 10"):
        choose(nodes, 11, "g", "s")


@pytest.mark.parametrize("said", [{}, {"state": "x", "files": "many", "left_s": [], "examples": [5, {}]}])
def test_what_a_node_says_is_not_believed(said: dict[str, Any]) -> None:
    told = crew._node(Colleague("a", "a", (), is_self=False), said, "")
    assert (told["state"], told["files"], told["left_s"]) == ("walking", 0, None)
