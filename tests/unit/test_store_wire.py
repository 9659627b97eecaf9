"""The wire gives out what is exactly the version asked for, and leaves everything else to the ordinary way."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cachefs.config import Addressing
from cachefs.store import wire as wire_module
from cachefs.store.address import Address
from cachefs.store.memory import MemoryStore
from cachefs.store.retry import RetryingStore, RetryPolicy
from cachefs.store.wire import Timeouts, Wire
from cachefs.types import ObjectVersion
from tests.unit.test_store_bulk import Recorder

QUICK = RetryPolicy(deadline_s=2.0, first_wait_s=0.001, longest_wait_s=0.01)
Answer = Callable[[bytes, int], bytes | None]
"""From a request and its number on the connection to what is sent; None: close."""


class Server:
    """Answers each request as a test says, on loopback."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        count = 0
        with connection, contextlib.suppress(OSError):
            pending = b""
            while True:
                while b"\r\n\r\n" not in pending:
                    chunk = connection.recv(65536)
                    if not chunk:
                        return
                    pending += chunk
                request, _, pending = pending.partition(b"\r\n\r\n")
                self.requests.append(request)
                answer = self._answer(request, count)
                count += 1
                if answer is None:
                    return
                connection.sendall(answer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


class WiredMemory(MemoryStore):
    """Objects in memory, and a wire to a server that claims to have them."""

    def __init__(self, port: int) -> None:
        super().__init__()
        address = Address.parse("bucket", "us-east-1", f"http://127.0.0.1:{port}", Addressing.PATH)
        self.connections: Wire | None = None
        self.ordinary: list[str] = []
        self.throttled = 0
        self.connections = Wire(address, lambda: None, Timeouts(1.0, 5.0), certificates="", on_throttled=self.slower)

    def slower(self) -> None:
        self.throttled += 1

    def wire(self) -> Wire | None:
        return self.connections

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        self.ordinary.append(version.key)
        return super().get_range(version, start, length)

    def close(self) -> None:
        if self.connections is not None:
            self.connections.close()
        super().close()


class Rig:
    def __init__(self, answer: Callable[[str, ObjectVersion, bytes, int], bytes | None], count: int = 40) -> None:
        self.bodies = [b"%d " % number * (number * 97 % 700 + 1) for number in range(count)]
        self.server = Server(self._answer)
        self.inner = WiredMemory(self.server.port)
        for number, body in enumerate(self.bodies):
            self.inner.put(f"a b/{number}", body)
        self.versions = [self.inner.head(f"a b/{number}").version for number in range(count)]
        self._by_key = {version.key: version for version in self.versions}
        self._how = answer
        self.store = RetryingStore(self.inner, QUICK, max_requests=16)

    def _answer(self, request: bytes, count: int) -> bytes | None:
        path = request.split(b" ", 2)[1].decode()
        key = path.removeprefix("/bucket/").replace("%20", " ")
        return self._how(key, self._by_key[key], self.bodies[int(key.partition("/")[2])], count)

    def run(self) -> Recorder:
        recorder = Recorder()
        self.store.get_many(self.versions, recorder)
        assert self.store.limiter.in_flight == 0
        assert recorder.bodies == dict(enumerate(self.bodies))
        return recorder


def good(version: ObjectVersion, body: bytes, more: str = "", status: str = "200 OK") -> bytes:
    head = f'HTTP/1.1 {status}\r\nETag: "{version.etag}"\r\nContent-Length: {len(body)}\r\n{more}\r\n'
    return head.encode() + body


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(answer: Callable[[str, ObjectVersion, bytes, int], bytes | None], count: int = 40) -> Rig:
        made.append(Rig(answer, count))
        return made[-1]

    yield make
    for rig in made:
        rig.store.close()
        rig.server.close()


def test_objects_come_over_few_connections(rigs: Callable[..., Rig]) -> None:
    rig = rigs(lambda key, version, body, count: good(version, body))
    rig.run()
    rig.run()
    assert rig.inner.ordinary == []
    assert len(rig.server.requests) == 80
    assert rig.server.connections <= 12
    first = rig.server.requests[0]
    assert b'\r\nIf-Match: "' in first
    assert b"Authorization" not in first, "anonymous"
    counted = rig.store.counters.snapshot()
    assert counted["origin_get_requests"] == 80
    assert counted["origin_bytes"] == 2 * sum(map(len, rig.bodies))
    assert counted["origin_errors"] == 0


def changed(version: ObjectVersion, body: bytes) -> bytes:
    return good(ObjectVersion(version.key, "another", version.size), body)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(changed, id="another entity tag"),
        pytest.param(lambda v, b: good(v, b + b"x"), id="longer"),
        pytest.param(lambda v, b: good(v, b[:-1]), id="shorter"),
        pytest.param(lambda v, b: good(v, b, "Transfer-Encoding: chunked\r\n"), id="chunked"),
        pytest.param(lambda v, b: good(v, b, "Content-Encoding: gzip\r\n"), id="encoded"),
        pytest.param(lambda v, b: good(v, b, status="206 Partial Content"), id="a part"),
        pytest.param(lambda v, b: good(v, b"", status="404 Not Found"), id="gone"),
        pytest.param(lambda v, b: good(v, b"", status="412 Precondition Failed"), id="changed"),
        pytest.param(lambda v, b: b"HTTP/1.1 100 Continue\r\n\r\n" + good(v, b), id="an interim answer"),
        pytest.param(lambda v, b: b"HTTP/1.0 200 OK\r\n\r\n" + b, id="an old server"),
        pytest.param(lambda v, b: b"\r\n\r\n", id="no answer at all"),
        pytest.param(lambda v, b: b"x" * 40_000, id="headers without end"),
        pytest.param(lambda v, b: None, id="closed"),
    ],
)
def test_what_is_odd_is_asked_for_the_ordinary_way(
    rigs: Callable[..., Rig], odd: Callable[[ObjectVersion, bytes], bytes | None]
) -> None:
    def answer(key: str, version: ObjectVersion, body: bytes, count: int) -> bytes | None:
        return odd(version, body) if key.endswith("/17") else good(version, body)

    rig = rigs(answer)
    rig.run()
    assert rig.inner.ordinary == ["a b/17"]
    assert not rig.inner.throttled


def test_a_body_that_breaks_off_is_asked_for_again(rigs: Callable[..., Rig]) -> None:
    def answer(key: str, version: ObjectVersion, body: bytes, count: int) -> bytes | None:
        return good(version, body)[:-1] if key.endswith("/17") else good(version, body)

    rig = rigs(answer)
    closing = threading.Timer(0.2, rig.server.close)
    closing.start()
    rig.run()
    closing.join()
    assert "a b/17" in rig.inner.ordinary


def test_a_connection_that_was_closed_while_nobody_used_it_is_no_trouble(rigs: Callable[..., Rig]) -> None:
    rig = rigs(lambda key, version, body, count: good(version, body) if count < 3 else None)
    rig.run()
    rig.run()
    assert rig.inner.ordinary == []
    assert rig.store.counters.snapshot()["origin_errors"] == 0


def test_a_connection_that_the_server_closes_is_not_used_again(rigs: Callable[..., Rig]) -> None:
    rig = rigs(lambda key, version, body, count: good(version, body, "Connection: close\r\n"))
    rig.run()
    assert rig.inner.ordinary == []
    assert rig.server.connections == 40


def test_a_server_that_wants_fewer_requests_gets_them(rigs: Callable[..., Rig]) -> None:
    throttling = threading.Event()

    def answer(key: str, version: ObjectVersion, body: bytes, count: int) -> bytes | None:
        number = int(key.rpartition("/")[2])
        if number == 5:
            throttling.set()
        elif number > 5:
            throttling.wait(5)
        if throttling.is_set():
            return good(version, b"", "Retry-After: 1\r\n", status="503 Slow Down")
        return good(version, body)

    rig = rigs(answer)
    began = time.monotonic()
    rig.run()
    assert time.monotonic() - began >= 1, "as long as the server asked for"
    assert rig.inner.throttled
    assert rig.store.limiter.limit < 16
    assert len(rig.server.requests) < 30, "nothing more was begun"
    assert rig.store.counters.snapshot()["origin_throttled"] >= 1


def test_a_server_that_says_nothing(rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "SILENCE_S", 0.3)
    rig = rigs(lambda key, version, body, count: b"" if key.endswith("/17") else good(version, body))
    began = time.monotonic()
    rig.run()
    assert time.monotonic() - began < 2
    assert rig.inner.ordinary == ["a b/17"]


def test_nobody_listens(rigs: Callable[..., Rig]) -> None:
    rig = rigs(lambda key, version, body, count: good(version, body))
    rig.server.close()
    rig.run()
    assert len(rig.inner.ordinary) == 40


def test_a_store_that_is_closed_meanwhile(rigs: Callable[..., Rig]) -> None:
    rig = rigs(lambda key, version, body, count: b"")
    threading.Timer(0.2, rig.store.close).start()
    recorder = Recorder()
    began = time.monotonic()
    rig.store.get_many(rig.versions, recorder)
    assert time.monotonic() - began < 1.5
    assert len(recorder.errors) == 40
    assert rig.store.limiter.in_flight == 0


def test_what_the_orders_raise_ends_the_call(rigs: Callable[..., Rig]) -> None:
    class Broken(Recorder):
        def arrived(self, *_: object) -> None:
            raise ZeroDivisionError

    rig = rigs(lambda key, version, body, count: good(version, body))
    with pytest.raises(ZeroDivisionError):
        rig.store.get_many(rig.versions, Broken())
    assert rig.store.limiter.in_flight == 0
    rig.run()


def test_what_a_reader_takes_is_left_out(rigs: Callable[..., Rig]) -> None:
    rig = rigs(lambda key, version, body, count: None if key.endswith("/17") else good(version, body))
    recorder = Recorder()
    recorder.refused = {3, 4}
    recorder.keep_postponed = False
    rig.store.get_many(rig.versions, recorder)
    assert set(range(40)) - set(recorder.bodies) == {3, 4, 17}
    assert recorder.errors == {}
    assert rig.inner.ordinary == []
