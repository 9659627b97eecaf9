"""Reads the requests of the controller service, field by field, and refuses what cannot be meant.

Everything that can be wrong with a request by itself is refused here, by the name of the field; what depends on the
records or on the bucket is not looked at. Text of a request is repeated in an error only where it is no secret. Sizes
and groups are read here for the node service as well (`csi.node_requests`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from csi import mount_flags
from csi.status import aborted, invalid, out_of_range
from csi.v1 import csi_pb2

FSTYPES = frozenset({"", "cachefs", "fuse.cachefs"})
MAX_NAME_BYTES = 256
"""The protocol says 128; a CO may have its own limit, and the name is only hashed."""
MAX_PAGE = 5000
"""Entries of one answer, which has to stay below 4 MiB."""
_MAX_GROUP = 2**32 - 2
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_TOKEN = "after:"  # noqa: S105 - of a page
_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,127}")

Mode = csi_pb2.VolumeCapability.AccessMode


@dataclass(frozen=True, slots=True)
class Capacity:
    """A capacity range that can be."""

    required_bytes: int
    limit_bytes: int
    """0: none."""

    def fits(self, capacity_bytes: int) -> bool:
        """Whether a volume of this capacity is what was asked for."""
        return self.required_bytes <= capacity_bytes and not 0 < self.limit_bytes < capacity_bytes


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted."""

    after: str
    limit: int

    def next_token(self, last: str) -> str:
        """Return the token of what comes behind `last`."""
        return _TOKEN + last


def name(request: Any) -> str:
    """Return the name of what is to be made."""
    text: str = request.name
    if not text:
        raise invalid("name", "must be given")
    if len(text.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise invalid("name", f"must have at most {MAX_NAME_BYTES} bytes")
    if _CONTROL.search(text):
        raise invalid("name", "must not have control characters")
    return text


def required(field: str, text: str) -> str:
    """Return an id, which must be there."""
    if not text:
        raise invalid(field, "must be given")
    return text


def capabilities(request: Any) -> None:
    """Check the capabilities of a request: at least one, all of them such that volumes here have them."""
    if not request.volume_capabilities:
        raise invalid("volume_capabilities", "must be given")
    for number, each in enumerate(request.volume_capabilities):
        capability(f"volume_capabilities[{number}]", each)


def capability(field: str, wanted: Any) -> None:
    """Check one capability."""
    problem = unsupported(wanted)
    if problem is not None:
        raise invalid(f"{field}.{problem[0]}", problem[1])


def unsupported(wanted: Any) -> tuple[str, str] | None:
    """Return the field of a capability that no volume here can have, and why; None: it is well."""
    kind = wanted.WhichOneof("access_type")
    if kind is None:
        return "access_type", "must be given: mount"
    if kind == "block":
        return "block", "there are no block devices here: ask for volumeMode Filesystem"
    if wanted.mount.fs_type not in FSTYPES:
        return "mount.fs_type", "must be empty or cachefs"
    try:
        mount_group(wanted.mount.volume_mount_group)
    except ValueError as error:
        return "mount.volume_mount_group", str(error)
    if not wanted.HasField("access_mode") or wanted.access_mode.mode == Mode.UNKNOWN:
        return "access_mode", "must be given"
    if wanted.access_mode.mode not in Mode.Mode.values():
        return "access_mode", "is none that is known here"
    try:
        mount_flags.parse(wanted.mount.mount_flags)
    except ValueError as error:
        return "mount.mount_flags", str(error)
    return None


def mount_group(text: str) -> int | None:
    """Return the group that files of a mount are to have, None: the volume's own. Raises ValueError."""
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(_MAX_GROUP)) and int(text) <= _MAX_GROUP):
        raise ValueError("must be the number of a group")
    return int(text)


def capacity(request: Any) -> Capacity:
    """Return the capacity that is asked for; zero is allowed and means "as it comes"."""
    wanted, limit = request.capacity_range.required_bytes, request.capacity_range.limit_bytes
    for field, number in (("required_bytes", wanted), ("limit_bytes", limit)):
        if number < 0:
            raise out_of_range(f"capacity_range.{field}: must not be negative")
    if 0 < limit < wanted:
        raise out_of_range(f"capacity_range: limit_bytes {limit} is less than required_bytes {wanted}")
    return Capacity(wanted, limit)


def source(request: Any) -> dict[str, str]:
    """Return what a volume is to be made from: {"volume": id}, {"snapshot": id} or nothing."""
    if not request.HasField("volume_content_source"):
        return {}
    wanted = request.volume_content_source
    kind = wanted.WhichOneof("type")
    if kind == "volume":
        return {"volume": required("volume_content_source.volume.volume_id", wanted.volume.volume_id)}
    if kind == "snapshot":
        return {"snapshot": required("volume_content_source.snapshot.snapshot_id", wanted.snapshot.snapshot_id)}
    raise invalid("volume_content_source.type", "must be a volume or a snapshot")


def topology(request: Any, *, offered: bool) -> tuple[dict[str, str], ...]:
    """Return the places from which a volume is to be reachable; none: all. Buckets are reachable from everywhere."""
    if not offered or not request.HasField("accessibility_requirements"):
        return ()
    wanted = request.accessibility_requirements
    if not wanted.requisite and not wanted.preferred:
        raise invalid("accessibility_requirements", "must have requisite or preferred")
    return tuple(dict(each.segments) for each in (wanted.requisite or wanted.preferred))


def page(request: Any) -> Page:
    """Return which part of a list is wanted. A token that none of our answers had is ABORTED, as the protocol says."""
    if request.max_entries < 0:
        raise invalid("max_entries", "must not be negative")
    token = request.starting_token
    if token and not (token.startswith(_TOKEN) and _ID.fullmatch(token.removeprefix(_TOKEN))):
        raise aborted("starting_token: is none of this driver; begin the list anew")
    return Page(token.removeprefix(_TOKEN), min(request.max_entries or MAX_PAGE, MAX_PAGE))


def no_parameters(parameters: Mapping[str, str], foreign: Iterable[str]) -> None:
    """Refuse parameters where none is known, but those of Kubernetes' own."""
    for key in sorted(parameters):
        if not key.startswith(tuple(foreign)):
            raise invalid(f"parameters.{key}"[:200], "unknown parameter; snapshots have none")
