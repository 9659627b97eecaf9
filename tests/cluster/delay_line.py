"""A cable that is long: hands each frame between two packet sockets on some time after it came.

    python -m tests.cluster.delay_line FD FD SECONDS

Started by `tests.cluster.namespaces`, with the sockets inherited; ends when its standard input closes, so that it never
outlives who started it. TCP does not notice that this is no cable: handshakes and windows take the round trips that
they take on a real way. Frames cross with virtio headers, unsegmented, as in `bench.far_link`.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import signal
import sys
import time

_FRAME_BYTES = (64 << 10) + 256
_BURST = 64
"""Frames read from one side before the other gets its turn."""


def carry(one: int, other: int, one_way_s: float, until: int) -> None:
    """Hand frames on, each `one_way_s` after it was read, until the descriptor `until` is readable."""
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()  # in the order of their times
    opposite = {one: other, other: one}
    for fd in opposite:
        os.set_blocking(fd, False)
    while True:
        timeout = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        readable = select.select([one, other, until], [], [], timeout)[0]
        if until in readable:
            return
        for fd in readable:
            with contextlib.suppress(BlockingIOError):
                for _ in range(_BURST):
                    frame = os.read(fd, _FRAME_BYTES)
                    waiting.append((time.monotonic() + one_way_s, opposite[fd], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, fd, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # a cable may lose frames; TCP sends them again
                os.write(fd, frame)


def main() -> int:
    """Carry frames until the one who started us is gone."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    one, other, one_way_s = sys.argv[1:]
    carry(int(one), int(other), float(one_way_s), until=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
