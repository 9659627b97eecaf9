"""A link with a delay into a network namespace of its own: what is behind it is far away, for every system alike.

    with FarLink() as link:
        subprocess.Popen([*link.enter, "weed", "server", f"-ip={link.address}", ...])

Why not netem: it is not part of every kernel. Instead two TUN devices, one here and one in the namespace, and between
them one child process that hands each packet on `one_way_s` after it came. TCP does not notice: handshakes, slow start
and window limits take the round trips that they take on a real way. Packets cross with virtio headers, unsegmented (up
to 64 KiB), so a gigabyte is 16,000 of them and costs the child 0.8 s of CPU through eight connections, 1.8 s through
one. One connection carries 130 MB/s (that is TCP's windows), eight carry 700.

Nothing can be left behind: the namespace has no name and lives as long as a process in it, the devices live as long as
their descriptors, and the child ends when the pipe from us closes, also after kill -9.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import ipaddress
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

ONE_WAY_S = 0.010
_START_TIMEOUT_S = 10.0
_NETWORK = ipaddress.ip_network("198.18.0.0/15")
"""Reserved for measurements (RFC 2544): nobody's real network."""
_LINK_PREFIX = 30
_PACKET_BYTES = (64 << 10) + 64
_BURST = 64
"""Packets read from one side before the other gets its turn."""
_PRIORITY = -10
"""A way is not longer because the machines at its ends are busy."""
_QUEUE_PACKETS = 10_000
"""More than all windows of a bench together: the link itself loses nothing."""

# include/uapi/linux: if_tun.h, sockios.h, if.h, sched.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFTXQLEN = 0x8914, 0x8916, 0x891C, 0x8943
_IFF_UP_RUNNING = 0x1 | 0x40
_CLONE_NEWNET = 0x40000000


class LinkUnavailable(RuntimeError):
    """This machine does not let us make the link; the message is the reason that the report shows."""


class FarLink:
    """The link and its namespace. Context manager."""

    def __init__(self, one_way_s: float = ONE_WAY_S) -> None:
        self.one_way_s = one_way_s
        self.address = ""
        """The far end, as seen from here and from inside."""
        self._device = ""
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.far_link", str(self.one_way_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            start_new_session=True,  # Ctrl-C is ours: it must carry packets until the last mount is gone
        )
        assert self._child.stdout is not None
        answer: dict[str, str] = {"error": "the program that carries the packets did not start"}
        if select.select([self._child.stdout], [], [], _START_TIMEOUT_S)[0]:
            with contextlib.suppress(ValueError):
                answer = json.loads(self._child.stdout.readline())
        if "error" in answer:
            self.close()
            raise LinkUnavailable(answer["error"])
        self.address, self._device = answer["address"], answer["device"]
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; with it the devices go, and the namespace with the last process inside."""
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        child.stdout.close()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    @property
    def pid(self) -> int:
        """The process that carries the packets."""
        assert self._child is not None, "the link is closed"
        return self._child.pid

    def carried_bytes(self) -> int:
        """Return how many bytes went through so far, both ways."""
        counters = Path("/sys/class/net", self._device, "statistics")
        return sum(int((counters / name).read_text()) for name in ("rx_bytes", "tx_bytes"))

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command that is to run at the far end."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")


# -- the child ---------------------------------------------------------------------------------------------------------


def _open_end(name: str, address: str) -> int:
    """Make one end of the link in the present namespace and return its descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    netmask = str(ipaddress.ip_network(f"{address}/{_LINK_PREFIX}", strict=False).netmask)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, netmask)):
            fcntl.ioctl(control, request, struct.pack("16sHH4s16x", name.encode(), socket.AF_INET, 0, _packed(value)))
        fcntl.ioctl(control, _SIOCSIFTXQLEN, struct.pack("16si20x", name.encode(), _QUEUE_PACKETS))
        _switch_on(control, name)
    return fd


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def _switch_on(control: socket.socket, name: str) -> None:
    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), _IFF_UP_RUNNING))


def _make_link() -> tuple[int, int, dict[str, str]]:
    """Return (descriptor here, descriptor far away, names for `FarLink`). Leaves this process in the new namespace."""
    subnets = 1 << (_LINK_PREFIX - _NETWORK.prefixlen)
    base = _NETWORK.network_address + (os.getpid() % subnets << (32 - _LINK_PREFIX))
    device = f"far{os.getpid()}"
    here = _open_end(device, str(base + 1))
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"a network namespace: {os.strerror(number)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _switch_on(control, "lo")
    return here, _open_end("far0", str(base + 2)), {"address": str(base + 2), "device": device}


def _carry(here: int, there: int, one_way_s: float) -> None:
    """Hand packets on, each `one_way_s` after it was read, until the pipe on standard input closes."""
    waiting: collections.deque[tuple[float, int, bytearray, int]] = collections.deque()  # in the order of their times
    spare: list[bytearray] = []  # memory is used again: fresh pages for each packet cost more than the copy
    other = {here: there, there: here}
    now = time.monotonic
    while True:
        timeout = max(waiting[0][0] - now(), 0) if waiting else None
        readable = select.select([here, there, 0], [], [], timeout)[0]
        if 0 in readable:
            return
        for fd in readable:
            with contextlib.suppress(BlockingIOError):
                for _ in range(_BURST):
                    buffer = spare.pop() if spare else bytearray(_PACKET_BYTES)
                    spare.append(buffer)
                    length = os.readv(fd, [buffer])
                    spare.pop()
                    waiting.append((now() + one_way_s, other[fd], buffer, length))
        while waiting and waiting[0][0] <= now():
            _, fd, buffer, length = waiting.popleft()
            with contextlib.suppress(OSError):  # IP may lose packets; TCP sends them again
                os.write(fd, memoryview(buffer)[:length])
            spare.append(buffer)


def main() -> int:
    """Make the link, print where it leads (or why there is none), carry packets."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    try:
        here, there, names = _make_link()
    except OSError as error:
        print(json.dumps({"error": f"no link with a delay: {error.strerror or error}"}), flush=True)
        return 1
    print(json.dumps(names), flush=True)
    _carry(here, there, float(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
