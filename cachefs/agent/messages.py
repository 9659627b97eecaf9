"""The messages between workers (and `cachefs status`) and the node's agent, over a unix socket of mode 0600.

Framing: 4 bytes length (big endian), then one msgpack map (msgspec, tagged by its `type`). Block bytes do not cross the
socket: the agent commits a block to the shm tier and answers "there", the worker reads it from the same memory map.
The one exception is `FilledBlock.payload`, when no tier could take the block.

Requests carry `id`; each gets exactly one `Reply` or `Failure` with the same id, in any order. Every request may be
sent again after a reconnection (all are idempotent).

Versions (docs/decisions/0005): a new field with a default changes nothing. Anything else that a worker of the last
version would not understand (a field or message that is new, gone or means something else, and the formats of the two
environments that workers read by themselves) makes a new `PROTOCOL_VERSION`, and the agent goes on serving the last one
(`OLDEST_PROTOCOL`). Others are refused with a `Failure` of kind OTHER_VERSION; `cachefs.agent.succession` says what
then happens. Attach, Status, Stop, Failure and the frames themselves stay as they are for ever: versions find out about
each other with them.
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL_VERSION = 1
OLDEST_PROTOCOL = 1
"""The oldest version that this agent serves."""
OTHER_VERSION = "version"
MAX_MESSAGE_BYTES = 80 << 20
"""Over this length a peer is out of step, and the connection is closed."""


class Message(msgspec.Struct, tag_field="type", tag=str.lower, frozen=True):
    """Base of all messages."""


class Attach(Message, frozen=True):
    """First message of a worker: serve this volume on this connection. Reply: `Attached`."""

    id: int
    protocol: int
    version: str
    """cachefs version of the sender."""
    mount_id: str
    mountpoint: str
    pid: int
    volume: dict[str, Any]
    """The `s3`, `metadata`, `cache`, `limits` and `peer` sections of the configuration as
    `cachefs.config.as_plain` writes them."""
    environment: dict[str, str]
    """The AWS_* variables of the mount. Never stored, never logged."""
    check: bool
    """Make a request to the store first, and fail with a message for a person when it does not answer well."""
    mounted_at_s: float = 0.0
    """When the mount was made, by the clock since boot: of all mounts of a volume the newest one's settings hold."""
    given: list[str] = []
    """Settings (fields of the configuration) that somebody asked for, and whose notices he wants therefore."""
    own_environment: bool = False
    """The agent's own AWS_* variables hold where `environment` says nothing: for one who asks on behalf of the node."""


class Attached(Message, frozen=True):
    """What a worker needs to read the tiers by itself."""

    id: int
    pid: int
    version: str
    shm_path: str | None
    """Directory of the shm tier's LMDB environment; None while the tier is off."""
    metadata_path: str
    """Directory of the volume's metadata environment."""
    volume_id: str
    endpoint: str
    bucket: str
    block_size: int
    lineage: str = ""
    """What the metadata has in common with its copies: inode numbers of another lineage mean nothing in it."""
    disk_path: str | None = None
    """Directory of the disk tier's LMDB environment; None while the tier is off."""
    shm_limit_bytes: int = 0
    """How large the shm tier may become."""
    begun: bool = False
    """Whether this agent understands `Begun`."""
    ranges: bool = False
    """Whether this agent understands `FetchRange` and `RangeAhead`."""
    notices: list[str] = []
    """For the person who mounts: settings that this agent does not follow because another mount started it."""


class Resolve(Message, frozen=True):
    """See `AgentPort.resolve`. Reply: `Resolved`."""

    id: int
    parent: int
    name: bytes


class Resolved(Message, frozen=True):
    id: int
    ino: int | None
    valid_s: float


class ListDirectory(Message, frozen=True):
    """See `AgentPort.list_directory`. Reply: `Listed`."""

    id: int
    ino: int
    seen: bytes | None


class Listed(Message, frozen=True):
    id: int
    complete: bool
    frontier: bytes
    valid_s: float


class Fill(Message, frozen=True):
    """See `AgentPort.fill`. Reply: `Filled`."""

    id: int
    ino: int
    first: int
    count: int
    inline: bool = False


class Filled(Message, frozen=True):
    id: int
    blocks: list[tuple[int, str, bytes | None]]
    """(index, tier it came from, payload or None)."""


class FetchRange(Message, frozen=True):
    """See `AgentPort.fetch_range`. Reply: `FetchedRange`; only for agents that say `Attached.ranges`."""

    id: int
    ino: int
    offset: int
    length: int
    fresh: bool = False
    """From the store, whatever the tiers have."""


class FetchedRange(Message, frozen=True):
    id: int
    payload: bytes


class Readahead(Message, frozen=True):
    """See `AgentPort.readahead`. No reply."""

    ino: int
    first: int
    count: int


class RangeAhead(Message, frozen=True):
    """See `AgentPort.range_ahead`. No reply; only for agents that say `Attached.ranges`."""

    ino: int
    offset: int
    length: int


class Begun(Message, frozen=True):
    """Files that readers began to read, also when the tiers answered: what the prefetcher learns from. No reply; only
    for agents that say `Attached.begun`.
    """

    files: list[tuple[int, int]]
    """(inode number, block of the first read)."""


class Cached(Message, frozen=True):
    """Reply: `CachedBlocks`."""

    id: int
    ino: int


class CachedBlocks(Message, frozen=True):
    id: int
    blocks: dict[str, int]


class Counters(Message, frozen=True):
    """A worker's own counts since it started (hits never reach the agent otherwise). No reply; sent when they
    changed.
    """

    values: dict[str, float]


class Touched(Message, frozen=True):
    """Blocks that the worker answered from the tiers, for the eviction policy (a bounded sample). No reply."""

    keys: list[bytes]
    disk_hits: int = 0
    disk_hit_bytes: int = 0
    """What it has read from the disk tier itself since the last such message."""


class Status(Message, frozen=True):
    """First and only message of `cachefs status`. Reply: `StatusReply`."""

    id: int
    peers: bool = False
    """Ask the other nodes of the cluster as well."""


class StatusReply(Message, frozen=True):
    id: int
    status: dict[str, Any]


class Ping(Message, frozen=True):
    """Ask for a sign of life, on a connection of its own. Reply: `Done`; to close the connection is an answer too."""

    id: int


class Stop(Message, frozen=True):
    """Ask the agent to end when nothing is mounted (`force`: at once). Reply: `Done`."""

    id: int
    force: bool = False


class Work(Message, frozen=True):
    """Begin a job (`cachefs.agent.jobs`) on files of a mount. Reply: `JobState` again and again until it is over.

    It ends with the connection, unless it runs in the background: then the first reply comes when all paths are known.
    """

    id: int
    mount_id: str
    verb: str
    """warm, check, evict or pin."""
    force: bool = False
    """Also more than the tiers can hold."""
    background: bool = False
    for_s: float = 0.0
    """For how long to pin; 0: for ever."""
    tier: str = ""
    """Where what is warmed up is to be: shm, disk, or "": the nearest that has room."""
    nodes: int = -1
    """-1: this node alone; 0: all nodes that mount this; else so many of them (`cachefs.agent.crew`)."""
    group: str = ""
    """Only nodes of this group; "": of any."""


class Paths(Message, frozen=True):
    """More of what a job of this connection is to work on. Reply: `Done` when it can take more."""

    id: int
    job: str
    paths: list[bytes]
    """Relative to the root of the mount; b"" is the root."""
    last: bool = False


class Proceed(Message, frozen=True):
    """A job that waits for consent gets it. Reply: `Done`."""

    id: int
    job: str


class StopJob(Message, frozen=True):
    """Reply: `Done` when the job is over."""

    id: int
    job: str


class Pins(Message, frozen=True):
    """Reply: `PinList`."""

    id: int


class Unpin(Message, frozen=True):
    """Reply: `PinList`, of what was unpinned. No path: everything of the mount."""

    id: int
    mount_id: str
    paths: list[bytes]


class JobState(Message, frozen=True):
    """How far a job has come (see docs/STATUS.md)."""

    id: int
    job: dict[str, Any]
    over: bool = False


class PinList(Message, frozen=True):
    id: int
    pins: list[dict[str, Any]]


class Done(Message, frozen=True):
    id: int


class Failure(Message, frozen=True):
    """The request failed. `kind` is the name of a class in `cachefs.errors` (or OTHER_VERSION)."""

    id: int
    kind: str
    text: str


Errand = Work | Paths | Proceed | StopJob | Pins | Unpin
"""What commands ask for (`cachefs.agent.errands`)."""
Request = (
    Attach
    | Resolve
    | ListDirectory
    | Fill
    | FetchRange
    | Readahead
    | RangeAhead
    | Begun
    | Cached
    | Counters
    | Touched
    | Status
    | Ping
    | Stop
    | Errand
)
Answer = (
    Attached
    | Resolved
    | Listed
    | Filled
    | FetchedRange
    | CachedBlocks
    | StatusReply
    | JobState
    | PinList
    | Done
    | Failure
)
