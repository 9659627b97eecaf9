"""The gRPC server of the driver: a unix socket, threads, and one place that every call passes.

A service is an object of a class that `csi.v1.csi_pb2_grpc` generated (`IdentityServicer`, `ControllerServicer`,
`NodeServicer`); its methods take a request and return an answer, or raise: `csi.status` says which code that is.

    server = Server("/csi/csi.sock", [identity, controller])
    server.start()
    server.stop(grace_s=10)     # running calls end, new ones are refused

INVARIANTS: each call is logged once, with its method, what it is about, code and time; what the protocol marks as
secret (`csi_secret`), tokens of service accounts and mount flags are in no log line and in no error text; an error that
nobody foresaw is INTERNAL for the caller, and its traceback is in the log once.
"""

from __future__ import annotations

import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cachefs.errors import MountError
from cachefs.logs import redact
from csi import endpoint
from csi.status import Code, status_of
from csi.v1 import csi_pb2, csi_pb2_grpc

log = logging.getLogger(__name__)

Service = csi_pb2_grpc.IdentityServicer | csi_pb2_grpc.ControllerServicer | csi_pb2_grpc.NodeServicer

THREADS = 256
"""Calls at once; threads are made when they are needed. Many, since calls wait for others, and Probe must not."""
HIDDEN = "***"
SERVICE_ACCOUNT_TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
"""Key of volume_context with tokens of the pod, which the protocol does not mark."""
_SECRET_KEY = re.compile(r"(?i)token|secret(?!-?name)|password|passwd|access_?key")
"""Keys of maps whose values are not written, though the protocol does not mark them: people write into wrong places."""
_TOKEN = re.compile(r'"token"\s*:\s*"([^"]+)"')
_LEAST_SECRET = 4
"""Characters of a secret that is looked for in texts; shorter ones would hit words."""
_MESSAGE_CHARACTERS = 1024
_SUBJECTS = ("volume_id", "snapshot_id", "name", "source_volume_id")
_OFTEN = frozenset({"Probe", "GetPluginInfo", "GetPluginCapabilities", "NodeGetVolumeStats"})
"""Asked every few seconds: logged when they fail, else at debug level, as the GetCapabilities of all services and what
kubelet publishes again.
"""
_MOST_PLACES = 4096
_ADD: tuple[tuple[type[Any], Callable[[Any, Any], None]], ...] = (
    (csi_pb2_grpc.IdentityServicer, csi_pb2_grpc.add_IdentityServicer_to_server),
    (csi_pb2_grpc.ControllerServicer, csi_pb2_grpc.add_ControllerServicer_to_server),
    (csi_pb2_grpc.NodeServicer, csi_pb2_grpc.add_NodeServicer_to_server),
)


class Server:
    """The driver at its socket."""

    def __init__(self, path: str, services: Sequence[Service]) -> None:
        """`path` is absolute (`csi.endpoint.parse_endpoint`). Nothing listens before `start`."""
        self.path = path
        self._inode = -1
        self._server = grpc.server(
            futures.ThreadPoolExecutor(THREADS, thread_name_prefix="csi"),
            interceptors=[_Calls()],
            options=(("grpc.so_reuseport", 0),),
        )
        for service in services:
            for kind, add in _ADD:
                if isinstance(service, kind):
                    add(service, self._server)

    def start(self) -> None:
        """Listen, with the rights 0600 for the socket. Raises MountError when that cannot be."""
        endpoint.clear(self.path)
        umask = os.umask(0o177)  # nobody may connect between bind and chmod
        try:
            self._server.add_insecure_port(f"unix:{self.path}")
            os.chmod(self.path, 0o600)
            self._inode = os.lstat(self.path).st_ino
        except (RuntimeError, OSError) as error:
            raise MountError(f"--endpoint {self.path}: cannot listen there ({error})") from error
        finally:
            os.umask(umask)
        self._server.start()
        log.info("the driver listens on %s", self.path)

    def stop(self, grace_s: float) -> None:
        """BLOCKS. Refuse new calls, wait so long for those that run, then cancel them; the socket is gone after it."""
        self._server.stop(grace_s).wait(grace_s + 1)
        endpoint.remove(self.path, self._inode)


class _Calls(grpc.ServerInterceptor):  # type: ignore[misc]  # the library has no types
    """Wraps every method: log line, and errors into codes."""

    def __init__(self) -> None:
        self._published: set[tuple[str, str]] = set()

    def intercept_service(self, continuation: Callable[[Any], Any], call: Any) -> Any:
        method = continuation(call)
        if method is None or method.unary_unary is None:
            return method
        name = call.method.rpartition("/")[2]
        inner = method.unary_unary

        def answer(request: Message, context: Any) -> Any:
            return _answered(name, inner, request, context, self._is_repeated)

        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=method.request_deserializer,
            response_serializer=method.response_serializer,
        )

    def _is_repeated(self, name: str, request: Any) -> bool:
        """Return whether a call that went well was the same before: kubelet publishes every volume of every pod again
        each minute (requiresRepublish).
        """
        if name not in ("NodePublishVolume", "NodeUnpublishVolume"):
            return False
        place = (request.volume_id, request.target_path)
        if name == "NodeUnpublishVolume":
            self._published.discard(place)
            return False
        repeated = place in self._published
        if len(self._published) < _MOST_PLACES:
            self._published.add(place)
        return repeated


def _answered(
    name: str, inner: Callable[[Any, Any], Any], request: Message, context: Any,
    is_repeated: Callable[[str, Message], bool],
) -> Any:  # fmt: skip
    started = time.monotonic()
    try:
        response = inner(request, context)
    except Exception as error:  # noqa: BLE001 - the boundary of the driver: everything ends as a status
        code, text = status_of(error)
        if context.code() is Code.UNIMPLEMENTED.value:  # the generated class has set it: the service has no such method
            code, text = Code.UNIMPLEMENTED, f"{name} is not offered by this driver"
        elif code is Code.INTERNAL:
            _log_failure(name, request, error)
    else:
        often = name in _OFTEN or name.endswith("GetCapabilities") or is_repeated(name, request)
        _log_call(name, request, Code.OK, "", started, often=often)
        return response
    text = clean(text, request)
    _log_call(name, request, code, text, started)
    context.abort(code.value, text)
    raise AssertionError("abort raises")


def _log_call(name: str, request: Message, code: Code, text: str, started: float, *, often: bool = False) -> None:
    level = logging.ERROR if code is Code.INTERNAL else logging.DEBUG if often else logging.INFO
    if not log.isEnabledFor(level):
        return
    subject = next((str(value) for key in _SUBJECTS if (value := getattr(request, key, ""))), "-")
    shown = f" {sanitized(request)}" if log.isEnabledFor(logging.DEBUG) else ""
    milliseconds = (time.monotonic() - started) * 1000
    log.log(level, "%s %s %s %.0f ms%s%s", name, subject, code.name, milliseconds, f": {text}" if text else "", shown)


def _log_failure(name: str, request: Message, error: BaseException) -> None:
    """Write the traceback of an unforeseen error, without it if a secret of the request is in it."""
    text = "".join(traceback.format_exception(error))
    if any(secret in text for secret in _secrets(request)):
        log.error("%s failed with %s; its traceback has a secret and is left out", name, type(error).__name__)
    else:
        log.error("%s failed", name, exc_info=error)


# -- secrets ----------------------------------------------------------------------------------------------------------


def clean(text: str, request: Message) -> str:
    """Return an error text as one line of bounded length, without anything that is a secret of the request."""
    for secret in _secrets(request):
        text = text.replace(secret, HIDDEN)
    return redact(" ".join(text.split()))[:_MESSAGE_CHARACTERS]


def sanitized(message: Message) -> str:
    """Return a message as one line of text, secrets hidden."""
    return "{" + ", ".join(f"{name}: {value}" for name, value in _shown(message)) + "}"


def _shown(message: Message) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        if _is_secret(field) or field.name == "mount_flags":
            yield field.name, HIDDEN
        elif _is_map(field):
            pairs = (f"{key}: {HIDDEN if _SECRET_KEY.search(key) else value[key]}" for key in sorted(value))
            yield field.name, "{" + ", ".join(pairs) + "}"
        elif field.message_type is None:
            yield field.name, str(list(value)) if field.is_repeated else repr(value)
        elif field.is_repeated:
            yield field.name, "[" + ", ".join(sanitized(each) for each in value) + "]"
        else:
            yield field.name, sanitized(value)


def _secrets(message: Message) -> list[str]:
    """Return the texts of a request that must not be repeated, the longest first."""
    found: set[str] = set()
    for field, value in message.ListFields():
        if _is_secret(field):
            found.update(str(each) for each in (value.values() if _is_map(field) else [value]))
        elif _is_map(field) and SERVICE_ACCOUNT_TOKENS in value:
            found.add(str(value[SERVICE_ACCOUNT_TOKENS]))
    for text in tuple(found):
        found.update(_TOKEN.findall(text))
    return sorted((text for text in found if len(text) >= _LEAST_SECRET), key=len, reverse=True)


def _is_secret(field: FieldDescriptor) -> bool:
    return bool(field.GetOptions().Extensions[csi_pb2.csi_secret])


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
