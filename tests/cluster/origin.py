"""What the nodes of a cluster take for their S3 server and their etcd: real ones, seen from inside the network.

The S3 server itself stays on the machine's loopback, where tests fill it. `Origin` is the proxy of the fault tests with
its listening socket in the place "s3": it counts every request and body byte that a node asks for, breaks answers on
demand, and its cable can be limited. etcd runs in the hub.
"""

from __future__ import annotations

import http.client
import json
import socket
import socketserver
import threading
from http.server import HTTPServer
from typing import Any

from cachefs.config import join_address
from tests.cluster.namespaces import Place
from tests.support.etcd_server import LOOPBACK, EtcdServer
from tests.support.fault_proxy import FaultProxy, _Connection, _Server

PORT = 8333


class _QuietServer(_Server):
    def server_bind(self) -> None:
        """Without the look-up of our name that `HTTPServer` makes: there is no name service here."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


assert issubclass(_Server, HTTPServer), "what the method above replaces"


class _QuietServer6(_QuietServer):
    address_family = int(socket.AF_INET6)


class Origin(FaultProxy):
    """A proxy in a place, before an S3 server on our loopback interface. Context manager."""

    def __init__(self, endpoint_url: str, place: Place) -> None:
        self.place = place
        host, _, port = endpoint_url.removeprefix("http://").partition(":")
        super().__init__(host, int(port))

    @property
    def endpoint_url(self) -> str:
        """What nodes use."""
        return f"http://{join_address(self.place.address, PORT)}"

    def got_bytes(self, bucket: str) -> int:
        """Return how many bytes of objects of a bucket were sent."""
        with self._lock:
            return sum(r.sent_bytes for r in self.requests if r.kind == "get" and r.bucket == bucket)

    def gets(self, key: str) -> list[str]:
        """Return the ranges that were asked of one object."""
        with self._lock:
            return [r.range for r in self.requests if r.kind == "get" and r.key == key]

    def _listen(self) -> None:
        with self.place.entered():  # only the socket is there: threads reach the server from where we are
            kind = _QuietServer6 if ":" in self.place.address else _QuietServer
            self._server = kind((self.place.address, PORT), _Connection)
        self._server.proxy = self
        self.port = PORT
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="origin", daemon=True
        )
        self._thread.start()


class ClusterEtcd(EtcdServer):
    """An etcd that runs in a place, and is reached from the network at `address`."""

    def __init__(self, place: Place, address: str, **more: Any) -> None:
        super().__init__(**more)
        self.place = place
        self.address = address

    @property
    def url(self) -> str:
        """What to give nodes as --etcd."""
        return f"http://{join_address(self.address, self.port)}"

    def _start(self) -> None:
        with self.place.entered():
            super()._start()

    def _arguments(self) -> list[str]:
        mine = f"http://{LOOPBACK}:{self.port}"
        return [
            argument.replace(mine, f"{mine},{self.url}")
            if argument.startswith("--listen-client")
            else argument.replace(mine, self.url)
            for argument in super()._arguments()
        ]

    def _answers(self) -> bool:
        """gRPC would connect from threads that are not in the place, so ask over HTTP."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return bool(json.load(connection.getresponse())["health"] == "true")
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return False
        finally:
            connection.close()
