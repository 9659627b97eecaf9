"""A real HTTPS server on loopback that plays the few parts of the Kubernetes API that cachefs uses."""

from __future__ import annotations

import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme

from csi.kube import KubeClient


class FakeApi:
    """Answers, and remembers what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.calls: list[tuple[str, str, str, dict[str, str], Any]] = []
        self.labels: dict[str, str] = {"zone": "a"}
        self.events: dict[str, dict[str, Any]] = {}
        """By name, as they are now."""
        self.status = 0
        self.delay_s = 0.0
        self.drip_s = 0.0
        self.directory = directory
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(str(directory / "ca.crt"))
        self.set_token("first")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api.answer(self)

            do_POST = do_PATCH = do_GET

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = False

            def get_request(self) -> tuple[ssl.SSLSocket, Any]:
                plain, address = super().get_request()
                # not here: a handshake that fails would leave a socket behind
                return context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

            def finish_request(self, request: Any, client_address: Any) -> None:
                request.do_handshake()
                super().finish_request(request, client_address)

            def handle_error(self, *_: object) -> None:
                pass  # who asked has hung up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def set_token(self, token: str) -> None:
        (self.directory / "token").write_text(token + "\n")

    def client(self, **more: Any) -> KubeClient:
        return KubeClient("127.0.0.1", self.port, service_account=str(self.directory), node_name="node-a", **more)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body: Any = json.loads(request.rfile.read(length)) if length else None
        self.calls.append(
            (
                request.command,
                request.path,
                request.headers["Authorization"],
                {"type": request.headers.get("Content-Type", "")},
                body,
            )
        )
        time.sleep(self.delay_s)
        found: Any = {"kind": "Status", "message": "it is\nforbidden"}
        status = self.status or 200
        if not self.status and request.command == "GET":
            found = {"metadata": {"name": "node-a", "labels": self.labels}}
        elif not self.status and request.command == "PATCH" and "/events/" in request.path:
            if request.path.rpartition("/")[2] not in self.events:
                status, found = 404, {"kind": "Status", "message": "events not found"}
            else:
                self.events[request.path.rpartition("/")[2]].update(body)
        elif not self.status and request.command == "POST":
            self.events[body["metadata"]["name"]] = body
            found = body
        elif not self.status and request.command == "PATCH":
            for key, value in body["metadata"]["labels"].items():
                self.labels.pop(key, None)
                if value is not None:
                    self.labels[key] = value
            found = {}
        raw = json.dumps(found).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(raw)))
        request.end_headers()
        for at in range(len(raw)):
            request.wfile.write(raw[at : at + 1])
            if self.drip_s:
                time.sleep(self.drip_s)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
