"""Messages with descriptors: order, backpressure, nonsense, and no descriptor lost or left open."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cachefs.keeper.passing import Channel
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop


class End:
    """One end of a connection, and what came there."""

    def __init__(self, loop: Loop, connection: socket.socket) -> None:
        self.messages: list[tuple[dict[str, Any], list[int]]] = []
        self.ended = False
        self.channel = Channel(loop, connection, lambda *got: self.messages.append(got), self._end)

    def _end(self) -> None:
        self.ended = True


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop(Journal("error", False))
    yield made
    made.close()


@pytest.fixture
def run(loop: Loop) -> Callable[[Callable[[], object]], None]:
    """Run the loop until something is true."""

    def until(condition: Callable[[], object]) -> None:
        def look() -> None:
            if condition():
                loop.stop()
            else:
                loop.after("look", 0.002, look)

        def give_up() -> None:
            loop.stop()

        loop.after("look", 0, look)
        loop.after("give up", 10, give_up)
        loop.run()
        loop.cancel("give up")
        assert condition()

    return until


def held(number: int) -> bytes:
    os.lseek(number, 0, os.SEEK_SET)
    content = os.read(number, 100)
    os.close(number)
    return content


def file_of(content: bytes) -> int:
    number = os.memfd_create("x")
    os.write(number, content)
    return number


def test_descriptors_arrive_with_their_messages_through_a_full_socket(
    loop: Loop, run: Callable[[Callable[[], object]], None]
) -> None:
    ours, theirs = socket.socketpair()
    left, right = End(loop, ours), End(loop, theirs)
    for number in range(300):  # far more than a socket takes
        files = [file_of(b"%d.%d" % (number, index)) for index in range(number % 4)]
        left.channel.send({"number": number, "filling": "x" * (number % 7) * 3000}, files)
        for file in files:
            os.close(file)  # the caller's, at once
    run(lambda: len(right.messages) == 300)
    for number, (message, files) in enumerate(right.messages):
        assert message["number"] == number
        assert [held(file) for file in files] == [b"%d.%d" % (number, index) for index in range(number % 4)]
    left.channel.close()
    run(lambda: right.ended)
    assert not left.ended  # nobody tells who has hung up himself
    assert right.channel.closed


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff" * 100,
        struct.pack(">IB", 2, 0) + b"{]",
        struct.pack(">IB", 2, 0) + b"[]",
        struct.pack(">IB", 2, 1) + b"{}",  # it says that there is a descriptor
        struct.pack(">IB", 2, 200) + b"{}",
    ],
)
def test_nonsense_ends_the_connection(loop: Loop, run: Callable[[Callable[[], object]], None], nonsense: bytes) -> None:
    ours, theirs = socket.socketpair()
    end = End(loop, ours)
    with theirs:
        theirs.sendall(nonsense)
        run(lambda: end.ended)
    assert end.messages == []


def test_descriptors_that_nobody_gets_are_closed(loop: Loop, run: Callable[[Callable[[], object]], None]) -> None:
    ours, theirs = socket.socketpair()
    end = End(loop, ours)
    reader, writer = os.pipe()
    body = json.dumps({"a": 1}).encode()
    with theirs:
        socket.send_fds(theirs, [struct.pack(">IB", len(body), 1) + body[:3]], [writer])  # torn
        os.close(writer)
        run(lambda: True)
    run(lambda: end.ended)
    assert os.read(reader, 1) == b""  # the last copy of the other end is closed
    os.close(reader)


def test_queued_descriptors_are_closed_with_the_channel(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    end = End(loop, ours)
    reader, writer = os.pipe()
    with theirs:
        for _ in range(200):
            end.channel.send({"filling": "x" * 10_000}, [writer])
        os.close(writer)
        end.channel.close()
        end.channel.send({"too": "late"}, [])
        with theirs.makefile("rb") as rest:
            while rest.read(1 << 20):
                pass
    assert os.read(reader, 1) == b""
    os.close(reader)
