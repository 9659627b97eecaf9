"""A directory as an origin (``file://DIR``): what S3 would say if the files below DIR were its objects.

* Keys are the paths below DIR; names that are not UTF-8 pass through as surrogate escapes. The entity tag is made of
  inode number, mtime and size, checked before and after every read.
* Listings are in S3's order: by the bytes of ``name`` for files and ``name/`` for directories, so the file ``a.txt``
  stands before the directory ``a/``. Unlike in S3 a directory without files is shown.
* Only regular files and directories exist. A symbolic link to a file below DIR is that file; links that lead out of
  DIR, links to directories (they could make loops) and anything else are not there, however they are asked for.
* A directory of 1,000,000 names lists in pages with bounded memory (see `_SortedNames`): the bytes of its names and one
  for each, for as long as its listing is being read, and for at most `_CURSORS` listings at once.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cachefs.errors import (
    AccessDenied,
    BadBody,
    BucketNotFound,
    CachefsError,
    NotFound,
    StaleObject,
    StorageUnavailable,
    Unsupported,
)
from cachefs.store.port import ListPage, ObjectInfo
from cachefs.types import ObjectVersion

_CURSORS = 4
_RUN = 50_000
"""Names sorted at once: bounds the objects that exist while a directory is read to some 5 MB."""


class _SortedNames:
    """The sort keys of one directory, sorted, in little memory.

    Sorting needs objects (80 bytes each), keeping does not: names are sorted in runs, each packed into one bytes value
    with NUL between (no name has one), and the runs are merged while they are read.
    """

    def __init__(self, directory: bytes, root: bytes, prefix: bytes) -> None:
        self._runs: list[bytes] = []
        run: list[bytes] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.name.startswith(prefix):
                    continue
                sort_key = _sort_key(entry, root)
                if sort_key is not None:
                    run.append(sort_key)
                if len(run) == _RUN:
                    self._runs.append(b"\0".join(sorted(run)))
                    run.clear()
        if run:
            self._runs.append(b"\0".join(sorted(run)))

    def since(self, first: bytes) -> Iterator[bytes]:
        """Yield all sort keys from `first` on, in order."""
        return heapq.merge(*(_unpack(run, first) for run in self._runs))


def _unpack(run: bytes, first: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(run):
        end = run.find(b"\0", start)
        end = len(run) if end < 0 else end
        name = run[start:end]
        if name >= first:
            yield name
        start = end + 1


def _sort_key(entry: os.DirEntry[bytes], root: bytes) -> bytes | None:
    """Return how the entry sorts, None if it is nothing that can be an object. Costs a system call for links only."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return entry.name + b"/"
        if entry.is_symlink() and (not entry.is_file() or not _inside(os.path.realpath(entry.path), root)):
            return None
        return entry.name if entry.is_file() else None
    except OSError:
        return None  # vanished, or a loop of links


def _inside(real: bytes, root: bytes) -> bool:
    return root == b"/" or real.startswith(root + b"/")


class _Cursor:
    """An iterator of (key, is directory) that can be asked whether anything is left."""

    def __init__(self, entries: Iterator[tuple[str, bool]]) -> None:
        self._entries = entries
        self._next = next(entries, None)

    @property
    def exhausted(self) -> bool:
        return self._next is None

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        while self._next is not None:
            entry, self._next = self._next, next(self._entries, None)
            yield entry


class LocalStore:
    """See the module. Thread-safe."""

    def __init__(self, directory: str) -> None:
        self._root = os.path.realpath(os.fsencode(directory))
        self._lock = threading.Lock()
        self._cursors: OrderedDict[tuple[str, str, str], _Cursor] = OrderedDict()
        """Listings that wait for their next page, by (prefix, delimiter, token). Taken out while in use."""
        self._closed = False

    @property
    def endpoint(self) -> str:
        """All local directories are at one endpoint; the directory itself is the bucket."""
        return "file://"

    @property
    def bucket(self) -> str:
        """The directory, without links."""
        return os.fsdecode(self._root)

    def check(self, prefix: str) -> None:
        """See `ObjectStore.check`."""
        self._require_root()

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        body = memoryview(bytearray(max(length, 0)))
        for _ in self.read_into(version, start, [body]):
            pass
        return body

    def read_into(self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> Iterator[int]:
        """See `ObjectStore.read_into`."""
        length = sum(map(len, buffers))
        if start < 0 or length <= 0 or start + length > version.size:
            raise BadBody(f"{version.key!r} has {version.size} bytes, not {length} from {start}", retryable=False)
        self._require_open()
        try:
            with self._opened(version.key) as descriptor:
                self._require_version(descriptor, version)
                for count, buffer in enumerate(buffers, 1):
                    if _pread_into(descriptor, start, buffer) != len(buffer):
                        raise BadBody(f"{version.key!r} ends before byte {start + len(buffer)}")
                    self._require_version(descriptor, version)
                    start += len(buffer)
                    yield count
        except NotFound as error:
            raise StaleObject(str(error)) from error
        except OSError as error:
            found = _translate(error, version.key)
            raise (StaleObject(str(found)) if isinstance(found, NotFound) else found) from error

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore.head`."""
        self._require_open()
        try:
            with self._opened(key) as descriptor:
                return _described(key, os.fstat(descriptor))
        except OSError as error:
            raise _translate(error, key) from error

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`. The token is the last key or common prefix of the page before."""
        if delimiter not in ("", "/"):
            raise Unsupported("a directory can be listed with the delimiter '/' or without one")
        self._require_open()
        self._require_root()
        with self._lock:
            cursor = self._cursors.pop((prefix, delimiter, token), None) if token else None
        if cursor is None:
            cursor = _Cursor(self._entries(prefix, delimiter, token or ""))
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        last = None
        for key, is_directory in cursor:
            if is_directory:
                prefixes.append(key)
            else:
                described = self._describe(key)
                if described is None:
                    continue
                objects.append(described)
            if len(objects) + len(prefixes) >= limit:
                if not cursor.exhausted:
                    last = key
                    self._keep((prefix, delimiter, key), cursor)
                break
        return ListPage(tuple(objects), tuple(prefixes), last)

    def close(self) -> None:
        """See `ObjectStore.close`."""
        with self._lock:
            self._closed = True
            self._cursors.clear()

    # -- listing ------------------------------------------------------------------------------------------------------

    def _keep(self, position: tuple[str, str, str], cursor: _Cursor) -> None:
        with self._lock:
            if not self._closed:
                self._cursors[position] = cursor
            while len(self._cursors) > _CURSORS:
                self._cursors.popitem(last=False)

    def _entries(self, prefix: str, delimiter: str, last: str) -> Iterator[tuple[str, bool]]:
        """Yield (key, False) for files and (common prefix, True) for directories below `prefix`, behind `last`.

        Without a delimiter directories are walked instead (`stack`: where we are in each that is open).
        """
        start = prefix[prefix.rfind("/") + 1 :]
        base = prefix.removesuffix(start) if start else prefix
        if not self._is_directory(base):
            return
        stack = [(base, self._names(base, start, last))]
        while stack:
            base, names = stack[-1]
            name = next(names, None)
            if name is None:
                stack.pop()
                continue
            key = base + os.fsdecode(name)
            if not name.endswith(b"/"):
                yield key, False
            elif delimiter:
                yield key, True
            else:
                stack.append((key, self._names(key, "", last)))

    def _names(self, base: str, start: str, last: str) -> Iterator[bytes]:
        """Return the sort keys in the directory `base` that begin with `start`, without what `last` leaves behind."""
        try:
            names = _SortedNames(self._path(base), self._root, os.fsencode(start))
        except (FileNotFoundError, NotADirectoryError):
            return iter(())
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return iter(())  # too deep for any path of its files
            raise _translate(error, base) from error
        behind = os.fsencode(last.removeprefix(base)) if last.startswith(base) else b""
        below, slash, rest = behind.partition(b"/")
        if rest:
            return names.since(below + slash)  # stopped inside of this directory: it has to be entered again
        return names.since(behind + b"\0" if behind else b"")  # no name is between X and X + NUL

    def _is_directory(self, base: str) -> bool:
        """Whether `base` is a path below the root, without links. Asked once a listing: it looks at every part."""
        try:
            path = self._path(base)
        except NotFound:
            return False
        return os.path.realpath(path) == (path.rstrip(b"/") or b"/")

    def _describe(self, key: str) -> ObjectInfo | None:
        """Return what a listing says of a file, None if it vanished meanwhile."""
        try:
            found = os.stat(self._path(key))
        except (OSError, NotFound):
            return None
        return _described(key, found) if stat.S_ISREG(found.st_mode) else None

    # -- files --------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> bytes:
        """Return the path of a key. Raises NotFound for keys that cannot be a path (or lead out of the directory)."""
        parts = key.removesuffix("/").split("/")
        if key and (any(part in ("", ".", "..") for part in parts) or "\0" in key):
            raise NotFound(f"{key!r} cannot be a path")
        return os.path.join(self._root, os.fsencode(key))

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """Open a regular file that is really below the directory."""
        if key.endswith("/") or not key:
            raise NotFound(f"{key!r} is a directory")
        path = self._path(key)
        real, above = os.path.realpath(path), os.path.dirname(path)
        if os.path.realpath(above) != above or not _inside(real, self._root):
            raise NotFound(f"{key!r} leads over a link to somewhere else")
        # O_NONBLOCK: opening a FIFO would wait for a writer. O_NOFOLLOW: the path has been resolved.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotFound(f"{key!r} is not a file")
            yield descriptor
        finally:
            os.close(descriptor)

    def _require_version(self, descriptor: int, version: ObjectVersion) -> None:
        if _described(version.key, os.fstat(descriptor)).version != version:
            raise StaleObject(f"{version.key!r} has changed in {self.bucket!r} since it was looked up")

    def _require_open(self) -> None:
        if self._closed:
            raise StorageUnavailable("the store is closed", retryable=False)

    def _require_root(self) -> None:
        try:
            with os.scandir(self._root):
                pass
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BucketNotFound(f"directory {self.bucket!r} does not exist") from error
        except OSError as error:
            raise _translate(error, self.bucket) from error


def _described(key: str, found: os.stat_result) -> ObjectInfo:
    etag = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
    return ObjectInfo(key, found.st_size, etag, found.st_mtime_ns)


def _pread_into(descriptor: int, start: int, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends; returns the bytes read."""
    at = 0
    while at < len(buffer):
        count = os.preadv(descriptor, [buffer[at:]], start + at)
        if not count:
            break
        at += count
    return at


def _translate(error: OSError, key: str) -> CachefsError:
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO):
        return NotFound(f"no file {key!r} ({reason})")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(f"{key!r} may not be read ({reason})")
    return StorageUnavailable(f"{key!r} cannot be read ({reason})")
