"""Tells a pod's events (`kubectl describe pod`) that its start waits for a warm-up, how far that is, and how it ends.

    WarmingUp       Normal    the start waits; written again with the progress, the same event with a higher count
    WarmedUp        Normal    the wait is over
    WarmUpTooLong   Warning   the limit of `warmupWait` is over: the pod starts, and loading goes on

kubelet shows what a publish call that failed has said; these events come while calls wait, and say when it is over.

A thread of its own asks the API (`csi.kube`), so a call never waits for it. Progress is written every `PERIOD_S` for a
pod at most, whatever its volumes and calls are; the end of a wait is written once. When the API does not take events,
one warning says so, and progress is not tried again for `RESPITE_S`.

INVARIANT: nothing in here raises or blocks for whoever tells, and what is remembered is bounded: of a pod that went
away while it waited, until `MOST_WAITS` others have come.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from csi.credentials import POD_NAME, POD_NAMESPACE, POD_UID
from csi.kube import NORMAL, WARNING, KubeClient, PodReference, event_name

log = logging.getLogger(__name__)

WAITING, OVER, TOO_LONG = "WarmingUp", "WarmedUp", "WarmUpTooLong"
PERIOD_S = 10.0
RESPITE_S = 60.0
MOST_WAITS = 4096
MOST_PENDING = 256
"""Events that are still to be written; more are dropped."""
END_S = 6.0


@dataclass(slots=True)
class _Wait:
    """One pod that waits for one volume."""

    event: str = ""
    """Name of the event with its progress; empty: there is none yet."""
    count: int = 0


class PodEvents:
    """Writes events from `start` to `close`. Any thread may tell."""

    def __init__(
        self, kube: KubeClient, *, period_s: float = PERIOD_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._kube = kube
        self._period_s = period_s
        self._now = now
        self._lock = threading.Lock()
        self._waits: OrderedDict[tuple[PodReference, str], _Wait] = OrderedDict()
        self._told: OrderedDict[PodReference, float] = OrderedDict()
        """When progress was last written, by pod."""
        self._pause_until = -math.inf
        self._pending: queue.Queue[Callable[[], object] | None] = queue.Queue(MOST_PENDING)
        self._thread = threading.Thread(target=self._run, name="pod-events", daemon=True)

    def start(self) -> None:
        """Begin to write. Returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Write what is pending, for some seconds at most, and end."""
        with contextlib.suppress(queue.Full):
            self._pending.put(None, timeout=END_S / 2)
        if self._thread.is_alive():
            self._thread.join(END_S)

    def listener(self, context: Mapping[str, str], volume_id: str) -> Listener:
        """Return what tells the pod of a publish call; nobody is told where kubelet does not say which pod that is."""
        name, namespace = context.get(POD_NAME, ""), context.get(POD_NAMESPACE, "")
        pod = PodReference(namespace, name, context.get(POD_UID, "")) if name and namespace else None
        return Listener(self, pod, volume_id)

    # -- what is told ------------------------------------------------------------------------------------------------

    def waiting(self, pod: PodReference, volume_id: str, text: str) -> None:
        """The start of a pod waits: `text` says how far it is."""
        now = self._now()
        with self._lock:
            wait = self._waits.setdefault((pod, volume_id), _Wait())
            self._waits.move_to_end((pod, volume_id))
            if len(self._waits) > MOST_WAITS:
                self._waits.popitem(last=False)
            if now < max(self._told.get(pod, -math.inf) + self._period_s, self._pause_until):
                return
            self._told[pod] = now
            self._told.move_to_end(pod)
            if len(self._told) > MOST_WAITS:
                self._told.popitem(last=False)
        self._later(lambda: self._write_progress(pod, wait, f"volume {volume_id}: {text}"))

    def over(self, pod: PodReference, volume_id: str, reason: str, text: str, kind: str) -> None:
        """The wait of a pod is over; one that did not wait is not told."""
        with self._lock:
            waited = self._waits.pop((pod, volume_id), None)
        if waited is not None:
            self._later(lambda: self._write(pod, reason, f"volume {volume_id}: {text}", kind))

    # -- writing -----------------------------------------------------------------------------------------------------

    def _later(self, act: Callable[[], object]) -> None:
        try:
            self._pending.put_nowait(act)
        except queue.Full:
            log.debug("an event of a pod is dropped: %d are still to be written", MOST_PENDING)

    def _run(self) -> None:
        while (act := self._pending.get()) is not None:
            try:
                act()
            except Exception:
                log.exception("an event of a pod could not be written")

    def _write_progress(self, pod: PodReference, wait: _Wait, text: str) -> None:
        if self._now() < self._pause_until:
            return  # it was asked for before the API failed
        if wait.event and self._kube.follow_event(pod, wait.event, text, wait.count + 1):
            wait.count += 1
            return
        wait.event, wait.count = "", 0  # there is none yet, or it is gone: events live for an hour
        name = event_name(pod)
        if self._write(pod, WAITING, text, NORMAL, name):
            wait.event, wait.count = name, 1

    def _write(self, pod: PodReference, reason: str, text: str, kind: str, name: str = "") -> bool:
        written = self._kube.emit_event(pod, reason, text, kind, name=name)
        self._pause_until = -math.inf if written else self._now() + RESPITE_S
        return written


@dataclass(frozen=True, slots=True)
class Listener:
    """The pod of a publish call, as a warm-up of one volume tells it. Without events, or without a pod: nobody."""

    events: PodEvents | None = None
    pod: PodReference | None = None
    volume_id: str = ""

    def waiting(self, text: str) -> None:
        """Its start waits, and is so far."""
        if self.events is not None and self.pod is not None:
            self.events.waiting(self.pod, self.volume_id, text)

    def over(self, text: str) -> None:
        """It starts."""
        if self.events is not None and self.pod is not None:
            self.events.over(self.pod, self.volume_id, OVER, text, NORMAL)

    def too_long(self, text: str) -> None:
        """It starts although not everything is there."""
        if self.events is not None and self.pod is not None:
            self.events.over(self.pod, self.volume_id, TOO_LONG, text, WARNING)
