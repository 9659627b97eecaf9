"""What etcd says about a cluster, as records come and go, and the View that follows from it. Pure: no clock, no socket.

Records are written by others and therefore checked one by one: one that is no Member, that claims another id than its
key, or that is absurdly large is left out, with a line for debugging and a count, and takes nobody else with it.

What always holds: a record that is gone from etcd is gone from here too, or it is a ghost: kept for a while because
etcd may have lost it while its node lives. A ghost that registers again is none any more.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from cachefs import metrics
from cachefs.config import MAX_GROUPS
from cachefs.metrics import Counters
from peer.identity import NODE_ID
from peer.members import Member, View
from peer.records import Record

log = logging.getLogger(__name__)

MAX_RECORD_BYTES = 4096
MAX_RECORDS = 200_000
"""Members and volumes together: whoever writes more than that into etcd fills his memory, not ours."""
MAX_WEIGHT = 1 << 40
MAX_TEXT = 256
VOLUME = re.compile(r"[0-9a-f]{16}")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]{2,64}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}")
_DECODER = msgspec.json.Decoder(Member)

Identity = tuple[str, str]
"""A volume ("" for the record of the member itself) and a node id."""


class Keys:
    """The names of a cluster's records in etcd."""

    def __init__(self, cluster: str) -> None:
        self.prefix = f"/cachefs/{cluster}/"
        self.epoch = f"{self.prefix}epoch"
        """Drawn by whoever comes first, deleted by who leaves last. Another one: etcd has lost its records since."""
        self.nodes = f"{self.prefix}nodes/"

    def node(self, node_id: str) -> str:
        """Return the key of a member."""
        return f"{self.nodes}{node_id}"

    def volume(self, volume: str, node_id: str) -> str:
        """Return the key that says that a member holds a volume."""
        return f"{self.prefix}volumes/{volume}/nodes/{node_id}"

    def parse(self, key: str) -> Identity | None:
        """Return what a key names, None if it is neither of the two."""
        match key.removeprefix(self.prefix).split("/"):
            case ["nodes", node_id] if NODE_ID.fullmatch(node_id):
                return "", node_id
            case ["volumes", volume, "nodes", node_id] if NODE_ID.fullmatch(node_id) and VOLUME.fullmatch(volume):
                return volume, node_id
        return None


class Roster:
    """The records of one cluster. Used by one thread."""

    def __init__(self, keys: Keys, counters: Counters) -> None:
        self._keys = keys
        self._counters = counters
        self._records: dict[Identity, Member | None] = {}
        """INVARIANT: a Member exactly where the volume is ""."""
        self._ghosts: set[Identity] = set()
        """INVARIANT: a subset of the keys of `_records`."""

    @property
    def ghosts(self) -> int:
        """How many records are kept though etcd does not have them."""
        return len(self._ghosts)

    def read(self, records: Iterable[Record]) -> dict[Identity, Member | None]:
        """Return what records say, without those that say nothing. From any thread: ten thousand take 0.1 s."""
        read: dict[Identity, Member | None] = {}
        for record in records:
            identity = self._keys.parse(record.key)
            if identity is None:
                continue
            member = None if identity[0] else self.read_member(record)
            if identity[0] or member is not None:
                read[identity] = member
        return read

    def put(self, record: Record) -> bool:
        """Take a record in; return whether that changes anything. A bad one counts as a deletion."""
        for identity, member in self.read((record,)).items():
            return self._keep(identity, member)
        spoilt = self._keys.parse(record.key)
        return spoilt is not None and self._drop(spoilt)

    def delete(self, key: str, *, keep: bool) -> bool:
        """A record is gone from etcd; with `keep` it stays as a ghost. Returns whether that changes anything."""
        identity = self._keys.parse(key)
        if identity is None or identity not in self._records:
            return False
        if keep:
            self._ghosts.add(identity)
            return False
        return self._drop(identity)

    def replace(self, listed: Mapping[Identity, Member | None], *, keep: bool) -> bool:
        """Take a full listing in that was `read`; what is not in it is deleted, or kept as ghosts. Returns whether
        anything changes.
        """
        changed = False
        for identity, member in listed.items():
            changed |= self._keep(identity, member)
        missing = self._records.keys() - listed.keys()
        if keep:
            self._ghosts |= missing
            return changed
        for identity in missing:
            changed |= self._drop(identity)
        return changed

    def forget_ghosts(self) -> bool:
        """Drop them; return whether there were any."""
        ghosts, self._ghosts = self._ghosts, set()
        for identity in ghosts:
            del self._records[identity]
        return bool(ghosts)

    def view(self, own: Member, volumes: Iterable[str], revision: int) -> View:
        """Return what the records say, with this node as it knows itself. Costs about 1 us for each record."""
        members = {node_id: member for (_, node_id), member in self._records.items() if member is not None}
        members[own.node_id] = own
        holding: dict[str, set[str]] = {volume: {own.node_id} for volume in volumes}
        for volume, node_id in self._records:
            if volume and node_id in members and node_id != own.node_id:
                holding.setdefault(volume, set()).add(node_id)
        holders: Mapping[str, tuple[Member, ...]] = {
            volume: tuple(members[node_id] for node_id in sorted(node_ids)) for volume, node_ids in holding.items()
        }
        return View(MappingProxyType(members), MappingProxyType(holders), revision)

    def read_member(self, record: Record) -> Member | None:
        """Return the member that a record describes, None (and a line in the log) if it cannot be one."""
        member, fault = self._decoded(record)
        if fault:
            self._complain(record, fault)
            return None
        return member

    def _decoded(self, record: Record) -> tuple[Member | None, str]:
        value = record.value or b""
        if len(value) > MAX_RECORD_BYTES:
            return None, f"it has {len(value)} bytes"
        try:
            member = _DECODER.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return None, str(error)
        if self._keys.node(member.node_id) != record.key:
            return None, "it names another id than its key"
        return member, fault_of(member)

    def _keep(self, identity: Identity, member: Member | None) -> bool:
        if identity not in self._records and len(self._records) >= MAX_RECORDS:
            self._counters.add(metrics.ETCD_BAD_RECORDS.name)
            return False
        self._ghosts.discard(identity)
        if identity in self._records and self._records[identity] == member:
            return False
        self._records[identity] = member
        return True

    def _drop(self, identity: Identity) -> bool:
        self._ghosts.discard(identity)
        if identity not in self._records:
            return False
        del self._records[identity]
        return True

    def _complain(self, record: Record, fault: str) -> None:
        self._counters.add(metrics.ETCD_BAD_RECORDS.name)
        log.debug("record %.200r of etcd is left out: %.200s", record.key, fault)

    def check_invariants(self) -> None:
        """For tests."""
        assert self._ghosts <= self._records.keys()
        for (volume, node_id), member in self._records.items():
            assert (member is None) == bool(volume)
            assert member is None or member.node_id == node_id


def fault_of(member: Member) -> str:
    """Return why others would leave out a node that describes itself like that, "" if they would not."""
    if not NODE_ID.fullmatch(member.node_id):
        return "its id is not 16 hexadecimal digits"
    if len(member.groups) > MAX_GROUPS:
        return "it is in too many groups"
    texts = (member.name, member.zone, member.instance, member.version, *member.groups)
    if any(len(text) > MAX_TEXT or not text.isprintable() for text in texts):
        return "a text is too long or not printable"
    if not _ADDRESS.fullmatch(member.address) or not 0 < int(member.address.rpartition(":")[2]) < 65536:
        return "its address is none"
    if not 0 < member.weight <= MAX_WEIGHT:
        return "its weight is absurd"
    return ""
