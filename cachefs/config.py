"""The one configuration: every setting of cachefs, declared once.

Command line options, environment names, keys of the configuration file and docs/CONFIGURATION.md are all derived from
the fields below (`cachefs.cli.options`): a field `cache_size_bytes` is the option ``--cache-size``, the variable
``CACHEFS_CACHE_SIZE`` and the key ``cache-size``. Order: option > environment > file > default.

Units are in the field names (`_bytes`, `_s`); people write ``50GiB`` and ``60s``. Layers receive their section only.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import math
import re
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

from cachefs.types import Consistency

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
ETCD_PORT = 2379
MAX_GROUPS = 32


class Addressing(enum.StrEnum):
    """How the bucket's name enters the URL."""

    AUTO = "auto"
    PATH = "path"
    VIRTUAL = "virtual"


class Engine(enum.StrEnum):
    """How requests of the kernel are answered."""

    CHANNEL = "channel"
    PYFUSE3 = "pyfuse3"


class Prefetch(enum.StrEnum):
    """Whether files are fetched before somebody opens them (docs/PREFETCH.md)."""

    AUTO = "auto"
    OFF = "off"


class LowLatency(enum.StrEnum):
    """When the wake-up guard holds /dev/cpu_dma_latency."""

    AUTO = "auto"
    ALWAYS = "always"
    OFF = "off"


class Eviction(enum.StrEnum):
    """What leaves a full tier first (docs/EVICTION.md)."""

    EPOCH = "epoch"
    S3FIFO = "s3fifo"
    LRU = "lru"


class LogFormat(enum.StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


def setting(
    default: Any, text: str, *, unit: str = "", metavar: str = "", hidden: bool = False, many: bool = False
) -> Any:
    """Declare one setting: its default, its help text and how it is written (`unit`: "bytes", "duration" or "").

    `many`: the option may be repeated; the value is one text with commas between.
    """
    described = {"help": text, "unit": unit, "metavar": metavar, "hidden": hidden, "many": many}
    return field(default=default, metadata=described)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Config:
    """Where the objects live and how they are reached."""

    source: str = setting("", "What to mount: s3://BUCKET[/PREFIX] or file://DIRECTORY.", metavar="SOURCE", hidden=True)
    endpoint_url: str = setting("", "Address of an S3-compatible server; empty: AWS.", metavar="URL")
    region: str = setting(
        "", "Region of the bucket; empty: from the profile or the environment, else us-east-1.", metavar="NAME"
    )
    profile: str = setting("", "Profile of the AWS configuration files.", metavar="NAME")
    anonymous: bool = setting(False, "Send unsigned requests (public buckets).")
    addressing: Addressing = setting(
        Addressing.AUTO, "Bucket name in the path or in the host name (auto: path with --endpoint-url, else host)."
    )
    ca_bundle: str = setting("", "PEM file with the certificate authorities to trust for the endpoint.", metavar="FILE")
    connect_timeout_s: float = setting(5.0, "How long to wait for a connection to the store.", unit="duration")
    request_timeout_s: float = setting(10.0, "How long one request to the store may take.", unit="duration")
    io_timeout_s: float = setting(
        30.0, "How long a reader waits for the store, retries included, before it gets EIO.", unit="duration"
    )
    manifest: str = setting(
        "",
        "Show what a manifest in the bucket lists (the object with this key, such as a snapshot), whatever is written "
        "later; the mount is immutable then.",
        metavar="KEY",
    )
    identity: str = setting(
        "",
        "A word for whose credentials these are: mounts with different ones share no metadata, blocks or connections.",
        metavar="WORD",
        hidden=True,
    )
    max_requests: int = setting(
        32, "Requests to the bucket in flight at once (lowered by itself while it throttles).", metavar="N"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The tiers of the node and their hard budgets."""

    cache_dir: str = setting(
        "", "Directory of the disk tier (default /var/cache/cachefs, or below ~/.cache).", metavar="DIR"
    )
    cache_size_bytes: int = setting(
        20 * GIB,
        "Most bytes that the disk tier takes (0: no disk tier; by default not more than 80 % of what is free).",
        unit="bytes",
    )
    shm_dir: str = setting(
        "/dev/shm",  # noqa: S108 - a tmpfs, with a directory of our own (0700) in it
        "A tmpfs for the shm tier.",
        metavar="DIR",
        hidden=True,
    )
    shm_size_bytes: int = setting(
        2 * GIB,
        "Most bytes that the shm tier takes of the node's memory (0: no shm tier; by default not more than half of "
        "the tmpfs and a quarter of the memory of the machine or container).",
        unit="bytes",
    )
    block_size_bytes: int = setting(
        MIB,
        "Size of a block (64KiB to 16MiB, a power of two); blocks that are in the cache directory keep theirs.",
        unit="bytes",
    )
    eviction: Eviction = setting(
        Eviction.EPOCH,
        "What leaves a full tier first. epoch: what came last while epochs are read, else what is worth least lately; "
        "s3fifo: what is worth least lately; lru: what was read least recently.",
    )
    memory_limit_bytes: int = setting(
        256 * MIB,
        "Most anonymous memory of the agent (the tiers have their own limits; at least 128MiB and 96MiB + 8 blocks).",
        unit="bytes",
    )
    runtime_dir: str = setting(
        "",
        "Directory for sockets and state of running mounts (default /run/cachefs, or below $XDG_RUNTIME_DIR).",
        metavar="DIR",
    )
    agent_idle_timeout_s: float = setting(
        30.0, "How long an agent without mounts stays, with the shm tier still warm.", unit="duration"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataConfig:
    """How new names have to be."""

    consistency: Consistency = setting(
        Consistency.TTL,
        "immutable: names never change; ttl: asked again after --metadata-ttl; strict: every open asks the store.",
    )
    metadata_ttl_s: float = setting(
        60.0, "How long a listing or a found name is trusted; 'forever' is allowed.", unit="duration"
    )
    negative_ttl_s: float = setting(5.0, "How long a name that was not found is trusted not to exist.", unit="duration")


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseConfig:
    """The mount itself."""

    read_only: bool = setting(True, "Mount read-only (the only mode of this version).")
    uid: int = setting(-1, "Owner of all files (-1: whoever mounts).", metavar="UID")
    gid: int = setting(-1, "Group of all files (-1: that of whoever mounts).", metavar="GID")
    file_mode: int = setting(0o444, "Permissions of files, octal.", unit="octal")
    dir_mode: int = setting(0o555, "Permissions of directories, octal.", unit="octal")
    allow_other: bool = setting(False, "Let other users into the mount (always on for root).")
    engine: Engine = setting(
        Engine.CHANNEL, "channel: reads are answered in front of libfuse; pyfuse3: all through libfuse."
    )
    cache: bool = setting(
        True,
        "Keep what is read. With --no-cache reads of this mount go to the store each time, and nothing is kept but in "
        "the page cache of the kernel.",
    )
    low_latency: LowLatency = setting(
        LowLatency.AUTO,
        "Keep idle CPUs awake: auto, while requests are frequent; always; off. Needs /dev/cpu_dma_latency.",
    )
    read_ahead_bytes: int = setting(4 * MIB, "Read-ahead of the kernel for this mount (needs root).", unit="bytes")
    prefetch: Prefetch = setting(
        Prefetch.AUTO,
        "Fetch files before they are opened, when directories are read in a pattern: auto; off, only what is read.",
    )
    foreground: bool = setting(False, "Stay in the foreground and log to stderr.")
    ready_timeout_s: float = setting(30.0, "How long `cachefs mount` waits for the mount to answer.", unit="duration")
    hang_timeout_s: float = setting(
        30.0,
        "How long the worker, or an agent that owes an answer, may show no sign of life before it is replaced.",
        unit="duration",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What this volume may do in the cache of the node, of which others have a part."""

    shm_quota_bytes: int = setting(
        0, "Most bytes of the shm tier that this volume takes; then its own blocks leave (0: no limit).", unit="bytes"
    )
    disk_quota_bytes: int = setting(
        0, "Most bytes of the disk tier that this volume takes; then its own blocks leave (0: no limit).", unit="bytes"
    )
    disk_ttl_s: float = setting(
        0.0,
        "How long blocks of this volume stay that nobody reads, also when it is not mounted any more (0: no limit).",
        unit="duration",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """Other nodes that share their caches with this one. Settings of the agent, as those of the cache."""

    etcd: str = setting(
        "",
        "Address of the etcd through which nodes find each other, as http(s)://HOST:PORT; may be repeated, or several "
        "with commas between (empty: this node is alone).",
        metavar="URL",
        many=True,
    )
    etcd_ca: str = setting("", "PEM file with the certificate authorities to trust for etcd.", metavar="FILE")
    etcd_cert: str = setting("", "PEM file with the certificate to show to etcd.", metavar="FILE")
    etcd_key: str = setting("", "PEM file with the key of that certificate.", metavar="FILE")
    etcd_user: str = setting("", "User of etcd.", metavar="NAME")
    etcd_password_file: str = setting("", "File with the password of that user.", metavar="FILE")
    cluster: str = setting(
        "default", "Nodes of one cluster share their caches; those of others do not see them.", metavar="NAME"
    )
    node_name: str = setting("", "What this node is called (default: the name of the machine).", metavar="NAME")
    zone: str = setting(
        "", "Where this node is: blocks that its zone has already are not fetched from another.", metavar="NAME"
    )
    group: str = setting(
        "",
        "A group of nodes that this one belongs to, such as those of one job, for `cachefs warmup --group`; may be "
        "repeated, or several with commas between.",
        metavar="NAME",
        many=True,
    )
    advertise: str = setting(
        "",
        "Where others reach this node (default: the address from which it reaches etcd, and any free port).",
        metavar="ADDR[:PORT]",
    )
    peer_listen: str = setting(
        "", "Where to listen for others, if that is not the address of --advertise.", metavar="ADDR[:PORT]"
    )
    peer_cert: str = setting("", "PEM file with the certificate to show to other nodes.", metavar="FILE")
    peer_key: str = setting("", "PEM file with the key of that certificate.", metavar="FILE")
    peer_ca: str = setting("", "PEM file with the authorities whose certificates make a node a peer.", metavar="FILE")
    peer_secret_file: str = setting(
        "", "File with a secret of at least 16 bytes that all nodes of the cluster share.", metavar="FILE"
    )
    peer_insecure: bool = setting(False, "Serve whoever asks: neither certificates nor a secret are needed.")

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        """The addresses of etcd; none: there are no peers."""
        return tuple(part.strip() for part in self.etcd.split(",") if part.strip())

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of this node, each once, in order."""
        return tuple(sorted({part.strip() for part in self.group.split(",") if part.strip()}))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is written down."""

    log_level: str = setting("info", "debug, info, warning or error.", metavar="LEVEL")
    log_format: LogFormat = setting(LogFormat.TEXT, "text or json.")
    log_file: str = setting(
        "", "Where to log (default: a file in the runtime directory; stderr with --foreground).", metavar="FILE"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All sections. `validate` refuses what cannot work; nothing is clamped silently."""

    s3: S3Config = field(default_factory=S3Config)
    cache: CacheConfig = field(default_factory=CacheConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    peer: PeerConfig = field(default_factory=PeerConfig)
    log: LogConfig = field(default_factory=LogConfig)


def as_plain(section: Any) -> dict[str, Any]:
    """Return a section (or the whole Config) as JSON-able values; infinity becomes the string "forever"."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, float) and math.isinf(value):
            return "forever"
        return value

    result: dict[str, Any] = plain(section)
    return result


def from_plain(cls: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a section (or the whole Config) from `as_plain`'s output."""
    import typing

    hints = typing.get_type_hints(cls)
    built: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.name not in values:
            continue
        kind, value = hints[f.name], values[f.name]
        if dataclasses.is_dataclass(kind):
            built[f.name] = from_plain(typing.cast("type[Any]", kind), value)
        elif kind is float and value == "forever":
            built[f.name] = math.inf
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            built[f.name] = kind(value)
        else:
            built[f.name] = value
    return cls(**built)


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of ADDR[:PORT] ([ADDR]:PORT for IPv6); port 0 without one. Raises ValueError."""
    host, _, port = text.partition(":")
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") > 1:
        host, port = text, ""
    is_host = re.fullmatch(r"[A-Za-z0-9._-]+", host) or _is_address(host.partition("%")[0])
    if not is_host or (port and not (re.fullmatch(r"[0-9]{1,5}", port) and int(port) < 1 << 16)):
        raise ValueError(f"'{text}' is no address: write ADDR or ADDR:PORT")
    return host, int(port or 0)


def split_endpoint(url: str) -> tuple[bool, str, int]:
    """Return whether an address of etcd asks for TLS, its host and its port (2379 without one).

    Raises ValueError; its text shows no password that was written into the address.
    """
    shown = re.sub(r"//[^/@]*@", "//***@", url)
    wrong = f"{shown}: must look like http://HOST:PORT or https://HOST:PORT"
    if not re.fullmatch(r"https?://[^/?#\s@,]+/?", url):
        raise ValueError(wrong)
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port or ETCD_PORT
    except ValueError as error:
        raise ValueError(f"{wrong} ({error})") from error
    if not host:
        raise ValueError(wrong)
    return parts.scheme == "https", host, port


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
