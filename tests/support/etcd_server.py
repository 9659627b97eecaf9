"""A real etcd on this machine for tests: Debian's `etcd` (package etcd-server), one process, a temporary directory.

    with EtcdServer() as server:
        settings = EtcdSettings(endpoints=(server.endpoint,), cluster="test")
        server.kill(); server.restart()             # the same ports, the same records
        server.restart(empty=True)                  # the same ports, nothing remembered
        server.pause(); server.resume()             # alive, connected, and silent (SIGSTOP)

The server never outlives the process that started it: a shell beside it reads a pipe whose other end only we hold, and
when that closes it kills the server and removes its files (as in `bench.s3_server`). Both ports are chosen here.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from bench.starting import start_on_free_ports
from peer.etcd import etcdrpc, open_client
from peer.etcd_settings import EtcdSettings

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 20.0
PROBE_S = 0.05
RELEASE_S = 5.0
PORTS = range(10_000, 32_000)
"""Below those that Linux gives to outgoing connections."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# As in bench/s3_server.py; in addition the number of the server itself is written down, for SIGSTOP.
_GUARD = """
exec 3<&0
directory=$1; shift
"$@" 3<&- </dev/null &
server=$!
echo $server >"$directory/pid"
{ read -r _ <&3; kill -KILL $$ $server; n=0
while kill -0 $server && [ $((n += 1)) -lt 60 ]; do sleep 0.05; done
rm -rf -- "$directory"; kill -KILL 0; } &
wait $server
kill -KILL 0
"""


class EtcdServerError(RuntimeError):
    """The server did not start; the message ends with the last lines of its log."""


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """Files for TLS; with a certificate for clients the server wants to see one of the same authority."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path | None = None
    client_key: Path | None = None


class EtcdServer:
    """One etcd, alone in its cluster."""

    def __init__(self, *, tls: ServerTls | None = None, arguments: tuple[str, ...] = ()) -> None:
        """`arguments` go to etcd as they are."""
        self._tls = tls
        self._more = arguments
        self._directory = Path(tempfile.mkdtemp(prefix="cachefs-etcd-"))
        self._guard: subprocess.Popen[bytes] | None = None
        self.port = 0
        self._peer_port = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            start_on_free_ports(self._start_anew, EtcdServerError)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and remove its records."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """Kill the server at once; its records stay for `restart`."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
        assert guard.stdin is not None
        guard.stdin.close()
        # Our child is its guard, not the server, whose last thread may hold the ports for a moment longer.
        deadline = time.monotonic() + RELEASE_S
        while not _free(self.port, self._peer_port) and time.monotonic() < deadline:
            time.sleep(0.005)

    def stop(self) -> None:
        """End the server as its operator would (SIGTERM), so that it says good-bye to its clients."""
        if self._guard is None:
            return
        os.kill(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(timeout=5)
        self.kill()

    def restart(self, *, empty: bool = False) -> None:
        """Start again on the same ports, with the same records or with none; returns when it answers."""
        self.kill()
        if empty:
            shutil.rmtree(self._directory / "records", ignore_errors=True)
        self._start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nobody answers on them."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def _start_anew(self) -> None:
        self.port, self._peer_port = free_ports()
        self._start()

    def _start(self) -> None:
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start it and do not wait. It must not run."""
        with (self._directory / "log").open("ab") as log:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "etcd-guard", str(self._directory), _executable(), *self._arguments()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when it answers. Raises EtcdServerError."""
        assert self._guard is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._guard.poll() is not None or time.monotonic() > deadline:
                self.kill()
                tail = (self._directory / "log").read_text(errors="replace").splitlines()[-8:]
                raise EtcdServerError("etcd did not start:\n" + "\n".join(tail))
            time.sleep(PROBE_S)

    def _arguments(self) -> list[str]:
        scheme = "https" if self._tls else "http"
        peer_url = f"http://{LOOPBACK}:{self._peer_port}"
        urls = f"{scheme}://{LOOPBACK}:{self.port}"
        arguments = [
            "--name=test",
            f"--data-dir={self._directory}/records",
            f"--listen-client-urls={urls}",
            f"--advertise-client-urls={urls}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=test={peer_url}",
            "--heartbeat-interval=50",  # the shortest lease is 1.5 election timeouts
            "--election-timeout=500",
            "--unsafe-no-fsync",
            "--log-level=warn",
            "--logger=zap",
        ]
        if self._tls:
            arguments += [f"--cert-file={self._tls.cert}", f"--key-file={self._tls.key}"]
            if self._tls.client_cert:
                arguments += ["--client-cert-auth", f"--trusted-ca-file={self._tls.ca}"]
        return arguments + list(self._more)

    def _answers(self) -> bool:
        """Whether it knows a leader and says so."""
        try:
            socket.create_connection((LOOPBACK, self.port), timeout=1).close()
        except OSError:
            return False
        with contextlib.closing(self.client()) as client:
            try:
                return bool(client.maintenancestub.Status(etcdrpc.StatusRequest(), 2).leader)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return False
                raise

    # -- use ----------------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """What to give as --etcd."""
        return f"{'https' if self._tls else 'http'}://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int:
        """The process number of etcd."""
        return int((self._directory / "pid").read_text())

    def cpu_s(self) -> float:
        """Return the seconds of processor time that it took so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def resident_bytes(self) -> int:
        """Return how much memory it holds."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def settings(self, **more: Any) -> EtcdSettings:
        """Return what a node needs to reach this server."""
        tls = self._tls
        if tls:
            more = {"ca": tls.ca, "cert": tls.client_cert, "key": tls.client_key, **more}
        return EtcdSettings(endpoints=(self.endpoint,), **more)

    def client(self, timeout_s: float = 5.0) -> Any:
        """Return a client of the library (blocking; close it)."""
        return open_client(self.settings(), self.endpoint, timeout_s)

    def enable_users(self, user: str, password: str, *, root_password: str = "root") -> None:
        """Turn on authentication, with a user who may read and write everything."""
        with contextlib.closing(self.client()) as client:
            stub = etcdrpc.AuthStub(client.channel)
            everything = {"permType": 2, "key": b"\0", "range_end": b"\0"}  # READWRITE
            for name, word, role in (("root", root_password, "root"), (user, password, "all")):
                stub.UserAdd(etcdrpc.AuthUserAddRequest(name=name, password=word), 5)
                stub.RoleAdd(etcdrpc.AuthRoleAddRequest(name=role), 5)
                stub.UserGrantRole(etcdrpc.AuthUserGrantRoleRequest(user=name, role=role), 5)
            stub.RoleGrantPermission(etcdrpc.AuthRoleGrantPermissionRequest(name="all", perm=everything), 5)
            stub.AuthEnable(etcdrpc.AuthEnableRequest(), 5)


def free_ports() -> tuple[int, int]:
    """Return ports that are free now, and that no outgoing connection takes while the server is down."""
    while True:
        first, second = random.sample(PORTS, 2)
        if _free(first, second):
            return first, second


def _free(*ports: int) -> bool:
    with contextlib.ExitStack() as held:
        for port in ports:
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((LOOPBACK, port))
                listener.listen()
            except OSError:
                return False
    return True


def _executable() -> str:
    found = shutil.which("etcd")
    if found is None:
        raise EtcdServerError("the program `etcd` is missing: apt-get install etcd-server")
    return found
