"""Blocking jobs in threads, the urgent ones first, with a bound on how many run and how many bytes they hold.

Jobs stand in one *line* per source (a store, for instance). A job starts when its line has a slot and its bytes are
free; lines take turns. So a store that hangs keeps its own slots and its own share of the bytes (`shares`), and no job
of another source waits for it. Readahead may only take a part of both, so a reader who waits always finds room at once;
while a more urgent job waits in a line, no other of that line starts. `_pump` decides without awaiting, so its
decisions cannot interleave; it runs whenever a job is submitted, promoted or finished.

The threads are the lane's own: trio.to_thread costs three turns of the event loop and 150 us per job, this one turn and
30 us, and a small file that is not cached waits for one job after the other. They are shared by all lines: every job
that was started has one.

INVARIANT: what is held is the sum of the sizes of the running jobs.
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

from cachefs.block.shares import Shares
from cachefs.errors import StorageUnavailable

log = logging.getLogger(__name__)


class Priority(enum.IntEnum):
    """Who waits for a fill: a reader, or nobody yet (the same file is being read; or perhaps it will be)."""

    DEMAND = 0
    READAHEAD = 1
    PREFETCH = 2


GREED = {Priority.DEMAND: 3.0, Priority.READAHEAD: 1.0, Priority.PREFETCH: 1.0}
"""What a source may hold, as a multiple of what is free (`shares`): readahead leaves as much for those who wait."""
SLOTS = {Priority.DEMAND: 1.0, Priority.READAHEAD: 0.75, Priority.PREFETCH: 0.5}
"""How many of the slots of a line may be taken when one more of these starts."""


@dataclass(eq=False, slots=True)
class Job:
    """`work` runs in a thread; then `finished` gets its error (or None) and who waited for it at last, in the trio
    thread, exactly once."""

    work: Callable[[], None]
    finished: Callable[[Exception | None, Priority], None]
    size: int
    priority: Priority
    started: bool = field(default=False, init=False)
    line: _Line = field(init=False)


class _Line:
    """The jobs of one source."""

    __slots__ = ("queues", "running", "slots", "source")

    def __init__(self, source: object) -> None:
        self.source = source
        self.slots = 1
        self.queues: tuple[deque[Job], ...] = tuple(deque() for _ in Priority)
        self.running = 0

    def has_slot(self, priority: Priority) -> bool:
        """Whether one more job may run."""
        return not self.running or self.running < int(self.slots * SLOTS[priority])


class Lane:
    """One kind of jobs. Used from the trio thread only."""

    def __init__(self, *, budget_bytes: int) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ready: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = self._idle = 0
        self._closed = False
        self._shares = Shares(budget_bytes)
        self._lines: dict[object, _Line] = {}
        """By source: the lines that have jobs, whoever's turn is next first."""

    @property
    def held_bytes(self) -> int:
        """What the running jobs hold."""
        return self._shares.held_bytes

    def waiting_readahead(self, source: object) -> int:
        """How many readahead jobs of a source have not started."""
        line = self._lines.get(source)
        return 0 if line is None else len(line.queues[Priority.READAHEAD])

    def under_way(self, source: object) -> int:
        """How many jobs of a source run, or wait for their turn."""
        line = self._lines.get(source)
        return 0 if line is None else line.running + sum(map(len, line.queues))

    def submit(self, job: Job, source: object, slots: int) -> None:
        """Run the job when its turn comes; `slots`: how many of this source may run at once, from now on."""
        line = self._lines.get(source)
        if line is None:
            line = self._lines[source] = _Line(source)
        line.slots = slots
        job.line = line
        line.queues[job.priority].append(job)
        self._pump()

    def promote(self, job: Job, priority: Priority) -> None:
        """A job is wanted more urgently now: let it overtake, if it has not started."""
        if not job.started and job.priority > priority:
            job.line.queues[job.priority].remove(job)
            job.priority = priority
            job.line.queues[priority].append(job)
            self._pump()

    def close(self) -> None:
        """Forget all jobs: no `finished` is called any more, not even of those that run."""
        self._closed = True
        for line in self._lines.values():
            for queue in line.queues:
                queue.clear()
        for _ in range(self._threads):
            self._ready.put(None)

    def _pump(self) -> None:
        while (job := self._next()) is not None:
            job.started = True
            job.line.running += 1
            self._shares.take(job.line.source, job.size)
            if self._idle > 0:
                self._idle -= 1
            elif not self._start_thread():
                self._release(job)
                job.finished(StorageUnavailable("no thread can be started for a fill"), job.priority)
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
        """Take the next job out of its line; None when no line has one that may start."""
        for priority in Priority:
            for line in self._lines.values():
                queue = line.queues[priority]
                if not queue or not line.has_slot(priority):
                    continue
                if any(line.queues[:priority]):
                    continue
                if self._shares.fits(line.source, queue[0].size, greed=GREED[priority]):
                    self._lines[line.source] = self._lines.pop(line.source)  # behind the others
                    return queue.popleft()
        return None

    def _release(self, job: Job) -> None:
        line = job.line
        line.running -= 1
        self._shares.give_back(line.source, job.size)
        if not line.running and not any(line.queues):  # a source that is gone leaves nothing behind
            del self._lines[line.source]

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
        self._idle += 1
        self._release(job)
        try:
            job.finished(error, job.priority)
        except Exception:
            log.exception("the end of a job failed")  # raised from here it would end the event loop
        self._pump()
