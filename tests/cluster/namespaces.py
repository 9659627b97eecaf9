"""A small network of namespaces: places with an address each, on one bridge, and all that goes wrong with cables.

    with Network() as network:
        one, two = network.add("n1", 11), network.add("n2", 12)
        with one.entered():
            subprocess.Popen([...])             # runs there, and shares our mounts
        network.cut(one, two)                   # nothing that n1 sends reaches n2; the other way still works
        network.unplug(one); network.plug(one)  # a partition of one: the cable is in, and nothing comes through
        network.far(two, one_way_s=0.05)        # a round trip of 100 ms
        network.limit(one, 100_000_000)         # bytes per second that n1 can send
        network.add_zone("b"); network.add("n3", 13, zone="b")   # a bridge of its own, behind one cable
        network.zone_link("b", up=False)        # nothing comes into the zone or leaves it

All of it is in namespaces, the bridge too: the machine itself gets no address, no route and no device, so any number of
networks may use the same addresses. A thread enters a namespace by setns(2); what it starts there runs there, while
mounts stay shared (`ip netns exec` would make a mount namespace of its own, in which our mounts are not seen).

Why no netem: it is not part of every kernel. Loss in one direction is a neighbour entry with an address of nobody: the
sender notices nothing. Delay is a process between a cable and the bridge (`tests.cluster.delay_line`). The limit is
tbf, which about every kernel has.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tests.support.programs import REPOSITORY

NAMESPACES = Path("/run/netns")
SUBNET, PREFIX_LENGTH = "10.213.0", 24
SUBNET_6, PREFIX_LENGTH_6 = "fd00:213:", 64
HUB_NUMBER = 254
_HUB_MAC = "02:00:00:00:fe:fe"  # a bridge that takes the address of a port would change it when that port leaves
_NOBODY = "02:00:00:00:de:ad"
_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23  # include/uapi/linux/if_packet.h
_PACKET_ADD_MEMBERSHIP, _PACKET_MR_PROMISC = 1, 1
_SO_RCVBUFFORCE = 33
_LINE_BUFFER_BYTES = 32 << 20
_TBF_BURST_BYTES = 256 << 10
_TBF_QUEUE_BYTES = 8 << 20
"""More than all windows of a test: what waits for its turn is not lost."""

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def address_of(number: int, *, ipv6: bool = False) -> str:
    """Return an address of the network, without its length."""
    return f"{SUBNET_6}:{number:x}" if ipv6 else f"{SUBNET}.{number}"


def why_not() -> str:
    """Return why this machine cannot have such a network, "" when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"missing: {', '.join(missing)} (apt-get install iproute2)"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


def run(*command: str) -> str:
    """Run a command of iproute2 and return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Place:
    """One namespace with one address."""

    def __init__(self, namespace: str, name: str, address: str) -> None:
        self.namespace = namespace
        """Its name for `ip netns`."""
        self.name = name
        self.address = address

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread, and what it starts meanwhile, be there. Sockets stay where they were made."""
        with open("/proc/thread-self/ns/net", "rb") as home, (NAMESPACES / self.namespace).open("rb") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def pids(self) -> list[int]:
        """Return all processes that are there."""
        return [int(word) for word in run("ip", "netns", "pids", self.namespace).split()]


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


class Network:
    """The bridge and the places on it. Context manager."""

    def __init__(self, prefix: str = "", *, ipv6: bool = False) -> None:
        """`prefix`: how the names of its namespaces begin. `ipv6`: addresses of that, and no others."""
        self.prefix = prefix or f"cfs{os.getpid()}x{next(_numbers)}-"
        self.ipv6 = ipv6
        self.places: dict[str, Place] = {}
        self._bridges: dict[str, str] = {}
        """By place: where its cable belongs."""
        self.hub = Place(f"{self.prefix}hub", "hub", address_of(HUB_NUMBER, ipv6=ipv6))
        self._lines: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            run("ip", "netns", "add", self.hub.namespace)
            self._keep_addresses(self.hub)
            self._ip(self.hub, "link", "set", "lo", "up")
            self._add_bridge("br0", _HUB_MAC)
            self.add_address(self.hub.address)
            with self.hub.entered():  # a cable beside the bridge must not be answered as if it were in it
                Path("/proc/sys/net/ipv4/conf/all/arp_ignore").write_text("1")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all namespaces; what runs in them must have ended."""
        for name in list(self._lines):
            self._end_line(name)
        for place in [*self.places.values(), self.hub]:
            if (NAMESPACES / place.namespace).exists():
                run("ip", "netns", "del", place.namespace)
        self.places.clear()

    def add(self, name: str, number: int, *, zone: str = "") -> Place:
        """Make a place with the address of this number, in a zone that was added."""
        address = address_of(number, ipv6=self.ipv6)
        place = self.places[name] = Place(f"{self.prefix}{name}", name, address)
        self._bridges[name] = _bridge(zone)
        run("ip", "netns", "add", place.namespace)
        self._keep_addresses(place)
        there = ("peer", "name", "eth0", "netns", place.namespace)
        self._ip(self.hub, "link", "add", "name", _cable(place), "type", "veth", *there)
        self._ip(self.hub, "link", "set", "dev", _cable(place), "master", _bridge(zone), "up")
        self._add_address(place, "eth0", place.address)
        for device in ("lo", "eth0"):
            self._ip(place, "link", "set", device, "up")
        return place

    def remove(self, place: Place) -> None:
        """Take a place away; what ran there must have ended."""
        self._end_line(place.name)
        del self.places[place.name]
        run("ip", "netns", "del", place.namespace)

    def add_address(self, address: str) -> None:
        """Give the hub an address more."""
        self._add_address(self.hub, "br0", address)

    def add_zone(self, zone: str) -> None:
        """Make a bridge for places that reach all others through one cable."""
        here, there = _zone_ends(zone)
        self._add_bridge(_bridge(zone))
        self._ip(self.hub, "link", "add", "name", here, "type", "veth", "peer", "name", there)
        self._ip(self.hub, "link", "set", "dev", here, "master", "br0", "up")
        self._ip(self.hub, "link", "set", "dev", there, "master", _bridge(zone), "up")

    def zone_bytes(self, zone: str) -> tuple[int, int]:
        """Return how many bytes came into a zone so far, and how many left it, with all heads."""
        [link] = json.loads(self._ip(self.hub, "-json", "-statistics", "link", "show", "dev", _zone_ends(zone)[1]))
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]

    def _add_bridge(self, name: str, mac: str = "") -> None:
        kind = ("type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        self._ip(self.hub, "link", "add", "name", name, *(("address", mac) if mac else ()), *kind)
        self._ip(self.hub, "link", "set", name, "up")

    def _add_address(self, place: Place, device: str, address: str) -> None:
        length = PREFIX_LENGTH_6 if self.ipv6 else PREFIX_LENGTH
        at_once = ("nodad",) if self.ipv6 else ()  # else nobody may use it for the first second
        self._ip(place, "addr", "add", f"{address}/{length}", "dev", device, *at_once)

    def _keep_addresses(self, place: Place) -> None:
        """An address of IPv6 goes when its link is down, unless told otherwise; one of IPv4 stays."""
        if self.ipv6:
            with place.entered():
                for scope in ("all", "default"):
                    Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("0")
                    Path(f"/proc/sys/net/ipv6/conf/{scope}/keep_addr_on_down").write_text("1")

    # -- faults -------------------------------------------------------------------------------------------------------

    def link_down(self, place: Place) -> None:
        """`ip link set down` in the place itself: it loses its routes, the others hear nothing more of it."""
        self._ip(place, "link", "set", "eth0", "down")

    def link_up(self, place: Place) -> None:
        """Undo `link_down`."""
        self._ip(place, "link", "set", "eth0", "up")

    def unplug(self, place: Place) -> None:
        """A partition of one: its cable is in, and nothing comes through in either direction."""
        self._ip(self.hub, "link", "set", "dev", _cable(place), "nomaster")

    def plug(self, place: Place) -> None:
        """Undo `unplug` and `far`."""
        self._end_line(place.name)
        self._ip(self.hub, "link", "set", "dev", _cable(place), "master", self._bridges[place.name])

    def zone_link(self, zone: str, *, up: bool) -> None:
        """Take the cable of a whole zone down, or up again."""
        self._ip(self.hub, "link", "set", "dev", _zone_ends(zone)[0], "up" if up else "down")

    def cut(self, source: Place, address: str) -> None:
        """Lose all that a place sends to an address; what comes from there still arrives."""
        entry = (address, "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")
        self._ip(source, "neigh", "replace", *entry)

    def mend(self, source: Place, address: str) -> None:
        """Undo `cut`."""
        with contextlib.suppress(RuntimeError):  # it was not cut
            self._ip(source, "neigh", "del", address, "dev", "eth0")

    def limit(self, place: Place, bytes_per_s: int | None) -> None:
        """Limit what a place sends; None: no longer."""
        qdisc = ("tc", "-n", place.namespace, "qdisc")
        with contextlib.suppress(RuntimeError):  # there is none yet
            run(*qdisc, "del", "dev", "eth0", "root")
        if bytes_per_s is not None:
            rate = ("rate", f"{bytes_per_s * 8}bit", "burst", str(_TBF_BURST_BYTES), "limit", str(_TBF_QUEUE_BYTES))
            run(*qdisc, "add", "dev", "eth0", "root", "tbf", *rate)

    def far(self, place: Place, one_way_s: float) -> None:
        """Let everything from and to a place take `one_way_s` longer. Connections live on."""
        self.plug(place)
        inner, outer = f"d-{place.name}", f"e-{place.name}"
        self._ip(self.hub, "link", "add", "name", inner, "type", "veth", "peer", "name", outer)
        self._ip(self.hub, "link", "set", "dev", outer, "up")
        self._ip(self.hub, "link", "set", "dev", inner, "master", self._bridges[place.name], "up")
        self._ip(self.hub, "link", "set", "dev", _cable(place), "nomaster")
        with self.hub.entered(), _tap(_cable(place)) as here, _tap(outer) as there:
            ends = [str(end.fileno()) for end in (here, there)]
            self._lines[place.name] = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.delay_line", *ends, str(one_way_s)],
                stdin=subprocess.PIPE,
                pass_fds=(here.fileno(), there.fileno()),
                cwd=REPOSITORY,
                start_new_session=True,
            )

    def _end_line(self, name: str) -> None:
        child = self._lines.pop(name, None)
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self._ip(self.hub, "link", "del", f"d-{name}")

    @staticmethod
    def _ip(place: Place, *arguments: str) -> str:
        return run("ip", "-n", place.namespace, *arguments)


def _cable(place: Place) -> str:
    """The hub's end of a place's cable."""
    return f"p-{place.name}"


def _bridge(zone: str) -> str:
    return f"br-{zone}" if zone else "br0"


def _zone_ends(zone: str) -> tuple[str, str]:
    """The two ends of a zone's cable: on the bridge of all, and on that of the zone."""
    return f"y-{zone}", f"z-{zone}"


def _tap(device: str) -> socket.socket:
    """Return a socket that gets every frame that arrives at a device, and puts frames on it, unsegmented."""
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    tap.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    tap.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _LINE_BUFFER_BYTES)
    index = socket.if_nametoindex(device)
    membership = index.to_bytes(4, sys.byteorder) + _PACKET_MR_PROMISC.to_bytes(2, sys.byteorder) + bytes(10)
    tap.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
    tap.bind((device, _ETH_P_ALL))
    return tap
