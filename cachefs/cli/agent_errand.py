"""One command's conversation with the agent of a mount: a job, its paths, and what becomes of it.

Plain sockets and one thread: the paths of a list are sent as fast as the agent takes them (each batch is answered), and
what the agent says in between is shown. Closing the connection ends a job that is not in the background.
"""

from __future__ import annotations

import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from cachefs import errors
from cachefs.agent import framing, messages
from cachefs.agent.launch import failure_error
from cachefs.cli.mounted_paths import Place
from cachefs.runtime import RuntimeDir

ANSWER_S = 30.0
"""How long the agent may show no sign of life: it says how a job does twice a second."""
BATCH_PATHS, BATCH_BYTES = 1024, 1 << 20
Show = Callable[[dict[str, Any]], object]
T = TypeVar("T", bound=messages.Answer)


class Errand:
    """A connection to an agent. Context manager."""

    def __init__(self, socket_path: str) -> None:
        """Raises AgentUnavailable."""
        self._ids = itertools.count(1)
        self._frames = framing.answers()
        self._received: deque[messages.Answer] = deque()
        self._heard = False
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(ANSWER_S)
        try:
            self._connection.connect(socket_path)
        except OSError as error:
            self._connection.close()
            raise errors.AgentUnavailable(
                f"the agent of this mount does not listen: {error.strerror or error}"
            ) from error

    @classmethod
    def to(cls, runtime: RuntimeDir, place: Place) -> Self:
        """Connect to the agent of a place. Raises AgentUnavailable."""
        return cls(runtime.agent(place.cache_dir, "sock"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def send(self, build: Callable[[int], messages.Message]) -> int:
        """Send a question, built with its number. Raises AgentUnavailable."""
        identity = next(self._ids)
        try:
            self._connection.sendall(framing.encode(build(identity)))
        except OSError as error:
            raise self._gone(error) from error
        return identity

    def receive(self) -> messages.Answer:
        """Return what the agent says next. Raises AgentUnavailable, and what the agent failed with."""
        while not self._received:
            try:
                received = self._connection.recv(65536)
            except OSError as error:
                raise self._gone(error) from error
            if not received:
                raise self._gone(None)
            self._heard = True
            self._received.extend(self._frames.feed(received))
        answer = self._received.popleft()
        if isinstance(answer, messages.Failure):
            raise failure_error(answer)
        return answer

    def ask(self, build: Callable[[int], messages.Message], kind: type[T]) -> T:
        """Ask one question on a connection without a job. Raises as `receive`."""
        self.send(build)
        answer = self.receive()
        if not isinstance(answer, kind):
            raise errors.ProtocolError("the agent answered something else")
        return answer

    def _gone(self, error: OSError | None) -> errors.AgentUnavailable:
        if isinstance(error, TimeoutError):
            return errors.AgentUnavailable(f"the agent has said nothing for {ANSWER_S:g} s")
        if not self._heard:
            return errors.AgentUnavailable("the agent hung up: it is ending, or of a version that does not know this")
        return errors.AgentUnavailable(
            "the agent ended before it was done (the mount goes on with another): run it again, it goes on where it was"
        )

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def run(
        self,
        build: Callable[[int], messages.Work],
        paths: Iterable[bytes],
        show: Show,
        consent: Callable[[dict[str, Any]], bool],
    ) -> dict[str, Any]:
        """Run a job with these paths to its end (in the background: until all paths are known); return its last state.

        `show` gets each state on the way; `consent` is asked when it is more than the tiers can hold.
        """
        number = self.send(build)
        state = self._next_state(number, show)
        job = str(state.job["job"])
        if not state.over:
            state = self._feed(number, job, paths, show, state)
        asked = False
        while not (state.over or state.job["background"]):
            if state.job["state"] == "asking" and not asked:
                asked = True
                self._decide(job, agreed=consent(state.job))
            state = self._next_state(number, show)
        return state.job

    def _decide(self, job: str, *, agreed: bool) -> None:
        if agreed:
            self.send(lambda i: messages.Proceed(id=i, job=job))
        else:
            self.send(lambda i: messages.StopJob(id=i, job=job))

    def _feed(
        self, number: int, job: str, paths: Iterable[bytes], show: Show, state: messages.JobState
    ) -> messages.JobState:
        """Hand all paths over, two batches under way at most."""
        under_way: set[int] = set()
        for batch, last in _batches(paths):
            while len(under_way) > 1 and not state.over:
                state = self._take(number, under_way, show) or state
            if state.over:
                return state
            under_way.add(self._send_paths(job, batch, last=last))
        while under_way and not state.over:
            state = self._take(number, under_way, show) or state
        return state

    def _send_paths(self, job: str, paths: list[bytes], *, last: bool) -> int:
        return self.send(lambda i: messages.Paths(id=i, job=job, paths=paths, last=last))

    def _take(self, number: int, under_way: set[int], show: Show) -> messages.JobState | None:
        answer = self.receive()
        if isinstance(answer, messages.JobState) and answer.id == number:
            show(answer.job)
            return answer
        under_way.discard(answer.id)
        return None

    def _next_state(self, number: int, show: Show) -> messages.JobState:
        while True:
            state = self._take(number, set(), show)
            if state is not None:
                return state


def _batches(paths: Iterable[bytes]) -> Iterator[tuple[list[bytes], bool]]:
    """Yield paths in batches, and whether it is the last one (there is always one)."""
    batch: list[bytes] = []
    size = 0
    for path in paths:
        if batch and (len(batch) == BATCH_PATHS or size + len(path) > BATCH_BYTES):
            yield batch, False
            batch, size = [], 0
        batch.append(path)
        size += len(path)
    yield batch, True
