"""Numbers of files in the order in which they were found, for any number of files: 8 bytes each, beyond a few on disk.

A job walks first, so that it knows how much it is about to fetch, and works then on exactly what it found. The file has
no name: it is gone with the agent, whatever becomes of that.
"""

from __future__ import annotations

import tempfile
from array import array
from types import TracebackType
from typing import IO, Self

import trio

from cachefs import errors

IN_MEMORY = 1 << 18
"""So many numbers (2 MiB) need no file."""
CHUNK = 1 << 13


class Spool:
    """A list of numbers that is written once, and then read as often as needed. Context manager."""

    def __init__(self, directory: str) -> None:
        """`directory`: where a file can be, if one is needed."""
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._last = array("Q")
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return self._written + len(self._last)

    def append(self, number: int) -> None:
        """Add one. Call `settle` every now and then."""
        self._last.append(number)

    async def settle(self) -> None:
        """Put away what should not stay in memory. Raises StorageUnavailable when there is no room for it."""
        if len(self._last) < IN_MEMORY:
            return
        try:
            if self._file is None:
                self._file = await trio.to_thread.run_sync(self._open)
            await trio.to_thread.run_sync(self._file.write, self._last)
        except OSError as error:
            raise errors.StorageUnavailable(
                f"no room in {self._directory} for the list of files: {error}", retryable=False
            ) from error
        self._written += len(self._last)
        self._last = array("Q")

    def _open(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._directory, prefix="files-", buffering=0)

    async def read(self, at: int) -> array[int]:
        """Return some of them from number `at` on, nothing at the end. Raises StorageUnavailable."""
        if at < self._written:
            chunk = array("Q")
            chunk.frombytes(await trio.to_thread.run_sync(self._read, at))
            return chunk
        await trio.lowlevel.checkpoint()
        return self._last[at - self._written : at - self._written + CHUNK]

    def _read(self, at: int) -> bytes:
        assert self._file is not None
        try:
            self._file.seek(at * 8)
            raw = self._file.read(min(CHUNK, self._written - at) * 8)
        except OSError as error:
            raise errors.StorageUnavailable(f"the list of files cannot be read: {error}", retryable=False) from error
        if not raw or len(raw) % 8:
            raise errors.StorageUnavailable("the list of files was cut", retryable=False)
        return raw
