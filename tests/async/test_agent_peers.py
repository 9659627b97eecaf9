"""When an agent is a peer: at once, later, or never; with a cluster that is played."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from cachefs.agent import peers
from cachefs.agent.peering import Peering
from cachefs.agent.peers import FIRST_PAUSE_S, LONGEST_PAUSE_S, Peers
from cachefs.agent.volumes import Sources, Volumes
from cachefs.config import CacheConfig, MetadataConfig, PeerConfig
from cachefs.errors import CachefsError, UsageError
from cachefs.metrics import Counters

GIVEN_UP = "goes on without peers"
CONFIG = PeerConfig(etcd="http://etcd:2379", cluster="lab")


class PlayedPeering:
    """A `Peering` whose starts fail as they are told."""

    def __init__(self, outcomes: list[Exception | None]) -> None:
        self.outcomes = outcomes
        self.starts: list[float] = []
        self.calls: list[str] = []

    async def start(self, *_: object) -> None:
        self.starts.append(trio.current_time())
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome

    def sources(self, store: Any, prefix: str, rules: MetadataConfig) -> Sources:
        return Sources(store, store, 7.0)

    def volumes_changed(self) -> None:
        self.calls.append("volumes_changed")

    def status(self, *, ask: bool) -> dict[str, Any]:
        return {"cluster": "lab", "members": ["me"]}

    async def leave(self) -> None:
        self.calls.append("leave")


class PlayedVolume:
    renewed = 0

    def renew_sources(self) -> None:
        self.renewed += 1


class Scene:
    """An agent's peers, and what they are made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcomes: list[Exception | None], readers: int = 1) -> None:
        self.peering = PlayedPeering(outcomes)
        self.peers = Peers(CONFIG, CacheConfig(), Counters())
        self.volume = PlayedVolume()
        self.made: list[Exception | None] = []
        """What making fails with, one after the other."""
        monkeypatch.setattr(peers, "living_mounts", lambda _: [{}] * readers)
        monkeypatch.setattr(self.peers, "_made", self._make)

    async def _make(self) -> Peering:
        outcome = self.made.pop(0) if self.made else None
        if outcome is not None:
            raise outcome
        return cast("Peering", self.peering)

    async def join(self, nursery: trio.Nursery) -> None:
        volumes = cast("Volumes", type("Played", (), {"by_id": {"v": self.volume}}))
        await self.peers.join(nursery, cast("Any", None), (None, None), volumes, dict)


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == peers.__name__ and r.levelno >= level]


async def settled(true: Callable[[], object], within_s: float = 600) -> None:
    with trio.fail_after(within_s):
        while not true():  # noqa: ASYNC110 - nobody says when
            await trio.sleep(0.5)


async def test_without_etcd_nothing_happens(nursery: trio.Nursery) -> None:
    alone = Peers(PeerConfig(), CacheConfig(), Counters())
    await alone.prepare()
    await alone.join(nursery, cast("Any", None), (None, None), cast("Any", None), dict)
    store = cast("Any", object())
    assert alone.sources(store, "", MetadataConfig()) == Sources(store)
    assert (alone.status(ask=False), alone.problem, alone.handicaps()) == (None, None, [])
    await alone.leave()


async def test_a_peer_at_once(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [])
    await scene.peers.prepare()
    await scene.join(nursery)
    assert scene.peers.status(ask=False) == {"problem": None, "cluster": "lab", "members": ["me"]}
    assert scene.volume.renewed == 0, "there was none before"
    await scene.peers.leave()
    assert scene.peering.calls == ["leave"]


@pytest.mark.parametrize("where", ["made", "started"])
async def test_who_mounts_first_is_told(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    wrong = UsageError("the secret is gone")
    scene = Scene(monkeypatch, [wrong] if where == "started" else [], readers=0)
    scene.made = [wrong] if where == "made" else []
    if where == "made":
        with pytest.raises(UsageError, match="the secret is gone"):
            await scene.peers.prepare()
    else:
        await scene.peers.prepare()
        with pytest.raises(UsageError, match="the secret is gone"):
            await scene.join(nursery)
    await scene.peers.leave()
    assert not nursery.child_tasks


@pytest.mark.expect_warnings(GIVEN_UP)
@pytest.mark.parametrize("where", ["made", "started"])
async def test_readers_are_served_and_get_peers_later(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock, where: str,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    fails = [UsageError("the secret is gone"), UsageError("the secret is gone"), UsageError("the port is taken")]
    scene = Scene(monkeypatch, list(fails) if where == "started" else [])
    scene.made = list(fails) if where == "made" else []
    store = cast("Any", object())
    await scene.peers.prepare()
    await scene.join(nursery)
    assert scene.peers.sources(store, "", MetadataConfig()) == Sources(store)
    assert scene.peers.problem == "the secret is gone"
    told = scene.peers.status(ask=True)
    assert told is not None
    assert (told["problem"], told["members"], told["etcd"]) == ("the secret is gone", [], {"connected": False})
    assert "the secret is gone" in scene.peers.handicaps()[0]
    await settled(lambda: scene.peers.problem != "the secret is gone")
    assert scene.peers.problem == "the port is taken"
    await settled(lambda: scene.peers.problem is None)
    await trio.sleep(10 * LONGEST_PAUSE_S)
    assert scene.peers.sources(store, "", MetadataConfig()) == Sources(store, store, 7.0)
    assert (scene.volume.renewed, scene.peering.calls) == (1, ["volumes_changed"])
    assert scene.peers.handicaps() == []
    assert [line.partition(":")[0] for line in said(caplog)] == [
        "this node goes on without peers, and tries again by itself",
        "this node is still without peers",
        "this node is a peer again",
    ]
    await scene.peers.leave()
    assert scene.peering.calls[-1] == "leave"


@pytest.mark.expect_warnings(GIVEN_UP)
async def test_the_pauses_grow_up_to_a_minute(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    scene = Scene(monkeypatch, [UsageError("no")] * 12)
    await scene.peers.prepare()
    await scene.join(nursery)
    await settled(lambda: scene.peers.problem is None, 1200)
    starts = scene.peering.starts
    pauses = [later - before for before, later in itertools.pairwise(starts)]
    wanted = [min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(12)]
    assert len(pauses) == 12
    assert all(0.8 * most <= pause <= most for pause, most in zip(pauses, wanted, strict=True))
    await scene.peers.leave()


@pytest.mark.expect_warnings(GIVEN_UP, "still without peers")
async def test_what_nobody_foresaw_ends_neither_the_agent_nor_the_tries(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    broken = ZeroDivisionError("zero")
    scene = Scene(monkeypatch, [broken, CachefsError("no"), broken, broken, None])
    await scene.peers.prepare()
    await scene.join(nursery)
    assert scene.peers.problem == "ZeroDivisionError: zero"
    await settled(lambda: scene.peers.problem == "no")
    await settled(lambda: scene.peers.problem == "ZeroDivisionError: zero")
    await settled(lambda: scene.peers.problem is None)
    assert len(said(caplog, logging.ERROR)) == 1
    await scene.peers.leave()


@pytest.mark.expect_warnings(GIVEN_UP)
async def test_leaving_ends_the_tries(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [UsageError("no")])
    await scene.peers.prepare()
    await scene.join(nursery)
    with trio.fail_after(2):
        await scene.peers.leave()
        await settled(lambda: not nursery.child_tasks)
    assert len(scene.peering.starts) == 1
    assert scene.peering.calls == []
