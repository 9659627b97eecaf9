"""How much one node does for others, and asks of them, at a time. Defaults fit an agent of 256 MiB."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Of a `PeerServer`."""

    connections: int = 512
    requests: int = 128
    """Under way at once; others wait, and are told that we live."""
    copied_bytes: int = 16 << 20
    """Of blocks that were read from the disk tier for others."""
    fetched_bytes: int = 48 << 20
    """Of blocks that are being fetched for others."""
    body_bytes: int = 16 << 20
    """Of bodies of requests that are being received."""
    load_threads: int = 8
    listing_threads: int = 8
    head_s: float = 10.0
    """For a TLS handshake; for a head, once it has begun."""
    body_s: float = 10.0
    idle_s: float = 60.0
    stuck_s: float = 15.0
    """How long a peer may take nothing of what we send."""
    listing_s: float = 10.0
    request_s: float = 30.0
    """For a whole answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Of a `PeerClient`; numbers of requests and bytes are for each peer."""

    requests: int = 1024
    """The lines of the block cache hold less; this is for faults of ours."""
    bytes: int = 4 << 30
    kept_connections: int = 16
    kept_in_all: int = 256
    """Idle connections to all peers."""
    kept_s: float = 45.0
    """An idle connection is closed after this time, before the server does it."""
    connection_life_s: float = 600.0
    """Then a new one is made, so that new certificates come into use."""
    connect_s: float = 0.5
    head_s: float = 0.5
    """Until the first byte of an answer's head."""
    silence_s: float = 1.0
    """Until the next byte of its body."""
    quiet_s: float = 0.25
    """Without anything since the call began, until another source is asked as well (`peer.hedge`) ..."""
    quiet_times: float = 4.0
    """... or so many times as long as it usually takes until the head comes, if that is more."""
    quiet_body_s: float = 0.4
    """The same within an answer: longer than a living node is silent (`wire.WAIT_S`)."""
    call_s: float = 15.0
    """For all of a call."""
    patience_s: float = 5.0
    """For the next block from a node that lives and fetches; longer where that is usual (`PATIENCE_TIMES`)."""
    patience_times: float = 4.0
    """How many times the usual wait of a node is waited for."""
