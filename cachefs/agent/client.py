"""The worker's connection to the agent: many questions at a time over one socket, and it survives the agent's death.

A question that was asked when the connection broke is asked again on the next one (all are idempotent), so nobody
notices an agent that was killed and started anew except by the time it took. The connection is opened again by `run`,
which also starts an agent when there is none.
"""

from __future__ import annotations

import itertools
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from cachefs import errors
from cachefs.agent import framing, messages
from cachefs.agent.launch import OtherVersion, failure_error
from cachefs.agent.sender import Sender
from cachefs.types import Ino, Tier
from cachefs.vfs.ports import FilledBlock, ListingProgress, Resolution

log = logging.getLogger(__name__)

RECEIVE_BYTES = 256 << 10
GRACE_S = 15.0
"""How much longer than the store's own deadline a question may take: time to start another agent."""
RETRY_S = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)
SETTLED_S = 0.25
"""A connection that ended sooner counts as a failure: an agent that hangs up on us is not called again at once."""


@dataclass(eq=False, slots=True)
class _Question:
    frame: bytes
    answered: Callable[[messages.Answer], None]
    """Called in the trio thread."""
    expires_at: float = math.inf
    """By time.monotonic: when an asker without a task gives up."""
    of_range: bool = False
    """Only for agents that know of ranges."""


class AgentClient:
    """Implements `cachefs.vfs.ports.AgentPort`. `run` must run in a nursery for as long as questions are asked.

    INVARIANT: a question is in `_questions` exactly until its answer arrived or its asker gave up.
    """

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        replace: Callable[[], socket.socket],
        attach: Callable[[int], messages.Attach],
        on_attached: Callable[[messages.Attached], Awaitable[None]],
        io_timeout_s: float,
        *,
        patient: bool = False,
    ) -> None:
        """`connect` and `replace` block and run in a thread: the one returns a connection to the agent, the other puts
        one of our own version in its place first. `attach` builds the first message of every connection.

        `patient`: also the first attach is tried until it works, because somebody serves without it meanwhile.
        """
        self._connect = connect
        self._replace = replace
        self._attach = attach
        self._on_attached = on_attached
        self._deadline_s = io_timeout_s + GRACE_S
        self._patient = patient
        self.tried = trio.Event()
        """Set when the first attach has succeeded or failed."""
        self._ids = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._sender: Sender | None = None
        self._introducing = False
        self._fetches_ranges = False
        """Whether the agent that was attached last knows of ranges."""
        self.received = 0
        """Grows with everything that comes from an agent."""
        self.pid = 0
        """Process of the agent, 0 while there is no connection."""

    @property
    def waits(self) -> bool:
        """Whether an answer of the agent is due."""
        return self._introducing or bool(self._questions)

    # -- the connection
    # -------------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a connection, for ever. Reports started after the first attach; raises if that one fails, unless it is
        patient.

        Afterwards only MountError is raised: this worker cannot go on with that agent, but another one can.
        """
        failures = 0
        started = False
        said = ""
        while True:
            try:
                await trio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                stream = await self._open()
                async with stream:
                    if not started:
                        started = True
                        task_status.started()
                    self.tried.set()
                    said = ""
                    began = trio.current_time()
                    await self._converse(stream)
                    failures = 0 if trio.current_time() > began + SETTLED_S else failures + 1
            except errors.MountError:
                raise
            except (errors.CachefsError, OSError) as error:
                # Once, not at every try: an agent that cannot start for an hour is one line.
                level = logging.DEBUG if str(error) == said else logging.WARNING
                log.log(level, "the agent cannot be reached: %s", error)
                said = str(error)
                if not started and not self._patient:
                    raise
                failures += 1
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                log.warning("connection to the agent lost (%s), opening it again", type(error).__name__)
                failures += 1
            finally:
                self.pid = 0
                self.tried.set()

    async def _open(self) -> trio.SocketStream:
        """Connect and attach; take the place of an agent that is too old. Raises AgentUnavailable, MountError."""
        try:
            return await self._attach_to(self._connect)
        except OtherVersion as error:
            log.debug("%s", error)
            return await self._attach_to(self._replace)

    async def _attach_to(self, connect: Callable[[], socket.socket]) -> trio.SocketStream:
        connection = await trio.to_thread.run_sync(connect, abandon_on_cancel=True)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        try:
            answer = await self._introduce(stream)
            if isinstance(answer, messages.Failure):
                raise failure_error(answer)
            assert isinstance(answer, messages.Attached)
            self.pid = answer.pid
            self._fetches_ranges = answer.ranges
            await self._on_attached(answer)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    async def _introduce(self, stream: trio.SocketStream) -> messages.Answer:
        frames = framing.answers()
        self._introducing = True
        try:
            await stream.send_all(framing.encode(self._attach(next(self._ids))))
            while received := await stream.receive_some(RECEIVE_BYTES):
                for answer in frames.feed(received):
                    return answer
        finally:
            self._introducing = False
            self.received += 1
        raise trio.BrokenResourceError("the agent closed the connection")

    async def _converse(self, stream: trio.SocketStream) -> None:
        self._sender = sender = Sender(stream)
        for identity, question in list(self._questions.items()):  # others add to it, and look for the sender after that
            if question.of_range and not self._fetches_ranges:
                self._questions.pop(identity, None)
                question.answered(messages.Failure(id=identity, kind="Unsupported", text="this agent reads no ranges"))
            else:
                sender.send(question.frame)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.run)
                await self._receive(stream)
                nursery.cancel_scope.cancel()
        finally:
            self._sender = None
            sender.stop()
        log.warning("the agent (pid %d) is gone, looking for another", self.pid)

    async def _receive(self, stream: trio.SocketStream) -> None:
        frames = framing.answers()
        try:
            while received := await stream.receive_some(RECEIVE_BYTES):
                self.received += 1
                for answer in frames.feed(received):
                    question = self._questions.pop(answer.id, None)
                    if question is not None:
                        question.answered(answer)
        except (trio.BrokenResourceError, OSError, errors.ProtocolError) as error:
            log.warning("connection to the agent broke: %s", error)

    def tell(self, message: messages.Message) -> None:
        """Send a message that has no answer; lost when there is no connection."""
        if self._sender is not None:
            self._sender.send(framing.encode(message))

    async def _ask(self, build: Callable[[int], messages.Message], *, of_range: bool = False) -> messages.Answer:
        identity = next(self._ids)
        answers: list[messages.Answer] = []
        answered = trio.Event()

        def take(answer: messages.Answer) -> None:
            answers.append(answer)
            answered.set()

        question = _Question(framing.encode(build(identity)), take, of_range=of_range)
        self._questions[identity] = question
        if self._sender is not None:
            self._sender.send(question.frame)
        try:
            with trio.move_on_after(self._deadline_s):
                await answered.wait()
        finally:
            self._questions.pop(identity, None)
        if not answers:
            raise self._silence()
        if isinstance(answers[0], messages.Failure):
            raise failure_error(answers[0])
        return answers[0]

    def _ask_without_task(
        self,
        build: Callable[[int], messages.Message],
        answered: Callable[[messages.Answer], None],
        *,
        of_range: bool = False,
    ) -> bool:
        """Ask, and have `answered` called once in the trio thread. Returns False when there is no agent. Any thread."""
        if self._sender is None:
            return False
        identity = next(self._ids)
        frame = framing.encode(build(identity))
        self._questions[identity] = _Question(frame, answered, time.monotonic() + self._deadline_s, of_range)
        sender = self._sender
        if sender is not None:  # else, or when it breaks now, it is asked on the next connection
            sender.send(frame)
        return True

    def _silence(self) -> errors.AgentUnavailable:
        return errors.AgentUnavailable(f"no answer from the agent within {self._deadline_s:g} s")

    def expire(self) -> None:
        """Give up questions without a task whose time is over. Call it every second or so."""
        now = time.monotonic()
        for identity, question in list(self._questions.items()):
            if now > question.expires_at and self._questions.pop(identity, None) is not None:
                late = self._silence()
                question.answered(messages.Failure(id=identity, kind=type(late).__name__, text=str(late)))

    # -- AgentPort
    # ------------------------------------------------------------------------------------------------------

    async def resolve(self, parent: Ino, name: bytes) -> Resolution:
        """See `AgentPort.resolve`."""
        answer = await self._ask(lambda i: messages.Resolve(id=i, parent=parent, name=name))
        assert isinstance(answer, messages.Resolved)
        return Resolution(None if answer.ino is None else Ino(answer.ino), answer.valid_s)

    async def list_directory(self, ino: Ino, seen: bytes | None) -> ListingProgress:
        """See `AgentPort.list_directory`."""
        answer = await self._ask(lambda i: messages.ListDirectory(id=i, ino=ino, seen=seen))
        assert isinstance(answer, messages.Listed)
        return ListingProgress(answer.complete, answer.frontier, answer.valid_s)

    async def fill(self, ino: Ino, first: int, count: int, *, inline: bool = False) -> list[FilledBlock]:
        """See `AgentPort.fill`."""
        return _blocks(await self._ask(lambda i: messages.Fill(id=i, ino=ino, first=first, count=count, inline=inline)))

    def request_fill(
        self, ino: Ino, first: int, count: int, answer: Callable[[list[FilledBlock] | errors.CachefsError], None]
    ) -> bool:
        """See `AgentPort.request_fill`."""

        def take(reply: messages.Answer) -> None:
            answer(failure_error(reply) if isinstance(reply, messages.Failure) else _blocks(reply))

        return self._ask_without_task(lambda i: messages.Fill(id=i, ino=ino, first=first, count=count), take)

    async def fetch_range(self, ino: Ino, offset: int, length: int, *, fresh: bool = False) -> bytes:
        """See `AgentPort.fetch_range`."""
        if self._sender is not None and not self._fetches_ranges:
            raise errors.Unsupported("the agent that runs reads no ranges")

        def build(identity: int) -> messages.Message:
            return messages.FetchRange(id=identity, ino=ino, offset=offset, length=length, fresh=fresh)

        return _payload(await self._ask(build, of_range=True))

    def request_range(
        self,
        ino: Ino,
        offset: int,
        length: int,
        answer: Callable[[bytes | errors.CachefsError], None],
        *,
        fresh: bool = False,
    ) -> bool:
        """See `AgentPort.request_range`."""
        if not self._fetches_ranges:
            return False

        def take(reply: messages.Answer) -> None:
            answer(failure_error(reply) if isinstance(reply, messages.Failure) else _payload(reply))

        def build(identity: int) -> messages.Message:
            return messages.FetchRange(id=identity, ino=ino, offset=offset, length=length, fresh=fresh)

        return self._ask_without_task(build, take, of_range=True)

    def range_ahead(self, ino: Ino, offset: int, length: int) -> None:
        """See `AgentPort.range_ahead`."""
        if self._fetches_ranges:
            self.tell(messages.RangeAhead(ino=ino, offset=offset, length=length))

    def readahead(self, ino: Ino, first: int, count: int) -> None:
        """See `AgentPort.readahead`."""
        self.tell(messages.Readahead(ino=ino, first=first, count=count))

    async def cached(self, ino: Ino) -> dict[Tier, int]:
        """See `AgentPort.cached`."""
        answer = await self._ask(lambda i: messages.Cached(id=i, ino=ino))
        assert isinstance(answer, messages.CachedBlocks)
        return {Tier(name): count for name, count in answer.blocks.items()}


def _blocks(answer: messages.Answer) -> list[FilledBlock]:
    assert isinstance(answer, messages.Filled)
    return [FilledBlock(index, Tier(tier), payload) for index, tier, payload in answer.blocks]


def _payload(answer: messages.Answer) -> bytes:
    assert isinstance(answer, messages.FetchedRange)
    return bytes(answer.payload)
