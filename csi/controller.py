"""The Controller service: what the provisioner, the resizer and the snapshotter of Kubernetes ask.

Requests are checked (`csi.controller_requests`), then done by `csi.provisioning` and `csi.controller_snapshots`; here
are the answers, the lists, quotas and the condition of volumes. Nothing is remembered but in the records, so any number
of replicas may be killed and started.

The capacity of a volume is a number that is kept and shown (`df`): buckets have no size, and volumes are read-only.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from cachefs.errors import AccessDenied, CachefsError, CredentialsError
from csi import controller_requests as requests
from csi import volumes as known_volumes
from csi.buckets import Buckets
from csi.controller_snapshots import Snapshots
from csi.copying import Jobs
from csi.locks import CallLocks
from csi.parameter_table import AuthSource
from csi.parameters import own_parameters, parse
from csi.provisioning import Order, Provisioner
from csi.records import VOLUMES, VolumeRecords
from csi.status import invalid, not_found, out_of_range, worded
from csi.v1 import csi_pb2, csi_pb2_grpc
from csi.volumes import Made, State, Volume

UNLIMITED_BYTES = 1 << 60
"""What GetCapacity says: buckets have no size."""
WAIT_S = 5.0
_MAX_CAPACITY = (1 << 63) - 1
_Rpc = csi_pb2.ControllerServiceCapability.RPC
CAPABILITIES = (
    _Rpc.CREATE_DELETE_VOLUME,
    _Rpc.LIST_VOLUMES,
    _Rpc.GET_CAPACITY,
    _Rpc.CREATE_DELETE_SNAPSHOT,
    _Rpc.LIST_SNAPSHOTS,
    _Rpc.CLONE_VOLUME,
    _Rpc.EXPAND_VOLUME,
    _Rpc.VOLUME_CONDITION,
    _Rpc.GET_VOLUME,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
    _Rpc.GET_SNAPSHOT,
)


class Controller(csi_pb2_grpc.ControllerServicer):
    """See the protocol for what each method does. `close` it at the end."""

    def __init__(
        self, records: VolumeRecords, buckets: Buckets, *, has_topology: bool = False, wait_s: float = WAIT_S
    ) -> None:
        """`has_topology`: nodes say where they are (--zone), so volumes do as well. `wait_s`: how long a call waits for
        a copy or a deletion.
        """
        self._records = records
        self._buckets = buckets
        self._has_topology = has_topology
        self._locks = CallLocks("volume")
        self._jobs = Jobs(records)
        self._provisioner = Provisioner(records, buckets, self._jobs, self._locks, wait_s=wait_s)
        self._snapshots = Snapshots(records, buckets, self._locks)

    def close(self) -> None:
        """BLOCKS for a request. Copies and deletions stop; they go on with the next call for them, anywhere."""
        self._jobs.close()

    # -- volumes ------------------------------------------------------------------------------------------------------

    def CreateVolume(self, request: Any, context: Any) -> csi_pb2.CreateVolumeResponse:
        """Make a volume, or return the one of this name."""
        name = requests.name(request)
        requests.capabilities(request)
        if request.mutable_parameters:
            raise invalid("mutable_parameters", "volumes here have none")
        order = Order(
            name=name,
            parameters=dict(request.parameters),
            capacity=requests.capacity(request),
            source=requests.source(request),
            topology=requests.topology(request, offered=self._has_topology),
            secrets=dict(request.secrets),
        )
        return csi_pb2.CreateVolumeResponse(volume=self._provisioner.create(order).message())

    def DeleteVolume(self, request: Any, context: Any) -> csi_pb2.DeleteVolumeResponse:
        """Take a volume away, with what it owns."""
        volume_id = requests.required("volume_id", request.volume_id)
        self._provisioner.delete(volume_id, dict(request.secrets))
        return csi_pb2.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self,
        request: Any,
        context: Any,
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        """Say whether a volume has capabilities, and is what the caller takes it for."""
        volume_id = requests.required("volume_id", request.volume_id)
        if not request.volume_capabilities:
            raise invalid("volume_capabilities", "must be given")
        volume = self._found(volume_id)
        answer = csi_pb2.ValidateVolumeCapabilitiesResponse
        for number, each in enumerate(request.volume_capabilities):
            problem = requests.unsupported(each)
            if problem is not None:
                return answer(message=f"volume_capabilities[{number}].{problem[0]}: {problem[1]}")
        if request.parameters and own_parameters(request.parameters) != dict(volume.parameters):
            return answer(message="parameters: the volume was made with others")
        if request.volume_context and own_parameters(request.volume_context) != volume.context:
            return answer(message="volume_context: the volume has another one")
        if request.mutable_parameters:
            return answer(message="mutable_parameters: volumes here have none")
        return answer(
            confirmed=answer.Confirmed(
                volume_context=dict(request.volume_context),
                volume_capabilities=list(request.volume_capabilities),
                parameters=dict(request.parameters),
            )
        )

    def ControllerExpandVolume(self, request: Any, context: Any) -> csi_pb2.ControllerExpandVolumeResponse:
        """Raise the capacity of a volume; less than it has is no error, and changes nothing."""
        volume_id = requests.required("volume_id", request.volume_id)
        if not request.HasField("capacity_range"):
            raise invalid("capacity_range", "must be given")
        if request.HasField("volume_capability"):
            requests.capability("volume_capability", request.volume_capability)
        wanted = requests.capacity(request)
        with self._locks.alone(volume_id):
            volume = self._found(volume_id)
            reached = max(volume.capacity_bytes, wanted.required_bytes)
            if not wanted.fits(reached):
                raise out_of_range(
                    f"capacity_range.limit_bytes: the volume has {volume.capacity_bytes} bytes, and none shrinks"
                )
            if reached != volume.capacity_bytes:
                self._records.put(VOLUMES, volume_id, dataclasses.replace(volume, capacity_bytes=reached).record())
        return csi_pb2.ControllerExpandVolumeResponse(capacity_bytes=reached, node_expansion_required=True)

    def ListVolumes(self, request: Any, context: Any) -> csi_pb2.ListVolumesResponse:
        """Return volumes, by their ids. Their condition is what the records say; nobody asks a store for it."""
        page = requests.page(request)
        records = self._records.page(VOLUMES, page.after, page.limit + 1)
        entries = []
        for _, record in records[: page.limit]:
            volume = Volume.of_record(record)
            status = csi_pb2.ListVolumesResponse.VolumeStatus(volume_condition=self._recorded_condition(volume))
            entries.append(csi_pb2.ListVolumesResponse.Entry(volume=volume.message(), status=status))
        more = len(records) > page.limit
        token = page.next_token(records[page.limit - 1][0]) if more else ""
        return csi_pb2.ListVolumesResponse(entries=entries, next_token=token)

    def ControllerGetVolume(self, request: Any, context: Any) -> csi_pb2.ControllerGetVolumeResponse:
        """Return a volume and its condition: whether the bucket answers, and what the volume shows is there."""
        volume = self._found(requests.required("volume_id", request.volume_id))
        condition = self._condition(volume)
        status = csi_pb2.ControllerGetVolumeResponse.VolumeStatus(volume_condition=condition)
        return csi_pb2.ControllerGetVolumeResponse(volume=volume.message(), status=status)

    def GetCapacity(self, request: Any, context: Any) -> csi_pb2.GetCapacityResponse:
        """Say how much can be provisioned: as good as everything, or nothing for capabilities that no volume has."""
        if own_parameters(request.parameters):
            parse(request.parameters, where="parameters", of_class=True)
        refused = any(requests.unsupported(each) is not None for each in request.volume_capabilities)
        return csi_pb2.GetCapacityResponse(available_capacity=0 if refused else UNLIMITED_BYTES)

    def ControllerGetCapabilities(
        self,
        request: Any,
        context: Any,
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        """Say what this service can do."""
        capability = csi_pb2.ControllerServiceCapability
        offered = [capability(rpc=capability.RPC(type=each)) for each in CAPABILITIES]
        return csi_pb2.ControllerGetCapabilitiesResponse(capabilities=offered)

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def CreateSnapshot(self, request: Any, context: Any) -> csi_pb2.CreateSnapshotResponse:
        """Pin what a volume shows now."""
        return self._snapshots.create(request)

    def DeleteSnapshot(self, request: Any, context: Any) -> csi_pb2.DeleteSnapshotResponse:
        """Delete a snapshot; volumes that were made from it stay."""
        return self._snapshots.delete(request)

    def ListSnapshots(self, request: Any, context: Any) -> csi_pb2.ListSnapshotsResponse:
        """Return snapshots, by their ids."""
        return self._snapshots.list(request)

    def GetSnapshot(self, request: Any, context: Any) -> csi_pb2.GetSnapshotResponse:
        """Return one snapshot."""
        return self._snapshots.get(request)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _found(self, volume_id: str) -> Volume:
        volume = known_volumes.find(self._records, volume_id)
        if volume is None:
            raise not_found(f"the volume {volume_id!r} was not made by this driver, or does not exist any more")
        return volume

    def _recorded_condition(self, volume: Volume) -> csi_pb2.VolumeCondition:
        if volume.state is State.READY:
            return csi_pb2.VolumeCondition(abnormal=False, message="ready")
        progress = self._jobs.progress(volume.volume_id)
        text = progress.text if progress is not None else f"{volume.state} it"
        return csi_pb2.VolumeCondition(abnormal=bool(progress and progress.error), message=text)

    def _condition(self, volume: Volume) -> csi_pb2.VolumeCondition:
        """Look at the bucket, if the controller may: the request brings no secrets."""
        if volume.state is not State.READY:
            return self._recorded_condition(volume)
        spec = volume.spec
        if not self._buckets.has_credentials(spec):
            text = "ready; the controller has no credentials to look at the bucket, the nodes report what they see"
            return csi_pb2.VolumeCondition(abnormal=False, message=text)
        started = time.monotonic()
        try:
            with self._buckets.open(spec, {}) as admin:
                if volume.made is Made.MANIFEST:
                    admin.head(volume.manifest)
                elif volume.made is Made.PREFIX and next(admin.objects(volume.prefix), None) is None:
                    gone = f"s3://{spec.bucket}/{volume.prefix} is gone: somebody has deleted it"
                    return csi_pb2.VolumeCondition(abnormal=True, message=gone)
                else:
                    admin.check(volume.prefix)
        except CachefsError as error:
            return _what_was_seen(volume, error)
        answered_ms = (time.monotonic() - started) * 1000
        return csi_pb2.VolumeCondition(abnormal=False, message=f"the bucket answers ({answered_ms:.0f} ms)")


def _what_was_seen(volume: Volume, error: CachefsError) -> csi_pb2.VolumeCondition:
    """Return the condition of a volume whose bucket the controller could not look at. Of a dataset with the nodes' keys
    that says nothing, as when it was made: nodes may have keys that the controller has not.
    """
    keys = isinstance(error, AccessDenied | CredentialsError) and volume.spec.auth_source is AuthSource.NODE
    if keys and volume.made is Made.DATASET:
        text = f"ready; the controller cannot look at the bucket, the nodes report what they see: {error}"
        return csi_pb2.VolumeCondition(abnormal=False, message=worded(text))
    return csi_pb2.VolumeCondition(abnormal=True, message=worded(str(error)))
