"""Makes and takes away volumes: CreateVolume and DeleteVolume.

CreateVolume, in this order, so that it can be killed anywhere and called again:

    look at the bucket -> the record (state "making", owned or not) -> objects -> the record (state "ready")

The record stands before the first object is written, and says whether the prefix was empty then. Only what was empty is
ever deleted: a prefix that held objects (of a claim of the same name whose volume was retained, or of somebody else) is
shown as it is, and stays when the volume goes.

DeleteVolume, in this order: unfinished copies of it away -> refuse while snapshots or volumes from snapshots need the
objects -> the record (state "deleting") -> objects, in the background when they are many -> the record away. Big copies
and deletions are answered with ABORTED and how far they are; the callers of CSI ask again, and bring the credentials
that go on with it.

INVARIANTS: what is deleted lies below the prefix of a record that says `owned`, or is the manifest of that volume; two
volumes that are there at the same time own no common object.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from cachefs.errors import AccessDenied, BucketNotFound, CredentialsError, NotFound, UsageError
from cachefs.store.admin import BucketAdmin
from csi import path_template, snapshots
from csi import volumes as known_volumes
from csi.buckets import Buckets
from csi.controller_requests import Capacity
from csi.copying import Jobs
from csi.locks import CallLocks
from csi.parameter_table import AuthSource
from csi.parameters import VolumeSpec, own_parameters, parse
from csi.path_template import PVC_NAME, PVC_NAMESPACE
from csi.records import VOLUMES, CorruptRecord, VolumeRecords
from csi.status import aborted, already_exists, failed_precondition, invalid, not_found, out_of_range, worded
from csi.transfers import listing_key
from csi.volumes import Made, State, Volume, volume_id_of

log = logging.getLogger(__name__)

Secrets = Mapping[str, str]
ORIGIN = "context"
"""What the record of a snapshot has in addition: the context of the volume that it was taken of."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What CreateVolume is asked for, checked."""

    name: str
    parameters: Mapping[str, str]
    capacity: Capacity
    source: Mapping[str, str]
    topology: tuple[Mapping[str, str], ...]
    secrets: Secrets = dataclasses.field(repr=False)

    @property
    def claim(self) -> str:
        """namespace/name of the claim, if the provisioner told it."""
        namespace, name = (self.parameters.get(key, "") for key in (PVC_NAMESPACE, PVC_NAME))
        return f"{namespace}/{name}" if name else ""


class Provisioner:
    """Volumes, their records and what they have in buckets. Any thread."""

    def __init__(
        self, records: VolumeRecords, buckets: Buckets, jobs: Jobs, locks: CallLocks, *, wait_s: float = 5.0
    ) -> None:
        """`wait_s`: how long a call waits for a copy or a deletion before it says how far it is."""
        self._records = records
        self._buckets = buckets
        self._jobs = jobs
        self._locks = locks
        self._prefixes = CallLocks("prefix")
        self._wait_s = wait_s

    # -- CreateVolume -------------------------------------------------------------------------------------------------

    def create(self, order: Order) -> Volume:
        """Make a volume, or return the one of this name. Raises `Refused` and `cachefs.errors`."""
        spec = parse(order.parameters, where="parameters", of_class=True)
        volume_id = volume_id_of(order.name)
        with self._locks.alone(volume_id):
            volume = known_volumes.find(self._records, volume_id)
            if volume is None:
                volume = self._begin(volume_id, order, spec)
            _check_same(volume, order)
            if volume.state is State.DELETING:
                raise aborted(f"the volume {volume_id} is being deleted: try again")
            if volume.state is State.MAKING:
                self._make_or_forget(volume, order)
                volume = self._keep(volume, state=State.READY)
                self._jobs.forget(volume_id)
            return volume

    def _make_or_forget(self, volume: Volume, order: Order) -> None:
        """Make what the volume needs. Where nothing can have been written the record goes too: after a refusal that is
        final nobody asks again, nor deletes the volume.
        """
        try:
            self._make(volume, order)
        except (AccessDenied, CredentialsError, NotFound, UsageError):
            if volume.made is not Made.PREFIX or not volume.source:
                self._records.delete(VOLUMES, volume.volume_id)
            raise

    def _begin(self, volume_id: str, order: Order, spec: VolumeSpec) -> Volume:
        """Decide what the volume is to be, and write its record."""
        volume = self._planned(volume_id, order, spec)
        if volume.made is not Made.PREFIX:
            self._look(volume, spec, order.secrets)
            return self._recorded(volume)
        place = f"s3://{spec.bucket}/{volume.prefix}"
        with self._prefixes.alone(volume.place), self._buckets.open(spec, order.secrets) as admin:
            self._check_alone(volume, spec)
            owned = next(admin.objects(volume.prefix), None) is None
            if not owned and volume.source:
                raise failed_precondition(f"{place} holds objects already: a copy needs an empty prefix")
            if not owned:
                log.info("volume %s: %s has objects already, which are never deleted", volume_id, place)
            return self._recorded(dataclasses.replace(volume, owned=owned))

    def _planned(self, volume_id: str, order: Order, spec: VolumeSpec) -> Volume:
        """Return the volume as it is to be, `owned` not decided. Raises `Refused` when its source does not fit."""
        made, prefix, least_bytes, manifest = self._of_source(volume_id, order.source, spec)
        if made is Made.PREFIX:
            prefix = spec.prefix + path_template.expanded(spec.path_template, order.parameters, volume_id)
            if len(prefix.encode()) > path_template.MAX_PREFIX_BYTES:
                raise invalid("parameters.pathTemplate", f"becomes more than {path_template.MAX_PREFIX_BYTES} bytes")
        if not order.capacity.fits(max(least_bytes, order.capacity.required_bytes)):
            raise out_of_range(
                f"capacity_range.limit_bytes {order.capacity.limit_bytes} is less than the {least_bytes} bytes "
                "of the source"
            )
        return Volume(
            volume_id=volume_id,
            name=order.name,
            parameters=own_parameters(order.parameters),
            made=made,
            owned=False,
            prefix=prefix,
            claim=order.claim,
            source=dict(order.source),
            manifest=manifest,
            capacity_bytes=order.capacity.required_bytes,
            first_capacity_bytes=order.capacity.required_bytes,
            topology=order.topology,
            created_ns=time.time_ns(),
        )

    def _of_source(self, volume_id: str, source: Mapping[str, str], spec: VolumeSpec) -> tuple[Made, str, int, str]:
        """Return what is to be made, the prefix that it shows (if it gets none of its own), bytes, its manifest."""
        own = Made.PREFIX if spec.path_template else Made.DATASET
        if not source:
            return own, spec.prefix, 0, ""
        manifest = snapshots.volume_manifest_key(volume_id)
        if "snapshot" in source:
            snapshot = snapshots.find(self._records, source["snapshot"])
            if snapshot is None:
                raise not_found(f"the snapshot {source['snapshot']!r} does not exist")
            _check_place(spec, origin_of(self._records, snapshot.snapshot_id))
            return Made.MANIFEST, snapshot.prefix, snapshot.size_bytes, manifest
        origin = known_volumes.find(self._records, source["volume"])
        if origin is None:
            raise not_found(f"the volume {source['volume']!r} was not made by this driver, or does not exist any more")
        if origin.state is not State.READY:
            raise aborted(f"the volume {origin.volume_id} is not ready to be cloned ({origin.state}): try again")
        _check_place(spec, origin.spec)
        if own is Made.PREFIX and origin.made is not Made.MANIFEST:
            return Made.PREFIX, "", origin.capacity_bytes, ""
        return Made.MANIFEST, origin.prefix, origin.capacity_bytes, manifest

    def _recorded(self, volume: Volume) -> Volume:
        """Write the record of a new volume; another replica may have been quicker, then it is theirs."""
        found = self._records.put_new(VOLUMES, volume.volume_id, volume.record())
        return volume if found is None else Volume.of_record(found)

    def _look(self, volume: Volume, spec: VolumeSpec, secrets: Secrets) -> None:
        """Say now what is wrong with the bucket, as far as the controller can know it."""
        if not secrets and not self._buckets.has_credentials(spec):
            return  # nodes have them
        try:
            with self._buckets.open(spec, secrets) as admin:
                admin.check(volume.prefix)
        except (AccessDenied, CredentialsError) as error:
            if spec.auth_source is not AuthSource.NODE:
                raise
            log.info("the controller cannot look at s3://%s itself; nodes may: %s", spec.bucket, worded(str(error)))

    def _check_alone(self, volume: Volume, spec: VolumeSpec) -> None:
        """Refuse a prefix that lies in, or around, that of another claim's volume."""
        for other in known_volumes.every(self._records):
            if other.made is not Made.PREFIX or not other.overlaps(volume.prefix, spec):
                continue
            if other.prefix == volume.prefix and other.claim == volume.claim and volume.claim:
                if other.owned and other.state is State.DELETING:
                    raise aborted(
                        f"s3://{spec.bucket}/{volume.prefix} is still being deleted with the volume that the claim "
                        f"{volume.claim} had before ({other.volume_id}): try again"
                    )
                continue  # the claim of a retained volume was made anew: it gets its objects back
            raise failed_precondition(
                f"parameters.pathTemplate: s3://{spec.bucket}/{volume.prefix} is in use by the volume "
                f"{other.volume_id} (claim {other.claim or 'unknown'}): let the template name namespace and claim"
            )

    def _make(self, volume: Volume, order: Order) -> None:
        """Write what the volume needs in the bucket. Everything here may be done again."""
        if volume.made is Made.DATASET:
            return
        spec = volume.spec
        if volume.made is Made.MANIFEST:
            with self._buckets.open(spec, order.secrets, patient=True) as admin:
                self._pin(admin, volume)
            return
        if "volume" in volume.source:
            self._copy(volume, spec, order.secrets)
        if volume.owned:  # else it has objects, and what its marker may have is not ours
            with self._buckets.open(spec, order.secrets) as admin:
                admin.put(volume.prefix, b"")

    def _pin(self, admin: BucketAdmin, volume: Volume) -> None:
        """Give the volume its manifest, unless an earlier try has done it. Raises NotFound: its source is gone."""
        try:
            admin.head(volume.manifest)
            return
        except NotFound:
            pass
        if "snapshot" in volume.source:
            snapshot = snapshots.find(self._records, volume.source["snapshot"])
            if snapshot is None:
                raise NotFound(f"the snapshot {volume.source['snapshot']!r} does not exist any more")
            snapshots.pin(admin, snapshot.manifest, volume.volume_id)
            return
        origin = self._source_volume(volume)
        if origin.manifest:
            snapshots.pin(admin, origin.manifest, volume.volume_id)
        else:
            snapshots.pin_prefix(admin, origin.prefix, volume.volume_id)

    def _source_volume(self, volume: Volume) -> Volume:
        origin = known_volumes.find(self._records, volume.source["volume"])
        if origin is None:
            raise NotFound(f"the volume {volume.source['volume']!r} does not exist any more")
        return origin

    def _copy(self, volume: Volume, spec: VolumeSpec, secrets: Secrets) -> None:
        origin = self._source_volume(volume)
        progress = self._jobs.copy(
            volume.volume_id,
            lambda: self._buckets.open(spec, secrets, patient=True),
            source_prefix=origin.prefix,
            target_prefix=volume.prefix,
            wait_s=self._wait_s,
        )
        if not progress.ready:
            raise aborted(f"the volume {volume.volume_id} is being made: {progress.text}")

    def _keep(self, volume: Volume, **changes: Any) -> Volume:
        changed = dataclasses.replace(volume, **changes)
        self._records.put(VOLUMES, volume.volume_id, changed.record())
        return changed

    # -- DeleteVolume -------------------------------------------------------------------------------------------------

    def delete(self, volume_id: str, secrets: Secrets) -> None:
        """Take a volume away with what it owns. A volume that is not known is gone. Raises `Refused` and errors."""
        with self._locks.alone(volume_id):
            volume = known_volumes.find(self._records, volume_id)
            if volume is None:
                return
            self._drop_unfinished_copies(volume, secrets)
            self._take_away(volume, secrets)

    def _take_away(self, volume: Volume, secrets: Secrets) -> None:
        if volume.owned:
            self._check_free(volume)
        if volume.state is not State.DELETING:
            # a volume that the claim gets anew sees this one go, or has all of it
            with self._prefixes.alone(volume.place) if volume.owned else nullcontext():
                volume = self._keep(volume, state=State.DELETING)
        try:
            self._remove(volume, secrets)
        except BucketNotFound:
            log.info("volume %s: its bucket is gone, and all that it had", volume.volume_id)
        self._jobs.forget(volume.volume_id)
        self._records.delete(VOLUMES, volume.volume_id)

    def _drop_unfinished_copies(self, source: Volume, secrets: Secrets) -> None:
        """Take away what was begun as a copy of a volume that goes: it can never be finished, and when its claim is
        gone too the provisioner asks for it no more, not even to delete it.
        """
        for each in known_volumes.every(self._records):
            if not each.is_unfinished_copy_of(source):
                continue
            with self._locks.alone(each.volume_id):
                found = known_volumes.find(self._records, each.volume_id)
                if found is not None and found.is_unfinished_copy_of(source):  # it may have become ready
                    log.info("volume %s: was never finished, and goes with its source", found.volume_id)
                    self._take_away(found, secrets)

    def _remove(self, volume: Volume, secrets: Secrets) -> None:
        spec = volume.spec
        if volume.made is Made.MANIFEST:
            with self._buckets.open(spec, secrets) as admin:
                snapshots.unpin(admin, volume.volume_id)
        if not volume.owned:
            return
        if self._is_shared(volume):
            self._jobs.forget(volume.volume_id)
            with self._buckets.open(spec, secrets) as admin:
                admin.delete([listing_key(volume.volume_id)])
            return
        self._buckets.open(spec, secrets).close()  # what is wrong with the secrets is said before a job begins
        progress = self._jobs.delete(
            volume.volume_id,
            lambda: self._buckets.open(spec, secrets, patient=True),
            prefix=volume.prefix,
            wait_s=self._wait_s,
        )
        if not progress.ready:
            raise aborted(f"the volume {volume.volume_id} is being deleted: {progress.text}")

    def _check_free(self, volume: Volume) -> None:
        """Refuse to delete objects that snapshots, or volumes made from them, still show."""
        spec = volume.spec
        for snapshot_id, record in self._records.page(snapshots.KIND):
            snapshot = snapshots.Snapshot.of_record(record)
            same = snapshot.bucket == spec.bucket and snapshot.prefix.startswith(volume.prefix)
            if same and origin_of(self._records, snapshot_id).endpoint == spec.endpoint:
                raise failed_precondition(
                    f"the snapshot {snapshot_id} ({snapshot.name}) shows objects of the volume {volume.volume_id}: "
                    "delete it first"
                )
        for other in known_volumes.every(self._records):
            others = other.made is Made.MANIFEST and other.volume_id != volume.volume_id
            if others and other.is_within(volume.prefix, spec):
                raise failed_precondition(
                    f"the volume {other.volume_id} (claim {other.claim or 'unknown'}) shows objects of the volume "
                    f"{volume.volume_id}: delete it first"
                )

    def _is_shared(self, volume: Volume) -> bool:
        """Whether another volume has the prefix by now: then its objects stay."""
        for other in known_volumes.every(self._records):
            if other.volume_id == volume.volume_id or other.made is not Made.PREFIX:
                continue
            if other.overlaps(volume.prefix, volume.spec):
                log.info("volume %s: its objects stay, since volume %s has them now", volume.volume_id, other.volume_id)
                return True
        return False


def _check_same(volume: Volume, order: Order) -> None:
    """Refuse a request whose name is that of a volume which is not what it asks for."""
    wanted = own_parameters(order.parameters)
    for key in sorted({*wanted, *volume.parameters}):
        if wanted.get(key) != volume.parameters.get(key):
            raise already_exists(f"the volume {order.name} exists with another value of parameters.{key}")
    if dict(order.source) != dict(volume.source):
        raise already_exists(f"the volume {order.name} exists, made from another volume_content_source")
    if not order.capacity.fits(volume.capacity_bytes):
        raise already_exists(f"the volume {order.name} exists with a capacity of {volume.capacity_bytes} bytes")
    if order.topology and volume.topology and not any(place in volume.topology for place in order.topology):
        raise already_exists(f"the volume {order.name} exists for other accessibility_requirements")


def _check_place(spec: VolumeSpec, origin: VolumeSpec) -> None:
    """Refuse a source that lies elsewhere: manifests and copies stay within their bucket."""
    if (spec.endpoint, spec.bucket) != (origin.endpoint, origin.bucket):
        raise invalid(
            "volume_content_source",
            f"lies in the bucket {origin.bucket!r} at {origin.endpoint or 'AWS'}, and the class is for "
            f"{spec.bucket!r} at {spec.endpoint or 'AWS'}: use a class of the same bucket",
        )


def origin_of(records: VolumeRecords, snapshot_id: str) -> VolumeSpec:
    """Return how the volume was reached that a snapshot was taken of, as its record keeps it. Raises CorruptRecord."""
    record = records.get(snapshots.KIND, snapshot_id) or {}
    context = record.get(ORIGIN)
    if not isinstance(context, dict):
        raise CorruptRecord(f"the record of the snapshot {snapshot_id} does not say where its bucket is")
    return parse(context)
