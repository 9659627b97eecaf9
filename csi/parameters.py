"""Reads what a StorageClass, a PersistentVolume or an inline volume says, by the table of `csi.parameter_table`.

`parse` reads the parameters of a class, the attributes of a volume or of an inline volume into a `VolumeSpec`, and
refuses what it does not know by name: a misspelt parameter that is ignored would be found out months later.
`VolumeSpec.config` puts them over the configuration of a node.

Keys of Kubernetes' own (`csi.storage.k8s.io/...`, `storage.kubernetes.io/...`) pass. Those of the driver
(`cachefs.csi.k8s.io/...`) are written into the attributes of a volume by CreateVolume, and are refused in a class.

INVARIANT: values of unknown keys are in no error text, since they may be secrets that stand in the wrong place.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cachefs import settings as writing
from cachefs.config import Addressing, Config, S3Config
from cachefs.errors import UsageError
from csi.mount_flags import MountFlags
from csi.parameter_table import BY_NAME, DEFAULT_AUDIENCE, AuthSource, Parameter
from csi.status import failed_precondition, invalid

OWN = "cachefs.csi.k8s.io/"
MANIFEST_KEY = f"{OWN}manifest"
CAPACITY_KEY = f"{OWN}capacity"
FOREIGN = ("csi.storage.k8s.io/", "storage.kubernetes.io/")
MAX_VALUE_BYTES = 4096
_LEAST_QUOTA_BLOCKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSpec:
    """What the parameters of a volume say."""

    bucket: str
    prefix: str = ""
    """"" or "x/y/"."""
    path_template: str = ""
    """Only of a class: what comes behind `prefix` for each claim."""
    endpoint: str = ""
    region: str = ""
    path_style: bool | None = None
    auth_source: AuthSource = AuthSource.NODE
    role_arn: str = ""
    sts_endpoint: str = ""
    sts_region: str = ""
    audience: str = DEFAULT_AUDIENCE
    memory_limit_bytes: int = 0
    """0: whatever the node's agent has."""
    warmup: tuple[str, ...] = ()
    """Paths within the volume; "/" is all of it."""
    warmup_wait: float = 0.0
    """Seconds that a pod waits until it is warm: 0 not at all, infinity without a limit of its own."""
    group: str = ""
    """Nodes that load what `warmup` says; empty: each that has a pod of the volume."""
    mount_options: MountFlags = field(default_factory=MountFlags)
    """Of the parameter `mountOptions`; those of a capability come on top (`with_flags`)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `cachefs.config` that the parameters set."""
    manifest: str = ""
    """Key of the manifest in the bucket that says what the volume shows; empty: what the bucket has."""
    capacity_bytes: int = 0
    """As asked for when it was made; 0: not at all."""

    @property
    def source(self) -> str:
        """What `cachefs mount` would be given: s3://BUCKET[/PREFIX]."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def gid(self) -> int | None:
        """The group of all files; None: that of the mount."""
        found = {**self.settings, **self.mount_options.settings}.get("gid")
        return None if found is None or found < 0 else int(found)

    def with_flags(self, flags: MountFlags) -> VolumeSpec:
        """Return this with the mount flags of a capability, which win over those of the parameters."""
        return dataclasses.replace(self, mount_options=self.mount_options.joined(flags))

    def config(self, node_config: Config) -> Config:
        """Return the configuration of a mount of this volume: the node's, and over it what the volume says.

        Raises `Refused` when this node cannot serve it as it wants.
        """
        self._check_node(node_config)
        given = self._given()
        given["fuse"] = {"read_only": True, "allow_other": True, "foreground": False, **given.get("fuse", {})}
        sections = {name: dataclasses.replace(getattr(node_config, name), **more) for name, more in given.items()}
        return dataclasses.replace(node_config, **sections)

    def s3(self, base: S3Config) -> S3Config:
        """Return how the bucket is reached: `base`, and over it what the volume says."""
        return dataclasses.replace(base, **self._given()["s3"])

    def _given(self) -> dict[str, dict[str, Any]]:
        """Return the fields of `cachefs.config` that the volume sets, by section."""
        s3: dict[str, Any] = {"source": self.source, "anonymous": self.auth_source is AuthSource.ANONYMOUS}
        places = {"endpoint_url": self.endpoint, "region": self.region, "manifest": self.manifest}
        s3 |= {name: text for name, text in places.items() if text}
        if self.path_style is not None:
            s3["addressing"] = Addressing.PATH if self.path_style else Addressing.VIRTUAL
        given: dict[str, dict[str, Any]] = {"s3": s3}
        for name, value in {**self.settings, **self.mount_options.settings}.items():
            setting = writing.find_setting(name)
            assert setting is not None, name
            given.setdefault(setting.section, {})[setting.field] = value
        return given

    def _check_node(self, node_config: Config) -> None:
        limit = node_config.cache.memory_limit_bytes
        if 0 < self.memory_limit_bytes < limit:
            raise failed_precondition(
                f"memoryLimit {writing.render_size(self.memory_limit_bytes)}: the agent of this node may take "
                f"{writing.render_size(limit)}; lower the node's --memory-limit or raise the parameter"
            )
        least = _LEAST_QUOTA_BLOCKS * node_config.cache.block_size_bytes
        given = {**self.settings, **self.mount_options.settings}
        for name, shown in (("shm_quota_bytes", "shmQuota"), ("disk_quota_bytes", "diskQuota")):
            if 0 < given.get(name, 0) < least:
                raise invalid(shown, f"must be at least {writing.render_size(least)} (16 blocks of this node)")


# -- reading ----------------------------------------------------------------------------------------------------------


def parse(context: Mapping[str, str], *, where: str = "volume_context", of_class: bool = False) -> VolumeSpec:
    """Return what parameters say; `where` is the field of the request that has them.

    `of_class`: they are of a StorageClass, which may have `pathTemplate` and may not have the driver's own keys. Raises
    `Refused` (INVALID_ARGUMENT), whose text begins with the name of the parameter.
    """
    values: dict[str, Any] = {"settings": {}}
    seen: dict[str, str] = {}
    for name, text in sorted(context.items()):
        if name.startswith(FOREIGN):
            continue
        if name in (MANIFEST_KEY, CAPACITY_KEY) and not of_class:
            values["manifest" if name == MANIFEST_KEY else "capacity_bytes"] = _own(where, name, text)
            continue
        row = _row(where, name, of_class)
        if row.name in seen:
            raise invalid(f"{where}.{name}", f"is the same as {seen[row.name]}: leave out one of them")
        seen[row.name] = name
        value = _read(f"{where}.{name}", row, text)
        if row.setting:
            values["settings"][row.setting] = value
        elif row.field != "read_only":
            values[row.field] = value
    if not values.get("bucket"):
        raise invalid(f"{where}.bucket", "must be given")
    spec = VolumeSpec(**values)
    _check_together(where, spec, seen)
    return spec


def own_parameters(context: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters that are the driver's: without keys of Kubernetes."""
    return {name: text for name, text in context.items() if not name.startswith(FOREIGN)}


def _row(where: str, name: str, of_class: bool) -> Parameter:
    row = BY_NAME.get(name)
    if row is None:
        close = difflib.get_close_matches(name, list(BY_NAME), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise invalid(f"{where}.{name}"[:200], f"unknown parameter{hint}")
    if row.of_class and not of_class:
        raise invalid(f"{where}.{name}", "is for StorageClasses; a volume says its 'prefix'")
    return row


def _read(where: str, row: Parameter, text: str) -> Any:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_VALUE_BYTES or "\0" in text:
        raise invalid(where, f"must have at most {MAX_VALUE_BYTES} bytes, and no NUL")
    try:
        return row.read(text.strip())
    except (ValueError, UsageError) as error:
        if row.read is AuthSource:
            raise invalid(where, f"'{text}' is not one of: {', '.join(AuthSource)}") from error
        raise invalid(where, str(error)) from error


def _own(where: str, name: str, text: str) -> str | int:
    if name == MANIFEST_KEY:
        return text
    if not (text.isascii() and text.isdecimal()):
        raise invalid(f"{where}.{name}", "must be a number of bytes")
    return int(text)


def _check_together(where: str, spec: VolumeSpec, seen: Mapping[str, str]) -> None:
    of_pods = spec.auth_source is AuthSource.POD
    if of_pods and not spec.role_arn:
        raise invalid(f"{where}.roleArn", "must be given with authSource 'pod'")
    for name in ("roleArn", "stsEndpoint", "stsRegion", "audience"):
        if name in seen and not of_pods:
            raise invalid(f"{where}.{name}", "has a meaning only with authSource 'pod'")
    for name in ("warmupWait", "group"):
        if name in seen and not spec.warmup:
            raise invalid(f"{where}.{name}", "has a meaning only with 'warmup'")
