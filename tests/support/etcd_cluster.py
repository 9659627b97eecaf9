"""A real etcd of three members on this machine, whose members may be killed one by one.

with EtcdCluster() as cluster:
    settings = cluster.settings(cluster="test")     # all three endpoints
    cluster.leader().kill()                         # the others choose another
    cluster.members[0].restart()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Self

import grpc

from bench.starting import start_on_free_ports
from peer.etcd import etcdrpc
from peer.etcd_settings import EtcdSettings
from tests.support.etcd_server import LOOPBACK, EtcdServer, EtcdServerError, free_ports
from tests.support.machine import wait_until

SIZE = 3
ELECTION_S = 10.0


class EtcdMember(EtcdServer):
    """One of several servers that are one etcd."""

    def __init__(self, name: str, everybody: Callable[[], str]) -> None:
        """`everybody` returns what `--initial-cluster` wants, once all ports are chosen."""
        super().__init__()
        self.name = name
        self._everybody = everybody

    @property
    def peer_url(self) -> str:
        """Where the other members reach it."""
        return f"http://{LOOPBACK}:{self._peer_port}"

    def choose_ports(self, taken: set[int]) -> None:
        """Choose ports that no other member has, and add them to `taken`."""
        while True:
            chosen = free_ports()
            if taken.isdisjoint(chosen):
                self.port, self._peer_port = chosen
                taken.update(chosen)
                return

    def leads(self) -> bool:
        """Whether it is the leader, as it says itself."""
        with contextlib.closing(self.client(2.0)) as client:
            try:
                status = client.maintenancestub.Status(etcdrpc.StatusRequest(), 2)
            except grpc.RpcError:
                return False
            return bool(status.leader and status.leader == status.header.member_id)

    def _arguments(self) -> list[str]:
        usual = [word for word in super()._arguments() if not word.startswith(("--name=", "--initial-cluster="))]
        return [*usual, f"--name={self.name}", f"--initial-cluster={self._everybody()}"]


class EtcdCluster:
    """See the module. Context manager."""

    def __init__(self, size: int = SIZE) -> None:
        self.members = [EtcdMember(f"m{number}", self._everybody) for number in range(size)]

    def _everybody(self) -> str:
        return ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def __enter__(self) -> Self:
        try:
            start_on_free_ports(self._start, EtcdServerError)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        taken: set[int] = set()
        for member in self.members:
            member.kill()  # of a try that failed
            member.choose_ports(taken)
        for member in self.members:
            member.launch()
        for member in self.members:
            member.wait()

    def close(self) -> None:
        """Stop all members and remove their records."""
        for member in self.members:
            member.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """What to give as --etcd, each."""
        return tuple(member.endpoint for member in self.members)

    def settings(self, **more: Any) -> EtcdSettings:
        """Return what a node needs to reach this etcd."""
        return EtcdSettings(endpoints=self.endpoints, **more)

    def leader(self, among: list[EtcdMember] | None = None) -> EtcdMember:
        """Return the leader of now; waits for an election. `among`: the members that live."""
        found: list[EtcdMember] = []

        def is_there() -> bool:
            found[:] = [member for member in among or self.members if member.leads()]
            return len(found) == 1

        wait_until(is_there, ELECTION_S, "there is one leader")
        return found[0]
