"""The controller's side of snapshots: CreateSnapshot, DeleteSnapshot, ListSnapshots, GetSnapshot.

What a snapshot is, and how it is written, is in `csi.snapshots`; here are the requests, the records that say how the
bucket is reached later (the volume may be gone by then), and the pages of lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from csi import controller_requests as requests
from csi import snapshots
from csi import volumes as known_volumes
from csi.buckets import Buckets
from csi.locks import CallLocks
from csi.parameters import FOREIGN
from csi.provisioning import ORIGIN, origin_of
from csi.records import VolumeRecords
from csi.snapshots import Snapshot
from csi.status import aborted, already_exists, not_found
from csi.v1 import csi_pb2
from csi.volumes import State, Volume


class Snapshots:
    """Snapshots of volumes. Any thread."""

    def __init__(self, records: VolumeRecords, buckets: Buckets, volume_locks: CallLocks) -> None:
        self._records = records
        self._buckets = buckets
        self._volume_locks = volume_locks
        self._locks = CallLocks("snapshot")

    def create(self, request: Any) -> csi_pb2.CreateSnapshotResponse:
        """See the protocol."""
        volume_id = requests.required("source_volume_id", request.source_volume_id)
        name = requests.name(request)
        requests.no_parameters(request.parameters, FOREIGN)
        snapshot_id = snapshots.snapshot_id(name)
        with self._locks.alone(snapshot_id):
            found = snapshots.find(self._records, snapshot_id)
            if found is None:
                # beside others: many snapshots of one volume at once are fine, its deletion meanwhile is not
                with self._volume_locks.beside(volume_id, snapshot_id):
                    found = self._take(self._volume(volume_id), name, request.secrets)
            if found.source_volume_id != volume_id:
                raise already_exists(f"the snapshot {name} exists, of the volume {found.source_volume_id}")
            return csi_pb2.CreateSnapshotResponse(snapshot=_message(found))

    def delete(self, request: Any) -> csi_pb2.DeleteSnapshotResponse:
        """See the protocol. Volumes that were made from the snapshot stay as they are."""
        snapshot_id = requests.required("snapshot_id", request.snapshot_id)
        with self._locks.alone(snapshot_id):
            if snapshots.find(self._records, snapshot_id) is not None:
                spec = origin_of(self._records, snapshot_id)
                with self._buckets.open(spec, request.secrets) as admin:
                    snapshots.delete(admin, self._records, snapshot_id)
        return csi_pb2.DeleteSnapshotResponse()

    def get(self, request: Any) -> csi_pb2.GetSnapshotResponse:
        """See the protocol."""
        snapshot_id = requests.required("snapshot_id", request.snapshot_id)
        found = snapshots.find(self._records, snapshot_id)
        if found is None:
            raise not_found(f"the snapshot {snapshot_id!r} does not exist")
        return csi_pb2.GetSnapshotResponse(snapshot=_message(found))

    def list(self, request: Any) -> csi_pb2.ListSnapshotsResponse:
        """See the protocol."""
        page = requests.page(request)
        if request.snapshot_id:
            found = snapshots.find(self._records, request.snapshot_id)
            fits = found is not None and request.source_volume_id in ("", found.source_volume_id)
            return _listed([found] if found is not None and fits else [], "")
        chosen, after = snapshots.listed(
            self._records, after=page.after, limit=page.limit, source_volume_id=request.source_volume_id
        )
        return _listed(chosen, page.next_token(after) if after else "")

    def _volume(self, volume_id: str) -> Volume:
        volume = known_volumes.find(self._records, volume_id)
        if volume is None:
            raise not_found(f"the volume {volume_id!r} was not made by this driver, or does not exist any more")
        if volume.state is not State.READY:
            raise aborted(f"the volume {volume_id} is not ready to be pinned ({volume.state}): try again")
        return volume

    def _take(self, volume: Volume, name: str, secrets: Mapping[str, str]) -> Snapshot:
        spec = volume.spec
        with self._buckets.open(spec, secrets, patient=True) as admin:
            return snapshots.create(
                admin,
                self._records,
                name=name,
                source_volume_id=volume.volume_id,
                prefix=volume.prefix,
                source_manifest=volume.manifest,
                more={ORIGIN: volume.context},
            )


def _message(snapshot: Snapshot) -> csi_pb2.Snapshot:
    seconds, nanoseconds = divmod(snapshot.created_ns, 10**9)
    return csi_pb2.Snapshot(
        snapshot_id=snapshot.snapshot_id,
        source_volume_id=snapshot.source_volume_id,
        size_bytes=snapshot.size_bytes,
        creation_time=Timestamp(seconds=seconds, nanos=nanoseconds),
        ready_to_use=True,
    )


def _listed(found: list[Snapshot], next_token: str) -> csi_pb2.ListSnapshotsResponse:
    entries = [csi_pb2.ListSnapshotsResponse.Entry(snapshot=_message(each)) for each in found]
    return csi_pb2.ListSnapshotsResponse(entries=entries, next_token=next_token)
