"""What each volume holds of a tier: its quota, and how long what nobody reads may stay.

A note beside each block says whose it is and when it was stored or last read (`cachefs.block.lmdb_env`), so a tier that
is opened again knows both. A volume with a quota has a *lane*: a policy of its own with all of its blocks, beside the
policy of the tier, which has the blocks of all. So the tier evicts across all volumes as if there were no quotas, and a
volume that is about to exceed its own evicts what its own policy gives up, in O(1). Volumes without a quota pay nothing
but the note; those with one a second place for each block (less than 150 bytes).

Time to live: what was read is noted anew when its note is older than an eighth of that time, and the notes are looked
through once in an eighth, a bounded number at a time. So a block leaves when it was not read for the time to live, and
a quarter later at the latest. Pinned blocks stay. Nothing of that runs where no volume has such a time.

INVARIANT: a lane holds blocks of the ledger only; with those it leaves out (they are being looked for after its quota
came) they are all that the volume has.
Under the lock of the tier, but where it says otherwise.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from cachefs import errors
from cachefs.block.ledger import MAX_TOUCHED, Ledger, value_cost
from cachefs.block.lmdb_env import BlockEnvironment, MapFull
from cachefs.block.policies.planned import IsPinned
from cachefs.block.ports import EvictionPolicy
from cachefs.types import BlockKey, ObjectId

log = logging.getLogger(__name__)

NOBODY = 0
"""The owner of blocks that belong to no volume, as far as is known."""
GRAIN = 8
"""Parts of a time to live: notes are as exact as one of them, and looked through once in one."""
TEND_S = 3.0
"""About how often `tend` is called."""
MOST_READS = 1 << 15
NOTED_AT_ONCE = 512
"""In one transaction: each may change another page."""
NOTE_S = 0.05
LEAST_SWEPT, MOST_SWEPT = 256, 16384
LEARNED_AT_ONCE = 1024
DELETED_AT_ONCE = 64
LEAST_TRIM = 64 << 20
"""A writer evicts no more than this, or four times what it writes, when a quota has become smaller."""
TRIM_S = 0.1
WRONG_CLOCK_S = 3600
"""A note that is so far ahead was made with another clock."""
OID_BYTES = 16

Evict = Callable[["Lane", int], None]
"""Deletes blocks of a lane until so many bytes of it are free."""
Writable = Callable[[int], BlockEnvironment]
"""Returns the environment, ready for so many notes; raises TierUnavailable when it has no room for them."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What one volume may do in one tier. 0: as it likes."""

    quota_bytes: int = 0
    ttl_s: float = 0.0


class Lane:
    """The blocks of one volume with a quota, in the order of its own policy."""

    __slots__ = ("_leaving", "policy", "quota_bytes", "touched", "used_bytes")

    def __init__(self, policy: EvictionPolicy, quota_bytes: int) -> None:
        self.policy = policy
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self.touched: deque[BlockKey] = deque(maxlen=MAX_TOUCHED)
        self._leaving: set[BlockKey] = set()
        """Victims that are being deleted."""

    def add(self, key: BlockKey, length: int, *, ahead: bool) -> None:
        """A value of `length` bytes was stored."""
        (self.policy.bring if ahead else self.policy.add)(key, length)
        self.used_bytes += value_cost(length)

    def adopt(self, key: BlockKey, length: int) -> None:
        """A value of `length` bytes was there before."""
        self.policy.adopt(key, length)
        self.used_bytes += value_cost(length)

    def take_victim(self) -> BlockKey | None:
        """Take the block to evict next out of the order, a pinned one if there is no other (the quota was lowered)."""
        key = self.policy.take()
        if key is None and (key := self.policy.pinned_victim()) is not None:
            self.policy.remove(key)
        if key is not None:
            self._leaving.add(key)
        return key

    def keep(self, key: BlockKey, length: int) -> None:
        """A victim stays after all."""
        if key in self._leaving:
            self._leaving.discard(key)
            self.policy.add(key, length)

    def gone(self, key: BlockKey, length: int) -> None:
        """A value was deleted, whoever asked for that and whosever it was."""
        if key in self._leaving or key in self.policy:
            self._leaving.discard(key)
            self.policy.remove(key)
            self.used_bytes -= value_cost(length)

    def settle(self) -> None:
        """Tell the policy what was read."""
        while self.touched:
            self.policy.touch(self.touched.popleft())

    def __contains__(self, key: object) -> bool:
        return key in self.policy

    def __len__(self) -> int:
        return len(self.policy)


class Holdings:
    """The limits of all volumes in one tier, and what follows from them."""

    def __init__(self, count_expired: Callable[[int], object], clock: Callable[[], float] = time.time) -> None:
        self.limits: dict[int, Limit] = {}
        self._count_expired = count_expired
        self._clock = clock
        self._reads: dict[BlockKey, int] = {}
        """Blocks that were read since the last look, and who has read them: those whose notes matter."""
        self._learning: dict[int, bytes] = {}
        """Owners whose blocks are being looked for, and behind which block to go on."""
        self._place = b""
        self._next_pass = 0.0

    @property
    def now_s(self) -> int:
        """The time that is noted, in seconds since the epoch."""
        return int(self._clock())

    @property
    def are_limited(self) -> bool:
        """Whether any volume has a limit here. Any thread."""
        return bool(self.limits)

    def lanes(self, make_policy: Callable[[], EvictionPolicy]) -> dict[int, Lane]:
        """Return empty lanes for a ledger that begins."""
        self._learning.clear()
        return {
            owner: Lane(make_policy(), limit.quota_bytes) for owner, limit in self.limits.items() if limit.quota_bytes
        }

    def change(self, limits: Mapping[int, Limit], ledger: Ledger, make_policy: Callable[[], EvictionPolicy]) -> None:
        """Have these limits from now on. What volumes hold that have a quota only now shows when `learn` is done."""
        self.limits = {owner: limit for owner, limit in limits.items() if limit != Limit()}
        for owner in [owner for owner in ledger.lanes if not limits.get(owner, Limit()).quota_bytes]:
            del ledger.lanes[owner]
            self._learning.pop(owner, None)
        for owner, limit in self.limits.items():
            if limit.quota_bytes and owner in ledger.lanes:
                ledger.lanes[owner].quota_bytes = limit.quota_bytes
            elif limit.quota_bytes:
                ledger.lanes[owner] = Lane(make_policy(), limit.quota_bytes)
                self._learning[owner] = b""
        self._next_pass = 0.0

    def note_reads(self, keys: Iterable[BlockKey], owner: int, ledger: Ledger) -> None:
        """Blocks were read by `owner` (NOBODY: it is not known). Any thread."""
        if not self.limits or len(self._reads) >= MOST_READS:
            return
        lane = ledger.lanes.get(owner)
        if any(limit.ttl_s for limit in list(self.limits.values())):
            self._reads.update(dict.fromkeys(keys, owner))
        elif lane is not None:  # blocks that are nobody's become those of who reads them
            self._reads.update((key, owner) for key in keys if key not in lane and key in ledger)

    def make_room(self, ledger: Ledger, owner: int, need: int, evict: Evict) -> None:
        """Let a volume evict what it has to before `need` bytes of it are stored. Raises what `evict` raises."""
        lane = ledger.lanes.get(owner)
        over = 0 if lane is None else lane.used_bytes + need - lane.quota_bytes
        if lane is not None and over > 0:
            evict(lane, min(over, max(4 * need, LEAST_TRIM)))

    def learn(self, env: BlockEnvironment, ledger: Ledger) -> bool:
        """Find some of the blocks of volumes whose quotas are new; returns whether there are more to look at."""
        for owner, place in list(self._learning.items()):
            found = env.notes(place, LEARNED_AT_ONCE)
            lane = ledger.lanes[owner]
            for key, whose, _ in found:
                if whose == owner and key in ledger and key not in lane:
                    lane.adopt(key, env.length(key) or 0)
            if len(found) == LEARNED_AT_ONCE:
                self._learning[owner] = found[-1][0]
            else:
                del self._learning[owner]
        return bool(self._learning)

    def tend(
        self,
        env: BlockEnvironment,
        ledger: Ledger,
        evict: Evict,
        writable: Writable,
        is_pinned: IsPinned | None,
    ) -> None:
        """Do what is due, a bounded part of it. Raises what `evict`, `writable` and the environment raise."""
        if not self.limits:
            return
        ledger.settle()
        until = time.monotonic() + NOTE_S
        try:
            while self._reads and time.monotonic() < until:
                self._note(env, ledger, writable)
        except MapFull as error:
            log.debug("what was read is noted later: %s", error)  # what leaves now makes room
        until = time.monotonic() + TRIM_S
        for lane in ledger.lanes.values():
            while lane.used_bytes > lane.quota_bytes and len(lane) and time.monotonic() < until:
                evict(lane, min(lane.used_bytes - lane.quota_bytes, LEAST_TRIM // 8))
        self._sweep(env, ledger, writable, is_pinned)

    def _note(self, env: BlockEnvironment, ledger: Ledger, writable: Writable) -> None:
        """Write down what was read, where its note is old; what is nobody's is the reader's from now on."""
        former, self._reads = self._reads, {}
        reads = dict(former)  # other threads go on with the new one, but for a last word to this one
        now = self.now_s
        chosen = list(islice(reads, NOTED_AT_ONCE))
        keys = [key for key in chosen if key in ledger]
        notes: list[tuple[BlockKey, int, int]] = []
        for key, found in zip(keys, env.notes_of(keys), strict=True):
            if found is None:
                if reads[key] in self.limits:
                    notes.append((key, reads[key], now))
            elif abs(now - found[1]) * GRAIN >= self._ttl_s(found[0]) > 0 and now != found[1]:
                notes.append((key, found[0], now))
        if notes:
            try:
                writable(len(notes)).note(sorted(notes))
            except errors.TierUnavailable:
                self._reads.update(reads)
                raise
        self._reads.update(islice(reads.items(), len(chosen), None))
        for key, owner, _ in notes:
            lane = ledger.lanes.get(owner)
            if lane is not None and key not in lane:
                lane.adopt(key, env.length(key) or 0)

    def _ttl_s(self, owner: int) -> float:
        limit = self.limits.get(owner)
        return 0.0 if limit is None else limit.ttl_s

    def _sweep(self, env: BlockEnvironment, ledger: Ledger, writable: Writable, is_pinned: IsPinned | None) -> None:
        """Look through some notes, and delete blocks that nobody has read for too long."""
        shortest = min((limit.ttl_s for limit in self.limits.values() if limit.ttl_s), default=0.0)
        if not shortest or (not self._place and time.monotonic() < self._next_pass):
            return
        if not self._place:
            self._next_pass = time.monotonic() + max(shortest / GRAIN, TEND_S / 2)
        share = int(len(ledger) * 2 * TEND_S * GRAIN / shortest)
        count = max(LEAST_SWEPT, min(MOST_SWEPT, share))
        found, now = env.notes(self._place, count), self.now_s
        began_at = self._place
        self._place = bytes(found[-1][0]) if len(found) == count else b""
        old: list[BlockKey] = []
        ahead: list[tuple[BlockKey, int, int]] = []
        for key, owner, at_s in found:
            ttl_s = self._ttl_s(owner)
            if ttl_s and at_s > now + WRONG_CLOCK_S:
                ahead.append((key, owner, now))
            elif (
                ttl_s
                and (now - at_s) * GRAIN > ttl_s * (GRAIN + 1)
                and key not in self._reads
                and not (is_pinned is not None and is_pinned(ObjectId(key[:OID_BYTES])))
            ):
                old.append(key)
        if ahead:
            writable(NOTED_AT_ONCE).note(ahead[:NOTED_AT_ONCE])
        until = time.monotonic() + TRIM_S
        for start in range(0, len(old), DELETED_AT_ONCE):
            if time.monotonic() > until:
                self._place = began_at or bytes(1)  # the rest next time
                return
            gone = writable(0).delete(old[start : start + DELETED_AT_ONCE])
            for key, length in gone:
                ledger.gone(key, length)
            self._count_expired(len(gone))
