"""Which blocks of a tier stay: what it is told of reads, plans, pins and limits, and what it says of owners.

The part of `cachefs.block.lmdb_tier.TierWriter` that moves no bytes. Everything that changes is done under the lock of
the tier; what is asked by others takes no lock.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from cachefs import errors
from cachefs.block.faults import Faults
from cachefs.block.gate import Gate
from cachefs.block.holdings import NOBODY, Holdings, Lane, Limit
from cachefs.block.ledger import PAGE_SIZE, Ledger
from cachefs.block.lmdb_env import BlockEnvironment, MapFull
from cachefs.block.policies.choice import Guidance
from cachefs.block.policies.planned import IsPinned, NextUse
from cachefs.block.tier_eviction import Demotion, evict
from cachefs.metrics import Counters
from cachefs.types import BlockKey, Tier

log = logging.getLogger(__name__)
T = TypeVar("T")

TREE_BYTES = 64 * PAGE_SIZE
"""What a transaction may take beside its values, at the least: copies of tree pages and of the list of free pages."""


class Order(NamedTuple):
    """How blocks are to be stored (see `TierWriter.put_values`)."""

    demote: Demotion | None
    ahead: bool
    owner: int
    read_at_s: int


class TierOrder:
    """See the module. All that has a value here is set by `TierWriter`."""

    tier: Tier
    _counters: Counters
    _block_cost: int
    _usable_bytes: int
    """What blocks might take when it was last looked at: asking the file system can take long, and fail."""
    _lock: threading.RLock
    _gate: Gate
    _env: BlockEnvironment | None
    _ledger: Ledger
    _guidance: Guidance
    _holdings: Holdings
    _faults: Faults

    def _usable_environment(self) -> BlockEnvironment:
        """Return the environment, marked as in use. Raises TierUnavailable."""
        raise errors.TierUnavailable("it has none")

    def _may_grow(self, env: BlockEnvironment, growth: int) -> bool:
        """Whether a transaction may take so many bytes more of the file."""
        return False

    def _give_up(self, error: Exception) -> errors.TierUnavailable:
        """Close an environment that cannot be trusted any more."""
        return errors.TierUnavailable(str(error))

    # -- what it is told -----------------------------------------------------------------------------------------------

    def touch(self, keys: Iterable[BlockKey], owner: int = NOBODY) -> None:
        """Blocks were read (by `owner`, if that is known): evict them later."""
        if self._holdings.are_limited:
            keys = list(keys)
            self._holdings.note_reads(keys, owner, self._ledger)
        self._ledger.touch(keys, owner)

    def part_with(self, keys: Iterable[BlockKey]) -> None:
        """Blocks that were read are in another tier, too. Any thread."""
        self._ledger.part_with(keys)

    def oldest_first(self) -> list[BlockKey]:
        """Return the keys of all blocks, roughly in the order of their eviction."""
        with self._lock:
            self._ledger.settle()
            return self._ledger.oldest_first()

    def guide(self, *, next_use: NextUse | None = None, is_pinned: IsPinned | None = None) -> None:
        """Follow this plan and keep these pins from now on (see there); call it again when the answers change."""
        with self._lock:
            self._guidance.next_use, self._guidance.is_pinned = next_use, is_pinned
            self._ledger.guide(self._guidance.apply)

    def admitted(self, keys: Iterable[BlockKey], owner: int = NOBODY) -> list[BlockKey]:
        """Return those of these blocks that are not here, and would be kept for longer than a moment."""
        with self._lock:
            self._ledger.settle()
            ledger, size = self._ledger, self._block_cost
            room = self._has_room(size)
            return [key for key in keys if key not in ledger and ledger.admits(key, owner, size, room=room)]

    @property
    def is_planned(self) -> bool:
        """Whether it follows a plan."""
        return self._guidance.next_use is not None

    @property
    def is_full(self) -> bool:
        """Whether something has to leave for the next block. Any thread."""
        return not self._has_room(self._block_cost)

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes fit without anything leaving."""
        return self._env is not None and self._ledger.used_bytes + size <= self._usable_bytes

    # -- whose blocks they are -----------------------------------------------------------------------------------------

    def limit(self, limits: Mapping[int, Limit]) -> None:
        """Have these limits for volumes, by owner, from now on. Call `learn_holdings` after it until it says no."""
        with self._lock:
            self._holdings.change(limits, self._ledger, self._guidance.policy)

    def learn_holdings(self) -> bool:
        """Look for blocks of volumes that have a quota only now; returns whether to call it again. BLOCKS for
        milliseconds. Never raises.
        """
        with self._lock:
            return self._guarded(lambda env: self._holdings.learn(env, self._ledger)) or False

    def owned(self, keys: Sequence[BlockKey]) -> list[tuple[int, int]]:
        """Return whose these blocks are (NOBODY: it is not known), and when they were stored or read last (seconds
        since the epoch, roughly; 0: it is not known). Never raises.
        """
        with self._gate:
            try:
                found = [] if self._env is None else self._env.notes_of(keys)
            except (errors.CorruptBlock, errors.TierUnavailable) as error:
                log.debug("%s: %s", self.tier, error)
                found = []
        return [note or (NOBODY, 0) for note in found] or [(NOBODY, 0)] * len(keys)

    def owned_after(self, after: bytes, count: int) -> list[tuple[BlockKey, int, int]]:
        """Return up to `count` blocks behind a key (b"": from the first) that belong to somebody: key, owner, length.
        Never raises.
        """
        with self._gate:
            try:
                return [] if self._env is None else self._env.owned_after(after, count)
            except (errors.CorruptBlock, errors.TierUnavailable) as error:
                log.debug("%s: %s", self.tier, error)
                return []

    def limit_of(self, owner: int) -> Limit:
        """Return what a volume may do here. Any thread."""
        return self._holdings.limits.get(owner, Limit())

    def held_by(self, owner: int) -> int | None:
        """Return how many bytes a volume with a quota holds; None when it has none. Any thread."""
        lane = self._ledger.lanes.get(owner)
        return None if lane is None else lane.used_bytes

    def _evict_own(self, lane: Lane, want: int, demote: Demotion | None = None) -> None:
        """Delete blocks of one volume until `want` bytes of it are free. Raises TierUnavailable, CorruptBlock."""
        assert self._env is not None
        count = functools.partial(self._counters.add, f"{self.tier}_evictions")
        evict(self._env, self._ledger, want, demote=demote, punch=None, count=count, lane=lane)

    def _tend(self, env: BlockEnvironment) -> None:
        def writable(notes: int) -> BlockEnvironment:
            """Promise room for so many notes in different pages, and take back that all is on the device."""
            if notes and not self._may_grow(env, notes * 2 * PAGE_SIZE + TREE_BYTES):
                raise MapFull("there is no room for notes of what was read")
            return self._usable_environment()

        def evict_own(lane: Lane, want: int) -> None:
            writable(0)
            self._evict_own(lane, want)

        self._holdings.tend(env, self._ledger, evict_own, writable, self._guidance.is_pinned)

    def _guarded(self, work: Callable[[BlockEnvironment], T]) -> T | None:
        """Do something for which nobody waits. Under the lock; never raises for the tier's sake."""
        try:
            return None if self._env is None else work(self._env)
        except MapFull as error:
            log.debug("%s: %s", self.tier, error)
        except errors.CorruptBlock as error:
            self._give_up(error)
        except errors.TierUnavailable as error:
            self._faults.fault(error)
        return None
