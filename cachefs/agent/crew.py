"""A warm-up on several nodes at once: `cachefs warmup --nodes`.

    command --paths--> CrewJob --+--> the Job of this node, if it is one of them
                                 +--> a leg for each other node --orders--> its agent (`cachefs.agent.commissions`)

All nodes walk the same paths by themselves. The blocks go along a tree (`peer.tree`), so the store gives each of them
once, and their owner gives them to few. A leg hands the paths over in parts and asks how far the node is; to whoever
started it, the whole is one job whose figures are sums, with those of each node in `nodes`.

What always holds: a node that does not answer for `GONE_S`, refuses, or was started again has failed, is named, and
holds up nobody else. Of the paths, as many are kept as the slowest node has not taken, at most `WINDOW` parts.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import trio
import xxhash

from cachefs import errors
from cachefs.agent.commissions import Order, Report
from cachefs.agent.jobs import OVER, Figures, Job, State, Verb
from cachefs.agent.volumes import Volume
from cachefs.block.ports import BlockSource

log = logging.getLogger(__name__)

ASK_S = 0.5
GONE_S = 15.0
"""So long a node may give no answer: less than that is a pause of its agent, or one that is started again."""
STOP_S = 3.0
WINDOW = 4
THREADS = 32
MOST_EXAMPLES = 1000
FIGURES = tuple(field.name for field in dataclasses.fields(Figures))
_ORDER = (State.WALKING, State.FETCHING, State.CHECKING)


class Colleague(NamedTuple):
    """A node that mounts a volume, this one too."""

    node_id: str
    name: str
    groups: tuple[str, ...]
    is_self: bool


class Colleagues(Protocol):
    """The other nodes, as far as jobs need them. Trio thread, but where it says otherwise."""

    def colleagues(self, volume: Volume) -> list[Colleague]:
        """Return all nodes that mount a volume, this one too. Raises UsageError when this node has no peers."""
        ...

    def send_order(self, volume: Volume, node_id: str, order: Order) -> Report:
        """Ask a node about a job. BLOCKS; any thread. Raises NotFound: it has none; StorageUnavailable: no answer."""
        ...

    def crew_source(self, volume: Volume, crew: Sequence[str]) -> BlockSource:
        """Return where a node of a crew gets blocks that all of it want."""
        ...


def choose(colleagues: Sequence[Colleague], count: int, group: str, seed: str) -> list[Colleague]:
    """Return those that are meant: of a group ("": of all) all (0) or so many, the same ones every time.

    Chosen by rendezvous (Thaler and Ravishankar, 1998), so a node that comes or goes changes one place at most. Raises
    UsageError when there are not as many.
    """
    found = [each for each in colleagues if not group or group in each.groups]
    of = f" of group {group}" if group else ""
    if not found:
        raise errors.UsageError(f"no node{of} mounts this (`cachefs peers` shows them)")
    if count > len(found):
        raise errors.UsageError(f"{count} nodes{of} were asked for, and {len(found)} mount this (`cachefs peers`)")
    found.sort(key=lambda each: (xxhash.xxh3_64_intdigest(f"{seed}\0{each.node_id}".encode()), each.node_id))
    return sorted(found[: count or None], key=lambda each: (each.name, each.node_id))


class _Leg:
    """The part of one other node."""

    def __init__(self, colleague: Colleague) -> None:
        self.colleague = colleague
        self.begun = self.over = False
        self.parts = 0
        """So many it has taken."""
        self.state: dict[str, Any] = {}
        self.error = ""
        self.heard_at = trio.current_time()

    def fail(self, why: str) -> None:
        """It does nothing any more."""
        self.error, self.over = why, True


class CrewJob:
    """A job on several nodes; to commands it is as a `Job`. Trio thread."""

    def __init__(
        self,
        own: Job | None,
        order: Order,
        volume: Volume,
        mountpoint: str,
        nodes: Sequence[Colleague],
        send: Callable[[Volume, str, Order], Report],
        *,
        background: bool,
    ) -> None:
        """`own`: the job of this node, if it is one of `nodes`; `order`: what the others are asked."""
        self.identity = own.identity if own is not None else f"crew-{secrets.token_hex(2)}"
        self.verb = Verb(order.verb)
        self.background = background
        self.over, self.fed, self.consent = trio.Event(), trio.Event(), trio.Event()
        self._own = own
        self._self_node = next((each for each in nodes if each.is_self), None)
        self._order = order
        self._volume, self._mountpoint = volume, mountpoint
        self._send = send
        self._legs = [_Leg(each) for each in nodes if not each.is_self]
        self._parts: dict[int, tuple[tuple[bytes, ...], bool]] = {}
        self._count = 0
        self._changed = trio.Event()
        self._threads = trio.CapacityLimiter(THREADS)
        self._scope = trio.CancelScope()
        self._stopped = False
        self._began, self._began_at = time.monotonic(), time.time()
        self._ended: float | None = None

    # -- from outside --------------------------------------------------------------------------------------------------

    async def feed(self, paths: list[bytes], *, last: bool) -> None:
        """See `Job.feed`: returns when the slowest node is not too far behind."""
        while self._parts and self._count - min(self._parts) >= WINDOW and not self.over.is_set():
            await self._changed.wait()
        self._parts[self._count] = tuple(paths), last
        self._count += 1
        self._tell()
        self._forget()
        if self._own is not None:
            await self._own.feed(paths, last=last)
        if last:
            self.fed.set()

    def stop(self) -> None:
        """End it everywhere; it is over a moment later."""
        self._stopped = True
        self._scope.cancel()

    async def run(self) -> None:
        """Do it. Raises nothing."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    if self._own is not None:
                        nursery.start_soon(self._own.run)
                    for leg in self._legs:
                        nursery.start_soon(self._lead, leg)
        finally:
            with trio.CancelScope(shield=True):
                await self._stop_others()
            self._ended = time.monotonic()
            self.fed.set()
            self.over.set()
            self._tell()
            log.info("%s %s of %s on %d nodes is over", self.verb, self.identity, self._mountpoint, self._node_count)

    @property
    def _node_count(self) -> int:
        return len(self._legs) + (self._own is not None)

    # -- other nodes ---------------------------------------------------------------------------------------------------

    async def _lead(self, leg: _Leg) -> None:
        """Have one node do its part."""
        while not leg.over:
            moved = await self._ask(leg)
            if leg.over:
                break
            if leg.parts not in self._parts:
                with trio.move_on_after(ASK_S):
                    await self._changed.wait()
            elif not moved:
                await trio.sleep(ASK_S)
        self._forget()

    async def _ask(self, leg: _Leg) -> bool:
        """Ask once; returns whether it took a part."""
        paths, last = self._parts.get(leg.parts, ((), False))
        order = dataclasses.replace(
            self._order, begin=not leg.begun, crew=() if leg.begun else self._order.crew,
            part=leg.parts, paths=paths, filled=leg.parts in self._parts, last=last,
        )  # fmt: skip
        try:
            report = await self._sent(leg, order)
        except (errors.NotFound, errors.UsageError) as error:
            leg.fail(str(error))
            return False
        except errors.CachefsError as error:
            if trio.current_time() > leg.heard_at + GONE_S:
                leg.fail(f"it does not answer: {error}")
            return False
        leg.heard_at = trio.current_time()
        leg.begun = True
        leg.state, leg.over = report.job, report.over
        moved, leg.parts = report.parts > leg.parts, report.parts
        if moved:
            self._forget()
        return moved

    async def _sent(self, leg: _Leg, order: Order) -> Report:
        return await trio.to_thread.run_sync(
            self._send, self._volume, leg.colleague.node_id, order, limiter=self._threads, abandon_on_cancel=True
        )

    async def _stop_others(self) -> None:
        """Tell those who are still at it that it is over; who cannot be told ends by himself."""

        async def stop(leg: _Leg) -> None:
            order = dataclasses.replace(self._order, begin=False, crew=(), stop=True)
            try:
                leg.state = (await self._sent(leg, order)).job
            except errors.CachefsError as error:
                log.debug("%s could not be told that the job is over: %s", leg.colleague.name, error)

        with trio.move_on_after(STOP_S):
            async with trio.open_nursery() as nursery:
                for leg in self._legs:
                    if leg.begun and not leg.over:
                        nursery.start_soon(stop, leg)

    def _forget(self) -> None:
        """Drop parts that all have taken."""
        least = min((leg.parts for leg in self._legs if not leg.over), default=self._count)
        for number in [number for number in self._parts if number < least]:
            del self._parts[number]
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # -- what is said of it --------------------------------------------------------------------------------------------

    def describe(self, examples: int = 10) -> dict[str, Any]:
        """Return what docs/WARMUP.md says of a job. Any thread."""
        nodes = self._nodes()
        now = self._ended or time.monotonic()
        lefts = [node["left_s"] for node in nodes if node.get("left_s") is not None]
        failed = [node for node in nodes if node["error"]]
        problems = sum(node.get("problems", 0) for node in nodes)
        told = [
            {"node": node["node"], **example} for node in nodes for example in node.get("examples", ())
        ]  # fmt: skip
        return {
            "job": self.identity,
            "verb": str(self.verb),
            "tier": self._order.tier or None,
            "mountpoint": self._mountpoint,
            "state": str(self._state(nodes)),
            "error": None,
            "background": self.background,
            "started_at": self._began_at,
            "elapsed_s": round(now - self._began, 3),
            "capacity_bytes": min((node["capacity_bytes"] for node in nodes if node.get("capacity_bytes")), default=0),
            **{name: sum(node.get(name, 0) for node in nodes) for name in FIGURES},
            "done_bytes": sum(node.get("done_bytes", 0) for node in nodes),
            "bytes_per_s": sum(node.get("bytes_per_s", 0) for node in nodes),
            "left_s": max(lefts, default=None),
            "problems": problems + len(failed),
            "examples": told[:examples],
            "nodes": [{key: value for key, value in node.items() if key != "examples"} for node in nodes],
        }

    @property
    def examples(self) -> int:
        """How many problems can be named."""
        return MOST_EXAMPLES

    def _nodes(self) -> list[dict[str, Any]]:
        nodes = []
        if self._own is not None and self._self_node is not None:
            nodes.append(_node(self._self_node, self._own.describe(MOST_EXAMPLES), self._own.error))
        nodes += [_node(leg.colleague, leg.state, leg.error or leg.state.get("error") or "") for leg in self._legs]
        return sorted(nodes, key=lambda node: (node["node"], node["node_id"]))

    def _state(self, nodes: Sequence[dict[str, Any]]) -> State:
        states = [State(node["state"]) for node in nodes]
        if not self.over.is_set():
            return min((state for state in states if state in _ORDER), key=_ORDER.index, default=State.WALKING)
        if self._stopped:
            return State.STOPPED
        if all(state is State.DONE for state in states):
            return State.DONE
        return State.FAILED if all(state is State.FAILED for state in states) else State.INCOMPLETE


def _node(colleague: Colleague, state: dict[str, Any], error: str) -> dict[str, Any]:
    """Return one node's part, whatever it said of it: what is no number counts nothing."""
    told = {name: _number(state.get(name)) for name in (*FIGURES, "done_bytes", "bytes_per_s", "capacity_bytes")}
    said = State.FAILED if error else state.get("state")
    return {
        "node": colleague.name,
        "node_id": colleague.node_id,
        "job": str(state.get("job", "")) or None,
        "state": str(said if said in set(State) else State.WALKING),
        "error": error or None,
        **told,
        "left_s": state.get("left_s") if _number(state.get("left_s")) else None,
        "problems": _number(state.get("problems")),
        "examples": [
            {"path": str(each.get("path", "")), "why": str(each.get("why", ""))}
            for each in state.get("examples") or () if isinstance(each, dict)
        ],
    }  # fmt: skip


def _number(value: object) -> int:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return int(value) if fits and isinstance(value, (int, float)) else 0


__all__ = ["OVER", "Colleague", "Colleagues", "CrewJob", "choose"]
