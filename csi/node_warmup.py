"""Loads what a volume's `warmup` names, and lets pods wait for it (`warmupWait`).

The work is a job of the node's agent (`cachefs.agent.jobs`) that runs in the background: it goes on whatever becomes
of the call that began it, of the plugin, and of the pod. A publish call that is to wait holds on for a while and then
fails as UNAVAILABLE with how far it is; kubelet shows that as an event of the pod and calls again. What is known about
a warm-up is in a label of the mount, so any plugin goes on where the last one stopped:

    warm = {"since": seconds since the epoch, "job": of the agent, "done": false}

A pod starts when everything is loaded, or when the limit is over, counted from the first call; then the job goes on
beside it. Without `warmupWait` nobody waits, and what goes wrong is in the log. The agent forgets jobs when it dies:
the next call begins another one, which leaves out what is there.

INVARIANT: what is wrong with a warm-up never keeps a pod waiting for longer than its limit.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachefs import errors
from cachefs.agent import framing, launch, messages
from cachefs.config import CacheConfig
from cachefs.runtime import mount_id
from csi.locks import CallLocks
from csi.node_stats import agent_status
from csi.pod_events import Listener
from csi.status import Refused, unavailable

log = logging.getLogger(__name__)

LABEL = "warm"
FIRST_HOLD_S = 10.0
"""How long the call waits that begins a warm-up: then the pod's events say that there is one."""
HOLD_S = 100.0
"""How long later ones wait at most; kubelet gives each two minutes."""
MARGIN_S = 2.0
"""Before the end of a call's time it has to be answered."""
LOOK_S = 0.5
WAITERS = 64
"""Calls that wait at once; others are told how far it is. Each takes a thread of the server."""
ANSWER_S = 10.0
_OVER = frozenset({"done", "incomplete", "stopped", "failed"})
_ALL_NODES = 0
_THIS_NODE = -1
NOBODY = Listener()


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be warm before a pod starts."""

    mountpoint: str
    paths: Sequence[str]
    wait_s: float
    """0: the pod does not wait; infinity: for as long as it takes."""
    group: str = ""

    @property
    def mount_id(self) -> str:
        """The name by which the agent knows the mount."""
        return mount_id(self.mountpoint)


class WarmUps:
    """Begins warm-ups and waits for them. Any thread; calls BLOCK."""

    def __init__(self, cache: CacheConfig, now: Callable[[], float] = time.time) -> None:
        self._cache = cache
        self._now = now
        self._waiters = threading.BoundedSemaphore(WAITERS)
        self._beginning = CallLocks("warm-up of")
        self._look = threading.Lock()
        self._jobs: tuple[float, dict[str, Any]] = (-math.inf, {})
        """What the agent said last, and when (monotonic): all who wait share one question."""

    def attend(
        self,
        order: Order,
        read: Callable[[], str | None],
        keep: Callable[[str], object],
        left_s: float | None,
        pod: Listener = NOBODY,
    ) -> None:
        """Begin a warm-up if none was begun, and wait for it if the order says so.

        `read` returns the label of the mount as it is now, `keep` writes it; `left_s`: the time that the call has,
        None: any; `pod` is told. Raises Refused (UNAVAILABLE) when the pod has to wait longer, with how far it is;
        (ABORTED) when another call is beginning it.
        """
        known = _parse(read())
        if known.get("done"):
            pod.over("nothing is waited for any more")
            return
        first = "since" not in known
        since = float(known.get("since", self._now()))
        rest_s = since + order.wait_s - self._now()
        try:
            job = self._settle(order, read, keep, since)
            if job is None:
                pod.over("nothing is waited for any more")
                return
            if order.wait_s > 0:
                self._wait(order, job, rest_s, _hold(left_s, first=first), pod)
            if order.wait_s > 0 or job["state"] in _OVER:
                keep(_label(since, job, done=True))
        except Refused:
            raise
        except errors.CachefsError as error:
            if rest_s > 0:
                keep(_label(since, {"job": ""}))
                raise unavailable(f"warming up: {error}") from error
            log.warning("the warm-up of %s: %s", order.mountpoint, error)

    def _settle(
        self, order: Order, read: Callable[[], str | None], keep: Callable[[str], object], since: float
    ) -> dict[str, Any] | None:
        """Return the job of a mount, a new one if there is none or it failed and pods wait; None: it is warm."""
        with self._beginning.alone(order.mountpoint, wait_s=ANSWER_S):
            known = _parse(read())
            if known.get("done"):
                return None
            job = self._job_of(known)
            lost = job is not None and job["state"] in _OVER and job["state"] != "done"
            if job is None or (lost and order.wait_s > 0):
                job = self._begin(order)
                keep(_label(float(known.get("since", since)), job))
            return job

    def _wait(self, order: Order, job: Mapping[str, Any], rest_s: float, hold_s: float, pod: Listener) -> None:
        """Return when a job has loaded everything, or the limit is over. Raises Refused (UNAVAILABLE)."""
        end = time.monotonic() + rest_s
        give_up = time.monotonic() + hold_s
        if not self._waiters.acquire(blocking=False):
            pod.waiting(progress(job))
            raise unavailable(f"warming up: {progress(job)}")
        try:
            while True:
                if job["state"] == "done":
                    pod.over(f"loaded: {progress(job)}")
                    return
                if time.monotonic() >= end:
                    log.warning(
                        "%s is not warm (%s) and the limit of %g s is over: its pods start now",
                        order.mountpoint, progress(job), order.wait_s,
                    )  # fmt: skip
                    pod.too_long(f"the limit of {order.wait_s:g} s is over, the pod starts now: {progress(job)}")
                    return
                pod.waiting(progress(job))
                if job["state"] in _OVER or time.monotonic() >= give_up:
                    raise unavailable(f"warming up: {progress(job)}")
                time.sleep(max(0.0, min(LOOK_S, end - time.monotonic(), give_up - time.monotonic())))
                job = self._job_of(job) or {**job, "state": "failed", "error": "the agent was started anew"}
        finally:
            self._waiters.release()

    def _job_of(self, known: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what the agent says of a job now; None: it does not know it. Raises AgentUnavailable."""
        identity = known.get("job")
        if not identity:
            return None
        with self._look:
            seen, jobs = self._jobs
            if time.monotonic() - seen > LOOK_S or identity not in jobs:
                jobs = {job["job"]: job for job in agent_status(self._cache).get("jobs", ())}
                self._jobs = (time.monotonic(), jobs)
        found: dict[str, Any] | None = jobs.get(identity)
        return found

    def _begin(self, order: Order) -> dict[str, Any]:
        """Start a job in the background and return its state. Raises CachefsError."""
        work = messages.Work(
            id=1, mount_id=order.mount_id, verb="warm", background=True,
            nodes=_ALL_NODES if order.group else _THIS_NODE, group=order.group,
        )  # fmt: skip
        paths = [path.strip("/").encode("utf-8", "surrogateescape") for path in order.paths]
        with launch.running_agent(self._cache, ANSWER_S) as connection:
            frames = framing.answers()
            job = _next_job(connection, frames, framing.encode(work), until_over=False)
            feed = messages.Paths(id=2, job=job["job"], paths=paths, last=True)
            return _next_job(connection, frames, framing.encode(feed), until_over=True)


def _next_job(connection: Any, frames: framing.Frames[Any], frame: bytes, *, until_over: bool) -> dict[str, Any]:
    """Send a message and return the next state of the job; with `until_over` only after the message was answered.

    Closing the connection ends a job whose paths are not all known, so the answer is waited for.
    """
    job: dict[str, Any] = {}
    taken = not until_over
    try:
        connection.sendall(frame)
        while not (job and taken):
            received = connection.recv(65536)
            if not received:
                raise errors.AgentUnavailable("the agent hung up")
            for answer in frames.feed(received):
                if isinstance(answer, messages.Failure):
                    raise launch.failure_error(answer)
                if isinstance(answer, messages.JobState):
                    job = answer.job
                taken = taken or isinstance(answer, messages.Done)
    except OSError as error:
        raise errors.AgentUnavailable(f"the agent did not answer: {error}") from error
    return job


def progress(job: Mapping[str, Any]) -> str:
    """Return one line about a job, for the events of a pod."""
    state, total = job.get("state"), job.get("bytes", 0)
    if state == "walking":
        return f"{job.get('files', 0)} files found so far"
    if state == "failed":
        return f"{job.get('error') or 'it failed'}"
    if state == "stopped":
        return "the job was stopped"
    done = job.get("done_bytes", 0)
    percent = 100 * done // total if total else 100
    line = f"{percent} % ({_size(done)} of {_size(total)} in {job.get('files', 0)} files)"
    if state == "incomplete":
        examples = "; ".join(f"{each['path']}: {each['why']}" for each in job.get("examples", ())[:3])
        return f"{line}, and the rest cannot be loaded: {examples or 'blocks left the cache again'}"
    left_s = job.get("left_s")
    return f"{line}, about {left_s:.0f} s left" if left_s else line


def _size(count: int) -> str:
    for factor, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _hold(left_s: float | None, *, first: bool) -> float:
    hold_s = FIRST_HOLD_S if first else HOLD_S
    return hold_s if left_s is None else max(0.0, min(hold_s, left_s - MARGIN_S))


def _label(since: float, job: Mapping[str, Any], *, done: bool = False) -> str:
    return json.dumps({"since": since, "job": job["job"], "done": done})


def _parse(label: str | None) -> dict[str, Any]:
    try:
        found = json.loads(label or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
