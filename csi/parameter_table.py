"""THE table of what a StorageClass, a PersistentVolume or an inline volume may say: name, meaning, default, check.

`csi.parameters` reads by it, docs/KUBERNETES.md has it from `markdown_table`. Each row has a reader, which turns the
text of a person into a value or says why it cannot. INVARIANT: a parameter exists once, here.
"""

from __future__ import annotations

import enum
import ipaddress
import math
import re
import socket
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cachefs import settings as writing
from cachefs.store.source import parse_source
from csi import mount_flags, path_template
from csi.mount_flags import MountFlags

DEFAULT_AUDIENCE = "sts.amazonaws.com"
_LEAST_QUOTA_BYTES = 1 << 20
_AWS_METADATA = ipaddress.IPv6Address("fd00:ec2::254")


class AuthSource(enum.StrEnum):
    """Whose credentials a volume is read with."""

    NODE = "node"
    SECRET = "secret"  # noqa: S105 - the name of a kind
    POD = "pod"
    ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One row of the table."""

    name: str
    meaning: str
    read: Callable[[str], Any]
    """What its text means; raises ValueError (or UsageError) with a reason."""
    default: str = ""
    """As people read it; empty: none, or that of the node."""
    field: str = ""
    """Of `VolumeSpec`; empty: it is a setting of `cachefs.config`."""
    setting: str = ""
    also: str = ""
    """Another name of the same parameter."""
    of_class: bool = False
    """Only a class may have it."""


# -- readers ----------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable text")
    return text


def _group(text: str) -> str:
    if text and (re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text) is None or text == "all" or text.isdigit()):
        raise ValueError("must be the name of a group, as with `cachefs mount --group`")
    return text


def _url(text: str) -> str:
    if "@" in text:
        raise ValueError("keys do not belong into the address; write https://HOST[:PORT]")
    wrong = "must look like https://HOST[:PORT]"
    try:
        parts = urllib.parse.urlsplit(text)
        well = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise ValueError(wrong) from error
    if not well or parts.query or parts.fragment or re.search(r"\s", text):
        raise ValueError(wrong)
    if _is_of_the_machine(parts.hostname or ""):
        raise ValueError("is where machines get their own credentials, and no server of objects")
    return text


def _is_of_the_machine(host: str) -> bool:
    """Whether a host is the metadata service of a cloud, written as an address: a tenant would read the node's role
    there, as a file.
    """
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):  # inet_aton knows all the ways that a resolver takes: 2852039166, 0xa9fea9fe
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            return False
        address = address.ipv4_mapped or address
    return address.is_link_local or address == _AWS_METADATA


def _region(text: str) -> str:
    """A region becomes part of a host name; whatever else it had in it would be another host."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,63}", text):
        raise ValueError("must be the name of a region: letters, digits and hyphens")
    return text


def _file(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("must be the absolute path of a PEM file that the node service and the controller can read")
    return text


def _bucket(text: str) -> str:
    if "/" in text or not text:
        raise ValueError("must be the name of a bucket; what comes behind it belongs into 'prefix'")
    return parse_source(f"s3://{text}").bucket


def _prefix(text: str) -> str:
    path = text.strip("/")
    return parse_source(f"s3://bucket/{path}").prefix if path else ""


def _size(text: str) -> int:
    return writing.parse_size(text)


def _quota(text: str) -> int:
    number = writing.parse_size(text)
    if 0 < number < _LEAST_QUOTA_BYTES:
        raise ValueError(f"must be at least {writing.render_size(_LEAST_QUOTA_BYTES)}, or 0 for no limit")
    return number


def _wait(text: str) -> float:
    try:
        return math.inf if writing.parse_flag(text) else 0.0
    except ValueError:
        pass
    try:
        return writing.parse_duration(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is neither true nor a time such as 10m") from error


def _paths(text: str) -> tuple[str, ...]:
    paths = tuple(part.strip() for part in text.split(",") if part.strip())
    for path in paths:
        if any(part == ".." for part in path.split("/")) or "\0" in path:
            raise ValueError(f"'{path}' leads out of the volume")
    return paths


def _read_only(text: str) -> bool:
    if not writing.parse_flag(text):
        raise ValueError("writing is not offered in this version; leave it out, or say true")
    return True


def _options(text: str) -> MountFlags:
    return mount_flags.parse([text])


def _of_setting(name: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return mount_flags.read_setting(name, text)

    return read


# -- the table --------------------------------------------------------------------------------------------------------

TABLE: tuple[Parameter, ...] = (
    Parameter("bucket", "The bucket. It must exist.", _bucket, "(required)", field="bucket"),
    Parameter(
        "prefix", "What the keys begin with that the volume shows; empty: all of the bucket.", _prefix, field="prefix"
    ),
    Parameter(
        "pathTemplate",
        "A prefix of its own for each claim, below `prefix`: text with `${pvc.namespace}`, `${pvc.name}`, `${pv.name}` "
        "and `${volume.id}`. It is made with the claim, and deleted with it when the reclaim policy is Delete. Without "
        "it all claims of the class share `prefix`, of which nothing is ever deleted.",
        path_template.checked,
        field="path_template",
        of_class=True,
    ),
    Parameter("endpoint", "Address of an S3-compatible server; empty: AWS.", _url, field="endpoint"),
    Parameter("region", "Region of the bucket.", _region, field="region"),
    Parameter(
        "pathStyle",
        "true: the bucket's name in the path of URLs, false: in the host name.",
        writing.parse_flag,
        "true with `endpoint`, else false",
        field="path_style",
    ),
    Parameter(
        "caBundle",
        "PEM file with the authorities to trust for the endpoint, as the pods of the driver see it.",
        _file,
        setting="ca_bundle",
    ),
    Parameter(
        "authSource",
        "Whose credentials are used: `node` (those of the driver's pods), `secret` (the secrets that the class or the "
        "volume names), `pod` (the service account of each pod, by `roleArn`), `anonymous` (none).",
        AuthSource,
        "node",
        field="auth_source",
    ),
    Parameter("roleArn", "With `authSource: pod`: the role that pods assume.", _text, field="role_arn"),
    Parameter(
        "stsEndpoint", "With `authSource: pod`: address of STS.", _url, "that of the region", field="sts_endpoint"
    ),
    Parameter("stsRegion", "With `authSource: pod`: region of STS.", _region, "`region`", field="sts_region"),
    Parameter(
        "audience",
        "With `authSource: pod`: audience of the token; one of `tokenRequests` of the CSIDriver.",
        _text,
        DEFAULT_AUDIENCE,
        field="audience",
    ),
    Parameter(
        "mode",
        "How new names have to be: `immutable`, `ttl` or `strict`. Volumes from snapshots are always immutable.",
        _of_setting("consistency"),
        "ttl",
        setting="consistency",
    ),
    Parameter(
        "metadataTTL",
        "How long a listing or a name is trusted with `mode: ttl`.",
        _of_setting("metadata_ttl_s"),
        "60s",
        setting="metadata_ttl_s",
    ),
    Parameter("readOnly", "true, which is the only mode of this version.", _read_only, "true", field="read_only"),
    Parameter(
        "shmQuota",
        "Most bytes of a node's shm tier (memory) that the volume takes; 0: no limit but the tier's.",
        _quota,
        "0",
        setting="shm_quota_bytes",
        also="shmSize",
    ),
    Parameter(
        "diskQuota",
        "Most bytes of a node's disk tier that the volume takes; 0: no limit but the tier's.",
        _quota,
        "0",
        setting="disk_quota_bytes",
        also="cacheSize",
    ),
    Parameter(
        "diskTTL",
        "How long blocks stay on a node's disk that nobody reads; 0: until others need the room.",
        _of_setting("disk_ttl_s"),
        "0",
        setting="disk_ttl_s",
    ),
    Parameter(
        "memoryLimit",
        "Nodes whose agent may take more memory than this (its --memory-limit, which all volumes share) refuse the "
        "volume.",
        _size,
        field="memory_limit_bytes",
    ),
    Parameter(
        "prefetch",
        "Fetch files before they are opened, when directories are read in a pattern: `auto` or `off`.",
        _of_setting("prefetch"),
        "auto",
        setting="prefetch",
    ),
    Parameter(
        "warmup",
        "Paths within the volume, with commas between, that are loaded when the first pod of a node comes; `/`: all.",
        _paths,
        field="warmup",
    ),
    Parameter(
        "warmupWait",
        "Pods start when `warmup` is loaded: `true`, or a time after which they start anyway, such as `10m`.",
        _wait,
        "false",
        field="warmup_wait",
    ),
    Parameter(
        "group", "Group of nodes that load what `warmup` says; empty: the nodes that have pods.", _group, field="group"
    ),
    Parameter("useCache", "false: nothing is kept of what is read.", _of_setting("cache"), "true", setting="cache"),
    Parameter("uid", "Owner of all files.", _of_setting("uid"), "0", setting="uid"),
    Parameter("gid", "Group of all files; `fsGroup` of a pod wins.", _of_setting("gid"), "0", setting="gid"),
    Parameter("fileMode", "Permissions of files.", _of_setting("file_mode"), "0444", setting="file_mode"),
    Parameter("dirMode", "Permissions of directories.", _of_setting("dir_mode"), "0555", setting="dir_mode"),
    Parameter(
        "mountOptions",
        "More settings of a mount, as with `cachefs mount -o`; `mountOptions` of the class or the volume win.",
        _options,
        field="mount_options",
    ),
)
BY_NAME = {name: each for each in TABLE for name in (each.name, each.also) if name}
"""Rows by all names that they have."""


def markdown_table() -> str:
    """Return the table for the documentation."""
    rows = ["| parameter | meaning | default |", "| --- | --- | --- |"]
    for each in TABLE:
        names = f"`{each.name}`" + (f", `{each.also}`" if each.also else "")
        rows.append(f"| {names} | {each.meaning} | {each.default} |")
    return "\n".join(rows) + "\n"
