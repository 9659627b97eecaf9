"""What a job of the controller does step by step (`csi.copying` runs it): a copy by the server, a deletion.

`work` is a generator: each value is the record to keep from then on, so that another process can go on from there.

    {"verb", "state": "running" | "done" | "gone", "done": objects, "total": objects or None, "after": last key, ...}

Requests go out from a few threads; a batch is over before its record is given out. So after a crash at most one batch
is done twice, which changes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from cachefs.errors import AlreadyExists, CachefsError, StaleObject, StorageUnavailable, UsageError
from cachefs.store.admin import DELETE_KEYS, BucketAdmin
from cachefs.store.manifest import HIDDEN, Header, Manifest
from cachefs.store.port import ObjectInfo
from csi.snapshots import downloaded, write_pinned

log = logging.getLogger(__name__)

REQUESTS = 8
"""Requests of one job in flight."""
COPIES = 128
COPY_BYTES = 16 << 30
"""One step of a copy is so many objects, or fewer with so many bytes."""
DELETIONS = 4
"""Requests of 1,000 keys in one step of a deletion."""
ROUNDS = 4
"""How often a prefix is listed until it is empty."""
JOBS = f"{HIDDEN}/jobs/"
"""Where the listings of copies are that are not over."""
Record = Mapping[str, Any]
Stopped = Callable[[], bool]


def listing_key(job_id: str) -> str:
    """Return the key of what a copy has listed, which is there until the copy is over."""
    return f"{JOBS}{job_id}"


class Cancelled(CachefsError):
    """The job was told to stop; it goes on with the next call for it."""


class Steps(Protocol):
    """The work of one job."""

    @property
    def verb(self) -> str:
        """What it does, for people and in records."""
        ...

    def work(self, admin: BucketAdmin, record: Record | None, stopped: Stopped) -> Iterator[Record]:
        """Do what is left to do after `record` (None: all of it); yields what is to be kept in its place.

        Raises Cancelled soon after `stopped` says so, and what the store raises.
        """
        ...


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy what is below one prefix to below another, as it is when the job begins."""

    job_id: str
    source_prefix: str
    target_prefix: str

    @property
    def verb(self) -> str:
        """See `Steps.verb`."""
        return "copying"

    def work(self, admin: BucketAdmin, record: Record | None, stopped: Stopped) -> Iterator[Record]:
        """See `Steps.work`. Raises AlreadyExists, before anything is written, when the target holds objects already."""
        listing = listing_key(self.job_id)
        if record is None:
            self._require_empty(admin)
            admin.delete([listing])  # of a job of this id that was forgotten
            record = self._record()
            yield record  # from here on the target is this job's
        self._require_same(record)
        header = Header(bucket=admin.bucket, prefix=self.source_prefix, source=self.job_id, created_ns=time.time_ns())
        summary = write_pinned(admin, listing, header, _until(stopped, admin.objects(self.source_prefix)))
        if record["listed_ns"] != summary.header.created_ns:
            record = self._record(total=summary.objects, listed_ns=summary.header.created_ns)
            yield record
        try:
            with downloaded(admin, listing) as manifest:
                for step in self._batches(admin, manifest, record, stopped):
                    record = step
                    yield record
        except StaleObject:
            admin.delete([listing])
            yield self._record()
            raise
        admin.delete([listing])
        yield {**record, "state": "done"}

    def _batches(self, admin: BucketAdmin, manifest: Manifest, record: Record, stopped: Stopped) -> Iterator[Record]:
        """Copy what comes behind the last key of the record."""
        after, done = record["after"], record["done"]
        there = admin.objects(self.target_prefix, self._target(after) if after else "")
        pairs = self._compared(manifest.objects("", after), there)
        with _pool() as pool:
            while batch := _next_batch(pairs):
                _require_going_on(stopped)
                list(pool.map(lambda found: self._copy(admin, found), [found for found, same in batch if not same]))
                after, done = batch[-1][0].key, done + len(batch)
                yield {**record, "after": after, "done": done}

    def _copy(self, admin: BucketAdmin, found: ObjectInfo) -> None:
        if not found.size and found.key.endswith("/"):
            admin.put(self._target(found.key), b"")  # a marker of a directory, which some servers list and cannot copy
            return
        admin.copy(found.key, found.etag, self._target(found.key), size=found.size)

    def _compared(self, wanted: Iterable[ObjectInfo], there: Iterator[ObjectInfo]) -> Iterator[tuple[ObjectInfo, bool]]:
        """Yield what is to be copied, and whether an earlier try has done it. Both listings are in the same order."""
        beside = next(there, None)
        for found in wanted:
            target = self._target(found.key)
            while beside is not None and _order(beside.key) < _order(target):
                beside = next(there, None)
            same = beside is not None and (beside.key, beside.etag, beside.size) == (target, found.etag, found.size)
            yield found, same

    def _target(self, key: str) -> str:
        return self.target_prefix + key[len(self.source_prefix) :]

    def _require_empty(self, admin: BucketAdmin) -> None:
        for found in admin.objects(self.target_prefix):
            if found.key != self.target_prefix:  # the marker of a volume that was just made is no content
                raise AlreadyExists(
                    f"s3://{admin.bucket}/{self.target_prefix} holds objects already, such as {found.key!r}: "
                    "a copy needs a prefix of its own"
                )

    def _require_same(self, record: Record) -> None:
        if (record["source"], record["target"]) != (self.source_prefix, self.target_prefix):
            raise UsageError(f"the job {self.job_id!r} has begun to copy {record['source']!r} to {record['target']!r}")

    def _record(self, *, total: int | None = None, listed_ns: int = 0) -> Record:
        return {
            "verb": self.verb,
            "state": "running",
            "source": self.source_prefix,
            "target": self.target_prefix,
            "done": 0,
            "total": total,
            "after": "",
            "listed_ns": listed_ns,
        }


@dataclass(frozen=True, slots=True)
class Deletion:
    """Delete what is below a prefix; the object that is the prefix itself (a volume's marker) at the end."""

    job_id: str
    prefix: str

    @property
    def verb(self) -> str:
        """See `Steps.verb`."""
        return "deleting"

    def work(self, admin: BucketAdmin, record: Record | None, stopped: Stopped) -> Iterator[Record]:
        """See `Steps.work`. Raises StorageUnavailable when somebody keeps writing below the prefix."""
        record = record or {
            "verb": self.verb, "state": "running", "prefix": self.prefix, "done": 0, "total": None, "after": ""
        }  # fmt: skip
        if record["prefix"] != self.prefix:
            raise UsageError(f"the job {self.job_id!r} has begun to delete {record['prefix']!r}")
        yield record
        for _ in range(ROUNDS):
            before = record["done"]
            for step in self._round(admin, record, stopped):
                record = step
                yield record
            if record["done"] == before:
                admin.delete([self.prefix, listing_key(self.job_id)])
                yield {**record, "state": "gone"}
                return
        raise StorageUnavailable(f"s3://{admin.bucket}/{self.prefix} is still being written to: it cannot be deleted")

    def _round(self, admin: BucketAdmin, record: Record, stopped: Stopped) -> Iterator[Record]:
        """Delete what is listed now."""
        keys = (found.key for found in admin.objects(self.prefix) if self._is_inside(found.key))
        done = record["done"]
        with _pool() as pool:
            while batch := list(itertools.islice(keys, DELETE_KEYS * DELETIONS)):
                _require_going_on(stopped)
                parts = [batch[start : start + DELETE_KEYS] for start in range(0, len(batch), DELETE_KEYS)]
                done += sum(pool.map(admin.delete, parts))
                yield {**record, "done": done}

    def _is_inside(self, key: str) -> bool:
        return len(key) > len(self.prefix) and key.startswith(self.prefix)


def _until(stopped: Stopped, objects: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
    """Pass a listing on until the job is told to stop."""
    for found in objects:
        _require_going_on(stopped)
        yield found


def _require_going_on(stopped: Stopped) -> None:
    if stopped():
        raise Cancelled("the job was told to stop")


def _next_batch(pairs: Iterator[tuple[ObjectInfo, bool]]) -> list[tuple[ObjectInfo, bool]]:
    """Return what one step copies: so many objects or bytes."""
    batch: list[tuple[ObjectInfo, bool]] = []
    size = 0
    while len(batch) < COPIES and size < COPY_BYTES:
        pair = next(pairs, None)
        if pair is None:
            break
        batch.append(pair)
        size += pair[0].size
    return batch


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Have threads for requests. What was not begun when something went wrong is not begun any more."""
    pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="transfer")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _order(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")
