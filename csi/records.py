"""What the controller remembers: volumes, snapshots, copies under way. One small JSON document each, by kind and id.

Two places: a directory (`FileRecords`, one controller) and etcd (`csi.etcd_records`, several replicas). `open_records`
takes what `--state` says.

INVARIANTS: `put_new` is atomic, so of two calls for one id one finds the record of the other; what was put is on disk
when the call returns; a record that cannot be read is an error that names it, never "there is none", since whoever
believes that deletes or makes something twice.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from cachefs.durable import replace_durably
from cachefs.errors import CachefsError, ConfigError, StorageUnavailable

FORMAT = 1
VOLUMES = "volumes"
MAX_ID_BYTES = 128
_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,127}")
_SUFFIX = ".json"
_NEW = ".new"
_LEFT_BEHIND_S = 3600.0
"""Age of a temporary file whose writer is certainly dead."""

Value = Mapping[str, Any]


class CorruptRecord(CachefsError):
    """A record is there and cannot be read. Somebody has to look at it."""


class RecordsRefused(CachefsError):
    """Where records are, nobody lets the controller in. Somebody has to change something."""


class VolumeRecords(Protocol):
    """Where records are. All methods BLOCK, may be called from any thread, and raise StorageUnavailable when the place
    does not answer, RecordsRefused when it lets nobody in, CorruptRecord for a record that cannot be read.
    """

    def put_new(self, kind: str, record_id: str, value: Value) -> Value | None:
        """Keep a record if there is none of this id; returns the one that is there already, None when it is ours."""
        ...

    def put(self, kind: str, record_id: str, value: Value) -> None:
        """Keep a record in the place of the former one, if there is one."""
        ...

    def get(self, kind: str, record_id: str) -> Value | None:
        """Return a record, None: there is none. An id that no record can have has none."""
        ...

    def delete(self, kind: str, record_id: str) -> bool:
        """Remove a record; returns whether there was one."""
        ...

    def page(self, kind: str, after: str = "", limit: int = 0) -> list[tuple[str, Value]]:
        """Return ids and records in the order of their ids, those behind `after`, at most `limit` (0: all)."""
        ...

    def check(self) -> None:
        """Prove that the place can be read. Raises StorageUnavailable or ConfigError."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


def is_id(record_id: str) -> bool:
    """Whether a record can have this id: 1 to 128 small letters, digits, dots and hyphens, no dot or hyphen first."""
    return _ID.fullmatch(record_id) is not None


def encode(value: Value) -> bytes:
    """Return the bytes of a record."""
    return json.dumps({"format": FORMAT, "record": dict(value)}, sort_keys=True, ensure_ascii=False).encode()


def decode(raw: bytes, where: str) -> Value:
    """Return a record from its bytes. Raises CorruptRecord, which names `where` it was."""
    try:
        document = json.loads(raw)
        record = document["record"]
        known = document["format"] == FORMAT and isinstance(record, dict)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptRecord(f"the record {where} cannot be read ({type(error).__name__}): look at it") from error
    if not known:
        raise CorruptRecord(f"the record {where} is of another version of cachefs: upgrade the controller")
    found: dict[str, Any] = record
    return found


class FileRecords:
    """Records as files DIRECTORY/KIND/ID.json, for one controller."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory. Raises ConfigError when that cannot be."""
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--state file://{directory}: {error.strerror}") from error
        self._sweep()

    def put_new(self, kind: str, record_id: str, value: Value) -> Value | None:
        """See `VolumeRecords`. A hard link is what makes it atomic."""
        path = self._path(kind, record_id)
        with _translated(path):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=_NEW)
            try:
                with open(descriptor, "wb") as file:
                    file.write(encode(value))
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, path)
            except FileExistsError:
                return decode(path.read_bytes(), str(path))
            finally:
                os.unlink(temporary)
            _sync_directory(path.parent)
        return None

    def put(self, kind: str, record_id: str, value: Value) -> None:
        """See `VolumeRecords`."""
        path = self._path(kind, record_id)
        with _translated(path):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            replace_durably(path, encode(value))

    def get(self, kind: str, record_id: str) -> Value | None:
        """See `VolumeRecords`."""
        if not is_id(record_id):
            return None
        path = self._path(kind, record_id)
        with _translated(path):
            try:
                raw = path.read_bytes()
            except FileNotFoundError:
                return None
        return decode(raw, str(path))

    def delete(self, kind: str, record_id: str) -> bool:
        """See `VolumeRecords`."""
        if not is_id(record_id):
            return False
        path = self._path(kind, record_id)
        with _translated(path):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            _sync_directory(path.parent)
        return True

    def page(self, kind: str, after: str = "", limit: int = 0) -> list[tuple[str, Value]]:
        """See `VolumeRecords`."""
        found: list[tuple[str, Value]] = []
        with _translated(self._directory / kind):
            names = self._names(kind, after)
            ids = heapq.nsmallest(limit, names) if limit else sorted(names)
        for record_id in ids:
            value = self.get(kind, record_id)
            if value is not None:  # None: deleted meanwhile
                found.append((record_id, value))
        return found

    def check(self) -> None:
        """See `VolumeRecords`."""
        with _translated(self._directory):
            os.listdir(self._directory)

    def close(self) -> None:
        """See `VolumeRecords`."""

    def _sweep(self) -> None:
        """Remove what earlier controllers were killed over; one that is about to end may still write the newest."""
        for pattern in (f"*/.*{_NEW}", f"*/*{_SUFFIX}.tmp"):
            for path in self._directory.glob(pattern):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                        path.unlink()

    def _names(self, kind: str, after: str) -> Iterator[str]:
        try:
            entries = os.listdir(self._directory / kind)
        except FileNotFoundError:
            return
        for entry in entries:
            record_id = entry.removesuffix(_SUFFIX)
            if entry.endswith(_SUFFIX) and is_id(record_id) and record_id > after:
                yield record_id

    def _path(self, kind: str, record_id: str) -> Path:
        if not is_id(kind) or not is_id(record_id):
            raise ValueError(f"{kind}/{record_id} cannot be a record")
        return self._directory / kind / f"{record_id}{_SUFFIX}"


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageUnavailable(f"the records of the controller: {path}: {error.strerror or error}") from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
