"""Frames that many threads send on one socket: whole, in order, and never on a descriptor that is another file's."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections import defaultdict

import pytest
import trio

from cachefs.agent.sender import Sender
from tests.support.block_cache_rig import eventually

FRAMES, THREADS = 300, 8


def frame(thread: int, number: int) -> bytes:
    body = struct.pack(">II", thread, number) + bytes([thread]) * (7919 * number % 60_000)
    return struct.pack(">I", len(body)) + body


def pair() -> tuple[trio.SocketStream, socket.socket]:
    ours, theirs = socket.socketpair()
    return trio.SocketStream(trio.socket.from_stdlib_socket(ours)), theirs


async def test_frames_of_many_threads_on_a_full_socket() -> None:
    stream, theirs = pair()
    received = bytearray()

    def read_slowly() -> None:
        while piece := theirs.recv(100_000):
            received.extend(piece)

    def send_all(sender: Sender, thread: int) -> None:
        for number in range(FRAMES):
            assert sender.send(frame(thread, number))

    reader = threading.Thread(target=read_slowly)
    async with trio.open_nursery() as nursery:
        sender = Sender(stream)
        nursery.start_soon(sender.run)
        async with trio.open_nursery() as writers:
            for thread in range(THREADS):
                writers.start_soon(trio.to_thread.run_sync, send_all, sender, thread)
            await trio.sleep(0.05)
            reader.start()  # the socket is full by now
        expected = sum(len(frame(thread, number)) for thread in range(THREADS) for number in range(FRAMES))
        await eventually(lambda: len(received) >= expected, timeout_s=20)
        nursery.cancel_scope.cancel()
    sender.stop()
    await stream.aclose()
    reader.join(5)
    theirs.close()
    numbers: dict[int, list[int]] = defaultdict(list)
    start = 0
    while start < len(received):
        (length,) = struct.unpack_from(">I", received, start)
        thread, number = struct.unpack_from(">II", received, start + 4)
        assert received[start : start + 4 + length] == frame(thread, number)
        numbers[thread].append(number)
        start += 4 + length
    assert all(numbers[thread] == list(range(FRAMES)) for thread in range(THREADS))


async def test_nothing_is_written_after_the_stop() -> None:
    stream, theirs = pair()
    sender = Sender(stream)
    number = stream.socket.fileno()
    sender.stop()
    await stream.aclose()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(theirs.close)
        ends = os.pipe()
        for end in ends:
            cleanup.callback(os.close, end)
        if number not in ends:
            os.dup2(ends[1], number)
            cleanup.callback(os.close, number)
        assert not sender.send(b"frame"), "the number is another file's by now"
        os.set_blocking(ends[0], False)
        with pytest.raises(BlockingIOError):
            os.read(ends[0], 10)


async def test_a_stream_that_broke_is_said() -> None:
    stream, theirs = pair()
    sender = Sender(stream)
    theirs.close()
    assert not sender.send(b"x" * 10)
    assert sender.broken
    with trio.fail_after(2):
        await sender.run()
    await stream.aclose()
