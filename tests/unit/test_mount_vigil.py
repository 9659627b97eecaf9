"""Signs of life: who counts silence, who beats, and when a channel counts as moving."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from cachefs.fuse.channel import Channel
from cachefs.fuse.protocol import IN_HEADER, IN_HEADER_SIZE, Opcode
from cachefs.mount import vigil
from cachefs.mount.heartbeat import Heartbeat
from cachefs.mount.loop import Loop
from cachefs.mount.vigil import Vigil
from cachefs.runtime import process_state

LIMIT_S = 30.0


class Clock:
    """A loop whose time the test moves: rings one timer after the other, each as late as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.timer: tuple[float, Callable[[], object]] | None = None
        monkeypatch.setattr(f"{vigil.__name__}.time.monotonic", lambda: self.now)

    def after(self, name: object, delay_s: float, callback: Callable[[], object]) -> None:
        self.timer = (self.now + delay_s, callback)

    def cancel(self, name: object) -> None:
        self.timer = None

    def ring(self, late_s: float = 0.0) -> None:
        assert self.timer is not None
        (due, callback), self.timer = self.timer, None
        self.now = due + late_s
        callback()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def watched(clock: Clock, said: list[str]) -> Vigil:
    return Vigil(cast("Loop", clock), LIMIT_S, os.getpid(), said.append)


def test_silence_is_noticed_at_the_limit(clock: Clock, watched: Vigil, said: list[str]) -> None:
    began = clock.now
    watched.heard()
    while clock.timer is not None:
        clock.ring()
    assert LIMIT_S <= clock.now - began < LIMIT_S + 2
    assert said == ["no sign of life for 30 s (it runs)"]


def test_nobody_is_judged_before_the_first_beat(clock: Clock, watched: Vigil) -> None:
    assert clock.timer is None


def test_a_beat_begins_the_count_anew(clock: Clock, watched: Vigil, said: list[str]) -> None:
    watched.heard()
    for _ in range(5):
        for _ in range(15):
            clock.ring()
        watched.heard()
    assert said == []
    watched.end()
    assert clock.timer is None


def test_a_machine_that_slept_or_has_no_cpu_is_no_silence(clock: Clock, watched: Vigil, said: list[str]) -> None:
    watched.heard()
    for _ in range(200):
        for _ in range(10):
            clock.ring()
        clock.ring(late_s=3600)
    assert said == []


def test_a_process_in_a_debugger_is_left_alone(
    clock: Clock, watched: Vigil, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vigil, "process_state", lambda pid: "t")
    watched.heard()
    for _ in range(200):
        clock.ring()
    assert said == []


def test_the_state_of_a_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]) as child:
        deadline = time.monotonic() + 10
        while process_state(child.pid) != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
    assert process_state(child.pid) == ""
    assert process_state(os.getpid()) == "R"


# -- beats ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


async def beat_for(heart: Heartbeat, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await heart.run()


async def test_beats_come_while_everything_moves(pipe: tuple[int, int], autojump_clock: Any) -> None:
    moving = [True, True, False, True]
    await beat_for(Heartbeat(pipe[1], LIMIT_S, lambda: moving.pop(0)), 19)
    lines = os.read(pipe[0], 4096).splitlines()
    assert [json.loads(line) for line in lines] == [{"event": "beat"}] * 3


async def test_a_supervisor_that_does_not_read_stops_nobody(pipe: tuple[int, int], autojump_clock: Any) -> None:
    os.set_blocking(pipe[1], False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe[1], bytes(4096))
    os.set_blocking(pipe[1], True)
    with trio.fail_after(100_000):  # by the clock of the test: a write that waits would be seen by the real one
        await beat_for(Heartbeat(pipe[1], LIMIT_S, lambda: True), 50)


async def test_a_supervisor_that_is_gone_stops_nobody(pipe: tuple[int, int], autojump_clock: Any) -> None:
    os.close(pipe[0])
    await beat_for(Heartbeat(pipe[1], LIMIT_S, lambda: True), 50)


# -- the channel ------------------------------------------------------------------------------------------------------


class Kernel:
    """The other end of a channel's device."""

    def __init__(self) -> None:
        self.ours, self.device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asked = threading.Event()
        self.go_on = threading.Event()
        filesystem = SimpleNamespace(reads=None, listing_generation=self._listing_generation)
        self.channel = Channel(
            self.device.fileno(), self.near, cast("Any", filesystem), cast("Any", None), lambda: None
        )

    def _listing_generation(self, ino: int) -> None:
        self.asked.set()
        self.go_on.wait(20)

    def ask(self, opcode: Opcode) -> None:
        body = struct.pack("<QQ", 0, 0)
        header = IN_HEADER.pack(IN_HEADER_SIZE + len(body), opcode, 7, 1)
        self.ours.send(header.ljust(IN_HEADER_SIZE, b"\0") + body)

    def close(self) -> None:
        self.go_on.set()
        self.device.shutdown(socket.SHUT_RDWR)  # wakes the thread,
        self.device.close()  # and this ends it, as an unmount does
        self.near.shutdown(socket.SHUT_RDWR)
        for thread in self.channel._threads:
            thread.join(10)
        for end in (self.ours, self.near, self.far):
            end.close()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    made.channel.start()
    yield made
    made.close()


def test_a_channel_that_waits_for_requests_moves(kernel: Kernel) -> None:
    for _ in range(3):
        assert kernel.channel.moves()
        time.sleep(0.05)


def test_a_channel_that_is_caught_in_a_request_does_not_move(kernel: Kernel) -> None:
    kernel.ask(Opcode.OPENDIR)
    assert kernel.asked.wait(10)
    assert kernel.channel.moves(), "it has taken one since"
    assert not kernel.channel.moves()
    assert not kernel.channel.moves()
    kernel.go_on.set()
    kernel.ours.recv(4096)
    deadline = time.monotonic() + 10
    while not kernel.channel.moves():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_channel_without_its_thread_does_not_move(kernel: Kernel) -> None:
    kernel.near.shutdown(socket.SHUT_RDWR)
    kernel.channel._threads[1].join(10)
    assert not kernel.channel.moves()
