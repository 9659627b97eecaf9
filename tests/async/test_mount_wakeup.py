"""The wake-up guard: when it is held, when it is let go, and that it costs nothing while nobody asks.

With a file in place of /dev/cpu_dma_latency; tests/fuse/test_low_latency.py has the real one. (Its thread sleeps until
the worker ends, so these tests are not among those that may leave no thread behind.)
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs.config import LowLatency
from cachefs.mount import wakeup
from cachefs.mount.wakeup import BUSY_PER_TICK, IDLE_TICKS, TICK_S, WakeUpGuard
from tests.support.machine import wait_until

HELD = struct.pack("i", 0)


class Worker:
    """What a guard needs of its worker: a counter of requests, and a flag that the next request wakes it."""

    def __init__(self, mode: LowLatency, device: Path) -> None:
        self.requests = 0
        self.asleep = False
        self.changes: list[bool] = []
        self.device = device
        self.guard = WakeUpGuard(mode, lambda: self.requests, self._set_asleep, self.changes.append, device=str(device))

    def _set_asleep(self, asleep: bool) -> None:
        self.asleep = asleep

    def request(self, count: int = 1) -> None:
        self.requests += count
        if self.asleep:
            self.guard.activity()

    @property
    def is_held(self) -> bool:
        """Whether this process has the device open."""
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return any(os.path.realpath(link) == str(self.device) for link in links if os.path.exists(link))


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "cpu_dma_latency"
    path.write_bytes(b"")
    return path


@pytest.fixture
def busy() -> Iterator[Callable[[Worker], threading.Event]]:
    """Makes many requests to a worker until the event is set."""
    ends: list[tuple[threading.Event, threading.Thread]] = []

    def start(worker: Worker) -> threading.Event:
        end = threading.Event()

        def ask() -> None:
            while not end.wait(TICK_S / BUSY_PER_TICK / 4):
                worker.request()

        thread = threading.Thread(target=ask, name="busy")
        thread.start()
        ends.append((end, thread))
        return end

    yield start
    for end, thread in ends:
        end.set()
        thread.join()


def test_auto_holds_it_while_requests_are_frequent_and_lets_go(
    device: Path, busy: Callable[[Worker], threading.Event]
) -> None:
    worker = Worker(LowLatency.AUTO, device)
    worker.guard.start()
    wait_until(lambda: worker.asleep, 5, "it sleeps at first")
    assert not worker.is_held
    for round_ in (1, 2):
        end = busy(worker)
        wait_until(lambda: worker.is_held, 5, "it is held")
        assert device.read_bytes()[-4:] == HELD
        time.sleep(0.3)
        assert worker.is_held
        assert not worker.asleep
        end.set()
        stopped = time.monotonic()
        wait_until(lambda: worker.asleep, 5, "it sleeps again")
        assert not worker.is_held
        assert time.monotonic() - stopped > IDLE_TICKS * TICK_S / 2  # not between two requests of a slow reader
        assert worker.changes == [True, False] * round_
    held_s = worker.guard.held_s
    assert held_s > 2 * IDLE_TICKS * TICK_S
    assert worker.guard.held_s == held_s


def test_auto_leaves_the_cpus_alone_for_a_few_requests(device: Path) -> None:
    worker = Worker(LowLatency.AUTO, device)
    worker.guard.start()
    wait_until(lambda: worker.asleep, 5, "it sleeps at first")
    for _ in range(10):
        worker.request()
        time.sleep(2 * TICK_S)
    assert worker.changes == []
    wait_until(lambda: worker.asleep, 5, "it sleeps again")
    assert worker.guard.held_s == 0


def test_a_guard_that_sleeps_takes_no_cpu(device: Path) -> None:
    worker = Worker(LowLatency.AUTO, device)
    worker.guard.start()
    wait_until(lambda: worker.asleep, 5, "it sleeps")
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.01


def test_always_is_always(device: Path) -> None:
    worker = Worker(LowLatency.ALWAYS, device)
    worker.guard.start()
    assert worker.is_held
    assert device.read_bytes() == HELD
    assert worker.changes == [True]
    time.sleep(0.1)
    assert worker.guard.held_s >= 0.1


def test_off_touches_nothing(device: Path) -> None:
    worker = Worker(LowLatency.OFF, device)
    threads = threading.active_count()
    worker.guard.start()
    worker.request(1000)
    assert (worker.is_held, worker.asleep, worker.changes) == (False, False, [])
    assert threading.active_count() == threads


@pytest.mark.parametrize("mode", [LowLatency.AUTO, LowLatency.ALWAYS])
def test_without_the_device_everything_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: LowLatency
) -> None:
    caplog.set_level(logging.INFO, wakeup.__name__)
    worker = Worker(mode, tmp_path / "missing")
    worker.guard.start()
    assert "no right to" in caplog.text
    assert (worker.asleep, worker.changes) == (False, [])


def test_a_device_that_refuses_is_asked_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, busy: Callable[[Worker], threading.Event]
) -> None:
    """As in a container whose device rules access(2) does not know."""
    caplog.set_level(logging.INFO, wakeup.__name__)
    directory = tmp_path / "cpu_dma_latency"
    directory.mkdir()  # it can be written, says access(2), and not be opened for that
    worker = Worker(LowLatency.AUTO, directory)
    worker.guard.start()
    wait_until(lambda: worker.asleep, 5, "it sleeps at first")
    for _ in range(2):
        end = busy(worker)
        time.sleep(4 * TICK_S)
        end.set()
        wait_until(lambda: worker.asleep, 5, "it sleeps again")
    assert worker.changes == []
    assert caplog.text.count("the wake-up guard is not available") == 1
