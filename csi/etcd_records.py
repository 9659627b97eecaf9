"""Records of the controller in etcd, through the adapter of `peer.etcd`: for several replicas, and nodes without disks.

    /cachefs-csi/<cluster>/<kind>/<id>    one JSON document, for ever (no lease)

Calls go to one endpoint until it fails, then to the next; each has a deadline. A token of a user that etcd does not
know any more is renewed. `put_new` is one transaction, so of two replicas one finds the record of the other.

The errors of the library end here, as StorageUnavailable (try again) or RecordsRefused (somebody has to change
something); no password and no token is in any of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from cachefs.config import PeerConfig
from cachefs.errors import StorageUnavailable
from csi.records import RecordsRefused, Value, decode, encode, is_id
from peer.etcd import EtcdFault, etcdrpc, open_client
from peer.etcd_settings import EtcdSettings

T = TypeVar("T")

ROOT = "/cachefs-csi"
TIMEOUT_S = 5.0
PAGE_RECORDS = 1000
_TEXT_CHARACTERS = 240
_OTHER_TOKEN = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT})
_REFUSALS = frozenset({grpc.StatusCode.PERMISSION_DENIED, *_OTHER_TOKEN})


def settings_of(config: PeerConfig) -> EtcdSettings:
    """Return where etcd is, as the options of --etcd say."""

    def path(text: str) -> Path | None:
        return Path(text) if text else None

    return EtcdSettings(
        endpoints=config.etcd_endpoints,
        cluster=config.cluster,
        ca=path(config.etcd_ca),
        cert=path(config.etcd_cert),
        key=path(config.etcd_key),
        user=config.etcd_user or None,
        password_file=path(config.etcd_password_file),
    )


class EtcdRecords:
    """Records in etcd, see `csi.records.VolumeRecords`. Makes no request before the first call."""

    def __init__(self, settings: EtcdSettings, *, timeout_s: float = TIMEOUT_S) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._root = f"{ROOT}/{settings.cluster}/"
        self._lock = threading.Lock()
        self._client: Any = None
        self._endpoint = 0

    def put_new(self, kind: str, record_id: str, value: Value) -> Value | None:
        """See `VolumeRecords`."""
        key = self._key(kind, record_id)
        absent = etcdrpc.Compare(key=key, target=etcdrpc.Compare.CREATE, create_revision=0)
        put = etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=encode(value)))
        read = etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key))
        request = etcdrpc.TxnRequest(compare=[absent], success=[put], failure=[read])
        answer = self._call(lambda client: client.kvstub.Txn(request, self._timeout_s, metadata=client.metadata))
        if answer.succeeded:
            return None
        found = answer.responses[0].response_range.kvs
        return decode(bytes(found[0].value), key.decode())

    def put(self, kind: str, record_id: str, value: Value) -> None:
        """See `VolumeRecords`."""
        request = etcdrpc.PutRequest(key=self._key(kind, record_id), value=encode(value))
        self._call(lambda client: client.kvstub.Put(request, self._timeout_s, metadata=client.metadata))

    def get(self, kind: str, record_id: str) -> Value | None:
        """See `VolumeRecords`."""
        if not is_id(record_id):
            return None
        key = self._key(kind, record_id)
        kvs = self._range(etcdrpc.RangeRequest(key=key)).kvs
        return decode(bytes(kvs[0].value), key.decode()) if kvs else None

    def delete(self, kind: str, record_id: str) -> bool:
        """See `VolumeRecords`."""
        if not is_id(record_id):
            return False
        request = etcdrpc.DeleteRangeRequest(key=self._key(kind, record_id))
        answer = self._call(
            lambda client: client.kvstub.DeleteRange(request, self._timeout_s, metadata=client.metadata)
        )
        return bool(answer.deleted)

    def page(self, kind: str, after: str = "", limit: int = 0) -> list[tuple[str, Value]]:
        """See `VolumeRecords`."""
        prefix = f"{self._root}{kind}/".encode()
        start = prefix + after.encode() + b"\0" if after else prefix
        found: list[tuple[str, Value]] = []
        while True:
            wanted = min(PAGE_RECORDS, limit - len(found)) if limit else PAGE_RECORDS
            answer = self._range(etcdrpc.RangeRequest(key=start, range_end=prefix[:-1] + b"0", limit=wanted))
            for kv in answer.kvs:
                key = bytes(kv.key)
                found.append((key[len(prefix) :].decode(), decode(bytes(kv.value), key.decode("utf-8", "replace"))))
            if not answer.more or not answer.kvs or len(found) == limit:
                return found
            start = bytes(answer.kvs[-1].key) + b"\0"

    def check(self) -> None:
        """See `VolumeRecords`."""
        self._range(etcdrpc.RangeRequest(key=self._root.encode(), limit=1, keys_only=True))

    def close(self) -> None:
        """See `VolumeRecords`."""
        with self._lock:
            self._drop()

    def _key(self, kind: str, record_id: str) -> bytes:
        if not is_id(kind) or not is_id(record_id):
            raise ValueError(f"{kind}/{record_id} cannot be a record")
        return f"{self._root}{kind}/{record_id}".encode()

    def _range(self, request: Any) -> Any:
        return self._call(lambda client: client.kvstub.Range(request, self._timeout_s, metadata=client.metadata))

    # -- connections --------------------------------------------------------------------------------------------------

    def _call(self, ask: Callable[[Any], T]) -> T:
        """Ask, once more with another token when the one in use is not known any more, and each endpoint once."""
        failure: BaseException | None = None
        for _ in range(len(self._settings.endpoints) + 1):
            client = None
            try:
                client = self._connected()
                return ask(client)
            except EtcdFault as error:  # a file that cannot be read
                raise RecordsRefused(str(error)) from error
            except (grpc.RpcError, ValueError) as error:  # ValueError: a channel that another thread has closed
                failure = error
                code = error.code() if isinstance(error, grpc.RpcError) else None
                self._leave(client, next_endpoint=code not in _OTHER_TOKEN)
        assert failure is not None
        raise self._translated(failure) from failure

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                client = open_client(self._settings, self._settings.endpoints[self._endpoint], self._timeout_s)
                try:
                    self._authenticate(client)
                except BaseException:
                    client.close()
                    raise
                self._client = client
            return self._client

    def _authenticate(self, client: Any) -> None:
        if self._settings.user is None or self._settings.password_file is None:
            return
        try:
            password = self._settings.password_file.read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RecordsRefused(f"--etcd-password-file {self._settings.password_file}: cannot be read") from error
        request = etcdrpc.AuthenticateRequest(name=self._settings.user, password=password)
        try:
            answer = etcdrpc.AuthStub(client.channel).Authenticate(request, self._timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:  # authentication is not enabled: as etcdctl, go on
                return
            raise
        client.metadata = (("token", answer.token),)

    def _leave(self, client: Any, *, next_endpoint: bool) -> None:
        with self._lock:
            if client is not None and client is not self._client:
                return  # another thread has done it
            self._drop()
            if next_endpoint:
                self._endpoint = (self._endpoint + 1) % len(self._settings.endpoints)

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close()

    def _translated(self, error: BaseException) -> StorageUnavailable | RecordsRefused:
        endpoint = ", ".join(self._settings.endpoints)
        if not isinstance(error, grpc.RpcError):
            return StorageUnavailable(f"etcd ({endpoint}) does not answer")
        text = " ".join((error.details() or "").split())[:_TEXT_CHARACTERS]
        if error.code() in _REFUSALS:
            return RecordsRefused(f"etcd ({endpoint}) refuses the controller: {text or error.code().name}")
        return StorageUnavailable(f"etcd ({endpoint}) does not answer: {text or error.code().name}")
