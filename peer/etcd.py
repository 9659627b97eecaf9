"""etcd behind one small typed edge: leases, records and a watch, over one connection at a time.

The library is etcd3 0.12.0. Three things keep it usable: its generated modules are replaced, before its first import,
by those of `peer.etcdrpc` (today's protobuf refuses the old ones); its watcher is never used (it spins while the server
is away), a watch here is a loop over the plain stream; and it never renews the token of a user, so a session ends with
`TokenExpired` and the next one asks for another.

What moves: an `EtcdSession` is one client on one endpoint. Whatever goes wrong ends the session with an `EtcdFault`;
whoever keeps sessions (`peer.membership`) opens the next one, on the next endpoint. That way nothing here has a state
of its own to repair.

What always holds: every call has a deadline; everything that blocks runs in a thread, which closing the session sets
free at once; no password and no token is in any error text. No deadline hangs on the time of day.
"""

from __future__ import annotations

import importlib
import os
import queue
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import trio

from cachefs import errors
from cachefs.config import split_endpoint
from peer.etcd_settings import EtcdSettings
from peer.records import Position, Record

# The C core of gRPC writes a line to stderr for every handshake that fails. Our own errors say it once.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251 - it is a message to a library, read at its import

for _name in ("kv_pb2", "auth_pb2", "rpc_pb2", "rpc_pb2_grpc"):
    sys.modules[f"etcd3.etcdrpc.{_name}"] = importlib.import_module(f"peer.etcdrpc.{_name}")

import etcd3  # noqa: E402 - after its generated modules are in place
import grpc  # noqa: E402
from etcd3 import etcdrpc as etcdrpc  # noqa: E402 - with its own name: others may import it from here

T = TypeVar("T")

PAGE_RECORDS = 1000
WRITE_RECORDS = 100
"""In one transaction; etcd's limit is 128 by default."""
RECEIVE_BYTES = 64 << 20
"""A watch that resumes may get thousands of events in one message; the default is 4 MiB."""
PROBE_S = 30.0
"""After so much silence a watch has to show that it lives. The renewals of the lease, on the same connection, find a
dead connection sooner; this finds a stream that the server has forgotten. 10,000 nodes: 333 probes a second.
"""
CONNECT_TIMEOUT_MS = 2000
THREADS = 8
TEXT_CHARACTERS = 240
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES),
    # Reconnecting is done by opening another session; two sessions must not share a connection, nor its back-off.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
    ("grpc.max_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
)


class EtcdFault(errors.CachefsError):
    """etcd did not do what it was asked. Never an error for a reader."""


class EtcdUnavailable(EtcdFault):
    """No answer, or not the hoped-for one; another try or another endpoint may help."""


class EtcdRefused(EtcdFault):
    """User, password, certificate or permission: somebody has to change something."""


class TokenExpired(EtcdFault):
    """The session's token is not known any more; the next session gets another."""


class LeaseGone(EtcdFault):
    """The lease has expired or was revoked."""


class Compacted(EtcdFault):
    """The events since the asked revision are gone: list everything again."""


class _Client(etcd3.Etcd3Client):  # type: ignore[misc]  # the library has no types
    """The library's client; with TLS also by the certificates of the system, and with a client certificate alone."""

    def _get_secure_creds(self, ca_cert: str, cert_key: str | None = None, cert_cert: str | None = None) -> Any:
        roots = ca_cert or ssl.get_default_verify_paths().cafile
        chosen = [Path(name).read_bytes() if name else None for name in (roots, cert_key, cert_cert)]
        return grpc.ssl_channel_credentials(*chosen)


def open_client(settings: EtcdSettings, endpoint: str, timeout_s: float) -> Any:
    """Return a client of one endpoint; nothing is sent yet. Raises EtcdRefused if a file cannot be read."""
    secure, host, port = split_endpoint(endpoint)
    try:
        return _Client(
            host=f"[{host}]" if ":" in host else host,
            port=port,
            ca_cert=str(settings.ca or "") if secure else None,
            cert_key=str(settings.key) if secure and settings.key else None,
            cert_cert=str(settings.cert) if secure and settings.cert else None,
            timeout=timeout_s,
            grpc_options=_CHANNEL_OPTIONS,
        )
    except OSError as error:
        raise EtcdRefused(f"etcd: {error.strerror}: {error.filename}") from error


class EtcdSession:
    """One connection to etcd. Every method raises EtcdFault, and after that the session is of no use."""

    def __init__(self, client: Any, endpoint: str, timeout_s: float) -> None:
        self._client = client
        self._watch_stub = etcdrpc.WatchStub(client.channel)
        self._timeout_s = timeout_s
        self._limiter = trio.CapacityLimiter(THREADS)
        self._renewals: _Stream | None = None
        self.endpoint = endpoint

    def close(self) -> None:
        """BLOCKS for a moment. Ends all calls, which sets the threads free that wait for them."""
        if self._renewals is not None:
            self._renewals.close()
        self._client.close()

    # -- leases -------------------------------------------------------------------------------------------------------

    async def grant(self, ttl_s: int) -> tuple[int, int]:
        """Return a new lease and for how many seconds it is good (etcd may say more than asked)."""
        lease = await self._call(lambda: self._client.lease(ttl_s))
        return int(lease.id), int(lease.ttl)

    async def refresh(self, lease: int) -> int:
        """Renew a lease; return how many seconds it is good now, 0 if it is gone. One at a time.

        All renewals of a session go over one stream: that costs etcd 0.33 ms and us 0.4 ms for each; a call of its own
        for each (as the library does it) costs 0.58 and 1.1 ms.
        """
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)
        if self._renewals is None:
            method, metadata = self._client.leasestub.LeaseKeepAlive, self._client.metadata
            self._renewals = await self._call(lambda: _Stream(method, metadata, request))
        else:
            self._renewals.send(request)
        answer = await self._call(self._renewals.receive)
        if answer is None:
            raise EtcdUnavailable(f"{self.endpoint}: the renewals ended")
        return int(answer.TTL)

    async def revoke(self, lease: int) -> None:
        """Give a lease back, and with it the records that bear it. Raises LeaseGone."""
        await self._call(lambda: self._client.revoke_lease(lease))

    # -- records ------------------------------------------------------------------------------------------------------

    async def read(self, key: str) -> tuple[bytes | None, Position]:
        """Return a value (None if there is none) as a majority of etcd's members has it."""
        answer = await self._range(key=key.encode())
        return (bytes(answer.kvs[0].value) if answer.kvs else None), _position(answer)

    async def create(self, key: str, value: bytes) -> None:
        """Write a record unless there is one; it stays until it is deleted."""
        absent = etcdrpc.Compare(key=key.encode(), target=etcdrpc.Compare.CREATE, create_revision=0)
        put = etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key.encode(), value=value))
        await self._transact(etcdrpc.TxnRequest(compare=[absent], success=[put]))

    async def write(self, lease: int, puts: Mapping[str, bytes], deletes: Iterable[str]) -> int:
        """Write and delete records; return the revision of the last change. Many records: several transactions.

        Raises: LeaseGone.
        """
        requests = [
            etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key.encode(), value=value, lease=lease))
            for key, value in puts.items()
        ]
        requests += [
            etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key.encode())) for key in deletes
        ]
        revision = 0
        for first in range(0, len(requests), WRITE_RECORDS):
            answer = await self._transact(etcdrpc.TxnRequest(success=requests[first : first + WRITE_RECORDS]))
            revision = int(answer.header.revision)
        return revision

    async def delete_unless(self, prefix: str, key: str) -> None:
        """Delete a record unless there are any below a prefix, in one transaction."""
        start, end = prefix.encode(), _after_prefix(prefix)
        none = etcdrpc.Compare(key=start, range_end=end, target=etcdrpc.Compare.CREATE, create_revision=0)
        delete = etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key.encode()))
        await self._transact(etcdrpc.TxnRequest(compare=[none], success=[delete]))

    async def list_prefix(self, prefix: str) -> tuple[list[Record], Position]:
        """Return all records below a prefix, as they were at one moment."""
        records: list[Record] = []
        start, end = prefix.encode(), _after_prefix(prefix)
        answer = await self._range(key=start, range_end=end, limit=PAGE_RECORDS)
        position = _position(answer)
        while True:
            records += [_record(kv, bytes(kv.value)) for kv in answer.kvs]
            if not answer.more:
                return records, position
            start = bytes(answer.kvs[-1].key) + b"\0"
            answer = await self._range(key=start, range_end=end, limit=PAGE_RECORDS, revision=position.revision)

    async def _range(self, **request: Any) -> Any:
        stub, metadata = self._client.kvstub, self._client.metadata
        return await self._call(lambda: stub.Range(etcdrpc.RangeRequest(**request), self._timeout_s, metadata=metadata))

    async def _transact(self, request: Any) -> Any:
        stub, metadata = self._client.kvstub, self._client.metadata
        return await self._call(lambda: stub.Txn(request, self._timeout_s, metadata=metadata))

    # -- events -------------------------------------------------------------------------------------------------------

    async def watch(self, prefix: str, after: int, deliver: Callable[[list[Record], int], None]) -> NoReturn:
        """Hand over what happens below a prefix after a revision, for ever: records, and the revision that one who has
        seen them can go on from. All events of one revision come together.

        Raises: Compacted, EtcdUnavailable, EtcdRefused, TokenExpired.
        """
        create = etcdrpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_after_prefix(prefix), start_revision=after + 1, progress_notify=True
        )
        # A member of etcd that lost the others ends the stream instead of going on in silence.
        metadata = (("hasleader", "true"), *(self._client.metadata or ()))
        request = etcdrpc.WatchRequest(create_request=create)
        stream = await self._call(lambda: _Stream(self._watch_stub.Watch, metadata, request))
        pulse = _Pulse()
        fault: EtcdFault = EtcdUnavailable("the watch ended")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._probe, pulse, stream)
                try:
                    await self._receive(stream, pulse, deliver)
                except EtcdFault as error:
                    fault = error
                nursery.cancel_scope.cancel()
        finally:
            stream.close()
        if pulse.lost:
            raise EtcdUnavailable(f"{self.endpoint}: the watch was silent for {PROBE_S + self._timeout_s:g} s")
        raise fault

    async def _receive(self, stream: _Stream, pulse: _Pulse, deliver: Callable[[list[Record], int], None]) -> NoReturn:
        while True:
            answer = await self._call(stream.receive, patient=True)
            pulse.beats += 1
            if answer is None:
                raise EtcdUnavailable(f"{self.endpoint}: the watch ended")
            if answer.compact_revision:
                raise Compacted(f"the events before revision {answer.compact_revision} are gone")
            if answer.canceled:
                raise EtcdUnavailable(f"{self.endpoint}: the watch was cancelled: {_short(answer.cancel_reason)}")
            # A watch_id of -1 answers a probe; its revision may be ahead of events that are still on their way.
            if answer.events:
                events = [_record(e.kv, bytes(e.kv.value) if e.type == 0 else None) for e in answer.events]
                deliver(events, events[-1].revision)
            elif not answer.created and answer.watch_id >= 0:
                deliver([], int(answer.header.revision))

    async def _probe(self, pulse: _Pulse, stream: _Stream) -> None:
        while not pulse.lost:
            seen = pulse.beats
            await trio.sleep(PROBE_S)
            if pulse.beats == seen:
                stream.send(etcdrpc.WatchRequest(progress_request=etcdrpc.WatchProgressRequest()))
                await trio.sleep(self._timeout_s)
                pulse.lost = pulse.beats == seen
        stream.close()

    # -- calls --------------------------------------------------------------------------------------------------------

    async def authenticate(self, user: str, password: str) -> None:
        """Get a token for this session. Raises EtcdRefused, whose text names the user."""
        request = etcdrpc.AuthenticateRequest(name=user, password=password)
        try:
            answer = await self._in_thread(
                lambda: etcdrpc.AuthStub(self._client.channel).Authenticate(request, self._timeout_s), self._timeout_s
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:  # authentication is not enabled: as etcdctl, go on
                return
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise EtcdRefused(f"etcd does not accept user {user!r} with the given password") from error
            raise self._fault(error) from error
        self._client.metadata = (("token", answer.token),)

    async def _call(self, ask: Callable[[], T], *, patient: bool = False) -> T:
        """`patient`: there is no deadline."""
        try:
            return await self._in_thread(ask, None if patient else self._timeout_s)
        except (grpc.RpcError, etcd3.Etcd3Exception) as error:
            raise self._fault(error) from error
        except ValueError as error:  # a call on a channel that was closed meanwhile
            raise EtcdUnavailable(f"{self.endpoint}: {_short(str(error))}") from error

    async def _in_thread(self, ask: Callable[[], T], timeout_s: float | None) -> T:
        if timeout_s is None:
            return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._limiter)
        # Calls have deadlines of their own; this one is for the case that the library does not keep them.
        with trio.move_on_after(timeout_s + 1):
            return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._limiter)
        raise EtcdUnavailable(f"{self.endpoint}: no answer within {timeout_s + 1:g} s")

    def _fault(self, error: BaseException) -> EtcdFault:
        """Return what an error of the library means for us."""
        cause = error if isinstance(error, grpc.RpcError) else error.__context__
        if not isinstance(cause, grpc.RpcError):
            return EtcdUnavailable(f"{self.endpoint}: {_short(str(error))}")
        code, text = cause.code(), _short(cause.details() or "")
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return TokenExpired(f"{self.endpoint}: {text}")
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            # With a token: users or roles were changed since it was given. Without: nobody was named.
            return (TokenExpired if self._client.metadata else EtcdRefused)(f"{self.endpoint}: {text}")
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return EtcdRefused(f"{self.endpoint}: {text}")
        if code is grpc.StatusCode.NOT_FOUND:
            return LeaseGone(f"{self.endpoint}: {text}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return EtcdUnavailable(f"{self.endpoint}: no answer within {self._timeout_s:g} s")
        return EtcdUnavailable(f"{self.endpoint}: {text or code.name}")


@asynccontextmanager
async def open_session(settings: EtcdSettings, endpoint: str, timeout_s: float) -> AsyncIterator[EtcdSession]:
    """A session on one endpoint, with a token if there is a user. `timeout_s` is for each call. Raises EtcdFault."""
    client = await trio.to_thread.run_sync(open_client, settings, endpoint, timeout_s)
    session = EtcdSession(client, endpoint, timeout_s)
    try:
        if settings.user is not None:
            assert settings.password_file is not None
            await session.authenticate(settings.user, await trio.to_thread.run_sync(_password, settings.password_file))
        yield session
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(session.close)


@dataclass(slots=True, eq=False)
class _Pulse:
    beats: int = 0
    lost: bool = False


class _Stream:
    """A call on which both sides go on speaking."""

    def __init__(self, method: Any, metadata: Any, first: Any) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests.put(first)
        self._call = method(iter(self._requests.get, None), metadata=metadata)  # a thread of the library takes them

    def send(self, request: Any) -> None:
        self._requests.put(request)

    def receive(self) -> Any:
        """BLOCKS. Returns the next answer, None when the other side has ended the call. Raises grpc.RpcError."""
        return next(self._call, None)

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


def _password(path: Path) -> str:
    try:
        return path.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EtcdRefused(f"the password file for etcd cannot be read: {path}") from error


def _record(kv: Any, value: bytes | None) -> Record:
    return Record(bytes(kv.key).decode("utf-8", "replace"), value, int(kv.mod_revision))


def _position(answer: Any) -> Position:
    return Position(int(answer.header.revision), int(answer.header.raft_term))


def _after_prefix(prefix: str) -> bytes:
    """The end of the range of keys that begin with `prefix` (which ends with an ASCII character)."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])


def _short(text: str) -> str:
    return " ".join(text.split())[:TEXT_CHARACTERS]
