"""Snapshots: a pinned manifest of keys and etags in the bucket, and a record of it. No object is copied.

    CreateSnapshot -> listing of the volume's prefix -> manifest `.cachefs/snapshots/<id>` -> record "snapshots/<id>"
    CreateVolume from it -> `pin`: a copy of the manifest, `.cachefs/volumes/<volume id>`, for `s3.manifest`
    DeleteSnapshot -> record, then manifest

The id is made of the name, so the same call always comes to the same snapshot, on any replica and after any crash: the
manifest is written with If-None-Match, and whoever finds one that is there reads its header. A volume has a manifest of
its own, so that a snapshot can be deleted while volumes made from it are in use.

A snapshot keeps no bytes: an object that is overwritten or deleted later can no longer be read through it (ESTALE), the
others can. Buckets with versioning do not change that.

INVARIANTS: a record exists only for a manifest that is whole. What is deleted lies below `.cachefs/` and nowhere else.

All functions BLOCK; any thread. Two calls for one name at the same time end well, one of them for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from cachefs.errors import AlreadyExists, NotFound, UsageError
from cachefs.store.admin import BucketAdmin
from cachefs.store.manifest import HIDDEN, Header, Manifest, Summary
from cachefs.store.manifest_writer import write_manifest
from cachefs.store.port import ObjectInfo
from csi.records import VolumeRecords

log = logging.getLogger(__name__)

KIND = "snapshots"
"""What records of snapshots are called."""
SNAPSHOTS = f"{HIDDEN}/snapshots/"
VOLUMES = f"{HIDDEN}/volumes/"
"""Where manifests of volumes are."""
PAGE = 500
"""Records that are looked at at once."""
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One snapshot, ready to use."""

    snapshot_id: str
    name: str
    source_volume_id: str
    bucket: str
    prefix: str
    """What was pinned: "" or "x/y/"."""
    manifest: str
    """Key of the manifest in the same bucket."""
    size_bytes: int
    """Of all objects, as they were."""
    objects: int
    created_ns: int
    """Nanoseconds since the epoch."""

    def record(self) -> dict[str, Any]:
        """Return it as a record keeps it."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Snapshot:
        """Read a record; what a later version wrote in addition is ignored."""
        return cls(**{name: record[name] for name in cls.__slots__})


def snapshot_id(name: str) -> str:
    """Return the id of the snapshot of this name."""
    return f"snap-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}"


def manifest_key(found_id: str) -> str:
    """Return the key of a snapshot's manifest."""
    return f"{SNAPSHOTS}{_safe(found_id)}"


def volume_manifest_key(volume_id: str) -> str:
    """Return the key of the manifest of a volume that was made from a snapshot."""
    return f"{VOLUMES}{_safe(volume_id)}"


def create(
    admin: BucketAdmin,
    records: VolumeRecords,
    *,
    name: str,
    source_volume_id: str,
    prefix: str,
    source_manifest: str = "",
    more: Mapping[str, Any] | None = None,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Snapshot:
    """Take the snapshot of a volume, or return the one of this name.

    `prefix`: the volume's, "" or ending with a slash. `source_manifest`: key of the manifest of a volume that was made
    from a snapshot itself; then nothing is listed. `more` goes into the record as it is. Raises AlreadyExists when the
    name is that of a snapshot of another volume, and what listings and writes raise (`cachefs.store.admin`).
    """
    found_id = snapshot_id(name)
    known = find(records, found_id)
    if known is None:
        header = Header(bucket=admin.bucket, prefix=prefix, source=source_volume_id, created_ns=clock_ns())
        objects = _objects_of(admin, source_manifest) if source_manifest else admin.objects(prefix)
        summary = write_pinned(admin, manifest_key(found_id), header, objects)
        made = Snapshot(
            snapshot_id=found_id,
            name=name,
            source_volume_id=summary.header.source,
            bucket=admin.bucket,
            prefix=summary.header.prefix,
            manifest=manifest_key(found_id),
            size_bytes=summary.size_bytes,
            objects=summary.objects,
            created_ns=summary.header.created_ns,
        )
        if made.source_volume_id != source_volume_id:
            raise _taken(name, made.source_volume_id)
        before = records.put_new(KIND, found_id, {**(more or {}), **made.record()})
        known = made if before is None else Snapshot.of_record(before)
    if known.source_volume_id != source_volume_id:
        raise _taken(name, known.source_volume_id)
    return known


def find(records: VolumeRecords, found_id: str) -> Snapshot | None:
    """Return a snapshot, None: there is none of this id."""
    record = records.get(KIND, found_id)
    return None if record is None else Snapshot.of_record(record)


def listed(
    records: VolumeRecords, *, after: str = "", limit: int = 0, source_volume_id: str = ""
) -> tuple[list[Snapshot], str]:
    """Return snapshots in the order of their ids, those behind the id `after`, and what to give as `after` for more
    ("": there are no more). At most `limit` (0: all), only those of a volume if it is named.
    """
    found: list[Snapshot] = []
    while True:
        page = records.page(KIND, after, PAGE)
        for _, record in page:
            snapshot = Snapshot.of_record(record)
            if source_volume_id not in ("", snapshot.source_volume_id):
                continue
            if limit and len(found) == limit:
                return found, found[-1].snapshot_id
            found.append(snapshot)
        if len(page) < PAGE:
            return found, ""
        after = page[-1][0]


def delete(admin: BucketAdmin, records: VolumeRecords, found_id: str) -> bool:
    """Delete a snapshot; returns whether there was one. Volumes that were made from it stay as they are.

    Raises AccessDenied, StorageUnavailable: the snapshot is still there.
    """
    known = find(records, found_id)
    if known is None:
        return False
    admin.delete([manifest_key(found_id)])
    records.delete(KIND, found_id)
    return True


def pin(admin: BucketAdmin, source_manifest: str, volume_id: str) -> str:
    """Give a volume a manifest of its own, a copy of another one; returns its key. The same call again does no harm.

    `source_manifest` is `Snapshot.manifest`, or what this returned for another volume (a clone of a volume that was
    made from a snapshot). Raises NotFound when it is gone.
    """
    key = volume_manifest_key(volume_id)
    found = admin.head(source_manifest)
    admin.copy(source_manifest, found.etag, key, size=found.size)
    return key


def pin_prefix(
    admin: BucketAdmin, prefix: str, volume_id: str, *, clock_ns: Callable[[], int] = time.time_ns
) -> Summary:
    """Pin what is below a prefix now, for a volume that is a clone of a dataset; its key is `volume_manifest_key`.

    The same call again finds what the first one pinned.
    """
    header = Header(bucket=admin.bucket, prefix=prefix, source=volume_id, created_ns=clock_ns())
    return write_pinned(admin, volume_manifest_key(volume_id), header, admin.objects(prefix))


def unpin(admin: BucketAdmin, volume_id: str) -> None:
    """Delete the manifest of a volume, if there is one."""
    admin.delete([volume_manifest_key(volume_id)])


def write_pinned(admin: BucketAdmin, key: str, header: Header, objects: Iterable[ObjectInfo]) -> Summary:
    """Write a manifest of a listing as an object, or return the figures of the one that has this key already.

    The listing is begun only if it is needed.
    """
    try:
        return describe(admin, key)
    except NotFound:
        pass
    with tempfile.TemporaryFile() as file:
        summary = write_manifest(cast("BinaryIO", file), header, objects)
        file.seek(0)
        try:
            admin.put(key, cast("BinaryIO", file), only_new=True)
        except AlreadyExists:  # another call was quicker, or the answer to our own first try was lost
            return describe(admin, key)
    log.info("pinned %d objects of s3://%s/%s as %s", summary.objects, admin.bucket, header.prefix, key)
    return summary


def describe(admin: BucketAdmin, key: str) -> Summary:
    """Return what a manifest in the bucket is of, and its figures; reads all of it.

    Raises NotFound, ConfigError when it is damaged.
    """
    with downloaded(admin, key) as manifest:
        return manifest.summary


@contextlib.contextmanager
def downloaded(admin: BucketAdmin, key: str) -> Iterator[Manifest]:
    """Have a manifest of the bucket open, as a temporary file. Raises NotFound, ConfigError when it is damaged."""
    with tempfile.NamedTemporaryFile(prefix="cachefs-manifest-") as file:
        with admin.open(key) as body:
            shutil.copyfileobj(body, file, _PIECE)
        file.flush()
        with contextlib.closing(Manifest(file.name, f"the manifest {key!r} in bucket {admin.bucket!r}")) as manifest:
            yield manifest


def _objects_of(admin: BucketAdmin, key: str) -> Iterator[ObjectInfo]:
    with downloaded(admin, key) as manifest:
        yield from manifest.objects()


def _safe(name: str) -> str:
    """Return an id as a part of a key. Raises UsageError for one that would lead elsewhere."""
    if not name or "/" in name or name in (".", "..") or not name.isprintable():
        raise UsageError(f"{name!r} cannot be the id of a snapshot or a volume")
    return name


def _taken(name: str, volume_id: str) -> AlreadyExists:
    return AlreadyExists(f"a snapshot called {name!r} exists already, of the volume {volume_id!r}")
