"""What this node has in etcd: a lease, and under it the record of the node and one for each volume that it holds.

What always holds:

* Without a lease nothing counts as registered. A lease that is gone is no fault: another is granted, and all is written
  again under it.
* A record of ours that somebody deleted or overwrote with something that is no member is written again. Events up to
  our own last change of a key are older than what we know, and are passed over.
* A node id has one owner. Whoever finds its record replaced by another instance does not replace it again; if the other
  still lives when the lease of a dead one would have expired, this node draws another id. An instance that has our own
  address is our successor on this node (an agent that took over), and the id is its.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec
import trio

from cachefs import metrics
from cachefs.metrics import Counters
from peer import holding
from peer.etcd import EtcdFault, EtcdSession, EtcdUnavailable, LeaseGone
from peer.members import Member
from peer.records import Record
from peer.roster import Keys, Roster

log = logging.getLogger(__name__)

LEAVE_S = 2.0
REGISTER_TRIES = 3


@dataclass(frozen=True, slots=True)
class _Rival:
    """Another instance that has put its record in the place of ours."""

    instance: str
    since: float
    successor: bool


class Registration:
    """Our records in etcd. Used in one trio loop, by one session at a time; what it knows survives sessions."""

    def __init__(
        self, keys: Keys, roster: Roster, member: Member, ttl_s: int, redraw_id: Callable[[], str], counters: Counters
    ) -> None:
        """`roster` reads the records of others; `redraw_id` BLOCKS, see `Membership`."""
        self._keys = keys
        self._roster = roster
        self._asked_ttl_s = ttl_s
        self._redraw_id = redraw_id
        self._counters = counters
        self.member = member
        self.volumes: frozenset[str] = frozenset()
        self.held: Mapping[str, holding.Holding] = {}
        """How much of a volume this node holds, where that is known."""
        self.lease: int | None = None
        self.ttl_s = float(ttl_s)
        """Of our lease; etcd may grant more than was asked for."""
        self._records: dict[str, bytes] = {}
        """What etcd has from us. INVARIANT: empty without a lease."""
        self._written: dict[str, int] = {}
        """The revision of our last change of a key."""
        self._rival: _Rival | None = None
        self._wake = trio.Event()

    def patience_s(self) -> float:
        """After how many seconds the record of a dead node must be gone: etcd looks for expired leases now and then."""
        return 1.5 * self.ttl_s + 1

    def wake(self) -> None:
        """Have `stay` look at once what has to be registered."""
        self._wake.set()

    # -- keeping it ---------------------------------------------------------------------------------------------------

    async def stay(self, session: EtcdSession, registered: Callable[[], None]) -> None:
        """Be registered for as long as the session lives; `registered` is called whenever that was confirmed.

        Raises EtcdFault, always.
        """
        while True:
            self._wake = trio.Event()
            await self._settle_rival(session)
            await self._register(session)
            registered()
            with trio.move_on_after(self.ttl_s / 3 * random.uniform(0.8, 1.0)):  # nodes that began together drift apart
                await self._wake.wait()

    async def leave(self, session: EtcdSession) -> None:
        """Give the lease back, and with it all records; the last one leaves nothing at all in etcd. Takes at most two
        seconds, also while being cancelled.
        """
        lease, self.lease = self.lease, None
        self._records.clear()
        if lease is None:
            return
        with trio.move_on_after(LEAVE_S) as scope:
            scope.shield = True
            try:
                await session.revoke(lease)
                await session.delete_unless(self._keys.nodes, self._keys.epoch)
            except EtcdFault as error:
                log.debug("left the cluster without a good-bye: %s", error)

    def etcd_lost_records(self) -> None:
        """Whatever we wrote may be gone."""
        self._records.clear()
        self._written.clear()
        self._wake.set()

    async def _register(self, session: EtcdSession) -> None:
        if self.lease is not None:
            self._counters.add(metrics.ETCD_RENEWALS.name)
            if await session.refresh(self.lease) <= 0:
                self._lose_lease()
        for _ in range(REGISTER_TRIES):
            if self.lease is None:
                self.lease, ttl_s = await session.grant(self._asked_ttl_s)
                self.ttl_s = float(ttl_s)
                self._counters.add(metrics.ETCD_LEASES.name)
            try:
                await self._write(session, self.lease)
            except LeaseGone:
                self._lose_lease()
            else:
                return
        raise EtcdUnavailable(f"{session.endpoint}: leases end as soon as they are granted")

    async def _write(self, session: EtcdSession, lease: int) -> None:
        wanted = self._wanted()
        puts = {key: value for key, value in wanted.items() if self._records.get(key) != value}
        deletes = [key for key in self._records if key not in wanted]
        if puts or deletes:
            revision = await session.write(lease, puts, deletes)
            self._records = wanted
            self._written.update(dict.fromkeys([*puts, *deletes], revision))

    def _wanted(self) -> dict[str, bytes]:
        if self._rival is not None:
            return dict(self._records)
        node_id = self.member.node_id
        wanted = {self._keys.volume(each, node_id): holding.encode(self.held.get(each)) for each in self.volumes}
        wanted[self._keys.node(node_id)] = msgspec.json.encode(self.member)
        return wanted

    def _lose_lease(self) -> None:
        log.debug("the lease of this node is gone, registering anew")
        self._counters.add(metrics.ETCD_LEASES_LOST.name)
        self.lease = None
        self._records.clear()

    # -- what others do to it -----------------------------------------------------------------------------------------

    def listed(self, records: Iterable[Record], revision: int) -> None:
        """Compare a listing of the whole cluster with what we have written."""
        found = {record.key: record for record in records}
        for key, written in list(self._written.items()):
            if revision >= written:  # else it is of a moment before our own change
                self._compare(found.get(key) or Record(key, None, revision))

    def changed(self, event: Record) -> None:
        """Look whether an event of the watch is somebody else's change of a record of ours."""
        if event.revision > self._written.get(event.key, event.revision):
            self._compare(event)

    def _compare(self, record: Record) -> None:
        if record.key == self._keys.node(self.member.node_id):
            before, self._rival = self._rival, self._rival_in(record)
            if before is not None and self._rival is None:
                self._wake.set()
        if self._records.get(record.key, record.value) != record.value:
            del self._records[record.key]
            self._wake.set()

    def _rival_in(self, record: Record) -> _Rival | None:
        other = self._roster.read_member(record) if record.value is not None else None
        if other is None or other.instance == self.member.instance:
            return None
        if self._rival is not None and self._rival.instance == other.instance:
            return self._rival
        return _Rival(other.instance, trio.current_time(), other.address == self.member.address)

    async def _settle_rival(self, session: EtcdSession) -> None:
        """Give up our id to one who has shown that it lives."""
        rival = self._rival
        if rival is None or rival.successor or trio.current_time() < rival.since + self.patience_s():
            return
        old = self.member.node_id
        drawn = await trio.to_thread.run_sync(self._redraw_id)
        log.warning("another node has the id %s too (a copy of our cache directory?): ours is %s now", old, drawn)
        self.member = msgspec.structs.replace(self.member, node_id=drawn)
        self._rival = None
        self._records.clear()
        self._written.clear()
        lease, self.lease = self.lease, None
        if lease is not None:
            try:
                await session.revoke(lease)  # with what still bears it below the old id
            except LeaseGone:
                pass
