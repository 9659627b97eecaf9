"""A listing enters the store page by page: what is new, the same, another version, gone.

Pages come in the order of sort keys, so each page is merged with the entries already stored between the last frontier
and its own: entries that the listing passed over have vanished. A listing that finds nothing new writes nothing but
its own completion, and 1,000,000 entries need no memory.

* A FIRST listing streams: the directory is incomplete, and readers get what is below its frontier.
* A listing of a complete directory (RE-LISTING) works in place. The directory stays complete with its old date until
  the end; readers see each change as soon as it is known. Nothing is gained by switching atomically: pages of one
  listing are of different moments anyway, and readdir(3) leaves open whether changes during a scan are seen. One page
  (1,000 entries) is one transaction.
* Some server might list in no order at all. That shows when a page begins below the frontier. The volume is then marked
  UNORDERED, the listing fails (its readers may have missed something), and from then on no listing streams: every
  entry is stamped with the listing's number, and what has an older number at the end has vanished.
* Entries asked for by name after a page was requested know better than the page: they are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cachefs.errors import NotADirectory, NotFound, StorageUnavailable
from cachefs.types import ROOT_INO, FileKind, Ino
from metadata.changes import Changes
from metadata.facts import PageEntries
from metadata.names import SLASH, frontier_of
from metadata.records import Dentry, Directory, unpack_dentry

REMOVALS_PER_TRANSACTION = 2000
"""Bounds the dirty pages that one transaction holds in memory."""


@dataclass(slots=True)
class ListingRun:
    """One listing on its way. Only the writer changes it; when a page fails the whole listing is given up."""

    ino: Ino
    generation: int
    started_ns: int
    first: bool
    """The directory has no complete listing yet."""
    unordered: bool
    frontier: bytes = b""
    pending: frozenset[bytes] = field(default_factory=frozenset)
    """Sort keys that were listed but are not below the frontier."""
    seen: int = 0
    shadowed: int = 0
    hidden: int = 0
    found: int = 0
    changed: bool = False
    age_ns: int = 0
    """How old the pages may be when they come."""

    @property
    def streaming(self) -> bool:
        """Readers may use what is below the frontier."""
        return self.first and not self.unordered


class Disordered(StorageUnavailable):
    """The store's pages are not in order (the volume has been marked)."""


def begin(changes: Changes, ino: Ino, unordered: bool, age_ns: int = 0) -> ListingRun:
    """Begin a listing, of pages that may be so old."""
    known = changes.directory(ino)
    first = known is None or not known.complete
    generation = (known.generation if known is not None else 0) + 1
    run = ListingRun(ino, generation, changes.now_ns, first, unordered, age_ns=age_ns)
    if first:
        changes.put_listing(ino, _incomplete(changes, run))
    return run


def put_page(changes: Changes, run: ListingRun, page: PageEntries, asked_ns: int) -> None:
    """Enter what a page states. Raises Disordered before anything is changed."""
    if not run.unordered and page.entries and page.entries[0][0] < run.frontier:
        raise Disordered("the store lists keys in no order; the directory is listed again without streaming")
    if page.found:
        changes.revive(run.ino)
    restamp = run.first or run.unordered
    for key, facts in page.entries:
        if facts is None:
            changes.put_directory(run.ino, key.removesuffix(SLASH), asked_ns, run.generation, restamp=restamp)
        else:
            changes.put_file(run.ino, key, facts, asked_ns, run.generation, restamp=restamp)


def vanished(
    changes: Changes, run: ListingRun, page: PageEntries, asked_ns: int, resume: bytes, last: bool
) -> tuple[list[Dentry], bytes | None]:
    """Return entries that the listing passed over, and where to go on when there may be more (None: that was all).

    `resume` is where the last call left off (at first: the run's frontier).
    """
    if run.unordered and not last:
        return [], None
    listed = run.pending.union(key for key, _ in page.entries) if not run.unordered else frozenset[bytes]()
    end = None if last else frontier_of(key for key, _ in page.entries)
    gone: list[Dentry] = []
    for key, raw in changes.walk(run.ino, resume, end):
        if key in listed:
            continue
        dentry = unpack_dentry(key, raw)
        if dentry.gone or changes.newer(dentry, asked_ns) or (run.unordered and _stamped(dentry, run)):
            continue
        if len(gone) >= REMOVALS_PER_TRANSACTION:
            return gone, key
        gone.append(dentry)
    return gone, None


def note(changes: Changes, run: ListingRun) -> None:
    """Take over what one transaction of the listing did."""
    run.shadowed += changes.shadowed
    run.changed |= changes.changed


def advance(changes: Changes, run: ListingRun, page: PageEntries) -> None:
    """A page is entered: move the frontier."""
    keys = [key for key, _ in page.entries]
    frontier = max(run.frontier, frontier_of(keys))
    if not run.unordered:
        run.pending = frozenset(key for key in run.pending.union(keys) if key >= frontier)
    run.frontier = frontier
    _account(changes, run, page)
    if run.streaming:
        changes.put_listing(run.ino, _incomplete(changes, run))


def complete(changes: Changes, run: ListingRun, page: PageEntries) -> None:
    """The last page is entered: the directory is complete. Raises NotFound when the store has nothing below it."""
    _account(changes, run, page)
    if run.found == 0 and run.ino != ROOT_INO:
        raise NotFound("the directory no longer exists")
    known = changes.directory(run.ino)
    created = changes.inode(run.ino)
    changed_ns = (
        known.changed_ns if known is not None else (created.mtime_ns if created is not None else changes.now_ns)
    )
    if run.changed and not run.first:
        changed_ns = changes.now_ns
        changes.touch_directory(run.ino)
    visible = max(0, run.seen - run.shadowed)
    changes.put_listing(
        run.ino,
        Directory(
            run.generation,
            run.started_ns,
            True,
            changed_ns,
            b"",
            visible,
            run.hidden + run.shadowed,
            changes.now_ns - run.age_ns,
        ),
    )


def drop(changes: Changes, ino: Ino) -> None:
    """The store has nothing below a directory: its own name vanished."""
    inode = changes.inode(ino)
    own = changes.entry(inode.parent, inode.name + SLASH) if inode is not None else None
    if inode is None or own is None or own.ino != ino or own.gone:
        return
    changes.remove(inode.parent, own)
    changed(changes, inode.parent)


def changed(changes: Changes, ino: Ino) -> None:
    """Entries of a directory came or went outside of a listing: date it, if its listing was complete."""
    known = changes.directory(ino)
    if known is not None and known.complete:
        changes.put_listing(ino, replace(known, changed_ns=changes.now_ns))
        changes.touch_directory(ino)


def _stamped(dentry: Dentry, run: ListingRun) -> bool:
    """Whether the listing met the entry, or somebody asked for it by name since the listing began."""
    return dentry.checked_ns >= run.started_ns and dentry.generation in (0, run.generation)


def _account(changes: Changes, run: ListingRun, page: PageEntries) -> None:
    run.seen += len(page.entries)
    run.hidden += page.hidden
    run.found += page.found


def _incomplete(changes: Changes, run: ListingRun) -> Directory:
    inode = changes.inode(run.ino)
    if inode is None:
        raise NotFound("the directory no longer exists")
    if inode.kind is not FileKind.DIRECTORY:
        raise NotADirectory("only directories can be listed")
    visible = max(0, run.seen - run.shadowed)
    return Directory(run.generation, run.started_ns, False, inode.mtime_ns, run.frontier, visible, run.hidden)
