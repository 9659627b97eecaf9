"""The cluster as this node sees it, and this node's place in it.

Two tasks share a session with etcd (`peer.etcd`). One follows: it lists the cluster's records once and watches them
from that revision on, across reconnections, and lists again only when the events between are gone or etcd has lost its
records. The other keeps this node registered (`peer.registration`). Whatever fails ends the session; the next one, on
the next endpoint, goes on where it ended.

What always holds:

* The view is there from the first moment (this node alone), is immutable, and only what etcd says changes it: with etcd
  gone the last view stays, for ever. No fault of etcd leaves `run`.
* The view holds this node in any case.
* A member whose lease expires is gone at once, except in doubt (`peer.contact`): when etcd comes back after it was
  stopped, cut off from all of us, or with nothing left, leases of living nodes are gone too, and they register anew
  within a lease time. Their records are ghosts until then. Without that each of a thousand nodes would believe itself
  alone, and read everything from the store.
* Nothing depends on the time of day, here or elsewhere: leases are timed by etcd, pauses by the monotonic clock.

How the load of etcd grows with nodes is measured in docs/decisions/0008-one-watch-per-node.md.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
import trio

from cachefs import errors, metrics
from cachefs.metrics import Counters
from peer.contact import Contact
from peer.etcd import (
    Compacted,
    EtcdFault,
    EtcdRefused,
    EtcdSession,
    EtcdUnavailable,
    open_session,
)
from peer.etcd_settings import EtcdSettings
from peer.holding import Holding
from peer.members import Member, View
from peer.records import Record
from peer.registration import Registration
from peer.roster import Keys, Roster, fault_of

log = logging.getLogger(__name__)

TTL_S = 10
START_WAIT_S = 2.0
"""How long `run` may take to report that it started when etcd does not answer."""
SETTLED_S = 1.0
"""A session that ended sooner counts as a failure, and the pauses between tries go on growing."""
PUBLISH_PAUSE_S = 0.02
PUBLISH_SHARE = 20
"""Building views takes at most 1/20 of the time, however many records change: changes wait and come together."""
GHOST_ROUND_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long to wait, in seconds."""

    retry_first_s: float = 0.1
    retry_longest_s: float = 2.0
    refused_s: float = 30.0
    """After etcd refused user, password or permission: somebody has to change something first."""
    timeout_s: float = 3.0
    """Of a call."""


class Membership:
    """Keeps this node registered and the view up to date while `run` runs."""

    def __init__(
        self,
        settings: EtcdSettings,
        member: Member,
        *,
        redraw_id: Callable[[], str],
        counters: Counters,
        on_change: Callable[[View], None] | None = None,
        ttl_s: int = TTL_S,
        pace: Pace | None = None,
    ) -> None:
        """`redraw_id` BLOCKS and runs in a thread: it draws another node id and keeps it (`peer.identity`).

        `on_change` is called in the loop of `run` with every new view, and must not block.

        Raises: ConfigError when others would not take `member` for one.
        """
        _check(member)
        self._settings = settings
        self._counters = counters
        self._listeners: list[Callable[[View], None]] = [on_change] if on_change else []
        self._pace = pace or Pace()
        self._keys = Keys(settings.cluster)
        self._roster = Roster(self._keys, counters)
        self._own = Registration(self._keys, self._roster, member, ttl_s, redraw_id, counters)
        self._view = View(MappingProxyType({member.node_id: member}))
        self._trio_token: trio.lowlevel.TrioToken | None = None
        self._changed = trio.Event()
        self._tried = trio.Event()

        # Where we are in the history of etcd.
        self._epoch: bytes | None = None
        self._revision = 0
        self._raft_term = 0

        # How we are connected.
        self._contact = Contact(settings.cluster, len(settings.endpoints))
        self._endpoint = random.randrange(len(settings.endpoints))
        self._followed = False
        self._confirmed = False
        self._baffled = False
        self._namesake_since: float | None = None
        self._namesake_said = False

    # -- what others ask and say --------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The cluster now. From any thread."""
        return self._view

    @property
    def member(self) -> Member:
        """This node as it describes itself now: its id may have been drawn anew. From any thread."""
        return self._own.member

    def subscribe(self, on_change: Callable[[View], None]) -> None:
        """Have `on_change` called in the loop of `run` with every new view from now on; it must not block."""
        self._listeners.append(on_change)

    def set_volumes(self, volumes: frozenset[str]) -> None:
        """Say which volumes (16 hexadecimal digits each) this node holds from now on. From any thread."""
        self._own.volumes = volumes
        self._call_soon(self._announced)

    def set_held(self, held: Mapping[str, Holding]) -> None:
        """Say how much of which volumes this node holds. Each time it differs is an event for all nodes. From any
        thread.
        """
        self._own.held = dict(held)
        self._call_soon(self._own.wake)

    def announce(self, **changes: Any) -> None:
        """Change what this node says of itself: fields of `Member`, but not its id. From any thread.

        Raises: ConfigError when others would not take it for a member.
        """
        assert "node_id" not in changes, "the id changes only when somebody else has it"
        _check(msgspec.structs.replace(self._own.member, **changes))
        self._call_soon(self._change_member, changes)

    def state(self) -> dict[str, Any]:
        """Return what `cachefs status` shows; no secret is in it. From any thread."""
        lease = self._own.lease
        return {
            "cluster": self._settings.cluster,
            "node_id": self._own.member.node_id,
            "endpoint": self._settings.endpoints[self._endpoint],
            "members": len(self._view.members),
            "lease": None if lease is None else f"{lease:x}",
            "revision": self._revision,
            **self._contact.state(),
        }

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Stay a member, for ever. Reports started when the cluster is known, or etcd has failed to answer.

        Cancellation leaves the cluster: the lease is given back, which takes at most two seconds.
        """
        self._trio_token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publish)
            nursery.start_soon(self._bury)
            nursery.start_soon(self._keep_session)
            with trio.move_on_after(START_WAIT_S):
                await self._tried.wait()
            self._renew_view()
            task_status.started()

    async def _keep_session(self) -> None:
        failures = 0
        while True:
            began = trio.current_time()
            fault = await self._session(self._settings.endpoints[self._endpoint])
            failures = 0 if self._contact.connected and trio.current_time() > began + SETTLED_S else failures + 1
            self._counters.add(metrics.ETCD_FAULTS.name)
            self._contact.lost(fault, failures, len(self._view.members))
            if failures >= len(self._settings.endpoints):
                self._tried.set()
            self._endpoint = (self._endpoint + 1) % len(self._settings.endpoints)
            await trio.sleep(self._pause_s(fault, failures))

    def _pause_s(self, fault: EtcdFault, failures: int) -> float:
        pace = self._pace
        longest = pace.refused_s
        if not isinstance(fault, EtcdRefused):
            rounds = failures // len(self._settings.endpoints)  # all endpoints are tried before the pauses grow
            longest = min(pace.retry_longest_s, pace.retry_first_s * 2.0 ** min(rounds, 16))
        return longest * random.uniform(0.5, 1.0)

    async def _session(self, endpoint: str) -> EtcdFault:
        """Be connected once, and return why it ended."""
        self._followed = self._confirmed = False
        try:
            async with open_session(self._settings, endpoint, self._pace.timeout_s) as session:
                self._counters.add(metrics.ETCD_CONNECTIONS.name)
                return await self._converse(session)
        except EtcdFault as fault:
            return fault
        except Exception as error:  # what nobody foresaw must not take the agent with it
            log.log(logging.DEBUG if self._baffled else logging.ERROR, "a session with etcd broke", exc_info=error)
            self._baffled = True
            return EtcdUnavailable(f"{endpoint}: {type(error).__name__}")

    async def _converse(self, session: EtcdSession) -> EtcdFault:
        ended = False
        try:
            fault = await _first_fault(
                lambda: self._follow(session), lambda: self._own.stay(session, self._note_confirmed)
            )
            ended = True
            return fault
        finally:
            if not ended:  # we are being cancelled
                await self._own.leave(session)

    def _note_confirmed(self) -> None:
        self._confirmed = True
        self._contact.heard(self._own.ttl_s)
        self._note_connected()
        if self._own.member.node_id not in self._view.members:  # it was drawn anew
            self._changed.set()
        self._look_for_namesake()

    def _note_connected(self) -> None:
        if self._followed and self._confirmed and not self._contact.connected:
            self._contact.gained(self._settings.endpoints[self._endpoint])
            self._tried.set()

    # -- following ----------------------------------------------------------------------------------------------------

    async def _follow(self, session: EtcdSession) -> None:
        if await self._must_list(session):
            await self._list(session)
        self._followed = True
        self._note_connected()
        while True:
            try:
                await session.watch(self._keys.prefix, self._revision, self._take)
            except Compacted as error:
                log.debug("listing the cluster anew: %s", error)
                await self._list(session)

    async def _must_list(self, session: EtcdSession) -> bool:
        """Whether what etcd has is no continuation of what we know: it is all new to us, or records were lost.

        The revision alone does not tell: many nodes that register anew soon lift it over the old one.
        """
        epoch, position = await session.read(self._keys.epoch)
        if epoch is None:
            await session.create(self._keys.epoch, secrets.token_hex(8).encode())
            epoch, position = await session.read(self._keys.epoch)
        self._contact.heard(self._own.ttl_s)
        known, self._epoch = self._epoch, epoch
        lost = known is not None and (
            epoch != known or position.revision < self._revision or position.raft_term < self._raft_term
        )
        self._raft_term = position.raft_term
        if lost:
            log.info("etcd has lost records; members that do not come back within %g s are gone", self._own.ttl_s)
            self._contact.doubt(self._own.ttl_s)
            self._revision = 0
            self._own.etcd_lost_records()
        return self._revision == 0

    async def _list(self, session: EtcdSession) -> None:
        records, position = await session.list_prefix(self._keys.prefix)
        self._counters.add(metrics.ETCD_LISTS.name)
        self._contact.heard(self._own.ttl_s)
        self._own.listed(records, position.revision)
        listed = await trio.to_thread.run_sync(self._roster.read, records)
        self._roster.replace(listed, keep=self._contact.doubting)
        self._revision = position.revision
        self._changed.set()

    def _take(self, events: list[Record], revision: int) -> None:
        """Apply what the watch brought."""
        self._contact.heard(self._own.ttl_s)
        self._counters.add(metrics.ETCD_EVENTS.name, len(events))
        changed = False
        for event in events:
            self._own.changed(event)
            if event.value is not None:
                changed |= self._roster.put(event)
            else:
                changed |= self._roster.delete(event.key, keep=self._contact.doubting)
        self._revision = revision
        if changed:
            self._changed.set()

    # -- the view -----------------------------------------------------------------------------------------------------

    def _call_soon(self, act: Callable[..., None], *arguments: Any) -> None:
        if self._trio_token is None:
            act(*arguments)
            return
        try:
            self._trio_token.run_sync_soon(act, *arguments)
        except trio.RunFinishedError:
            pass

    def _change_member(self, changes: dict[str, Any]) -> None:
        self._own.member = msgspec.structs.replace(self._own.member, **changes)
        self._announced()

    def _announced(self) -> None:
        self._own.wake()
        self._changed.set()

    async def _publish(self) -> None:
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            began = time.perf_counter()
            self._renew_view()
            await trio.sleep(max(PUBLISH_PAUSE_S, PUBLISH_SHARE * (time.perf_counter() - began)))

    async def _bury(self) -> None:
        """Forget ghosts when their time is over, but only while etcd could tell us that they live."""
        while True:
            await trio.sleep(GHOST_ROUND_S)
            if self._roster.ghosts and self._contact.connected and not self._contact.doubting:
                self._roster.forget_ghosts()
                self._changed.set()

    def _renew_view(self) -> None:
        view = self._roster.view(self._own.member, self._own.volumes, self._revision)
        if view.members == self._view.members and view.holders == self._view.holders:
            return
        self._view = view
        for listener in self._listeners:
            try:
                listener(view)
            except Exception:
                log.exception("a listener of the cluster failed")

    def _look_for_namesake(self) -> None:
        """Warn once of another node with our name. One that lost its id is its own namesake for a lease time."""
        own = self._own.member
        other = next((m for m in self._view.members.values() if m.name == own.name and m.node_id != own.node_id), None)
        now = trio.current_time()
        if other is None:
            self._namesake_since = None
        elif self._namesake_since is None:
            self._namesake_since = now
        elif not self._namesake_said and now > self._namesake_since + self._own.patience_s():
            self._namesake_said = True
            log.warning("two nodes are called %r: %s and %s", own.name, own.node_id, other.node_id)


def _check(member: Member) -> None:
    fault = fault_of(member)
    if fault:
        raise errors.ConfigError(f"this node cannot be described to its peers: {fault}")


async def _first_fault(*tasks: Callable[[], Awaitable[None]]) -> EtcdFault:
    """Run tasks side by side until one raises EtcdFault; end the others and return it."""
    faults: list[EtcdFault] = []

    async def guarded(task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except EtcdFault as fault:
            faults.append(fault)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(guarded, task)
    return faults[0]
