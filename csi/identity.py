"""The Identity service: who the driver is, what it offers, and whether it can work now.

Probe asks what the driver needs: the records of the controller, the keeper of the node and its node service. What does
not answer now makes the driver "not ready", with a line in the log: that happens whenever the node service or etcd is
replaced, and mounts go on meanwhile. What somebody has to change (records that refuse the controller) is
FAILED_PRECONDITION.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from google.protobuf.wrappers_pb2 import BoolValue

import cachefs
from cachefs.errors import CachefsError
from cachefs.logs import ThrottledWarning
from csi.status import Code, failed_precondition, status_of
from csi.v1 import csi_pb2, csi_pb2_grpc

log = logging.getLogger(__name__)

DRIVER_NAME = "cachefs.csi.k8s.io"
_Service = csi_pb2.PluginCapability.Service
_Expansion = csi_pb2.PluginCapability.VolumeExpansion

Check = Callable[[], None]
"""Returns when all is well; raises what `csi.status` knows."""


class Identity(csi_pb2_grpc.IdentityServicer):
    """See the protocol."""

    def __init__(
        self, *, controller: bool, has_topology: bool = False, name: str = DRIVER_NAME, checks: tuple[Check, ...] = ()
    ) -> None:
        """`controller`: the Controller service is offered, here or by another process of the driver."""
        self._name = name
        self._controller = controller
        self._has_topology = has_topology
        self._checks = checks
        self._not_ready = ThrottledWarning()

    def GetPluginInfo(self, request: Any, context: Any) -> csi_pb2.GetPluginInfoResponse:
        """Return name and version."""
        return csi_pb2.GetPluginInfoResponse(name=self._name, vendor_version=cachefs.__version__)

    def GetPluginCapabilities(self, request: Any, context: Any) -> csi_pb2.GetPluginCapabilitiesResponse:
        """Return what the driver as a whole offers."""
        kinds = [_Service.CONTROLLER_SERVICE] if self._controller else []
        kinds += [_Service.VOLUME_ACCESSIBILITY_CONSTRAINTS] if self._has_topology else []
        offered = [csi_pb2.PluginCapability(service=_Service(type=kind)) for kind in kinds]
        offered.append(csi_pb2.PluginCapability(volume_expansion=_Expansion(type=_Expansion.ONLINE)))
        return csi_pb2.GetPluginCapabilitiesResponse(capabilities=offered)

    def Probe(self, request: Any, context: Any) -> csi_pb2.ProbeResponse:
        """Ask everything that the driver needs."""
        waits = [reason for check in self._checks if (reason := _answer(check))]
        for reason in waits:
            more = self._not_ready.due(time.monotonic())
            if more is not None:
                log.info("not ready: %s%s", reason, more)
        return csi_pb2.ProbeResponse(ready=BoolValue(value=not waits))


def _answer(check: Check) -> str:
    """Return why the driver is not ready, "": it is."""
    try:
        check()
    except Exception as error:
        code, text = status_of(error)
        if code is Code.UNAVAILABLE:
            return text
        if code is Code.INTERNAL and not isinstance(error, CachefsError):
            raise
        raise failed_precondition(text) from error
    return ""
