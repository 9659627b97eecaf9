"""Blocking jobs in threads, demand before readahead, with a bound on how many run and how many bytes they hold.

A job starts when a slot and its bytes are free. Readahead may only take a part of both, so a reader who waits
always finds room at once; while a demand job waits, no readahead job starts. `_pump` decides without awaiting, so
its decisions cannot interleave; it runs whenever a job is submitted, promoted or finished.

The threads are the lane's own: trio.to_thread costs three turns of the event loop and 150 us per job, this one turn and
30 us, and a small file that is not cached waits for one job after the other.

INVARIANT: `held_bytes` is the sum of the sizes of the running jobs, and exceeds the budget only while a single job
runs that is larger than the whole budget.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import trio

from cachefs.errors import StorageUnavailable

log = logging.getLogger(__name__)


class Priority(enum.IntEnum):
    """Who waits for a fill: a reader, or nobody yet."""

    DEMAND = 0
    READAHEAD = 1


@dataclass(eq=False, slots=True)
class Job:
    """`work` runs in a thread; then `finished` gets its error (or None) in the trio thread, exactly once."""

    work: Callable[[], None]
    finished: Callable[[Exception | None], None]
    size: int
    priority: Priority
    started: bool = field(default=False, init=False)


class Lane:
    """One kind of jobs. Used from the trio thread only."""

    def __init__(
        self,
        *,
        slots: int,
        budget_bytes: int,
        readahead_slots: int,
        readahead_bytes: int,
    ) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ready: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = self._idle = 0
        self._closed = False
        self._slots = (slots, max(1, readahead_slots))
        self._bytes = (budget_bytes, readahead_bytes)
        self._queues: tuple[deque[Job], deque[Job]] = (deque(), deque())
        self._running = [0, 0]
        self.held_bytes = 0

    @property
    def demand(self) -> int:
        """How many demand jobs run or wait."""
        return self._running[Priority.DEMAND] + len(self._queues[Priority.DEMAND])

    @property
    def waiting_readahead(self) -> int:
        """How many readahead jobs have not started."""
        return len(self._queues[Priority.READAHEAD])

    def submit(self, job: Job) -> None:
        """Run the job when its turn comes."""
        self._queues[job.priority].append(job)
        self._pump()

    def promote(self, job: Job) -> None:
        """A reader waits for this readahead job now: let it overtake, if it has not started."""
        if not job.started and job.priority is Priority.READAHEAD:
            self._queues[Priority.READAHEAD].remove(job)
            job.priority = Priority.DEMAND
            self.submit(job)

    def close(self) -> None:
        """Forget all jobs: no `finished` is called any more, not even of those that run."""
        self._closed = True
        for queue in self._queues:
            queue.clear()
        for _ in range(self._threads):
            self._ready.put(None)

    def _pump(self) -> None:
        while (job := self._next()) is not None:
            job.started = True
            self._running[job.priority] += 1
            self.held_bytes += job.size
            if self._idle > 0:
                self._idle -= 1
            elif not self._start_thread():
                self._running[job.priority] -= 1
                self.held_bytes -= job.size
                job.finished(StorageUnavailable("no thread can be started for a fill"))
                continue
            self._ready.put(job)

    def _start_thread(self) -> bool:
        """Start one more thread; returns whether there is one for the next job, now or when it is through with its
        own.
        """
        try:
            threading.Thread(target=self._work, name=f"lane-{self._threads + 1}", daemon=True).start()
        except RuntimeError as error:
            log.warning("no thread for a fill: %s", error)
            if not self._threads:
                return False
            self._idle -= 1  # the next thread that gets free takes this job
            return True
        self._threads += 1
        return True

    def _next(self) -> Job | None:
        for priority, queue in zip(Priority, self._queues, strict=True):
            if not queue:
                continue
            running = self._running[0] + self._running[1]
            fits = self.held_bytes + queue[0].size <= self._bytes[priority] and running < self._slots[priority]
            return queue.popleft() if fits or not running else None
        return None

    def _work(self) -> None:
        """One thread: jobs, one after the other, until the lane is closed."""
        while (job := self._ready.get()) is not None:
            error: Exception | None = None
            try:
                job.work()
            except Exception as caught:  # noqa: BLE001 - a job's error belongs to whoever waits for the job
                error = caught
            try:
                self._token.run_sync_soon(self._done, job, error)
            except trio.RunFinishedError:
                return  # the agent has ended; nobody waits for anything
            del job, error  # a thread that waits must not keep the last job's bytes

    def _done(self, job: Job, error: Exception | None) -> None:
        if self._closed:
            return
        self._running[job.priority] -= 1
        self._idle += 1
        self.held_bytes -= job.size
        try:
            job.finished(error)
        except Exception:
            log.exception("the end of a job failed")  # raised from here it would end the event loop
        self._pump()
