"""Manifests: the names, versions and sizes of a set of objects, pinned in a file. A snapshot is one.

    cachefs manifest 1 {"bucket":"b","prefix":"p/","source":"pvc-1","created_ns":1790000000000000000}
    p/a.jpg <tab> 1834 <tab> 1789999999 <tab> 9e107d9d372bb6826bd81d3542a419d6
    p/b.jpg <tab> ...
    end <tab> 2 <tab> 3668 <tab> 0123456789abcdef0123456789abcdef

The first line names the format and where the objects are. Then one line for each object: key, size in bytes, time in
whole seconds since the epoch, entity tag; in the order of the keys' UTF-8 bytes, as S3 lists them. Control characters
and percent signs are written as %XX. The last line counts the objects and their bytes, and ends with the 128-bit xxh3
of everything before it: a file that is torn or was changed is noticed when it is opened.

Only what is looked at is in memory: the file is mapped, a name is found by binary search over its lines (10^6 objects,
100 MB: 0.01 s to open from the page cache, 20 us for a name, 3 ms for a page of 1,000, 1 MB of memory of our own).

INVARIANTS: keys are strictly ascending; none of them is what a mount hides (`.cachefs` in its root).
"""

from __future__ import annotations

import json
import mmap
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cachefs.errors import ConfigError, StorageUnavailable
from cachefs.store.port import ListPage, ObjectInfo

FORMAT = 1
HIDDEN = ".cachefs"
"""The name in the root of a mount that is not the bucket's, and where a bucket keeps what is ours."""
MAGIC = b"cachefs manifest "
END = b"end\t"
SECOND_NS = 1_000_000_000
_ESCAPED = re.compile(rb"[\x00-\x1f\x7f%]")
_PIECE = 8 << 20
_BEHIND = b"\xff"
"""Behind every byte that UTF-8 uses: `prefix + _BEHIND` is behind all keys with that prefix."""
_MOST_HEADER = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a manifest is of."""

    bucket: str
    prefix: str
    """What all keys begin with: "" or "x/y/"."""
    source: str = ""
    """Whatever whoever writes it wants to find again (the id of a volume)."""
    created_ns: int
    """When it was begun, nanoseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A manifest in figures."""

    header: Header
    objects: int
    size_bytes: int
    """Of all objects."""


class Manifest:
    """A manifest that is open for reading. Any thread."""

    def __init__(self, path: Path | str, name: str = "") -> None:
        """Open and verify a file; `name` is what messages call it. BLOCKS for a pass over it.

        Raises ConfigError when it is no whole manifest of a format that is known, OSError.
        """
        self.name = name or str(path)
        """What messages call it."""
        with open(path, "rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # an empty file has no map
                raise self._damaged("it is empty") from error
        try:
            self._begin, header = self._read_header()
            self._end, objects, size = self._read_end()
            self.summary = Summary(header, objects, size)
        except BaseException:
            self._map.close()
            raise

    def close(self) -> None:
        """Give the map back. Whoever still asks gets StorageUnavailable."""
        self._map.close()

    def find(self, key: str) -> ObjectInfo | None:
        """Return the object of this key, None: it is not in there. Raises StorageUnavailable when it is closed."""
        wanted = raw_key(key)
        with _open_map(self.name):
            at = self._first(wanted)
            if at == self._end:
                return None
            found, _ = self._object_at(at)
        return found if found.key == key else None

    def objects(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects with this prefix, those behind the key `start_after` only, in order."""
        begin = max(raw_key(prefix), raw_key(start_after) + b"\0" if start_after else b"")
        with _open_map(self.name):
            at = self._first(begin)
        while at < self._end:
            with _open_map(self.name):
                found, at = self._object_at(at)
            if not found.key.startswith(prefix):
                return
            yield found

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`. The token is the last key or common prefix of the page before."""
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        with _open_map(self.name):
            at, last = self._place_of(prefix, delimiter, token), ""
            while len(objects) + len(prefixes) < limit:
                found, behind = self._object_at(at) if at < self._end else (None, at)
                if found is None or not found.key.startswith(prefix):
                    return ListPage(tuple(objects), tuple(prefixes), None)
                cut = found.key.find(delimiter, len(prefix)) if delimiter else -1
                if cut >= 0:
                    last = found.key[: cut + len(delimiter)]
                    prefixes.append(last)
                    at = self._first(raw_key(last) + _BEHIND, behind)
                else:
                    last = found.key
                    objects.append(found)
                    at = behind
            more = at < self._end and self._key_at(at).startswith(raw_key(prefix))
        return ListPage(tuple(objects), tuple(prefixes), last if more else None)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _read_header(self) -> tuple[int, Header]:
        """Return where the objects begin, and the header."""
        stop = self._map.find(b"\n", 0, _MOST_HEADER)
        first = self._map[: max(stop, 0)]
        if not first.startswith(MAGIC):
            raise self._damaged("it is something else")
        number, _, described = first[len(MAGIC) :].partition(b" ")
        if number != b"%d" % FORMAT:
            raise ConfigError(f"{self.name} has the format {_shown(number)}, this version reads {FORMAT}")
        try:
            fields = json.loads(described)
            header = Header(**{name: fields[name] for name in Header.__slots__})
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged("its first line cannot be read") from error
        return stop + 1, header

    def _read_end(self) -> tuple[int, int, int]:
        """Return where the objects end, how many there are and their bytes; verifies the whole file."""
        size = len(self._map)
        begin = self._map.rfind(b"\n", 0, size - 1) + 1
        fields = self._map[begin:].split(b"\t")
        whole = self._map[size - 1 : size] == b"\n" and self._map[begin : begin + len(END)] == END
        if begin < self._begin or not whole or len(fields) != 4:
            raise self._damaged("its end is missing")
        digest = xxhash.xxh3_128()
        with memoryview(self._map) as view:
            for start in range(0, begin, _PIECE):
                with view[start : min(start + _PIECE, begin)] as piece:
                    digest.update(piece)
        if digest.hexdigest().encode() != fields[3].rstrip(b"\n"):
            raise self._damaged("its check sum is wrong")
        # The pass has brought all pages in; what names need comes back by itself.
        self._map.madvise(mmap.MADV_DONTNEED)
        self._map.madvise(mmap.MADV_RANDOM)
        try:
            return begin, int(fields[1]), int(fields[2])
        except ValueError as error:
            raise self._damaged("its last line cannot be read") from error

    def _place_of(self, prefix: str, delimiter: str, token: str | None) -> int:
        if token is None:
            return self._first(raw_key(prefix))
        if delimiter and token.endswith(delimiter) and token != prefix:
            return self._first(raw_key(token) + _BEHIND)
        return self._first(raw_key(token) + b"\0")

    def _first(self, wanted: bytes, low: int | None = None) -> int:
        """Return where the first line begins whose key is not before `wanted`."""
        low, high = self._begin if low is None else low, self._end
        while low < high:  # both are beginnings of lines, or the end
            middle = self._map.rfind(b"\n", low, (low + high) // 2) + 1 or low
            if self._key_at(middle) < wanted:
                low = self._map.find(b"\n", middle) + 1
            else:
                high = middle
        return low

    def _key_at(self, at: int) -> bytes:
        return unescape(self._map[at : self._map.find(b"\t", at)])

    def _object_at(self, at: int) -> tuple[ObjectInfo, int]:
        """Return the object of the line that begins here, and where the next one begins."""
        stop = self._map.find(b"\n", at) + 1
        try:
            key, size, seconds, etag = self._map[at : stop - 1].split(b"\t")
            name = unescape(key).decode("utf-8", "surrogateescape")
            return ObjectInfo(name, int(size), etag.decode(), int(seconds) * SECOND_NS), stop
        except ValueError as error:
            raise StorageUnavailable(f"{self.name} has a line that cannot be read", retryable=False) from error

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(f"{self.name} is no whole manifest ({why}): take another snapshot")


class _open_map:
    """Say of a map that was closed meanwhile what it is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise StorageUnavailable(f"{self._name} is closed", retryable=False) from error


def raw_key(key: str) -> bytes:
    """Return a key as it is sorted."""
    return key.encode("utf-8", "surrogateescape")


def escape(raw: bytes) -> bytes:
    """Return a key as it stands in a line."""
    return _ESCAPED.sub(lambda found: b"%%%02X" % found[0][0], raw) if _ESCAPED.search(raw) else raw


def unescape(text: bytes) -> bytes:
    """Undo `escape`."""
    return urllib.parse.unquote_to_bytes(text) if b"%" in text else text


def _shown(number: bytes) -> str:
    return repr(number[:16].decode("ascii", "replace"))
