"""Listings of directories, made by the agent on behalf of everybody who waits for them.

A listing is a task of the agent's: it goes on when the reader who asked first goes away. There is one per directory
at a time. Pages are fetched one ahead of the one that is being committed; nothing else is kept, so the size of a
directory does not matter. Waiters are woken after each committed page.

* A directory that has no complete listing STREAMS: waiters come back as soon as there is something new for them.
* A directory that has one, but too old, is listed in place (metadata.merge): waiters come back when it is complete.
* Under strict consistency a listing serves those who asked before it was begun, nobody else.
* A listing that fails fails for all who wait. It leaves the directory as it was, or incomplete; the next call begins
  anew.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from cachefs.errors import CachefsError, NotFound, StorageUnavailable
from cachefs.store.port import ListPage, ObjectStore
from cachefs.types import Ino
from metadata.facts import PageEntries, page_entries
from metadata.flights import Later
from metadata.freshness import Freshness
from metadata.merge import ListingRun
from metadata.store import MetadataWriter

_log = logging.getLogger(__name__)

PAGE_LIMIT = 1000

RunBlocking = Callable[..., Awaitable[Any]]
"""Runs a blocking function with its positional arguments in a thread of the agent's."""


class PageSource(Protocol):
    """Gives pages of directories: a store, or another node that has them. Any thread; BLOCKS."""

    def list_page(self, prefix: str, *, token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the listing of a directory has come."""

    complete: bool
    frontier: bytes
    """Everything below it is committed; b"" when complete."""
    valid_s: float
    """For how long the kernel may keep the entries."""


@dataclass(frozen=True, slots=True)
class _Page:
    entries: PageEntries
    asked_ns: int
    borrowed: bool
    """From elsewhere."""


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """Who else gives pages of the same store."""

    store: PageSource | None = None
    age_ns: int = 0
    """How old they may be."""


class _Flight:
    """One listing on its way."""

    def __init__(self, ino: Ino, elsewhere: _Elsewhere) -> None:
        self.ino = ino
        self.elsewhere = elsewhere
        """The same from its first page to its last: all of them count as so old."""
        self.begun_ns = time.time_ns() - elsewhere.age_ns
        self.frontier = b""
        """Up to where waiters may read; stays empty when the listing does not stream."""
        self.over = False
        self.error: CachefsError | None = StorageUnavailable("the listing was given up")
        self.news = trio.Event()

    def announce(self) -> None:
        """Wake everybody who waits."""
        self.news.set()
        self.news = trio.Event()


class Lister:
    """Makes listings. `nursery` is the agent's: listings live and die with it."""

    def __init__(
        self,
        writer: MetadataWriter,
        store: ObjectStore,
        prefix: str,
        freshness: Freshness,
        run_blocking: RunBlocking,
        nursery: trio.Nursery,
    ) -> None:
        writer.identity.expect(prefix)
        self._writer = writer
        self._reader = writer.reader
        self._store = store
        self._freshness = freshness
        self._run_blocking = run_blocking
        self._nursery = nursery
        self._elsewhere = _Elsewhere()
        self._vanished_at = -math.inf
        self._flights: dict[Ino, _Flight] = {}

    def borrow_from(self, elsewhere: PageSource | None, age_s: float) -> None:
        """Have listings that begin from now on ask `elsewhere` first (None: the store alone, as at the beginning).

        It gives pages of the same store that may be `age_s` old: they count as asked for so long ago.
        """
        self._elsewhere = _Elsewhere() if elsewhere is None else _Elsewhere(elsewhere, round(age_s * 1e9))

    async def list_directory(self, ino: Ino, seen: bytes | None) -> Progress:
        """Return when the listing of `ino` is complete, or has something for a reader who has come to `seen`.

        `seen` None: a reader begins; a listing that is too old is made anew. Otherwise he goes on in what there is.
        Raises NotFound (the store has nothing below it any more), NotADirectory, AccessDenied, StorageUnavailable.
        Cancellation leaves the listing going on.
        """
        directory = self._reader.directory(ino)
        if directory is not None and directory.complete:
            valid_s = self._freshness.listing(directory, time.time_ns())
            if seen is not None or valid_s is not None:
                return Progress(True, b"", valid_s or 0.0)
        flight = self._flights.get(ino)
        if flight is not None and seen is None and self._freshness.strict:
            while not flight.over:
                await flight.news.wait()
            flight = self._flights.get(ino)
        if flight is None:
            flight = self._flights[ino] = _Flight(ino, self._elsewhere)
            self._nursery.start_soon(self._drive, flight, name=f"listing {ino}")
        return await self._wait(flight, seen or b"")

    def name_vanished(self) -> None:
        """The store was asked for a name, and does not have it any more: pages from before that would bring it back."""
        self._vanished_at = time.monotonic()

    def _trusts(self, elsewhere: _Elsewhere) -> bool:
        return time.monotonic() >= self._vanished_at + elsewhere.age_ns / 1e9

    async def _wait(self, flight: _Flight, seen: bytes) -> Progress:
        while not flight.over:
            if flight.frontier > seen and self._reader.anything_past(flight.ino, seen):
                valid_s = self._freshness.found_s(flight.begun_ns, time.time_ns())
                return Progress(False, flight.frontier, valid_s or 0.0)
            await flight.news.wait()
        if flight.error is not None:
            raise copy.copy(flight.error) from flight.error
        directory = self._reader.directory(flight.ino)
        if directory is None or not directory.complete:
            raise NotFound("the directory no longer exists")
        return Progress(True, b"", self._freshness.listing(directory, time.time_ns()) or 0.0)

    async def _drive(self, flight: _Flight) -> None:
        try:
            await self._list(flight)
            flight.error = None
        except CachefsError as error:
            flight.error = error
        except Exception:  # noqa: BLE001 - the agent must not end with all its mounts because one directory is strange
            _log.exception("listing of directory %d failed", flight.ino)
            flight.error = StorageUnavailable("the listing failed inside cachefs; the agent's log says where")
        finally:
            flight.over = True
            del self._flights[flight.ino]
            flight.announce()

    async def _list(self, flight: _Flight) -> None:
        key = self._reader.key_of(flight.ino)
        elsewhere = flight.elsewhere
        run: ListingRun = await self._run_blocking(
            self._writer.begin_listing, flight.ino, time.time_ns(), elsewhere.age_ns
        )
        page = await self._fetch(elsewhere, key, None)
        at: str | None = None
        while True:
            if page.borrowed and not self._trusts(elsewhere):
                page = await self._fetch(elsewhere, key, at)
            ahead: Later[_Page] = Later()
            committed: Later[None] = Later()
            token = page.entries.next_token
            async with trio.open_nursery() as pair:
                if token is not None:
                    pair.start_soon(ahead.run, functools.partial(self._fetch, elsewhere, key, token))
                await committed.run(functools.partial(self._commit, run, page))
                if committed.error is None and run.streaming:  # readers need not wait for the page ahead
                    flight.frontier = run.frontier
                    flight.announce()
            committed.result()
            if token is None:
                return
            page, at = ahead.result(), token
            if page.entries.next_token == token:
                raise StorageUnavailable("the store lists the same page again and again", retryable=False)

    async def _fetch(self, elsewhere: _Elsewhere, key: str, token: str | None) -> _Page:
        asked_ns = time.time_ns()
        if elsewhere.store is None or not self._trusts(elsewhere):
            return _Page(await self._run_blocking(_list_page, self._store, key, token), asked_ns, borrowed=False)
        entries: PageEntries = await self._run_blocking(_list_page, elsewhere.store, key, token)
        return _Page(entries, asked_ns - elsewhere.age_ns, borrowed=True)

    async def _commit(self, run: ListingRun, page: _Page) -> None:
        await self._run_blocking(self._writer.commit_page, run, page.entries, page.asked_ns, time.time_ns())


def _list_page(store: PageSource, key: str, token: str | None) -> PageEntries:
    return page_entries(store.list_page(key, token=token, limit=PAGE_LIMIT), key)
