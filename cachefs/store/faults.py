"""A store that fails on purpose, around any other: what the layers above must survive, scripted call by call.

    plan = FaultPlan()
    store = FaultStore(MemoryStore(), plan)
    plan.add(Fault(Kind.THROTTLED, Operation.GET, times=2, retry_after_s=0.1))
    plan.add(Fault(Kind.DENIED, skip=10))         # 403 after ten calls
    plan.add(Fault(Kind.DELAY, delay_s=0.5))

Faults are tried in the order in which they were added; a delay lets the later ones still apply, any other fault ends
the search. They look the way the real adapter reports them: a truncated body is `BadBody`, a reset is
`StorageUnavailable`. Thread-safe.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cachefs.errors import AccessDenied, BadBody, CachefsError, NotFound, StaleObject, StorageUnavailable
from cachefs.store.port import ListPage, ObjectInfo, ObjectStore
from cachefs.types import ObjectVersion


class Operation(enum.StrEnum):
    """The calls of the port that can fail."""

    CHECK = "check"
    GET = "get"
    HEAD = "head"
    LIST = "list"


class Kind(enum.StrEnum):
    """What goes wrong."""

    DELAY = "delay"
    THROTTLED = "throttled"
    DENIED = "denied"
    MISSING = "missing"
    CHANGED = "changed"
    SERVER_ERROR = "server_error"
    TRUNCATED = "truncated"
    WRONG_LENGTH = "wrong_length"
    WRONG_ETAG = "wrong_etag"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the script: what goes wrong, in which calls, how often."""

    kind: Kind
    operation: Operation | None = None
    """None: every operation."""
    key: str | Callable[[str], bool] | None = field(default=None, kw_only=True)
    """The key (for lists and checks the prefix), or a predicate on it."""
    skip: int = field(default=0, kw_only=True)
    """So many matching calls pass first."""
    times: int | None = field(default=None, kw_only=True)
    """How many calls it hits then; None: all."""
    delay_s: float = field(default=0.0, kw_only=True)
    """How long DELAY waits."""
    retry_after_s: float | None = field(default=None, kw_only=True)
    """What THROTTLED asks for."""

    def covers(self, operation: Operation, key: str) -> bool:
        """Whether the call is one that this fault is about."""
        if self.operation is not None and self.operation is not operation:
            return False
        if self.key is None:
            return True
        return self.key(key) if callable(self.key) else self.key == key


class FaultPlan:
    """The script: faults in order, and what was called."""

    def __init__(self, *faults: Fault) -> None:
        self._lock = threading.Lock()
        self._faults: list[tuple[Fault, Counter[str]]] = []
        self.calls: Counter[Operation] = Counter()
        """Every call, those that failed included."""
        self.hits: Counter[Kind] = Counter()
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Append a fault to the script."""
        with self._lock:
            self._faults.append((fault, Counter()))

    def clear(self) -> None:
        """Let everything work again; the counts stay."""
        with self._lock:
            self._faults.clear()

    def faults_of(self, operation: Operation, key: str) -> list[Fault]:
        """Count a call and return what happens to it: delays, then at most one fault that ends it."""
        hitting = []
        with self._lock:
            self.calls[operation] += 1
            for fault, seen in self._faults:
                if not fault.covers(operation, key):
                    continue
                seen["calls"] += 1
                turn = seen["calls"] - fault.skip
                if turn <= 0 or (fault.times is not None and turn > fault.times):
                    continue
                self.hits[fault.kind] += 1
                hitting.append(fault)
                if fault.kind is not Kind.DELAY:
                    break
        return hitting


class FaultStore:
    """See the module."""

    def __init__(self, inner: ObjectStore, plan: FaultPlan | None = None) -> None:
        self.inner = inner
        self.plan = plan if plan is not None else FaultPlan()
        self._closed = threading.Event()

    @property
    def endpoint(self) -> str:
        """That of the inner store."""
        return self.inner.endpoint

    @property
    def bucket(self) -> str:
        """That of the inner store."""
        return self.inner.bucket

    def check(self, prefix: str) -> None:
        """See `ObjectStore.check`."""
        self._suffer(Operation.CHECK, prefix)
        self.inner.check(prefix)

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        self._suffer(Operation.GET, version.key)
        return self.inner.get_range(version, start, length)

    def read_into(self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> Iterator[int]:
        """See `ObjectStore.read_into`. A body that breaks off (TRUNCATED, RESET) gives half of its pieces first."""
        fault = self._wait_for(Operation.GET, version.key)
        if fault is not None and fault.kind in (Kind.TRUNCATED, Kind.RESET):
            yield from self.inner.read_into(version, start, buffers[: len(buffers) // 2]) if len(buffers) > 1 else ()
        if fault is not None:
            raise _failure(fault, Operation.GET, version.key)
        yield from self.inner.read_into(version, start, buffers)

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore.head`."""
        self._suffer(Operation.HEAD, key)
        return self.inner.head(key)

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`."""
        self._suffer(Operation.LIST, prefix)
        return self.inner.list_page(prefix, delimiter=delimiter, token=token, limit=limit)

    def close(self) -> None:
        """Close the inner store and end all delays."""
        self._closed.set()
        self.inner.close()

    def _suffer(self, operation: Operation, key: str) -> None:
        fault = self._wait_for(operation, key)
        if fault is not None:
            raise _failure(fault, operation, key)

    def _wait_for(self, operation: Operation, key: str) -> Fault | None:
        """Suffer the delays of a call; returns the fault that ends it, if any."""
        for fault in self.plan.faults_of(operation, key):
            if fault.kind is not Kind.DELAY:
                return fault
            self._closed.wait(fault.delay_s)
        return None


def _failure(fault: Fault, operation: Operation, key: str) -> CachefsError:
    if fault.kind is Kind.THROTTLED:
        return StorageUnavailable(
            f"{key!r}: the store asks to slow down (503 SlowDown)", throttled=True, retry_after_s=fault.retry_after_s
        )
    plain: dict[Kind, CachefsError] = {
        Kind.DENIED: AccessDenied(f"{key!r}: access denied (403)"),
        Kind.MISSING: (StaleObject if operation is Operation.GET else NotFound)(f"{key!r} does not exist (404)"),
        Kind.CHANGED: StaleObject(f"{key!r} is no longer the object that was opened (412)"),
        Kind.SERVER_ERROR: StorageUnavailable(f"{key!r}: internal error (500)"),
        Kind.TRUNCATED: BadBody(f"{key!r}: the body ended early"),
        Kind.WRONG_LENGTH: BadBody(f"{key!r}: the body has another length than asked for"),
        Kind.WRONG_ETAG: BadBody(f"{key!r}: the answer is of another version"),
        Kind.RESET: StorageUnavailable(f"{key!r}: connection reset"),
    }
    return plain[fault.kind]
