"""A security token service that trusts tokens by their text: `token-of-NAME...` gets keys that begin with `NAME`."""

from __future__ import annotations

import datetime
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

LIFETIME_S = 3600


class FakeSts:
    """Context manager; `asked` are the parameters of all questions, in order."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.sts = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What to give as stsEndpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def tokens(self) -> list[str]:
        """The tokens that were shown, in order."""
        return [question["WebIdentityToken"] for question in self.asked]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    sts: FakeSts


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # it is never another

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        question = dict(urllib.parse.parse_qsl(body))
        self.server.sts.asked.append(question)
        trusted = re.match(r"token-of-([a-z]+)", question.get("WebIdentityToken", ""))
        if trusted is None:
            self._answer(
                403, "<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>"
            )
            return
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=LIFETIME_S)
        keys = (
            f"<AccessKeyId>{trusted[1]}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
            f"<Expiration>{until:%Y-%m-%dT%H:%M:%SZ}</Expiration>"
        )
        action = "AssumeRoleWithWebIdentity"
        self._answer(
            200,
            f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result>'
            f"<Credentials>{keys}</Credentials></{action}Result></{action}Response>",
        )

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
