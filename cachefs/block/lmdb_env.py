"""The LMDB environment below a tier, the block cache's only module that knows LMDB.

Three databases in one environment: the unnamed one maps block keys to values (`cachefs.block.codec`); `index` maps the
same keys to (first page, length) of the value; `state` names the format and the block size, and has a note beside each
block of which volume it is and when it was stored or last read (`cachefs.block.holdings`). Whoever does not know such
notes passes over them, so they needed no other format; a block without one belongs to nobody.

Why the index: py-lmdb touches every page of a value that it returns, so a cold value would come page by page
through the map (56 MB/s measured). A long value lies in consecutive pages that never move while it exists, and its
first page is known when it is written. So a reader takes the small index record and then the value with one pread,
inside of one read transaction: as fast as a plain file, and a truncated file is a short read and no SIGBUS. The
index also gives the lengths that the budget needs without touching values.

INVARIANT: index and unnamed database hold the same block keys (both are changed in one transaction).
LMDB's errors leave this module as `MapFull` (evict and try again), CorruptBlock (begin anew) or TierUnavailable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lmdb

from cachefs import errors
from cachefs.block import tier_files
from cachefs.block.codec import Bytes
from cachefs.block.huge_pages import HUGE_PAGE, address_of
from cachefs.block.ledger import PAGE_HEADER, PAGE_SIZE, value_pages
from cachefs.block.page_location import first_page
from cachefs.types import BlockKey

FORMAT = b"1"
KEY_SIZE = 20
INDEX = b"index"
MAX_READERS = 500
LEAST_ALIGNED = 32 * HUGE_PAGE
RECORD = struct.Struct("<QI")
"""A record of the index: first page (0: the value is no piece of its own), length of the value."""
NOTE = struct.Struct("<QI")
"""A note in `state`: the owner of a block, and seconds since the epoch."""
NOTE_PREFIX = b"o"
"""Before the key of the block; no other key of `state` begins with it."""
SCANNED_NOTES = 4096
NO_MORE = b"\xff" * (KEY_SIZE + 1)
"""Behind every key."""
PINNED: dict[str, Any] = {"lib_version": 0} if hasattr(lmdb.Environment, "lib_version") else {}
"""lmdb 3 can write two file formats; this is the one that every version reads."""
_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.BadTxnError,
    lmdb.BadValsizeError,
)


class MapFull(errors.TierUnavailable):
    """No free pages for this write: evict, and try again."""


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except lmdb.MapFullError as error:
        raise MapFull(f"{what}: {error}") from error
    except _DAMAGE as error:
        raise errors.CorruptBlock(f"{what}: {error}") from error
    except lmdb.Error as error:
        if error.code in (errno.ENOSPC, errno.EDQUOT):
            raise MapFull(f"{what}: {error}") from error
        raise errors.TierUnavailable(f"{what}: {error}") from error
    except OSError as error:
        raise errors.TierUnavailable(f"{what}: {error}") from error


def file_identity(directory: str) -> tuple[int, int]:
    """Return what tells one data file from its successor at the same path. Raises OSError."""
    status = os.stat(os.path.join(directory, tier_files.DATA_FILE))
    return status.st_dev, status.st_ino


def stored_block_size(directory: str) -> int | None:
    """Return the size of the blocks in an environment that nobody has open; None when it has none. Raises CorruptBlock,
    TierUnavailable.
    """
    with _translated(f"{directory} cannot be read"):
        env = lmdb.Environment(directory, readonly=True, lock=False, create=False, max_dbs=2, **PINNED)
        try:
            state = env.open_db(b"state", create=False)
            with env.begin(db=state) as txn:
                found = txn.get(b"format"), txn.get(b"block_size") or b""
                blocks = txn.stat(env.open_db(INDEX, txn, create=False))["entries"]
        finally:
            env.close()
    return int(found[1]) if found[0] == FORMAT and found[1].isdigit() and blocks else None


class BlockEnvironment:
    """One open environment with its writer's operations. Writes: one thread at a time. Reads: any thread."""

    def __init__(self, directory: str, *, map_size: int, writemap: bool, block_size: int) -> None:
        """Open or begin it. Raises CorruptBlock (not usable, begin anew), TierUnavailable (not writable)."""
        self.directory = directory
        self._ticks = 0
        self._fd = -1
        self._writemap = writemap
        with _translated(f"{directory} cannot be opened"):
            tier_files.reserve_lock_file(directory)
            self._env = lmdb.Environment(
                directory,
                map_size=map_size,
                sync=False,
                metasync=False,
                writemap=writemap,
                meminit=False,
                readahead=False,
                max_dbs=2,
                max_readers=MAX_READERS,
                max_spare_txns=16,
                mode=0o600,
                **PINNED,
            )
        try:
            with _translated(f"{directory} cannot be read"):
                self.identity = file_identity(directory)
                self._fd = os.open(os.path.join(directory, tier_files.DATA_FILE), os.O_RDONLY | os.O_CLOEXEC)
                self._locatable = self._env.stat()["psize"] == PAGE_SIZE
                self._open_databases(block_size)
                self._known_end = self.end
                self._align(map_size)
        except BaseException:
            self._env.close()
            if self._fd >= 0:
                os.close(self._fd)
            raise

    def _open_databases(self, block_size: int) -> None:
        fresh = self._env.stat()["entries"] == 0
        self._state = self._env.open_db(b"state")
        self._index = self._env.open_db(INDEX)
        with self._env.begin(write=fresh) as txn:
            if fresh:
                txn.put(b"format", FORMAT, db=self._state)
                txn.put(b"block_size", b"%d" % block_size, db=self._state)
            found = txn.get(b"format", db=self._state), txn.get(b"block_size", db=self._state)
            blocks, indexed = self._env.stat()["entries"] - 2, txn.stat(self._index)["entries"]
        if found != (FORMAT, b"%d" % block_size):
            raise errors.CorruptBlock(f"it has format and block size {found}, not {FORMAT!r} and {block_size}")
        if not fresh and blocks != indexed:
            raise errors.CorruptBlock(f"it has {blocks} blocks and {indexed} in its index")

    @property
    def end(self) -> int:
        """The end of the used part of the data file, in bytes."""
        return (self._env.info()["last_pgno"] + 1) * PAGE_SIZE

    @property
    def txnid(self) -> int:
        """The number of the last committed transaction."""
        return self._env.info()["last_txnid"]

    def intact(self) -> bool:
        """Return whether the directory still leads to this data file and the file has all of its pages."""
        try:
            self._check_length()
            return file_identity(self.directory) == self.identity
        except (OSError, errors.CorruptBlock):
            return False

    def _check_length(self) -> None:
        """Notice a file that was cut before LMDB touches a page behind its end, which would be SIGBUS."""
        if os.fstat(self._fd).st_size < self._known_end:
            raise errors.CorruptBlock("the data file was cut while it was in use")

    def scan(self) -> Iterator[tuple[BlockKey, int]]:
        """Yield every block's key and the length of its value. Raises CorruptBlock."""
        with _translated("the index cannot be read"), self._env.begin(db=self._index) as txn:
            for key, record in txn.cursor():
                if len(key) != KEY_SIZE or len(record) != RECORD.size:
                    raise errors.CorruptBlock("its index has a foreign record")
                yield BlockKey(bytes(key)), RECORD.unpack(record)[1]

    def scan_with_owners(self) -> Iterator[tuple[BlockKey, int, int]]:
        """As `scan`, with the owner of each block (0: nobody's)."""
        place, owners = b"", dict[BlockKey, int]()
        for key, length in self.scan():
            while key > place:  # both are in the order of keys
                notes = self.notes(place, SCANNED_NOTES)
                owners = {noted: owner for noted, owner, _ in notes}
                place = notes[-1][0] if len(notes) == SCANNED_NOTES else NO_MORE
            yield key, length, owners.get(key, 0)

    def length(self, key: BlockKey) -> int | None:
        """Return the length of a block's value, or None."""
        with _translated("the index cannot be read"), self._env.begin(db=self._index) as txn:
            record = txn.get(key)
            return None if record is None or len(record) != RECORD.size else int(RECORD.unpack(record)[1])

    def extents(self, keys: Iterable[BlockKey]) -> list[tuple[int, int]]:
        """Return (offset, length) of the pages in the file that belong to one of these values and to nothing else."""
        found = []
        with _translated("the index cannot be read"), self._env.begin(db=self._index) as txn:
            for key in keys:
                record = txn.get(key)
                page, length = (0, 0) if record is None or len(record) != RECORD.size else RECORD.unpack(record)
                if page:
                    found.append((page * PAGE_SIZE, value_pages(length) * PAGE_SIZE))
        return found

    def read(self, key: BlockKey, place: memoryview | None = None) -> Bytes | None:
        """Return a block's value, unchecked, or None: in `place` if that is given and holds it, else in new memory.

        Raises CorruptBlock (short file), TierUnavailable.
        """
        self._check_length()
        with _translated(f"block {key.hex()} cannot be read"), self._env.begin(buffers=True) as txn:
            record = txn.get(key, db=self._index)
            if record is None or len(record) != RECORD.size:
                return None
            page, length = RECORD.unpack(record)
            if page:
                start = page * PAGE_SIZE + PAGE_HEADER
                if place is None or len(place) < length:
                    value: Bytes = os.pread(self._fd, length, start)
                    count = len(value)
                else:
                    value = place[:length]
                    count = os.preadv(self._fd, [value], start)
                if count != length:
                    raise errors.CorruptBlock(f"the data file ends within block {key.hex()}")
                return value
            view = txn.get(key)
            return None if view is None else bytes(view)

    @contextlib.contextmanager
    def lend(self, key: BlockKey) -> Iterator[memoryview | None]:
        """Give a block's value, unchecked, as a view of the map that is valid inside; None if it is not there.

        Raises CorruptBlock (short file), TierUnavailable.
        """
        self._check_length()
        with _translated(f"block {key.hex()} cannot be read"):
            txn = self._env.begin(buffers=True)
        try:
            with _translated(f"block {key.hex()} cannot be read"):
                value = txn.get(key)
            yield value
        finally:
            txn.abort()

    def write(self, values: Iterable[tuple[BlockKey, Bytes]], owner: int = 0, now_s: int = 0) -> None:
        """Commit blocks' values in one transaction, noted as those of `owner` (0: nobody's). When it raises, nothing
        changed.
        """
        self._check_length()
        note = NOTE.pack(owner, now_s) if owner else None
        with _translated("blocks cannot be written"), self._env.begin(write=True, buffers=True) as txn:
            last_page = (1 << 48) // PAGE_SIZE
            for key, value in values:
                txn.put(key, value)
                page = 0
                if self._locatable and value_pages(len(value)):
                    stored = txn.get(key)
                    page = first_page(stored, last_page) if stored is not None else 0
                    del stored
                txn.put(key, RECORD.pack(page, len(value)), db=self._index)
                if note is not None:
                    txn.put(NOTE_PREFIX + key, note, db=self._state)
        self._known_end = self.end

    def delete(self, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, int]]:
        """Delete blocks in one transaction; returns those that were there, with the lengths of their values."""
        self._check_length()
        gone: list[tuple[BlockKey, int]] = []
        with _translated("blocks cannot be deleted"), self._env.begin(write=True) as txn:
            for key in keys:
                record = txn.pop(key, db=self._index)
                txn.delete(key)
                txn.delete(NOTE_PREFIX + key, db=self._state)
                if record is not None:
                    gone.append((key, RECORD.unpack(record)[1]))
        self._known_end = self.end
        return gone

    def owner(self, key: BlockKey) -> int:
        """Return whose a block is (0: nobody's)."""
        [found] = self.notes_of([key])
        return 0 if found is None else found[0]

    def notes_of(self, keys: Iterable[BlockKey]) -> list[tuple[int, int] | None]:
        """Return (owner, seconds since the epoch) of each block; None where there is no note."""
        with _translated("notes cannot be read"), self._env.begin(db=self._state) as txn:
            found = [txn.get(NOTE_PREFIX + key) for key in keys]
        return [NOTE.unpack(note) if note is not None and len(note) == NOTE.size else None for note in found]

    def notes(self, after: bytes, count: int) -> list[tuple[BlockKey, int, int]]:
        """Return up to `count` notes behind the block `after` (b"": from the first): key, owner, seconds since the
        epoch.
        """
        found: list[tuple[BlockKey, int, int]] = []
        with _translated("notes cannot be read"), self._env.begin(db=self._state) as txn, txn.cursor() as cursor:
            there = cursor.set_range(NOTE_PREFIX + after + b"\0" if after else NOTE_PREFIX)
            while there and len(found) < count:
                key, note = cursor.item()
                if not key.startswith(NOTE_PREFIX):
                    break
                if len(key) == 1 + KEY_SIZE and len(note) == NOTE.size:
                    owner, at_s = NOTE.unpack(note)
                    found.append((BlockKey(key[1:]), owner, at_s))
                there = cursor.next()
        return found

    def owned_after(self, after: bytes, count: int) -> list[tuple[BlockKey, int, int]]:
        """Return up to `count` blocks that have a note, behind `after`: key, owner, length of the value."""
        found = []
        notes = self.notes(after, count)
        with _translated("the index cannot be read"), self._env.begin(db=self._index) as txn:
            for key, owner, _ in notes:
                record = txn.get(key)
                length = RECORD.unpack(record)[1] if record is not None and len(record) == RECORD.size else 0
                found.append((key, owner, length))
        return found

    def note(self, notes: Iterable[tuple[BlockKey, int, int]]) -> None:
        """Write notes in one transaction: key, owner, seconds since the epoch. When it raises, nothing changed."""
        self._check_length()
        with _translated("notes cannot be written"), self._env.begin(write=True, db=self._state) as txn:
            for key, owner, at_s in notes:
                txn.put(NOTE_PREFIX + key, NOTE.pack(owner, at_s))
        self._known_end = self.end

    def tick(self) -> None:
        """Commit something small: pages that were freed two transactions ago become usable."""
        self._ticks += 1
        with _translated("a transaction cannot be committed"), self._env.begin(write=True, db=self._state) as txn:
            txn.put(b"tick", b"%d" % self._ticks)

    def resize(self, map_size: int) -> None:
        """Let the file grow up to `map_size` bytes (never less than is used). No read may be open in this process."""
        with _translated("the map cannot be resized"):
            self._env.set_mapsize(max(map_size, self.end))
            self._align(map_size)

    def _align(self, map_size: int) -> None:
        """Let a map for writing begin at a multiple of a huge page, as far as the address space allows.

        The kernel puts a map right below what is there already. One that is shorter by what its beginning lacks to the
        next multiple ends at the same place, and so begins at that multiple. A small tier keeps its length.
        """
        if not self._writemap or map_size < LEAST_ALIGNED or map_size - HUGE_PAGE < self.end:
            return
        excess = (address_of(self._fd) or 0) % HUGE_PAGE
        if excess:
            self._env.set_mapsize(map_size - (HUGE_PAGE - excess))

    def reader_check(self) -> int:
        """Free the slots of readers that died inside of a transaction."""
        with _translated("readers cannot be checked"):
            return self._env.reader_check()

    def sync(self) -> None:
        """Wait until everything committed is on the device."""
        with _translated("the tier cannot be synced"):
            self._env.sync(True)

    def fileno(self) -> int:
        """Return a read-only descriptor of the data file."""
        return self._fd

    def close(self) -> None:
        """Unmap and close. No transaction may be open."""
        self._env.close()
        os.close(self._fd)
