"""Asks the agent and the keeper of this node, and has the answer written: one scrape.

Whoever is away costs its own values: `cachefs_agent_up 0` or `cachefs_keeper_up 0` is what is left of it. Any number of
scrapers share one question at a time, so that many of them are no load for the agent.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import cachefs
from cachefs.agent import launch, messages
from cachefs.config import CacheConfig
from cachefs.errors import AgentUnavailable
from cachefs.exporter import samples, table
from cachefs.exporter.exposition import Sample, exposition
from cachefs.exporter.table import Family
from cachefs.keeper.client import KeeperClient, KeeperError

log = logging.getLogger(__name__)
T = TypeVar("T")

ASK_S = 2.0
"""What each of them has for its answer: two scrapes in a row stay within the ten seconds of Prometheus."""


class Scrape:
    """What one node serves. Any thread; `text` BLOCKS for some seconds at most."""

    def __init__(self, cache: CacheConfig, keeper_socket: str = "") -> None:
        """`cache`: of the agent, which is never started. `keeper_socket`: empty where there is no keeper."""
        self._cache = cache
        self._keeper = KeeperClient(keeper_socket, ASK_S) if keeper_socket else None
        self._lock = threading.Lock()
        self._asked_at = -math.inf
        self._text = b""
        self._complained: set[str] = set()

    def text(self) -> bytes:
        """Return all values as they are now. Never raises for the sake of agent or keeper."""
        called_at = time.monotonic()
        with self._lock:
            if self._asked_at < called_at:  # else somebody has asked while we waited: that is new enough
                self._asked_at = time.monotonic()
                self._text = exposition(self._samples())
            return self._text

    def _samples(self) -> Iterator[Sample]:
        yield from samples.own_samples(cachefs.__version__)
        yield from self._of("agent", table.AGENT_UP, self._ask_agent)
        if self._keeper is not None:
            yield from self._of("keeper", table.KEEPER_UP, self._ask_keeper)

    def _of(self, part: str, up: Family, ask: Callable[[], Iterable[Sample]]) -> Iterator[Sample]:
        began = time.monotonic()
        try:
            found = list(ask())
        except (AgentUnavailable, KeeperError, OSError) as error:
            log.debug("metrics: %s", error)
            found = []
        except Exception:
            found = []
            if part not in self._complained:
                self._complained.add(part)
                log.exception("what the %s says of itself makes no sense, its metrics are left out", part)
        yield Sample(up, (), bool(found))
        yield Sample(table.SCRAPE_SECONDS, (part,), time.monotonic() - began)
        yield from found

    def _ask_agent(self) -> Iterable[Sample]:
        connection = launch.running_agent(self._cache, ASK_S)
        answer = launch.ask(connection, messages.Status(id=1), ASK_S)
        if not isinstance(answer, messages.StatusReply):
            raise AgentUnavailable("the agent answered something else")
        return samples.agent_samples(answer.status)

    def _ask_keeper(self) -> Iterable[Sample]:
        assert self._keeper is not None
        return samples.keeper_samples(self._keeper.status())
