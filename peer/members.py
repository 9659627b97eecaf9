"""Who is in the cluster: what a node says of itself in etcd, and what all of them say together.

    /cachefs/<cluster>/nodes/<node id>                    a Member, as JSON
    /cachefs/<cluster>/volumes/<volume>/nodes/<node id>   this node holds that volume (`peer.holding`)

Both bear the lease of their node. Nothing in them is secret, and nothing in them is trusted: whoever answers at an
address has to prove itself (`peer.credentials`), and what it sends is verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

PEER_PROTOCOL = 1
"""The version of what peers say to each other. A node asks only nodes of its own."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the cluster, as it describes itself."""

    node_id: str
    """16 hexadecimal digits, kept in the cache directory: with it the node finds its blocks again after a restart."""
    name: str
    """For people."""
    address: str
    """HOST:PORT where its peer server listens."""
    zone: str = ""
    groups: tuple[str, ...] = ()
    """Named sets of nodes that it belongs to, such as those of one job."""
    weight: int = 1
    """How large its share of the blocks is: the MiB that its tiers hold, at least 1."""
    instance: str = ""
    """Drawn anew by every agent that starts."""
    protocol: int = PEER_PROTOCOL
    version: str = ""
    """Of cachefs."""
    tls: bool = False
    """Whether its server speaks TLS."""


@dataclass(frozen=True, slots=True)
class View:
    """The cluster as one node sees it at one moment. Immutable: a change makes another View."""

    members: Mapping[str, Member] = field(default_factory=lambda: MappingProxyType({}))
    """By node id."""
    holders: Mapping[str, tuple[Member, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """By volume: the members that hold it, in the order of their ids."""
    revision: int = 0
    """Of etcd."""
