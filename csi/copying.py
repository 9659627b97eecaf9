"""Background work of the controller: copy a prefix into another one, delete a big prefix.

    call (CreateVolume, DeleteVolume) --> Jobs.copy / Jobs.delete --> a job's thread (two at a time)
            ^  waits some seconds, then                                 |  some requests in flight
            |  "copying 3,412 of 10,000"                                v
            +-- progress <------------------ record "jobs/<id>" <-- batch by batch

The caller asks again until the job is over, as Kubernetes' sidecars do when they hear ABORTED. That is also what lets
a job go on after a crash: no credentials are kept, so it needs a call that brings some (`open_admin`). What is done
stays done: the record says how far a copy is, and what is deleted is not listed any more.

A copy is of a moment: the source is listed once, into a manifest below `.cachefs/jobs/`, and each object is copied only
if it is still that version. When one is not, the job fails (StaleObject), and the next call begins it again with a new
listing; objects that were copied already and did not change are left out then.

INVARIANTS: a job writes and deletes below its own prefix only, which ends with a slash and is never empty. A copy never
begins in a prefix that holds objects. One job for an id at a time.

Any thread; `copy` and `delete` BLOCK for up to `wait_s`.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cachefs.errors import CachefsError, StorageUnavailable, UsageError
from cachefs.store.admin import BucketAdmin
from cachefs.store.manifest import HIDDEN
from csi.records import VolumeRecords
from csi.status import worded
from csi.transfers import Cancelled, Copy, Deletion, Steps

log = logging.getLogger(__name__)

KIND = "jobs"
"""What records of jobs are called."""
THREADS = 2
"""Jobs at work at once; more wait for their turn."""
WAIT_S = 5.0
"""How long a call waits for its job: a small one is over within it."""
CLOSE_S = 10.0
OpenAdmin = Callable[[], BucketAdmin]
"""Opens the bucket with the credentials of the call; the job closes it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is."""

    verb: str
    """"copying" or "deleting"."""
    done: int
    """Objects."""
    total: int | None
    """Objects, None: not known (yet)."""
    ready: bool
    """Whether it is over, and well."""
    error: str = ""
    """Why the last try ended before its time."""

    @property
    def text(self) -> str:
        """One line for a person: "copying 3,412 of 10,000"."""
        if self.ready:
            return f"{self.verb} {self.done:,} objects is done"
        counted = f"{self.verb} {self.done:,}" + ("" if self.total is None else f" of {self.total:,}") + " objects"
        return f"{counted}; the last try failed: {self.error}" if self.error else counted


class Jobs:
    """All jobs of a controller. `close` it at the end: what is not done goes on with a later call."""

    def __init__(self, records: VolumeRecords, *, threads: int = THREADS) -> None:
        self._records = records
        self._lock = threading.Lock()
        self._running: dict[str, _Job] = {}
        self._errors: dict[str, str] = {}
        self._turns = threading.BoundedSemaphore(threads)
        self._closed = False

    def copy(
        self,
        job_id: str,
        open_admin: OpenAdmin,
        *,
        source_prefix: str,
        target_prefix: str,
        wait_s: float = WAIT_S,
    ) -> Progress:
        """Copy all objects below one prefix to the same places below another, in the bucket of `open_admin`.

        Begins the job, goes on with it, or looks how far it is; the caller asks again until it is `ready`. A finished
        job stays known until `delete` or `forget` with its id. Raises UsageError for prefixes that cannot be,
        AlreadyExists when the target holds objects that the job did not make, what the job met if it failed while this
        waited (StaleObject: an object changed).
        """
        if not source_prefix.endswith("/") and source_prefix:
            raise UsageError(f"{source_prefix!r} cannot be copied: a prefix ends with a slash")
        _require_own(target_prefix)
        if source_prefix.startswith(target_prefix) or target_prefix.startswith(source_prefix):
            raise UsageError(f"{source_prefix!r} cannot be copied to {target_prefix!r}: one is a part of the other")
        return self._ask(job_id, Copy(job_id, source_prefix, target_prefix), open_admin, wait_s)

    def delete(self, job_id: str, open_admin: OpenAdmin, *, prefix: str, wait_s: float = WAIT_S) -> Progress:
        """Delete all objects below a prefix, the prefix's own marker last. A copy with the same id is stopped before.

        As `copy`: to be asked until it is `ready`; after that nothing is known of the job any more. Raises UsageError
        for a prefix that is empty, does not end with a slash or is not a volume's.
        """
        _require_own(prefix)
        return self._ask(job_id, Deletion(job_id, prefix), open_admin, wait_s)

    def progress(self, job_id: str) -> Progress | None:
        """Return how far a job is (also one that no thread works on since a restart), None: there is none."""
        record = self._records.get(KIND, job_id)
        return None if record is None else _progress(record, self._errors.get(job_id, ""))

    def forget(self, job_id: str) -> None:
        """Stop a job soon and drop what is known of it. What it made stays."""
        with self._lock:
            job = self._running.get(job_id)
        if job is not None:
            job.forgotten = True
            job.cancelled.set()
            job.over.wait(WAIT_S)
        self._records.delete(KIND, job_id)
        self._errors.pop(job_id, None)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Stop all jobs; they go on with the next call for them, in this process or another.

        BLOCKS until the requests on their way have ended, or for `timeout_s`: then their work is done again later.
        """
        with self._lock:
            self._closed = True
            running = list(self._running.values())
        for job in running:
            job.cancelled.set()
        deadline = time.monotonic() + timeout_s
        for job in running:
            job.over.wait(max(0.0, deadline - time.monotonic()))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _ask(self, job_id: str, steps: Steps, open_admin: OpenAdmin, wait_s: float) -> Progress:
        with self._lock:
            job = self._running.get(job_id)
        if job is not None and job.steps != steps:
            if steps.verb == job.steps.verb:
                raise UsageError(f"the job {job_id!r} is at work on something else")
            job.cancelled.set()
            if not job.over.wait(wait_s):  # a request of it is still on its way
                return Progress(steps.verb, 0, None, ready=False)
            job = None
        if job is None:
            record = self._records.get(KIND, job_id)
            if record is not None and record["verb"] == steps.verb and record["state"] == "done":
                return _progress(record, "")
            job = self._start(job_id, steps, open_admin)
        job.over.wait(wait_s)
        if job.over.is_set():
            if job.error is not None:
                raise copy.copy(job.error) from job.error
            return job.last
        return self.progress(job_id) or Progress(steps.verb, 0, None, ready=False)

    def _start(self, job_id: str, steps: Steps, open_admin: OpenAdmin) -> _Job:
        with self._lock:
            if self._closed:
                raise StorageUnavailable("the controller is about to end", retryable=False)
            known = self._running.get(job_id)
            if known is not None:  # another call was quicker
                return known
            job = self._running[job_id] = _Job(steps)
        threading.Thread(
            target=self._run, args=(job_id, job, open_admin), name=f"job-{steps.verb}", daemon=True
        ).start()
        return job

    def _run(self, job_id: str, job: _Job, open_admin: OpenAdmin) -> None:
        try:
            with self._turns, open_admin() as admin:
                self._work(job_id, job, admin)
            self._errors.pop(job_id, None)
        except Cancelled:
            log.info("the job %s (%s) was stopped", job_id, job.steps.verb)
        except CachefsError as error:
            job.error = error
            self._errors[job_id] = worded(str(error))
            log.info("the job %s (%s) stopped: %s", job_id, job.steps.verb, error)
        except Exception as error:  # a thread of its own: whoever asks has to hear it
            job.error = StorageUnavailable(f"{job.steps.verb} failed: {type(error).__name__}", retryable=False)
            self._errors[job_id] = str(job.error)
            log.exception("the job %s (%s) broke", job_id, job.steps.verb)
        finally:
            with self._lock:
                self._running.pop(job_id, None)
            job.over.set()

    def _work(self, job_id: str, job: _Job, admin: BucketAdmin) -> None:
        """Take one step after the other until none is left; each is written down."""
        if job.cancelled.is_set():  # while it waited for its turn
            raise Cancelled("the job was told to stop")
        record = self._records.get(KIND, job_id)
        if record is not None and record["verb"] != job.steps.verb:
            record = None  # a deletion takes the place of a copy
        for found in job.steps.work(admin, record, job.cancelled.is_set):
            if job.forgotten:
                raise Cancelled("nobody wants it any more")
            if found["state"] == "gone":
                self._records.delete(KIND, job_id)
            else:
                self._records.put(KIND, job_id, found)
            job.last = _progress(found, "")


class _Job:
    """A job that a thread works on."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.cancelled = threading.Event()
        self.forgotten = False
        """Nothing more is to be written down."""
        self.over = threading.Event()
        self.error: CachefsError | None = None
        self.last = Progress(steps.verb, 0, None, ready=False)


def _progress(record: Mapping[str, Any], error: str) -> Progress:
    ready = record["state"] in ("done", "gone")
    return Progress(record["verb"], record["done"], record["total"], ready=ready, error="" if ready else error)


def _require_own(prefix: str) -> None:
    """Refuse a prefix that cannot be one volume's alone."""
    parts = prefix.split("/")
    if parts[-1] or not all(parts[:-1]) or prefix in ("", "/") or parts[0] == HIDDEN or {".", ".."} & set(parts):
        raise UsageError(f"{prefix!r} is not the prefix of a volume: it has to be like 'some/place/'")
