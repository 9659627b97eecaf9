"""The node service at its real socket, with a keeper and an agent that a test chooses, and what the kubelet calls.

with Plugin(settings, keeper_socket) as plugin:
    volume = plugin.volume("v1", {"bucket": "b"})
    volume.stage()
    target = volume.publish("pod-1")
    volume.unpublish("pod-1")
    volume.unstage()
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import grpc

from cachefs.keeper.client import KeeperClient
from csi.node import NodeService
from csi.node_mounts import NodeSettings
from csi.pod_events import PodEvents
from csi.records import VolumeRecords
from csi.server import Server
from csi.v1 import csi_pb2, csi_pb2_grpc

Mode = csi_pb2.VolumeCapability.AccessMode
KEYS = {"accessKeyId": "AKIDEXAMPLE", "secretAccessKey": "wJalrXUtnFEMI/K7MDENG"}
CALL_S = 60.0


def capability(mode: str = "MULTI_NODE_READER_ONLY", *, group: str = "", flags: tuple[str, ...] = ()) -> Any:
    """Return a capability of a mounted volume."""
    mount = csi_pb2.VolumeCapability.MountVolume(volume_mount_group=group, mount_flags=flags)
    access = csi_pb2.VolumeCapability.AccessMode(mode=Mode.Mode.Value(mode))
    return csi_pb2.VolumeCapability(mount=mount, access_mode=access)


class Plugin:
    """The plugin in this process, behind a real socket. Context manager."""

    def __init__(
        self,
        settings: NodeSettings,
        keeper_socket: str,
        endpoint: Path,
        events: PodEvents | None = None,
        records: VolumeRecords | None = None,
    ) -> None:
        self.settings = settings
        self.service = NodeService(settings, KeeperClient(keeper_socket), events, records)
        self._server = Server(str(endpoint), [self.service])
        self._endpoint = endpoint

    def __enter__(self) -> Self:
        self.service.start()
        self._server.start()
        self._channel = grpc.insecure_channel(f"unix:{self._endpoint}")
        self.node: Any = csi_pb2_grpc.NodeStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._server.stop(2.0)

    def volume(self, volume_id: str, parameters: Mapping[str, str], **more: Any) -> KubeletVolume:
        """Return a volume as the kubelet sees it."""
        return KubeletVolume(self.node, self.settings.kubelet_dir, volume_id, parameters, **more)


class KubeletVolume:
    """One volume, and the calls of the kubelet for it."""

    def __init__(
        self,
        node: Any,
        kubelet_dir: str,
        volume_id: str,
        parameters: Mapping[str, str],
        *,
        mode: str = "MULTI_NODE_READER_ONLY",
        secrets: Mapping[str, str] | None = None,
        flags: tuple[str, ...] = (),
    ) -> None:
        self._node = node
        self._kubelet_dir = kubelet_dir
        self.volume_id = volume_id
        self.parameters = dict(parameters)
        self.mode, self.flags = mode, flags
        self.secrets = dict(secrets or {})
        self.staging = f"{kubelet_dir}/plugins/kubernetes.io/csi/cachefs/{volume_id}/globalmount"

    def target(self, pod: str) -> str:
        """Return where a pod has it."""
        return f"{self._kubelet_dir}/pods/{pod}/volumes/kubernetes.io~csi/{self.volume_id}/mount"

    def stage(self, *, group: str = "", secrets: Mapping[str, str] | None = None, **changes: Any) -> None:
        """NodeStageVolume."""
        fields: dict[str, Any] = {
            "volume_id": self.volume_id,
            "staging_target_path": self.staging,
            "volume_capability": capability(self.mode, group=group, flags=self.flags),
            "volume_context": self.parameters,
            "secrets": self.secrets if secrets is None else dict(secrets),
        }
        self._node.NodeStageVolume(csi_pb2.NodeStageVolumeRequest(**{**fields, **changes}), timeout=CALL_S)

    def unstage(self, staging: str | None = None) -> None:
        """NodeUnstageVolume."""
        place = self.staging if staging is None else staging
        request = csi_pb2.NodeUnstageVolumeRequest(volume_id=self.volume_id, staging_target_path=place)
        self._node.NodeUnstageVolume(request, timeout=CALL_S)

    def publish(
        self,
        pod: str = "pod-1",
        *,
        group: str = "",
        context: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        readonly: bool = False,
        call_s: float = CALL_S,
        **changes: Any,
    ) -> Path:
        """NodePublishVolume; returns where the pod has it."""
        fields: dict[str, Any] = {
            "volume_id": self.volume_id,
            "staging_target_path": self.staging,
            "target_path": self.target(pod),
            "volume_capability": capability(self.mode, group=group, flags=self.flags),
            "volume_context": {**self.parameters, **(context or {})},
            "secrets": self.secrets if secrets is None else dict(secrets),
            "readonly": readonly,
        }
        self._node.NodePublishVolume(csi_pb2.NodePublishVolumeRequest(**{**fields, **changes}), timeout=call_s)
        return Path(self.target(pod))

    def unpublish(self, pod: str = "pod-1") -> None:
        """NodeUnpublishVolume."""
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=self.volume_id, target_path=self.target(pod))
        self._node.NodeUnpublishVolume(request, timeout=CALL_S)

    def stats(self, path: str) -> Any:
        """NodeGetVolumeStats."""
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=self.volume_id, volume_path=path)
        return self._node.NodeGetVolumeStats(request, timeout=CALL_S)

    def expand(self, path: str, required_bytes: int, *, limit: int = 0) -> Any:
        """NodeExpandVolume."""
        wanted = csi_pb2.CapacityRange(required_bytes=required_bytes, limit_bytes=limit)
        request = csi_pb2.NodeExpandVolumeRequest(volume_id=self.volume_id, volume_path=path, capacity_range=wanted)
        return self._node.NodeExpandVolume(request, timeout=CALL_S)


def code(call: Any, *arguments: Any, **more: Any) -> str:
    """Return the code that a call ends with, "OK" when it works."""
    return refusal(call, *arguments, **more)[0]


def refusal(call: Any, *arguments: Any, **more: Any) -> tuple[str, str]:
    """Return code and text that a call ends with."""
    try:
        call(*arguments, **more)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""
