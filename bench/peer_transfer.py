"""Blocks between two processes of one machine: the peer server against nginx, asked by the same client code.

    python -m bench.peer_transfer [--seconds 2] [--json FILE]

Both servers give the same blocks of 1 MiB from memory: ours from a real shm tier (LMDB on tmpfs), nginx as files on
tmpfs with sendfile. The client verifies the checksum of every block, also of those from nginx. Wanted (issue of the
peers): at least half of nginx for 1 MiB blocks, and 3,000 blocks of 100 KB per second in batches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import trustme
import xxhash

from cachefs.block import codec
from cachefs.block.lmdb_tier import TierWriter
from cachefs.metrics import Counters
from cachefs.types import BlockKey, ObjectVersion, Tier, block_key, object_id
from peer.client import PeerClient
from peer.connections import Connection
from peer.credentials import PeerCredentials
from peer.leash import Leash
from peer.limits import ClientLimits
from peer.members import Member
from peer.ports import Fetched
from peer.server import PeerServer
from peer.wire import BatchRequest, Run

BLOCK = 1 << 20
LARGE = ObjectVersion("large", "etag", 64 * BLOCK)
SMALL_BYTES = 100_000
SMALL = [ObjectVersion(f"small-{number}", "etag", SMALL_BYTES) for number in range(640)]
BATCH = 80
CONNECTIONS = (1, 4)


def payload(version: ObjectVersion, index: int) -> bytes:
    """Return the bytes of a block: no two are alike."""
    length = min(BLOCK, version.size - index * BLOCK)
    return (xxhash.xxh3_128_digest(f"{version.key} {index}".encode()) * (length // 16 + 1))[:length]


def oid_of(version: ObjectVersion) -> bytes:
    """Return what a version is called."""
    return object_id("http://store", "bucket", version)


# -- servers ----------------------------------------------------------------------------------------------------------


class TierHoldings:
    """What a real shm tier holds, and nothing else."""

    def __init__(self, tier: TierWriter) -> None:
        self._tier = tier
        self.block_size = BLOCK

    def lend(self, key: BlockKey, length: int) -> AbstractContextManager[memoryview | None]:
        """See `Holdings.lend`."""
        return self._tier.lend(key, length)

    def level(self, *_: object) -> int:
        """See `Holdings.level`."""
        return 0

    def stored(self, key: BlockKey) -> bool:
        """See `Holdings.stored`."""
        return False

    def load(self, key: BlockKey, length: int) -> bytes | None:
        """See `Holdings.load`."""
        return None

    def fetch(
        self, volume: str, version: ObjectVersion, first: int, count: int, fetched: Fetched, *, behind: bool = False
    ) -> None:
        """See `Holdings.fetch`."""
        raise AssertionError("every block is in memory")

    def list_page(self, *_: object) -> Any:
        """See `Holdings.list_page`."""
        raise AssertionError("nothing is listed")

    def job(self, *_: object) -> Any:
        """See `Holdings.job`."""
        raise AssertionError("nothing is warmed up")

    def summary(self) -> dict[str, Any]:
        """See `Holdings.summary`."""
        return {}


def serve(directory: Path, certificates: list[str]) -> None:
    """Serve a tier until the parent closes our input."""
    blocks = [(LARGE, index) for index in range(64)] + [(version, 0) for version in SMALL]
    counters = Counters()
    tier = TierWriter(str(directory / "shm"), Tier.SHM, limit_bytes=256 << 20, block_size=BLOCK, counters=counters)
    for version, index in blocks:
        key = block_key(oid_of(version), index)  # type: ignore[arg-type]
        tier.put_values([(key, codec.encode(payload(version, index), key))])
    server = PeerServer(TierHoldings(tier), credentials=PeerCredentials(*certificates), counters=counters)
    print(server.start("127.0.0.1", 0), flush=True)
    sys.stdin.read()
    server.close()
    tier.close()


@contextlib.contextmanager
def peer_server(directory: Path, certificates: list[str]) -> Iterator[int]:
    """Run `serve` in a process of its own."""
    command = [sys.executable, "-m", "bench.peer_transfer", "--serve", str(directory), *certificates]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def nginx(directory: Path, certificates: list[str]) -> Iterator[int]:
    """Serve the large object's blocks as files."""
    root = directory / "nginx"
    root.mkdir(exist_ok=True)
    for index in range(64):
        (root / f"block-{index}").write_bytes(payload(LARGE, index))
    tls = ""
    if certificates:
        cert, key, ca = certificates
        tls = f"ssl_certificate {cert}; ssl_certificate_key {key}; ssl_client_certificate {ca}; ssl_verify_client on;"
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    config = directory / "nginx.conf"
    config.write_text(
        f"user root; daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid; "
        f"error_log {directory}/nginx.log crit; events {{ }} http {{ access_log off; sendfile on; tcp_nopush on; "
        f"keepalive_requests 1000000; server {{ listen 127.0.0.1:{port}{' ssl' if tls else ''}; {tls} "
        f"root {root}; }} }}\n"
    )
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with subprocess.Popen([program, "-c", str(config), "-e", f"{directory}/nginx.log"]) as process:
        try:
            time.sleep(0.5)
            yield port
        finally:
            process.terminate()
            process.wait()


# -- the client -------------------------------------------------------------------------------------------------------


def measure(threads: int, seconds: float, make: Callable[[], Callable[[int], int]]) -> tuple[float, float]:
    """Return calls and bytes per second; `make` returns the work of one thread: number of the call -> bytes."""
    totals = [(0, 0)] * threads
    failures: list[Exception] = []
    began = time.monotonic()

    def work(which: int) -> None:
        try:
            ask = make()
            calls = received = 0
            while time.monotonic() - began < seconds:
                received += ask(calls * threads + which)
                calls += 1
                totals[which] = (calls, received)
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            failures.append(error)

    running = [threading.Thread(target=work, args=(which,)) for which in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]
    spent = time.monotonic() - began
    return sum(calls for calls, _ in totals) / spent, sum(received for _, received in totals) / spent


def member_at(port: int, credentials: PeerCredentials) -> Member:
    """Return the node that listens at a port."""
    return Member(node_id="a" * 16, name="server", address=f"127.0.0.1:{port}", tls=credentials.tls)


def from_nginx(port: int, credentials: PeerCredentials) -> Callable[[], Callable[[int], int]]:
    """Return the work that gets one file per call."""
    sums = [xxhash.xxh3_64_intdigest(payload(LARGE, index)) for index in range(64)]

    def make() -> Callable[[int], int]:
        leash = Leash()
        connection = Connection(member_at(port, credentials), credentials, ClientLimits(), leash)
        place = memoryview(bytearray(BLOCK))

        def ask(call: int) -> int:
            answer = connection.ask("GET", f"/block-{call % 64}", b"", time.monotonic() + 15, 1.0, leash)
            answer.into(place)
            assert xxhash.xxh3_64_intdigest(place) == sums[call % 64]
            return BLOCK

        return ask

    return make


def from_peer(
    port: int, credentials: PeerCredentials, runs_of: Callable[[int], tuple[Run, ...]]
) -> Callable[[], Callable[[int], int]]:
    """Return the work that gets some blocks per call."""
    client = PeerClient(credentials, counters=Counters())
    peer = member_at(port, credentials)

    def make() -> Callable[[int], int]:
        memory = memoryview(bytearray(8 * BLOCK))

        def ask(call: int) -> int:
            runs = runs_of(call)
            buffers, at = [], 0
            for run in runs:
                for index in range(run.first, run.first + run.count):
                    length = min(BLOCK, run.size - index * BLOCK)
                    buffers.append(memory[at : at + length])
                    at += length
            request = BatchRequest(volume="0" * 16, block_size=BLOCK, only_cached=False, runs=runs)
            for _ in client.read_blocks(peer, request, buffers):
                pass
            return at

        return ask

    return make


def large_run(count: int) -> Callable[[int], tuple[Run, ...]]:
    """Return the request of each call: `count` blocks of the large object."""
    oid = oid_of(LARGE)
    return lambda call: (Run(b"large", "etag", LARGE.size, oid, call * count % 64, count),)


def small_runs(call: int) -> tuple[Run, ...]:
    """Return the request of each call: small objects."""
    first = call * BATCH % len(SMALL)
    return tuple(
        Run(version.key.encode(), "etag", SMALL_BYTES, oid_of(version), 0, 1)
        for version in SMALL[first : first + BATCH]
    )


def run(seconds: float) -> list[dict[str, Any]]:
    """Return one row per server, kind of block, TLS, and number of connections."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachefs-bench-") as name:
        directory = Path(name)
        certificates = make_certificates(directory)
        for tls in (False, True):
            files = certificates if tls else []
            credentials = PeerCredentials(*files)
            with peer_server(directory, files) as port, nginx(directory, files) as other:
                kinds: dict[str, tuple[int, Callable[[], Callable[[int], int]]]] = {
                    "nginx, 1 MiB": (1, from_nginx(other, credentials)),
                    "peer, 1 MiB, one per call": (1, from_peer(port, credentials, large_run(1))),
                    "peer, 1 MiB, eight per call": (8, from_peer(port, credentials, large_run(8))),
                    f"peer, 100 KB, {BATCH} per call": (BATCH, from_peer(port, credentials, small_runs)),
                }
                for kind, (blocks, make) in kinds.items():
                    for threads in CONNECTIONS:
                        calls, speed = measure(threads, seconds, make)
                        rows.append(
                            {
                                "kind": kind,
                                "tls": tls,
                                "connections": threads,
                                "blocks_per_s": calls * blocks,
                                "bytes_per_s": speed,
                            }
                        )
                        print(row_text(rows[-1]), flush=True)
    return rows


def row_text(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    speed = f"{row['blocks_per_s']:9.0f} blocks/s {row['bytes_per_s'] / 1e6:8.0f} MB/s"
    return f"{row['kind']:30} {'TLS' if row['tls'] else '   '} {row['connections']} connections {speed}"


def make_certificates(directory: Path) -> list[str]:
    """Write a certificate, its key, and the authority's certificate; return where they are."""
    authority = trustme.CA()
    issued = authority.issue_cert("peer.test")
    names = [str(directory / name) for name in ("cert.pem", "key.pem", "ca.pem")]
    issued.cert_chain_pems[0].write_to_path(names[0])
    issued.private_key_pem.write_to_path(names[1])
    authority.cert_pem.write_to_path(names[2])
    return names


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(Path(arguments.serve[0]), arguments.serve[1:])
        return
    rows = run(arguments.seconds)
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpus": os.cpu_count(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
