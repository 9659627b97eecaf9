"""A cache tier as the agent owns it: blocks in one LMDB environment, below a hard budget, whatever happens around it.

`TierWriter` adds to `cachefs.block.lmdb_env` what a cache needs: a budget with eviction before each write, group
commit, checks on the way out, and a life with full disks, foreign files and power losses. `TierReader`
(`cachefs.block.tier_reader`) is how other processes see the tier: no locks, and no page of an open read transaction is
ever reused, so eviction cannot pull bytes away under a reader.

INVARIANTS
* The data file never grows past the map size, and the map size is below the configured limit.
* A page that LMDB touches in a shared map has a block (`cachefs.block.tier_growth`). When the file system
  promises no more, the map is cut to what was promised (state "full"): LMDB then reuses freed pages or says "map
  full", and the tier evicts more. Every few seconds it tries to grow again.
* Ledger and environment hold the same keys; both are changed under `_lock` only.
* A fault of the tier is never the caller's: `read` answers None, writes raise TierUnavailable, one warning a minute.
* Lock order: `_lock`, then `_gate`. Reads take `_gate` only, so no read ever waits for a write.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cachefs import errors, metrics
from cachefs.block import codec, tier_files
from cachefs.block.codec import Bytes
from cachefs.block.eviction import LruPolicy
from cachefs.block.faults import Faults
from cachefs.block.gate import Gate
from cachefs.block.holdings import NOBODY, Holdings, Limit
from cachefs.block.ledger import PAGE_SIZE, Ledger, value_cost
from cachefs.block.lmdb_env import BlockEnvironment, MapFull
from cachefs.block.policies.choice import Guidance
from cachefs.block.ports import EvictionPolicy
from cachefs.block.tier_eviction import Demotion, evict
from cachefs.block.tier_growth import STEP, Growth
from cachefs.block.tier_opening import open_tier, take_over
from cachefs.block.tier_order import TREE_BYTES, Order, TierOrder
from cachefs.metrics import Counters
from cachefs.types import BlockKey, Tier

__all__ = ["Demotion", "TierWriter"]

log = logging.getLogger(__name__)

OTHER_BYTES = 256 << 10
"""Lock file, stamp and directory: they count to the tier's limit too."""
GROUP_BYTES = 8 << 20
GROUP_BLOCKS = 256
TREE_BYTES_PER_BLOCK = 5 * PAGE_SIZE
"""What a transaction may take beside its values, and `TREE_BYTES`: copies of tree pages."""
TRIES = 5
PAUSE_S = 0.004
"""Between the tries to get free pages; a reader's transaction takes less."""
PINNED_S = 0.5
"""For how long nothing is tried after that was in vain."""
RETRY_S = 5.0
NO_ROOM = "it may take no more of the file system below it, and goes on with less than its limit"


class TierWriter(TierOrder):
    """One tier. All methods block, and any thread may call them; `in` and `touch` never wait."""

    def __init__(
        self,
        directory: str,
        tier: Tier,
        *,
        limit_bytes: int,
        block_size: int,
        counters: Counters,
        policy: Callable[[], EvictionPolicy] = LruPolicy,
        patient: bool = False,
        limits: Mapping[int, Limit] | None = None,
    ) -> None:
        """Open or begin the tier. What cannot be used is set aside (shm: removed) with one warning.

        Raises: TierUnavailable when the limit is too small for a few blocks, or the directory cannot be written (with
        `patient` it is off then, and tried again). `limits`: as `limit` gets them, known before it is opened.
        """
        self.directory = directory.rstrip("/")
        self.tier = tier
        self.limit_bytes = limit_bytes
        self.block_size = block_size
        self._counters = counters
        self._guidance = Guidance(policy)
        self._holdings = Holdings(functools.partial(counters.add, metrics.EXPIRED_BLOCKS.name))
        self._holdings.limits = dict(limits or {})
        block_cost = value_cost(block_size + codec.HEADER_SIZE)
        self._map_size = (limit_bytes - OTHER_BYTES) // PAGE_SIZE * PAGE_SIZE
        if self._map_size < 8 * block_cost:
            raise errors.TierUnavailable(
                f"a {tier} tier of {limit_bytes} bytes is too small for blocks of {block_size}"
            )
        self._block_cost = block_cost
        self._lock, self._gate = threading.RLock(), Gate()
        self._ledger = self._new_ledger()
        self._env: BlockEnvironment | None = None
        self.generation = 0  # how often it was opened: another one has lost what was in it
        self._unusable = self._absent = ""
        """Why it could not be opened yet: what is there may be as good as ever."""
        self._retry_at = self._pause_until = 0.0
        self._clean = self._closed = False
        self._faults = Faults(f"the {tier} tier in {self.directory}", tier, counters)
        try:
            self._begin()
        except errors.TierUnavailable as error:
            if not patient:
                raise
            self._wait(error)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _new_ledger(self) -> Ledger:
        return Ledger(self._guidance.policy(), self._holdings.lanes(self._guidance.policy))

    def _begin(self) -> None:
        """Open the environment, or begin a new one. Raises TierUnavailable."""
        opened = open_tier(
            self.directory,
            self.tier,
            map_size=self._map_size,
            block_size=self.block_size,
            new_ledger=self._new_ledger,
            unusable=self._unusable,
        )
        try:
            path = os.path.join(self.directory, tier_files.DATA_FILE)
            growth = Growth(path, self._map_size, self._block_cost, self._gate, in_memory=self.tier is Tier.SHM)
        except OSError as error:
            opened.env.close()
            raise errors.TierUnavailable(f"{self.directory} cannot be written: {error}") from error
        self._env, self._ledger, self._growth = opened.env, opened.ledger, growth
        self._usable_bytes = growth.usable
        self.generation += 1
        self._unusable, self._absent, self._clean = "", "", False
        if opened.former is not None:
            put = lambda key, value, owner: self.put_values([(key, value)], owner=owner)  # noqa: E731
            take_over(opened.former, put, lambda: self._growth.usable - self._ledger.used_bytes)
            log.info("the %s tier is smaller now: took over %d blocks", self.tier, len(self._ledger))

    # -- reading -------------------------------------------------------------------------------------------------------

    def __contains__(self, key: object) -> bool:
        """Return whether the tier holds a block: a look into memory, from any thread."""
        return key in self._ledger

    def read(self, key: BlockKey, expected_length: int | None = None, place: memoryview | None = None) -> Bytes | None:
        """Return a block's stored value (header and payload), checked, or None: in `place` if it fits in there, else in
        new memory. Never raises for the tier's sake.
        """
        try:
            with self._gate:
                value = None if self._env is None else self._env.read(key, place)
            if value is not None:
                codec.verify(value, key, expected_length)
            return value
        except errors.CorruptBlock as error:
            self._drop_bad(key, error)
        except errors.TierUnavailable as error:
            self._faults.fault(error)
        return None

    @contextlib.contextmanager
    def lend(self, key: BlockKey, length: int) -> Iterator[memoryview | None]:
        """Give a block's bytes, unchecked, as a view of the map that is valid inside; None if they are not to be had.

        For moments only: meanwhile the map cannot grow, and no freed page is used again. Never raises for the tier's
        sake.
        """
        with contextlib.ExitStack() as stack:
            value: memoryview | None = None
            try:
                stack.enter_context(self._gate)
                value = None if self._env is None else stack.enter_context(self._env.lend(key))
            except (errors.CorruptBlock, errors.TierUnavailable) as error:
                self._faults.fault(error)
            fits = value is not None and len(value) == codec.HEADER_SIZE + length
            yield value[codec.HEADER_SIZE :] if value is not None and fits else None

    def _drop_bad(self, key: BlockKey, error: Exception) -> None:
        self._faults.bad_block(error)
        try:
            self.discard([key])
        except errors.TierUnavailable as fault:
            self._faults.fault(fault)

    # -- writing -------------------------------------------------------------------------------------------------------

    def put_values(
        self,
        values: Iterable[tuple[BlockKey, Bytes]],
        demote: Demotion | None = None,
        *,
        ahead: bool = False,
        owner: int = NOBODY,
        read_at_s: int = 0,
    ) -> None:
        """Commit stored values (see `codec`), in groups; keys that are there are not written again. Evicts first, and
        calls `demote` before. `ahead`: nobody has asked for them yet. `owner`: whose they are; `read_at_s`: when they
        were read last (0: now). Raises TierUnavailable; earlier groups stay.
        """
        order = Order(demote, ahead, owner, read_at_s or self._holdings.now_s)
        with self._lock:
            group: dict[BlockKey, Bytes] = {}
            most = room = self._group_bytes()
            for key, value in values:
                if key in self._ledger or key in group:
                    continue
                cost = value_cost(len(value))
                if group and (cost > room or len(group) >= GROUP_BLOCKS):
                    self._write(group, order)
                    group, room = {}, most
                group[key] = value
                room -= cost
            if group:
                self._write(group, order)

    def _write(self, group: dict[BlockKey, Bytes], order: Order) -> None:
        """Commit one group. Raises TierUnavailable."""
        need = sum(value_cost(len(value)) for value in group.values())
        if self._closed or time.monotonic() < self._pause_until:
            raise errors.TierUnavailable("it is closed, or was full a moment ago")  # the warning was given then
        try:
            env = self._usable_environment()
            self._ledger.settle()
            self._commit(env, group, need, order)
        except errors.CorruptBlock as error:
            raise self._give_up(error) from error
        except errors.TierUnavailable as error:
            self._faults.fault(error)
            raise
        for key, value in group.items():
            self._ledger.add(key, len(value), ahead=order.ahead, owner=order.owner)
        self._counters.add(f"{self.tier}_writes", len(group))
        self._counters.add(f"{self.tier}_write_bytes", sum(map(len, group.values())))

    def _commit(self, env: BlockEnvironment, group: dict[BlockKey, Bytes], need: int, order: Order) -> None:
        """Make room and write; while the free pages are too scattered, or still seen by a reader, make more room."""
        growth = need + len(group) * TREE_BYTES_PER_BLOCK + TREE_BYTES
        for attempt in range(TRIES):
            try:
                evict_own = functools.partial(self._evict_own, demote=order.demote)
                self._holdings.make_room(self._ledger, order.owner, need, evict_own)
                self._make_room(need, order.demote)
                if self._may_grow(env, growth):
                    env.write(group.items(), order.owner, order.read_at_s)
                    return
            except MapFull as error:
                log.debug("%s: %s", self.tier, error)
                try:
                    self._evict(need << attempt, order.demote)
                    env.tick()
                except MapFull:
                    pass  # even that takes a free page: readers inside of a transaction hold them, for moments only
                time.sleep(PAUSE_S * attempt)
        self._pause_until = time.monotonic() + PINNED_S
        raise MapFull("its free pages are too scattered, or still seen by a reader")

    def _may_grow(self, env: BlockEnvironment, growth: int) -> bool:
        could_grow = self._growth.growing
        ready = self._growth.prepare(env, growth)
        if could_grow and not ready:
            self._faults.fault(errors.TierUnavailable(NO_ROOM))
        elif not could_grow and self._growth.growing:
            log.info("the %s tier in %s can grow again", self.tier, self.directory)
        return ready

    def _usable_environment(self) -> BlockEnvironment:
        if self._env is None:
            self._revive()
        env = self._env
        if env is None:
            raise errors.TierUnavailable(self._unusable or self._absent or "it is closed")
        if self._clean:
            try:
                tier_files.in_use().store(self.directory)
            except OSError as error:
                raise errors.TierUnavailable(f"the stamp cannot be written: {error}") from error
            self._clean = False
        return env

    def _group_bytes(self) -> int:
        """Return what one transaction may write: LMDB uses its pages again only two transactions later."""
        most = 0 if self._env is None else min(GROUP_BYTES, self._growth.slack // 4)
        return max(most, self._block_cost)

    def _make_room(self, need: int, demote: Demotion | None) -> None:
        usable = self._usable_bytes = self._growth.usable
        if need > usable:
            if not self._growth.growing and self._growth.may_retry():
                return  # the file system is about to be asked for more
            raise errors.TierUnavailable("the file system below it is full")
        deficit = 0 if self._growth.growing else self._growth.deficit
        want = max(self._ledger.used_bytes + need - usable, deficit)
        if want > 0:
            self._evict(want, demote, give_back=deficit > 0)

    def _evict(self, want: int, demote: Demotion | None = None, *, give_back: bool = False) -> None:
        """Delete the oldest blocks until `want` bytes are free. Raises TierUnavailable, CorruptBlock."""
        assert self._env is not None
        punch = self._growth.punch if give_back else None
        count = functools.partial(self._counters.add, f"{self.tier}_evictions")
        evict(self._env, self._ledger, want, demote=demote, punch=punch, count=count)

    # -- room for others -----------------------------------------------------------------------------------------------

    def give_back(self, want: int) -> int:
        """Give `want` bytes of its file system to others, or what they are short of if that is more; returns how many
        that were. Takes time (blocks are deleted). Never raises.
        """
        with self._lock:
            if self._env is None or self._growth.room is None:
                return 0
            try:
                if self._growth.growing:
                    self._faults.fault(errors.TierUnavailable(NO_ROOM))
                given = self._growth.give_back(self._env, want, functools.partial(self._evict, give_back=True))
                if given is None:
                    given = self._growth.room.allocated()
                    self._begin_anew("others need the room that it takes")
                return given
            except errors.CorruptBlock as error:
                self._give_up(error)
            except errors.TierUnavailable as error:
                self._faults.fault(error)
            return 0

    def _begin_anew(self, why: str) -> None:
        """Remove everything and begin. Raises TierUnavailable: it cannot begin now, and `_revive` tries again."""
        self._give_up(errors.TierUnavailable(f"{why}: it begins anew"))
        try:
            tier_files.remove(self.directory)
            self._unusable = ""
            self._begin()
        except (OSError, errors.TierUnavailable) as error:
            self._unusable = why
            raise errors.TierUnavailable(f"it cannot begin anew: {error}") from error

    # -- life ----------------------------------------------------------------------------------------------------------

    def _give_up(self, error: Exception) -> errors.TierUnavailable:
        """Close an environment that cannot be trusted any more; `_revive` begins anew."""
        self._faults.fault(error)
        self._unusable = str(error)
        self._retry_at = time.monotonic() + RETRY_S
        env, self._env = self._env, None
        self._ledger = self._new_ledger()
        with self._gate.closed():
            if env is not None:
                env.close()
                self._growth.close()
        return errors.TierUnavailable(str(error))

    def _revive(self) -> None:
        if not (self._unusable or self._absent) or time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + RETRY_S
        try:
            self._begin()
        except errors.TierUnavailable as error:
            if self._unusable:
                raise
            self._wait(error)
            return
        log.info("the %s tier in %s is back", self.tier, self.directory)

    def _wait(self, error: errors.TierUnavailable) -> None:
        """It cannot be opened: try again later. Whoever opened it has been told."""
        self._absent = str(error)
        self._retry_at = self._pause_until = time.monotonic() + RETRY_S

    def maintain(self) -> None:
        """Do what has to be done every few seconds: free dead readers' slots, come back after faults. Never raises."""
        with self._lock:
            try:
                if self._env is None:
                    self._revive()
                elif not self._env.intact():
                    self._give_up(errors.CorruptBlock("its data file was removed or cut"))
                else:
                    if self._env.reader_check():
                        self._pause_until = 0.0
                    if self._growth.deficit:
                        self.give_back(0)
                    elif not self._growth.growing:  # a tier that nobody writes to finds room, too
                        self._may_grow(self._env, STEP)
                    self._usable_bytes = self._growth.usable
                    self._guarded(self._tend)
            except errors.CorruptBlock as error:
                self._give_up(error)
            except errors.TierUnavailable as error:
                self._faults.fault(error)

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """Delete blocks. Raises TierUnavailable."""
        with self._lock:
            env = self._usable_environment()
            try:
                for key, length in env.delete(keys):
                    self._ledger.gone(key, length)
            except errors.CorruptBlock as error:
                raise self._give_up(error) from error

    def sync_and_mark(self) -> None:
        """Make all durable and say so in the stamp: the tier survives a power loss now. Raises TierUnavailable."""
        with self._lock:
            if self._env is None or self._clean:
                return
            self._env.sync()
            try:
                tier_files.left_clean(self.directory, self._env.txnid).store(self.directory)
            except OSError as error:
                raise errors.TierUnavailable(f"the stamp cannot be written: {error}") from error
            self._clean = True

    def close(self) -> None:
        """Sync, mark and close. Never raises for the tier's sake."""
        with self._lock:
            try:
                self.sync_and_mark()
            except (errors.CorruptBlock, errors.TierUnavailable) as error:
                self._faults.fault(error)
            env, self._env, self._unusable, self._absent, self._closed = self._env, None, "", "", True
            with self._gate.closed():
                if env is not None:
                    env.close()
                    self._growth.close()

    @property
    def state(self) -> str:
        """Return "on", "full" (goes on with the room that it has) or "off"."""
        return "off" if self._env is None else "on" if self._growth.growing else "full"

    def stats(self) -> dict[str, Any]:
        """Return state, used_bytes, limit_bytes, usable_bytes and blocks, and the reason if it is off."""
        reason = {"reason": self._unusable or self._absent or None} if self._env is None else {}
        return reason | {
            "state": self.state,
            "used_bytes": self._ledger.used_bytes,
            "limit_bytes": self.limit_bytes,
            "usable_bytes": 0 if self._env is None else self._usable_bytes,
            "blocks": len(self._ledger),
        }
