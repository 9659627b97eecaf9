"""Writes manifests (`cachefs.store.manifest`) of listings of any length, in bounded memory.

    listing -> chunks of 50,000, sorted -> runs in temporary files -> one run: copied; several: merged -> manifest

S3 lists keys in the order of a manifest, so a chunk follows the one before it and all of them are one run. Servers that
keep directories (SeaweedFS, S3 Express) list `a/b` before `a-b`: then there are some runs.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import IO, BinaryIO

import xxhash

from cachefs.errors import StorageUnavailable
from cachefs.store.manifest import END, FORMAT, HIDDEN, MAGIC, SECOND_NS, Header, Summary, escape, raw_key, unescape
from cachefs.store.port import ObjectInfo

CHUNK = 50_000
"""Objects that are in memory at once: some 20 MB."""
_LINES = 4096


def write_manifest(file: BinaryIO, header: Header, objects: Iterable[ObjectInfo]) -> Summary:
    """Write a manifest of a listing, in whatever order it comes; returns its figures.

    What a mount of the prefix hides is left out. Of a key that is listed twice the later one counts. Raises
    StorageUnavailable for an object without an entity tag, OSError of the file or for want of room for temporary ones.
    """
    digest = xxhash.xxh3_128()
    described = json.dumps(asdict(header), separators=(",", ":")).encode()
    count = total = 0
    with contextlib.ExitStack() as opened:
        runs = _Runs(opened)
        for found in _visible(objects, header.prefix):
            runs.add(found)
        pieces = [MAGIC + b"%d " % FORMAT + described + b"\n"]
        for line in runs.lines():
            pieces.append(line)
            count, total = count + 1, total + int(line.split(b"\t", 2)[1])
            if len(pieces) >= _LINES:
                _pass_on(file, digest, pieces)
        _pass_on(file, digest, pieces)
    file.write(END + b"%d\t%d\t%s\n" % (count, total, digest.hexdigest().encode()))
    return Summary(header, count, total)


def _pass_on(file: BinaryIO, digest: xxhash.xxh3_128, pieces: list[bytes]) -> None:
    text = b"".join(pieces)
    digest.update(text)
    file.write(text)
    pieces.clear()


def _visible(objects: Iterable[ObjectInfo], prefix: str) -> Iterator[ObjectInfo]:
    """Leave out what a mount of the prefix hides."""
    hidden = f"{prefix}{HIDDEN}"
    for found in objects:
        if not found.key.startswith(hidden) or found.key[len(hidden) : len(hidden) + 1] not in ("", "/"):
            yield found


class _Runs:
    """Lines in order, in as few temporary files as the order of the listing allows."""

    def __init__(self, opened: contextlib.ExitStack) -> None:
        self._opened = opened
        self._chunk: dict[bytes, bytes] = {}
        self._files: list[IO[bytes]] = []
        self._last = b""
        """The last key of the last file."""

    def add(self, found: ObjectInfo) -> None:
        """Take an object. Raises StorageUnavailable when it has no entity tag."""
        if not found.etag:
            raise StorageUnavailable(f"{found.key!r} has no entity tag: it cannot be pinned", retryable=False)
        raw = raw_key(found.key)
        self._chunk[raw] = b"%s\t%d\t%d\t%s\n" % (
            escape(raw), found.size, found.mtime_ns // SECOND_NS, found.etag.encode()
        )  # fmt: skip
        if len(self._chunk) >= CHUNK:
            self._flush()

    def lines(self) -> Iterator[bytes]:
        """Yield all lines in the order of their keys, each key once."""
        self._flush()
        for file in self._files:
            file.seek(0)
        if len(self._files) == 1:
            yield from self._files[0]
            return
        last = None
        for key, _, line in heapq.merge(*(_numbered(-number, file) for number, file in enumerate(self._files))):
            if key != last:  # of several the one of the newest file comes first
                yield line
            last = key

    def _flush(self) -> None:
        if not self._chunk:
            return
        keys = sorted(self._chunk)
        if not self._files or keys[0] <= self._last:
            file: IO[bytes] = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115 - closed by `opened`
            self._files.append(self._opened.enter_context(file))
        self._files[-1].writelines(self._chunk[key] for key in keys)
        self._last = keys[-1]
        self._chunk.clear()


def _numbered(number: int, file: IO[bytes]) -> Iterator[tuple[bytes, int, bytes]]:
    for line in file:
        yield unescape(line.partition(b"\t")[0]), number, line
