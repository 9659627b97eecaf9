"""The node service of the driver: NodeStageVolume to NodeGetInfo, each a few lines over `csi.node_volumes`.

    csi/node_requests.py   fields of the requests, checked
    csi/credentials.py     what they say of credentials
    csi/node_volumes.py    which mounts there are to be
    csi/node_mounts.py     making them, and taking them away
    csi/node_keeper.py     the keeper of the node, who makes them
    csi/node_sizes.py      how large volumes have become
    csi/node_warmup.py     what pods may wait for
    csi/pod_events.py      what they are told meanwhile
    csi/node_stats.py      how mounts are

The plugin may be killed and started anew at any moment: it remembers nothing that is not with the keeper or in the
directory of credentials. Before its first call that changes something it has the keeper repair what is broken.

Which calls may be at work beside each other: publish and unpublish of different targets of one volume; everything else
on one volume is alone (`csi.locks`), and whoever comes second is ABORTED. A volume for one pod only (ReadWriteOncePod)
is published alone too, so that two pods cannot both be the first.
"""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager
from typing import Any

from cachefs.errors import CachefsError
from cachefs.keeper.client import KeeperClient, KeeperError, MountState
from csi import node_requests as requests
from csi.credentials import Credentials, from_request
from csi.locks import CallLocks
from csi.node_keeper import Keeper, Mounts, mount_key
from csi.node_mounts import NodeSettings
from csi.node_requests import Volume
from csi.node_sizes import Sizes
from csi.node_stats import Examiner
from csi.node_volumes import NodeVolumes
from csi.node_warmup import LABEL, Order, WarmUps
from csi.pod_events import Listener, PodEvents
from csi.records import VolumeRecords
from csi.status import invalid, not_found, out_of_range, unavailable
from csi.v1 import csi_pb2, csi_pb2_grpc

__all__ = ["NodeService", "NodeSettings"]

log = logging.getLogger(__name__)

ZONE_KEY = "topology.kubernetes.io/zone"
_Rpc = csi_pb2.NodeServiceCapability.RPC
CAPABILITIES = (
    _Rpc.STAGE_UNSTAGE_VOLUME,
    _Rpc.GET_VOLUME_STATS,
    _Rpc.VOLUME_CONDITION,
    _Rpc.EXPAND_VOLUME,
    _Rpc.VOLUME_MOUNT_GROUP,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
)


class NodeService(csi_pb2_grpc.NodeServicer):
    """One node. Calls BLOCK, each in a thread of the server; they end with Refused, CachefsError or KeeperError, which
    `csi.status` turns into codes.
    """

    def __init__(
        self,
        settings: NodeSettings,
        client: KeeperClient,
        events: PodEvents | None = None,
        records: VolumeRecords | None = None,
    ) -> None:
        """`events`: tells pods why they wait; None: nobody is told. `records`: of the controller, if they are reached
        from here.
        """
        self._settings = settings
        self._events = events
        self._keeper = Keeper(client, settings.node_id)
        self._volumes = NodeVolumes(settings, self._keeper, Sizes(records))
        self._warm_ups = WarmUps(settings.config.cache)
        self._examiner = Examiner(settings.config.cache, settings.node_id)
        self._locks = CallLocks("volume")
        self._repairing = threading.Lock()
        self._repaired = False

    def start(self) -> None:
        """Repair what the last plugin or the last boot has left. A keeper that is not there yet is asked again by the
        first call; never raises.
        """
        try:
            self._repair()
        except (CachefsError, KeeperError) as error:
            log.warning("nothing was repaired yet: %s", error)

    def check(self) -> None:
        """Raise Refused (UNAVAILABLE) unless the keeper answers and has a node service: for Probe."""
        if not self._keeper.look().has_node_service:
            raise self._keeper.node_service_missing()

    def _repair(self) -> None:
        with self._repairing:
            if not self._repaired:
                self._volumes.repair()
                self._repaired = True

    # -- stage ---------------------------------------------------------------------------------------------------------

    def NodeStageVolume(self, request: Any, context: Any) -> Any:
        """Make the mount of a volume, unless it needs what only the publish call knows."""
        volume_id = requests.volume_id(request)
        place = requests.place("staging_target_path", request.staging_target_path, self._settings.kubelet_dir)
        volume = requests.volume(request, volume_id)
        credentials = from_request(volume.spec, volume.secrets, volume.context, at_publish=False)
        self._repair()
        with self._locks.alone(volume_id):
            self._volumes.stage(volume, place, credentials, context.time_remaining())
        return csi_pb2.NodeStageVolumeResponse()

    def NodeUnstageVolume(self, request: Any, context: Any) -> Any:
        """Take the mounts of a volume away that is not published any more."""
        volume_id = requests.volume_id(request)
        place = requests.place("staging_target_path", request.staging_target_path, self._settings.kubelet_dir)
        self._repair()
        with self._locks.alone(volume_id):
            self._volumes.unstage(volume_id, place)
        return csi_pb2.NodeUnstageVolumeResponse()

    # -- publish -------------------------------------------------------------------------------------------------------

    def NodePublishVolume(self, request: Any, context: Any) -> Any:
        """Bind a volume to the place where a pod has it, warm if it is to be warm."""
        volume_id = requests.volume_id(request)
        target = requests.place("target_path", request.target_path, self._settings.kubelet_dir)
        volume = requests.volume(request, volume_id)
        stage = ""
        if volume.ephemeral:
            requests.check_inline(volume.spec, self._settings.inline_auth)
        else:
            requests.needs_stage(request.staging_target_path)
            stage = requests.place("staging_target_path", request.staging_target_path, self._settings.kubelet_dir)
            if stage == target:
                raise invalid("target_path", "must not be the staging_target_path")
        self._repair()
        with self._publishing(volume, target):
            self._publish(volume, stage, target, readonly=request.readonly, left_s=context.time_remaining())
        return csi_pb2.NodePublishVolumeResponse()

    def _publishing(self, volume: Volume, target: str) -> AbstractContextManager[None]:
        if volume.single_writer:
            return self._locks.alone(volume.volume_id)
        return self._locks.beside(volume.volume_id, target)

    def _publish(self, volume: Volume, stage: str, target: str, *, readonly: bool, left_s: float | None) -> None:
        mounts = self._keeper.look()
        staged = None if volume.ephemeral else self._volumes.fitting(volume, stage, mounts)
        credentials = self._credentials(volume, staged)
        identity = credentials.identity if credentials is not None and credentials.of_pod else ""
        name = mount_key(volume.volume_id, identity)
        key = mount_key(volume.volume_id, identity, volume.group)
        with self._volumes.using(key, target):
            if staged is None or staged.key != key:  # others may make or release that mount meanwhile
                mounts = self._keeper.look()
            self._volumes.check_target(volume, key, target, readonly, mounts)
            known = self._volumes.publish(volume, key, name, credentials, mounts, left_s)
            self._warm(volume, key, left_s)
            self._volumes.bind(volume, key, target, readonly, known)

    def _credentials(self, volume: Volume, staged: MountState | None) -> Credentials | None:
        """Return what a publish call brought; None: the volume has been given what it needs when it was staged."""
        return from_request(volume.spec, volume.secrets, volume.context, at_publish=staged is None)

    def _warm(self, volume: Volume, key: str, left_s: float | None) -> None:
        if not volume.spec.warmup:
            return

        def read() -> str | None:
            mount = self._keeper.look().by_key(key)
            return None if mount is None else mount.labels.get(LABEL)

        def keep(text: str) -> None:
            self._keeper.label(key, {LABEL: text})

        mount = self._keeper.look().by_key(key)
        if mount is None:
            raise unavailable("the mount of the volume is gone: try again")
        order = Order(mount.mountpoint, volume.spec.warmup, volume.spec.warmup_wait, volume.spec.group)
        pod = Listener() if self._events is None else self._events.listener(volume.context, volume.volume_id)
        self._warm_ups.attend(order, read, keep, left_s, pod)

    def NodeUnpublishVolume(self, request: Any, context: Any) -> Any:
        """Take a volume away from a pod."""
        volume_id = requests.volume_id(request)
        target = requests.place("target_path", request.target_path, self._settings.kubelet_dir)
        self._repair()
        with self._locks.beside(volume_id, target):
            self._volumes.unpublish(volume_id, target)
        return csi_pb2.NodeUnpublishVolumeResponse()

    # -- what is known -------------------------------------------------------------------------------------------------

    def _at(self, volume_id: str, path: str) -> tuple[Mounts, MountState]:
        """Return the mount of a volume that is published or staged at `path`. Raises Refused (NOT_FOUND)."""
        mounts, path = self._keeper.look(), path.rstrip("/")
        for mount in mounts.of_volume(volume_id):
            if path == mount.labels.get("stage") or any(target.path == path for target in mount.targets):
                return mounts, mount
        raise not_found(f"volume {volume_id} is not at {path} on this node")

    def NodeGetVolumeStats(self, request: Any, context: Any) -> Any:
        """Return figures and condition of a mount, within seconds whatever state it is in."""
        volume_id = requests.volume_id(request)
        path = requests.given("volume_path", request.volume_path).rstrip("/")
        mounts, mount = self._at(volume_id, path)
        self._examiner.forget({each.key for each in mounts.all})
        seen_at = mount.mountpoint if path == mount.labels.get("stage") else path
        health = self._examiner.examine(mount, seen_at, has_node_service=mounts.has_node_service)
        figures = health.figures
        total = _number(mount.labels.get("capacity")) or figures.total_bytes
        usage = csi_pb2.VolumeUsage
        return csi_pb2.NodeGetVolumeStatsResponse(
            usage=[
                _usage(usage.BYTES, total, figures.used_bytes),
                _usage(usage.INODES, figures.total_inodes, figures.used_inodes),
            ],
            volume_condition=csi_pb2.VolumeCondition(abnormal=health.abnormal, message=health.text),
        )

    def NodeExpandVolume(self, request: Any, context: Any) -> Any:
        """Keep the new size of a volume, which is a quota: nothing on the node has to grow. Less than it has is no
        error, and changes nothing.
        """
        volume_id = requests.volume_id(request)
        path = requests.given("volume_path", request.volume_path)
        wanted = requests.growth(request)
        with self._locks.alone(volume_id):
            mounts, mount = self._at(volume_id, path)
            has = _number(mount.labels.get("capacity"))
            reached = max(has, wanted.required_bytes)
            if not wanted.fits(reached):
                raise out_of_range(f"capacity_range.limit_bytes: the volume has {has} bytes, and none shrinks")
            for each in mounts.of_volume(volume_id):
                if reached > _number(each.labels.get("capacity")):
                    self._keeper.label(each.key, {"capacity": str(reached)})
        return csi_pb2.NodeExpandVolumeResponse(capacity_bytes=reached)

    def NodeGetInfo(self, request: Any, context: Any) -> Any:
        """Return what this node is called and where it is."""
        settings = self._settings
        topology = csi_pb2.Topology(segments={ZONE_KEY: settings.zone}) if settings.zone else None
        return csi_pb2.NodeGetInfoResponse(
            node_id=settings.node_id, max_volumes_per_node=settings.max_volumes, accessible_topology=topology
        )

    def NodeGetCapabilities(self, request: Any, context: Any) -> Any:
        """Return what this service offers."""
        kind = csi_pb2.NodeServiceCapability
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[kind(rpc=kind.RPC(type=each)) for each in CAPABILITIES]
        )


def _usage(unit: Any, total: int, used: int) -> Any:
    return csi_pb2.VolumeUsage(unit=unit, total=max(0, total), used=max(0, used), available=max(0, total - used))


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdecimal() else 0
