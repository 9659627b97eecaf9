"""Puts the driver together: which services are at the socket, and what they need.

    --mode controller   Identity, Controller      records, buckets
    --mode node         Identity, Node            keeper and agent of the node
    --mode all          all three, for tests and machines without Kubernetes;
                        starts a keeper and a node service if none is there

`Driver` is what `cachefs csi` runs until SIGTERM. What it opens it closes, in the opposite order; `stop` lets running
calls end first.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cachefs.config import Config
from cachefs.errors import ConfigError
from csi.identity import DRIVER_NAME, Check, Identity
from csi.parameter_table import AuthSource
from csi.records import FileRecords, VolumeRecords
from csi.server import Server, Service

if TYPE_CHECKING:
    from csi.pod_events import PodEvents

log = logging.getLogger(__name__)

DEFAULT_STATE = "file:///var/lib/cachefs/csi"


class Mode(enum.StrEnum):
    """What a process of the driver is for."""

    ALL = "all"
    CONTROLLER = "controller"
    NODE = "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverSettings:
    """What `cachefs csi` was told."""

    path: str
    """The socket (`csi.endpoint.parse_endpoint`)."""
    mode: Mode
    config: Config
    """Of the node's agent, and what the controller reaches buckets and etcd by."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    name: str = DRIVER_NAME
    node_id: str = ""
    zone: str = ""
    """Where this node is for Kubernetes; only with `has_topology`."""
    has_topology: bool = False
    max_volumes: int = 0
    state: str = ""
    """file:///DIR or etcd; empty: etcd if there is one, else `DEFAULT_STATE`."""
    keeper: str = "/run/cachefs/keeper.sock"
    credentials_dir: str = "/run/cachefs/credentials"
    kubelet_dir: str = "/var/lib/kubelet"
    node_uid: int = 65532
    inline_auth: frozenset[AuthSource] = frozenset(AuthSource)
    """What inline volumes may say as authSource."""
    has_events: bool = False
    """Pods are told what their start waits for (the Kubernetes API must be there)."""


class Driver:
    """One process of the driver."""

    def __init__(self, settings: DriverSettings) -> None:
        """Raises ConfigError when the settings cannot work. Nothing listens before `start`."""
        self._settings = settings
        self._stack = ExitStack()
        self._checks: list[Check] = []
        self._records: VolumeRecords | None = None
        services: list[Service] = []
        try:
            if settings.mode is not Mode.NODE:
                services.append(self._controller())
            if settings.mode is not Mode.CONTROLLER:
                services.append(self._node())
        except BaseException:
            self._stack.close()
            raise
        identity = Identity(
            controller=settings.mode is not Mode.NODE,
            has_topology=settings.has_topology,
            name=settings.name,
            checks=tuple(self._checks),
        )
        self._server = Server(settings.path, [identity, *services])

    def start(self) -> None:
        """Listen. Raises MountError; nothing that was opened or started stays then."""
        try:
            self._server.start()
        except BaseException:
            self._stack.close()
            raise
        log.info("driver %s, mode %s", self._settings.name, self._settings.mode)

    def stop(self, grace_s: float) -> None:
        """BLOCKS. End running calls, at most so long, and close everything."""
        self._server.stop(grace_s)
        self._stack.close()

    def _controller(self) -> Service:
        from csi.buckets import Buckets  # the clients of stores, which the plugin of a node does without
        from csi.controller import Controller

        self._records = records = open_records(self._settings)
        self._stack.callback(records.close)
        self._checks.append(records.check)
        buckets = Buckets(self._settings.config.s3, self._settings.environment)
        controller = Controller(records, buckets, has_topology=self._settings.has_topology)
        self._stack.callback(controller.close)
        return controller

    def _node(self) -> Service:
        from cachefs.keeper.client import KeeperClient  # the controller needs nothing of a node
        from csi.node import NodeService, NodeSettings

        settings = self._settings
        if not settings.node_id:
            raise ConfigError("--node-id must be given: the name of this node in Kubernetes")
        config, node_uid = settings.config, settings.node_uid
        if settings.mode is Mode.ALL:
            config, node_uid = self._alone(config, node_uid)
        node = NodeService(
            NodeSettings(
                node_id=settings.node_id,
                config=config,
                credentials_dir=settings.credentials_dir,
                node_uid=node_uid,
                kubelet_dir=settings.kubelet_dir,
                driver_name=settings.name,
                zone=settings.zone if settings.has_topology else "",
                max_volumes=settings.max_volumes,
                inline_auth=settings.inline_auth,
                environment=settings.environment,
            ),
            KeeperClient(settings.keeper),
            self._pod_events(),
            self._records_for_node(),
        )
        node.start()
        self._checks.append(node.check)
        return node

    def _records_for_node(self) -> VolumeRecords | None:
        """Open the records of the controller, if they are where this node reaches them."""
        if self._records is None and self._settings.config.peer.etcd_endpoints:
            from csi.node_sizes import TIMEOUT_S

            self._records = open_records(dataclasses.replace(self._settings, state="etcd"), TIMEOUT_S)
            self._stack.callback(self._records.close)
        return self._records

    def _pod_events(self) -> PodEvents | None:
        settings = self._settings
        if not settings.has_events:
            return None
        from csi.kube import KubeClient
        from csi.pod_events import PodEvents

        host = settings.environment.get("KUBERNETES_SERVICE_HOST", "")
        port = settings.environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not port.isdigit():
            raise ConfigError("--events: KUBERNETES_SERVICE_HOST and _PORT do not say where the Kubernetes API is")
        events = PodEvents(KubeClient(host, int(port), component=settings.name, node_name=settings.node_id))
        events.start()
        self._stack.callback(events.close)
        return events

    def _alone(self, config: Config, node_uid: int) -> tuple[Config, int]:
        """Start keeper and node service if this machine has none; return the settings and the user of the latter."""
        from csi import alone

        settings = self._settings
        if alone.listens(settings.keeper):
            return config, node_uid
        both = alone.NodeAlone(
            settings.keeper,
            config,
            root=settings.kubelet_dir,
            driver_name=settings.name,
            environment=settings.environment,
        )
        both.start()
        self._stack.callback(both.stop)
        return both.config, os.geteuid()


def open_records(settings: DriverSettings, timeout_s: float = 0.0) -> VolumeRecords:
    """Open what `--state` says; `timeout_s` is for a question to etcd, 0: as usual. Raises ConfigError."""
    peer = settings.config.peer
    state = settings.state or ("etcd" if peer.etcd_endpoints else DEFAULT_STATE)
    if state == "etcd":
        if not peer.etcd_endpoints:
            raise ConfigError("--state etcd needs --etcd: say where it is")
        from csi.etcd_records import TIMEOUT_S, EtcdRecords, settings_of  # imports the client of etcd, which few need

        return EtcdRecords(settings_of(peer), timeout_s=timeout_s or TIMEOUT_S)
    path = state.removeprefix("file://")
    if not state.startswith("file://") or not path.startswith("/"):
        raise ConfigError(f"--state {state}: must be file:///DIR or etcd")
    return FileRecords(Path(path))
