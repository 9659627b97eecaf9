"""Work that several tasks want at the same time is done once.

`SingleFlight`: the first task that asks does the work in itself, the others wait for its result. When the first one is
cancelled one of the others takes over. `Later`: the result of a task that runs beside another one, kept until wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar, cast

import trio

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Later(Generic[T]):
    """Runs something and keeps what it returned or raised until `result` is called."""

    def __init__(self) -> None:
        self._value: T | None = None
        self.error: Exception | None = None
        self.done = False

    async def run(self, call: Callable[[], Awaitable[T]]) -> None:
        """Run it. Cancellation passes and leaves nothing."""
        try:
            self._value = await call()
        except Exception as error:  # noqa: BLE001 - raised again by `result`
            self.error = error
        self.done = True

    def result(self) -> T:
        """Return or raise. Only after `run` has returned."""
        if self.error is not None:
            # A copy for everybody: one exception raised in several tasks would collect all their tracebacks.
            raise copy.copy(self.error) from self.error
        return cast("T", self._value)


class _Flight(Later[T]):
    def __init__(self) -> None:
        super().__init__()
        self.landed = trio.Event()


class SingleFlight(Generic[K, T]):
    """At most one call per key at a time."""

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[T]] = {}

    async def run(self, key: K, call: Callable[[], Awaitable[T]], *, fresh: bool = False) -> T:
        """Return the result of `call`, or of one that another task began for this key.

        `fresh`: only of one that was begun after this question.
        """
        under_way = self._flights.get(key)
        if fresh and under_way is not None:
            await under_way.landed.wait()
        while (flight := self._flights.get(key)) is not None:
            await flight.landed.wait()
            if flight.done:
                return flight.result()
        flight = self._flights[key] = _Flight()
        try:
            await flight.run(call)
        finally:
            del self._flights[key]
            flight.landed.set()
        return flight.result()
