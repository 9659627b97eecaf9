"""The worker's connection to the agent: many questions at a time over one socket, and it survives the agent's death.

A question that was asked when the connection broke is asked again on the next one (all are idempotent), so nobody
notices an agent that was killed and started anew except by the time it took. The connection is opened again by `run`,
which also starts an agent when there is none.
"""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from cachefs import errors
from cachefs.agent import framing, messages
from cachefs.agent.launch import failure_error
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


@dataclass(eq=False)
class _Question:
    frame: bytes
    answered: trio.Event = field(default_factory=trio.Event)
    answer: messages.Answer | None = None


class AgentClient:
    """Implements `cachefs.vfs.ports.AgentPort`. `run` must run in a nursery for as long as questions are asked.

    INVARIANT: a question is in `_questions` exactly until its answer arrived or its asker gave up.
    """

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        attach: Callable[[int], messages.Attach],
        on_attached: Callable[[messages.Attached], Awaitable[None]],
        io_timeout_s: float,
    ) -> None:
        """`connect` blocks and runs in a thread; `attach` builds the first message of every connection."""
        self._connect = connect
        self._attach = attach
        self._on_attached = on_attached
        self._deadline_s = io_timeout_s + GRACE_S
        self._ids = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._sender: Sender | None = None
        self.pid = 0
        """Process of the agent, 0 while there is no connection."""

    # -- the connection
    # -------------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a connection, for ever. Reports started after the first attach; raises if that one fails for good.

        Afterwards only MountError is raised: this worker cannot go on with that agent, but another one can.
        """
        failures = 0
        started = False
        while True:
            try:
                await trio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                stream = await self._open()
                async with stream:
                    if not started:
                        started = True
                        task_status.started()
                    began = trio.current_time()
                    await self._converse(stream)
                    failures = 0 if trio.current_time() > began + SETTLED_S else failures + 1
            except errors.MountError:
                raise
            except (errors.CachefsError, OSError) as error:
                log.warning("the agent cannot be reached: %s", error)
                if not started:
                    raise
                failures += 1
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                log.warning("connection to the agent lost (%s), opening it again", type(error).__name__)
                failures += 1
            finally:
                self.pid = 0

    async def _open(self) -> trio.SocketStream:
        """Connect and attach."""
        connection = await trio.to_thread.run_sync(self._connect, abandon_on_cancel=True)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        try:
            answer = await self._introduce(stream)
            if isinstance(answer, messages.Failure):
                if answer.kind == "version":
                    raise errors.MountError(f"{answer.text}, and this worker {messages.PROTOCOL_VERSION}")
                raise failure_error(answer)
            assert isinstance(answer, messages.Attached)
            self.pid = answer.pid
            await self._on_attached(answer)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    async def _introduce(self, stream: trio.SocketStream) -> messages.Answer:
        frames = framing.answers()
        await stream.send_all(framing.encode(self._attach(next(self._ids))))
        while received := await stream.receive_some(RECEIVE_BYTES):
            for answer in frames.feed(received):
                return answer
        raise trio.BrokenResourceError("the agent closed the connection")

    async def _converse(self, stream: trio.SocketStream) -> None:
        self._sender = sender = Sender(stream)
        for question in self._questions.values():
            sender.send(question.frame)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.run)
                await self._receive(stream)
                nursery.cancel_scope.cancel()
        finally:
            self._sender = None  # before the stream is closed: its descriptor's number may be another file's then
        log.warning("the agent (pid %d) is gone, looking for another", self.pid)

    async def _receive(self, stream: trio.SocketStream) -> None:
        frames = framing.answers()
        try:
            while received := await stream.receive_some(RECEIVE_BYTES):
                for answer in frames.feed(received):
                    question = self._questions.pop(answer.id, None)
                    if question is not None:
                        question.answer = answer
                        question.answered.set()
        except (trio.BrokenResourceError, OSError, errors.ProtocolError) as error:
            log.warning("connection to the agent broke: %s", error)

    def tell(self, message: messages.Message) -> None:
        """Send a message that has no answer; lost when there is no connection."""
        if self._sender is not None:
            self._sender.send(framing.encode(message))

    async def _ask(self, build: Callable[[int], messages.Message]) -> messages.Answer:
        identity = next(self._ids)
        question = _Question(framing.encode(build(identity)))
        self._questions[identity] = question
        if self._sender is not None:
            self._sender.send(question.frame)
        try:
            with trio.move_on_after(self._deadline_s):
                await question.answered.wait()
        finally:
            self._questions.pop(identity, None)
        if question.answer is None:
            raise errors.AgentUnavailable(f"no answer from the agent within {self._deadline_s:g} s")
        if isinstance(question.answer, messages.Failure):
            raise failure_error(question.answer)
        return question.answer

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
        answer = await self._ask(lambda i: messages.Fill(id=i, ino=ino, first=first, count=count, inline=inline))
        assert isinstance(answer, messages.Filled)
        return [FilledBlock(index, Tier(tier), payload) for index, tier, payload in answer.blocks]

    async def readahead(self, ino: Ino, first: int, count: int) -> None:
        """See `AgentPort.readahead`."""
        self.tell(messages.Readahead(ino=ino, first=first, count=count))

    async def cached(self, ino: Ino) -> dict[Tier, int]:
        """See `AgentPort.cached`."""
        answer = await self._ask(lambda i: messages.Cached(id=i, ino=ino))
        assert isinstance(answer, messages.CachedBlocks)
        return {Tier(name): count for name, count in answer.blocks.items()}

    async def usage(self) -> tuple[int, int]:
        """See `AgentPort.usage`."""
        answer = await self._ask(lambda i: messages.Usage(id=i))
        assert isinstance(answer, messages.UsageReply)
        return answer.used_bytes, answer.objects
