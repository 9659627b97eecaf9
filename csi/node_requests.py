"""Reads the requests of the node service, field by field, into what the rest of it works with.

Everything that can be wrong with a request by itself is refused here (INVALID_ARGUMENT, the text begins with the name
of the field); what depends on the state of the node is not looked at. The order of the checks is that of the fields.

INVARIANT: a `Volume` with the same parameters and mount flags has the same `fingerprint` in every version: mounts live
longer than the plugin that made them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from csi import mount_flags
from csi.controller_requests import FSTYPES, Capacity, capability, capacity, mount_group
from csi.parameter_table import AuthSource
from csi.parameters import CAPACITY_KEY, MANIFEST_KEY, VolumeSpec, own_parameters, parse
from csi.status import failed_precondition, invalid
from csi.v1 import csi_pb2

Mode = csi_pb2.VolumeCapability.AccessMode
EPHEMERAL_KEY = "csi.storage.k8s.io/ephemeral"
ONE_POD = "SINGLE_NODE_SINGLE_WRITER"
"""The access mode of volumes that one pod at a time may have (ReadWriteOncePod)."""
MAX_ID_BYTES = 256
MAX_PATH_BYTES = 4095


@dataclass(frozen=True, slots=True)
class Volume:
    """What a stage or a publish call says of a volume."""

    volume_id: str
    spec: VolumeSpec
    fingerprint: str
    """Of parameters and mount flags: two mounts of one volume have the same."""
    parameters: str
    """Parameters and mount flags as JSON, to be kept with the mount."""
    mode: str
    """Name of the access mode."""
    group: int | None
    """The group that files are to have, None: the volume's own."""
    context: Mapping[str, str]
    secrets: Mapping[str, str] = field(repr=False)

    @property
    def single_writer(self) -> bool:
        """Whether one target on this node is all there may be (ReadWriteOncePod)."""
        return self.mode == ONE_POD

    @property
    def ephemeral(self) -> bool:
        """Whether it is an inline volume of a pod."""
        return self.context.get(EPHEMERAL_KEY, "").lower() == "true"


def volume_id(request: Any) -> str:
    """Return the id of the volume that a request is about."""
    text: str = request.volume_id
    if not text:
        raise invalid("volume_id", "must be given")
    if len(text.encode()) > MAX_ID_BYTES or not text.isprintable():
        raise invalid("volume_id", f"must be at most {MAX_ID_BYTES} printable bytes")
    return text


def given(name: str, text: str) -> str:
    """Return a field that must not be empty."""
    if not text:
        raise invalid(name, "must be given")
    return text


def place(name: str, text: str, kubelet_dir: str) -> str:
    """Return a path of kubelet's, checked by its letters alone: it may be a mount that hangs."""
    given(name, text)
    if not text.startswith("/"):
        raise invalid(name, "must be an absolute path")
    if "\0" in text or len(os.fsencode(text)) > MAX_PATH_BYTES:
        raise invalid(name, f"must have at most {MAX_PATH_BYTES} bytes, and no NUL")
    if ".." in text.split("/"):
        raise invalid(name, "must not contain '..'")
    path = "/" + os.path.normpath(text).lstrip("/")
    if not path.startswith(f"{kubelet_dir.rstrip('/')}/"):
        raise invalid(name, f"must be below {kubelet_dir}, the directory of the kubelet that the driver serves")
    return path


def volume(request: Any, volume_id: str) -> Volume:
    """Read what a stage or publish request says of its volume: capability, parameters, secrets."""
    if not request.HasField("volume_capability"):
        raise invalid("volume_capability", "must be given")
    capability = request.volume_capability
    mode = _mode(capability)
    context = dict(request.volume_context)
    spec = parse(context)
    try:
        flags = mount_flags.parse(capability.mount.mount_flags)
    except ValueError as error:
        raise invalid("volume_capability.mount.mount_flags", str(error)) from None  # the cause may have values
    own = own_parameters(context)
    own.pop(CAPACITY_KEY, None)  # a volume may grow
    kept = {"context": own, "flags": sorted(capability.mount.mount_flags)}
    parameters = json.dumps(kept, sort_keys=True)
    return Volume(
        volume_id,
        spec.with_flags(flags),
        hashlib.sha256(parameters.encode()).hexdigest()[:32],
        parameters,
        mode,
        _group(capability.mount.volume_mount_group),
        context,
        dict(request.secrets),
    )


def _mode(capability: Any) -> str:
    kind = capability.WhichOneof("access_type")
    if kind is None:
        raise invalid("volume_capability.access_type", "must be given: mount")
    if kind == "block":
        raise invalid("volume_capability.block", "there are no block devices here: ask for volumeMode Filesystem")
    if capability.mount.fs_type not in FSTYPES:
        raise invalid("volume_capability.mount.fs_type", "must be empty or cachefs")
    if not capability.HasField("access_mode") or capability.access_mode.mode == Mode.UNKNOWN:
        raise invalid("volume_capability.access_mode", "must be given")
    try:
        name: str = Mode.Mode.Name(capability.access_mode.mode)
    except ValueError:
        raise invalid("volume_capability.access_mode", "is none that is known here") from None
    return name


def _group(text: str) -> int | None:
    try:
        return mount_group(text)
    except ValueError as error:
        raise invalid("volume_capability.mount.volume_mount_group", str(error)) from error


def check_inline(spec: VolumeSpec, allowed: Collection[AuthSource]) -> None:
    """Refuse an inline volume that says what only those may say who make classes and PersistentVolumes."""
    if spec.auth_source not in allowed:
        offered = ", ".join(sorted(allowed)) or "none: there are no inline volumes here"
        raise invalid(
            "volume_context.authSource",
            f"'{spec.auth_source}' is not offered to inline volumes of this cluster; offered: {offered}",
        )
    if spec.manifest:
        raise invalid(f"volume_context.{MANIFEST_KEY}", "is of volumes that the driver has made")


def needs_stage(staging_target_path: str) -> None:
    """Refuse the publish call of a volume that says nowhere where it is staged."""
    if not staging_target_path:
        raise failed_precondition("staging_target_path: must be given; call NodeStageVolume first")


def growth(request: Any) -> Capacity:
    """Return how large a volume is to become; zero when the request does not say."""
    if request.HasField("volume_capability"):
        capability("volume_capability", request.volume_capability)
    return capacity(request)
