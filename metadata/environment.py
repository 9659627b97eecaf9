"""Opening the LMDB environment of a volume's metadata: what is found there is checked before it is used.

* `open_or_create` is the writer's way in. An environment that cannot be trusted (metadata.custody says why) is set
  aside, and a new one begun.
* `open_readonly` is the way of readers.
* `copy` makes a compact copy of an environment that nobody writes to. The copy describes the same volume with the same
  inode numbers, and hands out new ones from another range: whatever becomes of the two, no number names two things.

The map is virtual address space, not memory. There is no writemap: a full disk has to be an error of a write, not
SIGBUS.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

import lmdb
import lmdb.verify

from cachefs.errors import StorageUnavailable
from metadata import custody, volume
from metadata.changes import Tables
from metadata.volume import VolumeIdentity

_log = logging.getLogger(__name__)

MAP_SIZE_BYTES = 64 << 30
MAX_READERS = 510
VERIFY_MAX_BYTES = 8 << 20
"""The offline verifier reads about 60 MB/s: files up to this size are checked in well under 0.3 s."""

_TABLES = ("inodes", "dentries", "directories", "orphans", "state")
_DAMAGE = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.VersionMismatchError,
    lmdb.PageNotFoundError,
    lmdb.NotFoundError,
    lmdb.IncompatibleError,
    lmdb.PanicError,
    ValueError,
    struct.error,
)


class Untrusted(Exception):
    """The environment is damaged, foreign, or of another format: nothing may be read from it."""


class NoRoom(Exception):
    """The copy would take more than half of what is free where it is to be."""


class Opened(NamedTuple):
    """An open environment."""

    env: lmdb.Environment
    tables: Tables
    set_aside: str | None = None
    """Why the environment that was found could not be used; None: it could, or there was none."""


def open_or_create(path: str, identity: VolumeIdentity, boot_id: str) -> Opened:
    """Open for writing what is at `path`, or begin anew. Raises lmdb.Error, OSError."""
    reason: str | None = None
    if custody.occupied(path):
        try:
            return _open_trusted(path, identity, boot_id)
        except Untrusted as error:
            reason = str(error)
            where = custody.set_aside(path)
            _log.warning("metadata in %s is not used: %s; it is now %s", path, reason, where)
    return _create(path, identity, boot_id)._replace(set_aside=reason)


def open_readonly(path: str) -> Opened:
    """Open for reading, beside the writer. Raises lmdb.Error, OSError."""
    env = _open(path, readonly=True)
    return Opened(env, _tables(env, create=False))


def copy(source: str, target: str, identity: VolumeIdentity, boot_id: str) -> None:
    """Make the new directory `target` a copy of an environment that nobody writes to; the source stays as it is.

    Raises Untrusted for a source that cannot be used, NoRoom, StorageUnavailable. What is left at `target` then is not
    to be used.
    """
    try:
        original = _open_trusted(source, identity, boot_id, readonly=True)
        try:
            free = os.statvfs(Path(target).parent)
            if 2 * _used_bytes(original) > free.f_bavail * free.f_frsize:
                raise NoRoom
            Path(target).mkdir(mode=0o700)
            custody.write_stamp(target, custody.Stamp(boot_id, None))
            original.env.copy(target, compact=True)
        finally:
            original.env.close()
        Path(target, custody.DATA_FILE).chmod(0o600)
        env = _open(target, readonly=False)
        try:
            tables = _tables(env, create=False)
            with env.begin(write=True) as txn:
                volume.renumber(txn, tables)
        finally:
            env.close()
    except _DAMAGE as error:
        raise Untrusted(f"it cannot be copied ({error})") from error
    except (lmdb.Error, OSError) as error:
        raise StorageUnavailable(f"metadata in {source} cannot be copied to {target}: {error}") from error


def _open(path: str, *, readonly: bool, lock: bool = True) -> lmdb.Environment:
    return lmdb.open(
        path,
        map_size=MAP_SIZE_BYTES,
        max_dbs=len(_TABLES),
        max_readers=MAX_READERS,
        max_spare_txns=4,
        mode=0o600,
        readonly=readonly,
        create=not readonly,
        lock=lock,
        sync=False,
        metasync=False,
    )


def _tables(env: lmdb.Environment, *, create: bool) -> Tables:
    return Tables(*(env.open_db(name.encode(), create=create) for name in _TABLES))


def _open_trusted(path: str, identity: VolumeIdentity, boot_id: str, *, readonly: bool = False) -> Opened:
    """Open what exists. Raises Untrusted, or lmdb.Error for what is not its fault (rights, a full disk).

    `readonly`: write nothing at all, not even to the lock file; only for an environment that has no writer.
    """
    reason = custody.distrust(path, boot_id)
    if reason is None and not custody.closed_cleanly(path):
        reason = _damage(path)
    if reason is not None:
        raise Untrusted(reason)
    env: lmdb.Environment | None = None
    try:
        env = _open(path, readonly=readonly, lock=not readonly)
        facts = env.info()
        if (facts["last_pgno"] + 1) * env.stat()["psize"] > os.stat(Path(path, custody.DATA_FILE)).st_size:
            raise Untrusted("its file is truncated")
        if not custody.is_last(path, facts["last_txnid"]):
            raise Untrusted("it was changed after it was closed")
        tables = _tables(env, create=False)
        with env.begin() as txn:
            reason = volume.fault(txn, tables, identity)
        if reason is not None:
            raise Untrusted(reason)
    except BaseException as error:
        if env is not None:
            env.close()
        if isinstance(error, _DAMAGE):
            raise Untrusted(f"it is damaged or no metadata environment ({error})") from error
        raise
    return Opened(env, tables)


def _damage(path: str) -> str | None:
    """Run the offline verifier over a file that is small enough, and return its first finding."""
    if os.stat(Path(path, custody.DATA_FILE)).st_size > VERIFY_MAX_BYTES:
        return None
    try:
        problems = lmdb.verify.verify(path)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 - any way to fall over a file is a finding about that file
        problems = [str(error)]
    return f"the verifier found: {problems[0]}" if problems else None


def _create(path: str, identity: VolumeIdentity, boot_id: str) -> Opened:
    Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    custody.write_stamp(path, custody.Stamp(boot_id, None))
    env = _open(path, readonly=False)
    tables = _tables(env, create=True)
    with env.begin(write=True) as txn:
        volume.found(txn, tables, identity, time.time_ns())
    return Opened(env, tables)


def _used_bytes(opened: Opened) -> int:
    """Return how large a compact copy is."""
    with opened.env.begin() as txn:
        parts = [opened.env.stat(), *(txn.stat(getattr(opened.tables, name)) for name in _TABLES)]
    pages = sum(part["branch_pages"] + part["leaf_pages"] + part["overflow_pages"] for part in parts)
    return (pages + 2) * int(parts[0]["psize"])
