"""The shm tier as workers read it: no locks, no copies.

py-lmdb touches every page of a value that it returns (to take page faults without the interpreter lock). For a
reader of 4 KiB in a block of 1 MiB that is 256 pages for one: 6 us of 8. So the reader takes the small index record
(first page and length, written by `cachefs.block.lmdb_env` in the same transaction as the value) and slices the value
out of a memory map of its own. The open read transaction is what keeps the pages from being reused, whichever map they
are seen through.

A snapshot that LMDB refuses (all reader slots taken, our slot cleared by somebody who took us for dead) is one in which
nothing is found: the reader asks the agent, which reads through its own environment. Counted, and warned of once a
minute.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import lmdb

from cachefs import errors
from cachefs.block import codec, tier_files
from cachefs.block.faults import Faults
from cachefs.block.ledger import PAGE_HEADER, PAGE_SIZE
from cachefs.block.lmdb_env import RECORD, file_identity
from cachefs.block.reader_env import ReaderEnvironment, open_environment
from cachefs.metrics import Counters
from cachefs.types import BlockKey, Tier

_unpack = RECORD.unpack


class _Opened(NamedTuple):
    """An environment and a map of its file: replaced as a whole, so that no thread ever mixes two."""

    env: lmdb.Environment
    blocks: lmdb._Database
    places: lmdb._Database
    identity: tuple[int, int]
    view: memoryview


class Snapshot:
    """A read transaction, to be used with `with`. Keep it short: pages that it can see are not reused.

    Raises TierUnavailable when it cannot be begun.
    """

    __slots__ = ("_opened", "_reader", "_txn")

    def __init__(self, reader: TierReader, opened: _Opened) -> None:
        self._reader = reader
        self._opened = opened
        try:
            self._txn = opened.env.begin(db=opened.places, buffers=True)
        except lmdb.Error as error:
            raise errors.TierUnavailable(f"no read transaction: {error}") from error

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        """The same as leaving the `with` block."""
        self._txn.abort()

    def get(self, key: bytes) -> memoryview | None:
        """Return a stored value (`codec.HEADER_SIZE` bytes of header, then the block) as a view of the map, or None.

        The view is valid until the snapshot ends. What cannot be looked up is not there: never raises.
        """
        try:
            record = self._txn.get(key)
            if record is None:
                return None
            page, length = _unpack(record)
            start = page * PAGE_SIZE + PAGE_HEADER
            view = self._opened.view
            if page and start + length <= len(view):
                return view[start : start + length]
            if page:
                self._opened = self._reader.follow(self._opened)  # the file has grown
                if start + length <= len(self._opened.view):
                    return self._opened.view[start : start + length]
            return self._txn.get(key, db=self._opened.blocks)
        except (lmdb.Error, struct.error) as error:
            self._reader.faults.fault(errors.TierUnavailable(f"block {key.hex()} cannot be looked up: {error}"))
            return None


class _NoSnapshot(Snapshot):
    """Stands for a read transaction that could not be begun: nothing is found in it."""

    __slots__ = ()

    def __init__(self) -> None:
        """It has nothing to open."""

    def end(self) -> None:
        """It has nothing to end."""

    def get(self, key: bytes) -> memoryview | None:
        """Return None for every key."""
        return None


_NOTHING = _NoSnapshot()


class TierReader:
    """A tier as another process sees it. Any number of threads may use one."""

    def __init__(self, directory: str, block_size: int | None = None, counters: Counters | None = None) -> None:
        """Open the environment in `directory`. Raises TierUnavailable when there is none that can be read, or (with
        `block_size`) one whose blocks have another size: block 1 of it would be other bytes of the object.

        `counters` get the snapshots and look-ups that failed (`shm_faults`).
        """
        self.directory = directory
        self.faults = Faults(f"the tier in {directory}", Tier.SHM, counters if counters is not None else Counters())
        self._block_size = block_size
        self._opened = self._open()

    def _open(self) -> _Opened:
        opened: ReaderEnvironment | None = None
        try:
            opened = open_environment(self.directory, self._block_size)
            return _Opened(*opened, self._map(opened.identity))
        except (lmdb.Error, OSError, ValueError) as error:
            if opened is not None:
                opened.env.close()
            raise errors.TierUnavailable(f"the tier in {self.directory} cannot be read: {error}") from error

    def _map(self, identity: tuple[int, int]) -> memoryview:
        with open(os.path.join(self.directory, tier_files.DATA_FILE), "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) != identity:
                # Places of one file must never be looked up in another one.
                raise ValueError("it was replaced while it was being opened")
            return memoryview(mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ))

    def snapshot(self) -> Snapshot:
        """Begin a read transaction. Never raises: where none can be begun, nothing is found."""
        try:
            return Snapshot(self, self._opened)
        except errors.TierUnavailable as error:
            self.faults.fault(error)
            return _NOTHING

    def find(self, key: bytes, start: int, size: int) -> tuple[memoryview, Callable[[], object]] | None:
        """Return `size` bytes of a stored value from `start` on, and what to call when they have been used; None when
        they are not there, or not to be had without more ado. Never raises.

        `snapshot` and `get` in one: every call counts where a read of 4 KiB takes 10 us.
        """
        opened = self._opened
        try:
            txn = opened.env.begin(opened.places, None, False, True)
        except lmdb.Error as error:
            self.faults.fault(errors.TierUnavailable(f"no read transaction: {error}"))
            return None
        try:
            record = txn.get(key)
            if record is None:
                txn.abort()
                return None
            page, length = _unpack(record)
            first = page * PAGE_SIZE + PAGE_HEADER + start
            if page and start + size <= length:
                piece = opened.view[first : first + size]
                if len(piece) == size:
                    return piece, txn.abort
        except (lmdb.Error, struct.error):
            pass
        txn.abort()
        return self._find_with_care(key, start, size)

    def _find_with_care(self, key: bytes, start: int, size: int) -> tuple[memoryview, Callable[[], object]] | None:
        """The same where the file has grown, the value is short, or something is wrong."""
        snapshot = self.snapshot()
        value = snapshot.get(key)
        if value is not None and start + size <= len(value):
            return value[start : start + size], snapshot.end
        snapshot.end()
        return None

    def follow(self, opened: _Opened) -> _Opened:
        """Map the whole of a file that has grown; returns `opened` as it is when its file is not there any more."""
        try:
            if file_identity(self.directory) != opened.identity:
                return opened
            grown = opened._replace(view=self._map(opened.identity))
        except (OSError, ValueError):
            return opened
        if self._opened.env is opened.env:
            self._opened = grown
        return grown

    def used_bytes(self) -> int:
        """Return how much of its file the tier has ever used: as much as it has blocks, or more."""
        info = self._opened.env.info()
        return (info["last_pgno"] + 1) * PAGE_SIZE

    def payload(self, key: BlockKey) -> bytes | None:
        """Return a checked copy of a block's bytes, or None. Raises CorruptBlock."""
        with self.snapshot() as snapshot:
            value = snapshot.get(key)
            return None if value is None else bytes(codec.verify(value, key))

    def refresh(self) -> bool:
        """Open again when the writer began a new environment in the directory; returns whether it did.

        Call it when a block that the agent has just filled is not there, with no snapshot open in the calling thread;
        those of other threads end as usual. Raises TierUnavailable (the old environment stays in use).
        """
        try:
            if file_identity(self.directory) == self._opened.identity:
                return False
        except OSError as error:
            raise errors.TierUnavailable(f"the tier in {self.directory} is gone: {error}") from error
        # Replaced, not closed: another thread may be inside of a snapshot. The last reference closes it.
        self._opened = self._open()
        return True

    def close(self) -> None:
        """Unmap. No snapshot may be open."""
        self._opened.env.close()
