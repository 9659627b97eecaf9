"""The wake-up guard: idle CPUs stay awake while requests are frequent.

Most of what a single reader waits for is the time an idle CPU needs to wake up (59.5 us for one byte to another
process and back on a virtual machine that halts idle CPUs; 4.4 us while the guard is held). Holding
/dev/cpu_dma_latency open with a 0 written to it makes idle CPUs poll instead (kernel documentation:
power/pm_qos_interface). The kernel undoes it when the descriptor is closed, so kill -9 can not leave it behind. The
price: idle CPUs do not sleep meanwhile, so `auto` holds it only while it pays.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable

from cachefs.config import LowLatency

log = logging.getLogger(__name__)

DEVICE = "/dev/cpu_dma_latency"
NO_LIMIT_US = 2_000_000_000
"""What the kernel takes for no wish at all."""
TICK_S = 0.05
BUSY_PER_TICK = 5
"""100 requests per second: from there on the wake-ups that are saved outweigh the sleep that is lost."""
IDLE_TICKS = 20
"""One second without a request."""


class WakeUpGuard:
    """Holds the guard for one worker. `requests` returns a counter that grows with each request.

    While nothing happens the thread sleeps for good; `activity` (called by the channel because `set_asleep(True)` was
    called) wakes it.
    """

    def __init__(
        self,
        mode: LowLatency,
        requests: Callable[[], int],
        set_asleep: Callable[[bool], None],
        on_change: Callable[[bool], None],
        device: str = DEVICE,
        lent: int = -1,
    ) -> None:
        """`lent`: the device as a descriptor that somebody with more rights has opened; it stays open."""
        self._mode = mode
        self._requests = requests
        self._set_asleep = set_asleep
        self._on_change = on_change
        self._device = device
        self._lent = lent
        self._descriptor: int | None = None
        self._wake = threading.Event()
        self._held_since = 0.0
        self._held_s = 0.0
        self._refused = False

    @property
    def held_s(self) -> float:
        """For how many seconds the guard has been held in all."""
        running = time.monotonic() - self._held_since if self._descriptor is not None else 0.0
        return self._held_s + running

    def start(self) -> None:
        """Begin; returns at once. Without the right to the device this logs one line and does nothing."""
        if self._mode is LowLatency.OFF:
            return
        if self._lent < 0 and not os.access(self._device, os.W_OK):
            log.info("no right to %s: idle CPUs may sleep between requests (--low-latency)", self._device)
            return
        if self._mode is LowLatency.ALWAYS:
            self._hold()
            return
        threading.Thread(target=self._watch, name="wake-up-guard", daemon=True).start()

    def activity(self) -> None:
        """A request came while the guard was asleep."""
        self._set_asleep(False)
        self._wake.set()

    def _watch(self) -> None:
        while True:
            self._set_asleep(True)
            self._wake.wait()
            self._wake.clear()
            self._until_idle()

    def _until_idle(self) -> None:
        idle, last = 0, self._requests()
        while idle < IDLE_TICKS:
            time.sleep(TICK_S)
            now = self._requests()
            idle = idle + 1 if now == last else 0
            if now - last >= BUSY_PER_TICK and self._descriptor is None and not self._refused:
                self._hold()
            last = now
        self._release()

    def _hold(self) -> None:
        descriptor = -1
        try:
            if self._lent < 0:
                descriptor = os.open(self._device, os.O_WRONLY | os.O_CLOEXEC)
            os.write(self._lent if descriptor < 0 else descriptor, struct.pack("i", 0))
        except OSError as error:
            # access(2) does not know the device rules of a container; they do not change, so this is said once.
            log.info("the wake-up guard is not available: %s", error)
            self._refused = True
            if descriptor >= 0:
                os.close(descriptor)
            return
        self._descriptor, self._held_since = self._lent if descriptor < 0 else descriptor, time.monotonic()
        self._on_change(True)

    def _release(self) -> None:
        if self._descriptor is None:
            return
        if self._descriptor == self._lent:
            os.write(self._lent, struct.pack("i", NO_LIMIT_US))
        else:
            os.close(self._descriptor)
        self._held_s += time.monotonic() - self._held_since
        self._descriptor = None
        self._on_change(False)
