"""The disk tier as workers read it: without the agent, in threads, each block checked in memory of the thread's own.

A block that is read once and in sequence gains nothing from the shm tier: the copy into it costs more than all the rest
of the read, and takes room from what is read again. So it goes from the page cache into the thread's memory, is checked
there, and goes to the kernel.

The bytes come by pread(2), not through a map: what the device cannot read is an error here and a miss, where a page
fault would be SIGBUS, or half an answer to a reader. The index is looked up in LMDB's map, as in every process that
opens a tier, after a look at the length of the file. The open read transaction keeps the pages from being used again
while they are read.

Whatever goes wrong, the block is not there: the agent is asked then, and it is the one that drops bad blocks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

import lmdb

from cachefs import errors
from cachefs.block import codec, tier_files
from cachefs.block.faults import Faults
from cachefs.block.gate import Gate
from cachefs.block.ledger import PAGE_HEADER, PAGE_SIZE
from cachefs.block.lmdb_env import RECORD, file_identity
from cachefs.block.reader_env import ReaderEnvironment, open_environment
from cachefs.metrics import Counters
from cachefs.types import BlockKey, Tier

log = logging.getLogger(__name__)

WILLNEED_BYTES = 128 << 10
"""Of longer pieces the kernel reads only the beginning (mm/readahead.c, force_page_cache_ra: a device's largest request
or its read-ahead, whichever is more).
"""


class _Opened(NamedTuple):
    environment: ReaderEnvironment
    descriptor: int


class DiskReader:
    """A disk tier that another process writes. Any thread; everything BLOCKS on the device."""

    def __init__(self, directory: str, block_size: int, counters: Counters) -> None:
        """Open it. Raises TierUnavailable when it cannot be read or has blocks of another size."""
        self.directory = directory
        self._block_size = block_size
        self._faults = Faults(f"the tier in {directory}", Tier.DISK, counters)
        self._gate = Gate()
        self._length = 0
        self._opened: _Opened | None = self._open()

    def _open(self) -> _Opened:
        try:
            tier_files.read_meta(self.directory)  # LMDB would trust what it maps
            descriptor = os.open(os.path.join(self.directory, tier_files.DATA_FILE), os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, errors.CorruptBlock) as error:
            raise errors.TierUnavailable(f"the tier in {self.directory} cannot be read: {error}") from error
        try:
            environment = open_environment(self.directory, self._block_size)
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != environment.identity:
                environment.env.close()
                raise ValueError("it was replaced while it was being opened")
        except (lmdb.Error, OSError, ValueError) as error:
            os.close(descriptor)
            raise errors.TierUnavailable(f"the tier in {self.directory} cannot be read: {error}") from error
        self._length = status.st_size
        return _Opened(environment, descriptor)

    def expect(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Let the device begin to read blocks that will be wanted; returns which of them are there."""
        try:
            with self._gate:
                return self._expect(self._usable(), keys)
        except errors.TierUnavailable as error:
            self._faults.fault(error)
            return [False] * len(keys)

    def _expect(self, opened: _Opened | None, keys: Sequence[BlockKey]) -> list[bool]:
        if opened is None:
            return [False] * len(keys)
        try:
            with opened.environment.env.begin(db=opened.environment.places) as txn:
                places = [_place(txn.get(key)) for key in keys]
                for place in places:
                    if place is not None and place[0]:
                        _will_need(opened.descriptor, *place)
        except (lmdb.Error, OSError) as error:
            raise errors.TierUnavailable(f"blocks cannot be looked up: {error}") from error
        return [place is not None for place in places]

    def read(self, key: BlockKey, expected_length: int, memory: memoryview) -> memoryview | None:
        """Return the bytes of a block, checked, as a part of `memory` (a header and a block long), or None."""
        try:
            with self._gate:
                value = self._read(self._usable(), key, memory)
            return None if value is None else codec.verify(value, key, expected_length)
        except errors.CorruptBlock as error:
            log.debug("the agent is asked for it: %s", error)
        except errors.TierUnavailable as error:
            self._faults.fault(error)
        return None

    def _read(self, opened: _Opened | None, key: BlockKey, memory: memoryview) -> memoryview | None:
        if opened is None:
            return None
        try:
            with opened.environment.env.begin(db=opened.environment.places) as txn:
                place = _place(txn.get(key))
                if place is None or place[1] > len(memory):
                    return None
                start, length = place
                value = memory[:length]
                if not start:
                    stored = txn.get(key, db=opened.environment.blocks)
                    if stored is None or len(stored) != length:
                        return None
                    value[:] = stored
                elif os.preadv(opened.descriptor, [value], start) != length:
                    raise errors.TierUnavailable(f"the data file ends within block {key.hex()}")
                return value
        except (lmdb.Error, OSError) as error:
            raise errors.TierUnavailable(f"block {key.hex()} cannot be read: {error}") from error

    def _usable(self) -> _Opened | None:
        """Notice a file that was cut before LMDB touches a page behind its end. Raises TierUnavailable."""
        opened = self._opened
        if opened is not None:
            length = os.fstat(opened.descriptor).st_size
            if length < self._length:
                raise errors.TierUnavailable("the data file was cut while it was in use")
            self._length = length
        return opened

    def follow(self) -> None:
        """Open the environment that the agent began in the directory, if it did. Never raises.

        A file that was removed is closed in any case: its room is wanted by others.
        """
        opened = self._opened
        try:
            if opened is not None and file_identity(self.directory) == opened.environment.identity:
                return
        except OSError as error:
            log.debug("%s: %s", self.directory, error)
        with self._gate.closed():
            self._close()
            try:
                self._opened = self._open()
            except errors.TierUnavailable as error:
                log.debug("%s", error)
                return
        log.info("the tier in %s can be read again", self.directory)

    def close(self) -> None:
        """Close it: no block is there any more."""
        with self._gate.closed():
            self._close()

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.environment.env.close()
            os.close(opened.descriptor)


def _place(record: bytes | None) -> tuple[int, int] | None:
    """Return offset (0: it is so short that it lies within LMDB's tree) and length of a stored value, or None."""
    if record is None or len(record) != RECORD.size:
        return None
    page, length = RECORD.unpack(record)
    return (page * PAGE_SIZE + PAGE_HEADER if page else 0), length


def _will_need(descriptor: int, start: int, length: int) -> None:
    for offset in range(start, start + length, WILLNEED_BYTES):
        os.posix_fadvise(descriptor, offset, min(WILLNEED_BYTES, start + length - offset), os.POSIX_FADV_WILLNEED)
