"""Finds out what one name is, with as few requests to the store as possible.

S3 has no directories, so a name can need two questions: HEAD of the key (a file?) and a LIST of one key below it (a
directory?). What the name was last time says which one to ask first; an unknown name gets both at once.

    trusted entry or complete listing    no request (metadata.freshness)
    not found a moment ago               no request (negative entries, in memory, bounded)
    was a file                           HEAD; LIST only when it is gone
    was a directory                      LIST; HEAD only when it is gone
    unknown                              both

Who asks for many names of one directory (`MANY_NAMES` within the ttl) gets a listing of the directory made, and is
answered from it: a page of a listing answers 1,000 names. A huge directory is not waited for longer than
`PATIENCE_S`; meanwhile names are asked for one by one. Under strict consistency every name is asked for, and a
question under way is shared only by those who asked before it was sent.

A version that the store no longer has ends the time of its name (`recheck`), unless names are pinned.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

import trio

from cachefs.errors import CachefsError, NotADirectory, NotFound, StorageUnavailable
from cachefs.store.port import ObjectInfo, ObjectStore
from cachefs.types import Consistency, FileKind, Ino
from metadata.facts import FileFacts, Finding, head_facts
from metadata.flights import Later, SingleFlight
from metadata.freshness import Absent, Freshness, Known
from metadata.listing import Lister, RunBlocking
from metadata.names import SLASH, decode_key, usable
from metadata.records import Dentry
from metadata.store import MetadataWriter

_log = logging.getLogger(__name__)

MANY_NAMES = 8
PATIENCE_S = 1.0
NEGATIVE_ENTRIES = 65536
WATCHED_DIRECTORIES = 1024


@dataclass(frozen=True, slots=True)
class Resolved:
    """The answer to a name; the record is committed."""

    ino: Ino | None
    """None: the name does not exist."""
    valid_s: float
    """For how long the kernel may keep this answer (0: not at all)."""


@dataclass(slots=True)
class _Asked:
    """How often names of one directory were asked for."""

    since_ns: int
    names: int = 0
    listing_ns: int = 0
    """When a listing was begun because of it (0: not yet)."""
    refused: bool = False
    """The listing failed: names go on one by one."""


class Resolver:
    """Resolves names for all workers of a volume. `lister` None: no directory is listed to answer names."""

    def __init__(
        self,
        writer: MetadataWriter,
        store: ObjectStore,
        prefix: str,
        freshness: Freshness,
        run_blocking: RunBlocking,
        lister: Lister | None = None,
    ) -> None:
        writer.identity.expect(prefix)
        self._writer = writer
        self._reader = writer.reader
        self._store = store
        self._freshness = freshness
        self._run_blocking = run_blocking
        self._lister = lister
        self._flights: SingleFlight[tuple[Ino, bytes], Resolved] = SingleFlight()
        self._negative: OrderedDict[tuple[Ino, bytes], int] = OrderedDict()
        self._asked: OrderedDict[Ino, _Asked] = OrderedDict()

    async def resolve(self, parent: Ino, name: bytes) -> Resolved:
        """Return what `name` in `parent` is now. Raises NotADirectory, StaleObject, AccessDenied, StorageUnavailable.

        Cancellation leaves nothing behind; another task that waits for the same name takes over.
        """
        if not usable(name):
            return self._absent(time.time_ns())
        answer = self._known(parent, name)
        if answer is None and self._lister is not None and not self._freshness.strict:
            answer = await self._from_listing(self._lister, parent, name)
        if answer is not None:
            return answer
        ask = functools.partial(self._ask, parent, name)
        return await self._flights.run((parent, name), ask, fresh=self._freshness.strict)

    async def recheck(self, ino: Ino) -> None:
        """The store no longer has the version that `ino` names: find out what its name is now, and commit it.

        Nothing is asked when the name leads elsewhere already, when it is pinned (immutable), or when the next look-up
        asks anyway (strict). Raises AccessDenied, StorageUnavailable.
        """
        inode = self._reader.inode(ino)
        if inode is None or self._freshness.consistency is not Consistency.TTL:
            return
        place = inode.parent, inode.name

        async def ask() -> Resolved:
            known = self._reader.dentry(*place)
            if known is not None and known.ino == ino:
                return await self._ask(*place)
            return Resolved(None if known is None else known.ino, 0.0)

        await self._flights.run(place, ask, fresh=True)

    def _known(self, parent: Ino, name: bytes) -> Resolved | None:
        now_ns = time.time_ns()
        known = self._freshness.name(self._reader, parent, name, now_ns)
        if isinstance(known, Known):
            return Resolved(known.dentry.ino, known.valid_s)
        if isinstance(known, Absent):
            return Resolved(None, known.valid_s)
        asked_ns = self._negative.get((parent, name))
        if asked_ns is None:
            return None
        valid_s = self._freshness.absent_s(asked_ns, now_ns)
        return None if valid_s is None else Resolved(None, valid_s)

    def _absent(self, asked_ns: int) -> Resolved:
        return Resolved(None, self._freshness.absent_s(asked_ns, time.time_ns()) or 0.0)

    # -- one name ------------------------------------------------------------------------------------------------------

    async def _ask(self, parent: Ino, name: bytes) -> Resolved:
        above = self._reader.key_of(parent)
        if above and not above.endswith("/"):
            raise NotADirectory(f"{above} is not a directory")
        known = self._reader.dentry(parent, name)
        asked_ns = time.time_ns()
        finding = await self._find(above + decode_key(name), None if known is None else known.kind)
        if known is not None and finding.file is None and not finding.directory and self._lister is not None:
            self._lister.name_vanished()
        ino = await self._commit(parent, name, known, finding, asked_ns)
        if ino is None:
            self._negative[parent, name] = asked_ns
            self._negative.move_to_end((parent, name))
            if len(self._negative) > NEGATIVE_ENTRIES:
                self._negative.popitem(last=False)
            return self._absent(asked_ns)
        self._negative.pop((parent, name), None)
        return Resolved(ino, self._freshness.found_s(asked_ns, time.time_ns()) or 0.0)

    async def _commit(
        self, parent: Ino, name: bytes, known: Dentry | None, finding: Finding, asked_ns: int
    ) -> Ino | None:
        if known is None and finding.file is None and not finding.directory:
            return None  # nothing to write down, and nothing written down that would be wrong
        try:
            ino: Ino | None = await self._run_blocking(
                self._writer.commit_name, parent, name, finding, asked_ns, time.time_ns()
            )
        except StorageUnavailable as error:
            if known is None or not self._confirms(known, finding):
                raise
            _log.warning("a name that is unchanged is answered without being dated: %s", error)
            return known.ino
        return ino

    def _confirms(self, known: Dentry, finding: Finding) -> bool:
        if known.kind is FileKind.DIRECTORY:
            return bool(finding.directory)
        inode, file = self._reader.inode(known.ino), finding.file
        same = inode is not None and file is not None and (inode.etag, inode.size) == (file.etag, file.size)
        return same and not finding.directory

    async def _find(self, key: str, was: FileKind | None) -> Finding:
        if was is FileKind.FILE:
            file = await self._head(key)
            return Finding(file) if file is not None else Finding(no_file=True, directory=await self._below(key))
        if was is FileKind.DIRECTORY:
            if await self._below(key):
                return Finding(directory=True)
            file = await self._head(key)
            return Finding(file, no_file=file is None, directory=False)
        return await self._find_unknown(key)

    async def _find_unknown(self, key: str) -> Finding:
        head: Later[FileFacts | None] = Later()
        below: Later[bool] = Later()
        async with trio.open_nursery() as pair:
            pair.start_soon(head.run, functools.partial(self._head, key))
            await below.run(functools.partial(self._below, key))
        if below.error is None and below.result():
            # The directory wins, so what became of the other question does not matter.
            file = head.result() if head.error is None else None
            return Finding(file, no_file=head.error is None and file is None, directory=True)
        file = head.result()
        if file is not None:
            return Finding(file, directory=None if below.error is not None else False)
        return Finding(no_file=True, directory=below.result())

    async def _head(self, key: str) -> FileFacts | None:
        try:
            found: ObjectInfo = await self._run_blocking(self._store.head, key)
        except NotFound:
            return None
        return head_facts(found)

    async def _below(self, key: str) -> bool:
        list_one = functools.partial(self._store.list_page, key + "/", delimiter="", limit=1)
        page = await self._run_blocking(list_one)
        return bool(page.objects or page.prefixes)

    # -- many names ----------------------------------------------------------------------------------------------------

    async def _from_listing(self, lister: Lister, parent: Ino, name: bytes) -> Resolved | None:
        """Answer from a listing that is made because many names were asked for. None: ask for this one."""
        asked = self._watch(parent)
        if asked.names <= MANY_NAMES or asked.refused:
            return None
        now_ns = time.time_ns()
        asked.listing_ns = asked.listing_ns or now_ns
        patience_s = PATIENCE_S - (now_ns - asked.listing_ns) / 1e9
        with trio.move_on_after(max(patience_s, 0.0)):
            try:
                await self._listed_past(lister, parent, name + SLASH)
            except CachefsError as error:
                asked.refused = True
                _log.info("directory %d is not listed to answer names: %s", parent, error)
        return self._known(parent, name)

    async def _listed_past(self, lister: Lister, parent: Ino, place: bytes) -> None:
        seen: bytes | None = None
        while True:
            progress = await lister.list_directory(parent, seen)
            if progress.complete or place < progress.frontier:
                return
            seen = progress.frontier

    def _watch(self, parent: Ino) -> _Asked:
        now_ns = time.time_ns()
        asked = self._asked.get(parent)
        if asked is None or self._freshness.found_s(asked.since_ns, now_ns) is None:
            asked = self._asked[parent] = _Asked(now_ns)
        self._asked.move_to_end(parent)
        if len(self._asked) > WATCHED_DIRECTORIES:
            self._asked.popitem(last=False)
        asked.names += 1
        return asked
