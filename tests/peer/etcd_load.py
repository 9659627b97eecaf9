"""How much a cluster of N nodes asks of etcd: the figures of docs/decisions/0008-one-watch-per-node.md.

    .venv/bin/python -m tests.peer.etcd_load 200 1000          simulated nodes
    .venv/bin/python -m tests.peer.etcd_load --real 100        memberships, each with its own connection

A simulated node has a lease that is renewed as `peer.registration` does it, two records and a watch of its own on the
server; a few connections are shared, because a thousand of them in one Python program would measure Python.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import msgspec
import trio

from peer.etcd import etcdrpc
from peer.membership import TTL_S
from peer.roster import Keys
from tests.peer.nodes import VOLUME, Node, a_member, node_id, running, until
from tests.support.etcd_server import EtcdServer

STREAMS = 8
RENEWERS = 4
STEADY_S = 10.0
JOINS = 20
KEYS = Keys("load")


class Watchers:
    """Many watchers on one stream, and how many events reached them."""

    def __init__(self, client: Any, count: int) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        create = etcdrpc.WatchCreateRequest(key=KEYS.prefix.encode(), range_end=KEYS.prefix[:-1].encode() + b"0")
        for _ in range(count):
            self._requests.put(etcdrpc.WatchRequest(create_request=create))
        self._call = etcdrpc.WatchStub(client.channel).Watch(self._take())
        self.created = 0
        self.events = 0
        threading.Thread(target=self._receive, daemon=True).start()

    def _take(self) -> Iterator[Any]:
        while (request := self._requests.get()) is not None:
            yield request

    def _receive(self) -> None:
        try:
            for answer in self._call:
                self.created += answer.created
                self.events += len(answer.events)
        except Exception:  # cancelled
            return

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


def register(client: Any, number: int) -> int:
    """Register a node as `peer.registration` does; return its lease."""
    lease = client.lease(TTL_S)
    puts = {
        KEYS.node(node_id(number)): msgspec.json.encode(a_member(number)),
        KEYS.volume(VOLUME, node_id(number)): b"",
    }
    ops = [
        etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key.encode(), value=value, lease=lease.id))
        for key, value in puts.items()
    ]
    client.kvstub.Txn(etcdrpc.TxnRequest(success=ops), 5)
    return int(lease.id)


def renew(client: Any, leases: list[int], stop: threading.Event, count: list[int]) -> None:
    """Renew leases, each every 0.3 of its life, evenly spread, over one stream."""
    pause_s = 0.3 * TTL_S / len(leases)
    due = time.monotonic()
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers = client.leasestub.LeaseKeepAlive(iter(requests.get, None))
    while not stop.is_set():
        for lease in leases:
            requests.put(etcdrpc.LeaseKeepAliveRequest(ID=lease))
            next(answers)
            count[0] += 1
            due += pause_s
            if stop.wait(max(0.0, due - time.monotonic())):
                break
    requests.put(None)


def simulate(nodes: int) -> None:
    """Measure one size and print a line."""
    with EtcdServer() as server, ExitStack() as cleanup:
        clients = [cleanup.enter_context(closing(server.client(10))) for _ in range(STREAMS)]
        empty_bytes = server.resident_bytes()
        began = time.monotonic()
        leases = [register(clients[0], number) for number in range(nodes)]
        registered_s = time.monotonic() - began
        stop, renewals = threading.Event(), [0]
        renewers = [
            threading.Thread(target=renew, args=(clients[n], leases[n::RENEWERS], stop, renewals))
            for n in range(RENEWERS)
        ]
        for renewer in renewers:
            renewer.start()
        watchers = [cleanup.enter_context(closing(Watchers(client, nodes // STREAMS))) for client in clients]
        while sum(w.created for w in watchers) < nodes // STREAMS * STREAMS:
            time.sleep(0.05)
        held_bytes = server.resident_bytes() - empty_bytes
        before, cpu_s, began = renewals[0], server.cpu_s(), time.monotonic()
        time.sleep(STEADY_S)
        steady_s = time.monotonic() - began
        steady_cpu = (server.cpu_s() - cpu_s) / steady_s
        rate = (renewals[0] - before) / steady_s
        stop.set()
        for renewer in renewers:
            renewer.join()
        cpu_s, waits = server.cpu_s(), []
        for number in range(nodes, nodes + JOINS):
            seen, began = sum(w.events for w in watchers), time.monotonic()
            register(clients[0], number)
            while sum(w.events for w in watchers) < seen + 2 * (nodes // STREAMS * STREAMS):
                time.sleep(0.001)
            waits.append(1000 * (time.monotonic() - began))
        join_cpu_ms = 1000 * (server.cpu_s() - cpu_s) / JOINS
        middle_ms = sorted(waits)[len(waits) // 2]
        print(
            f"{nodes:6} nodes: registered {nodes / registered_s:5.0f}/s; memory +{held_bytes / 1e6:.1f} MB; "
            f"{rate:.0f} renewals/s = {100 * steady_cpu:.1f} % of a core; a join reaches all in {middle_ms:.0f} ms "
            f"(longest {max(waits):.0f}) and costs {join_cpu_ms:.1f} ms CPU",
            flush=True,
        )


async def real(nodes: int) -> None:
    """Measure memberships with a connection each and print a line."""
    with EtcdServer() as server:
        empty_bytes = server.resident_bytes()
        members = [Node(server.settings(), a_member(number), ttl_s=TTL_S) for number in range(nodes)]
        async with running(*members):
            await until(lambda: all(len(node.ids) == nodes for node in members), 60)
            held_bytes = server.resident_bytes() - empty_bytes
            await trio.sleep(5)
            cpu_s, own_s, began = server.cpu_s(), time.process_time(), time.monotonic()
            await trio.sleep(STEADY_S)
            lasted_s = time.monotonic() - began
            server_share, own_share = (server.cpu_s() - cpu_s) / lasted_s, (time.process_time() - own_s) / lasted_s
            print(
                f"{nodes:6} memberships: etcd +{held_bytes / nodes / 1e3:.0f} kB a node, {100 * server_share:.1f} % of "
                f"a core; each node {100 * own_share / nodes:.3f} % of a core",
                flush=True,
            )


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("nodes", type=int, nargs="*")
    parser.add_argument("--real", type=int)
    arguments = parser.parse_args()
    for nodes in arguments.nodes:
        simulate(nodes)
    if arguments.real:
        trio.run(real, arguments.real)


if __name__ == "__main__":
    main()
