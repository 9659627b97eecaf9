"""The few calls to the Kubernetes API that cachefs makes: an event about a pod, labels of a node, a node.

Standard library only, one connection for each call: calls come seldom, and the service account's token, which kubelet
replaces every hour, is read again for each of them.

What the service account may need (RBAC), by caller:

    emit_event       events (core/v1): create, in the namespace of the pod
    follow_event     events (core/v1): patch, in the namespace of the pod
    get_node         nodes (core/v1): get
    label_node       nodes (core/v1): patch

What always holds: `emit_event`, `follow_event` and `label_node` never raise for the API's sake (a publish must not
fail because an event could not be written): they say so in one warning until a call works again, and return False.
`get_node` raises `KubeError`. Every call has a deadline. The token is in no error text and no log line. Any thread;
every call BLOCKS.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cachefs.config import join_address
from cachefs.errors import CachefsError

log = logging.getLogger(__name__)

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
TIMEOUT_S = 5.0
MAX_ANSWER = 4 << 20
MAX_MESSAGE = 1024
"""Characters; the API refuses longer messages of events."""
NORMAL, WARNING = "Normal", "Warning"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class KubeError(CachefsError):
    """The Kubernetes API could not be asked, or refused. `status` is its HTTP status, 0 without an answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class PodReference:
    """Which pod an event is about."""

    namespace: str
    name: str
    uid: str = ""


def event_name(pod: PodReference) -> str:
    """Return a name for an event, as client-go makes them: the object, and a number that does not come again."""
    return f"{pod.name[:200].rstrip('-.')}.{time.time_ns():x}"


class KubeClient:
    """The API as the service account of this pod may use it."""

    def __init__(
        self,
        host: str,
        port: int = 443,
        *,
        service_account: str = SERVICE_ACCOUNT,
        component: str = "cachefs.csi.k8s.io",
        node_name: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`host` and `port`: what KUBERNETES_SERVICE_HOST and _PORT say, for the caller to read. `service_account`: the
        directory with `token` and `ca.crt`. `component` and `node_name` are shown as the source of events.
        """
        self._host = host
        self._port = port
        self._directory = Path(service_account)
        self._component = component
        self._node_name = node_name
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        """What did not work the last time, and was said."""

    # -- what never raises ---------------------------------------------------------------------------------------------

    def emit_event(self, pod: PodReference, reason: str, message: str, kind: str = NORMAL, *, name: str = "") -> bool:
        """Write an event that `kubectl describe pod` shows; return whether the API took it.

        `reason`: one word in CamelCase; `message`: for a person, cut at 1024 characters; `kind`: NORMAL or WARNING;
        `name`: of the event (`event_name`), for `follow_event`.
        """
        return self._try("write events", lambda: self._create_event(pod, reason, message, kind, name))

    def follow_event(self, pod: PodReference, name: str, message: str, count: int) -> bool:
        """Say what is new of an event, which then has come `count` times; return whether the API took it. One that is
        gone (they live for an hour) is not taken, which is not worth a warning.
        """
        body = {"message": message[:MAX_MESSAGE], "count": count, "lastTimestamp": _stamp()}

        def patch() -> None:
            path = f"/api/v1/namespaces/{_segment(pod.namespace)}/events/{_segment(name)}"
            self._ask("PATCH", path, body, "application/merge-patch+json")

        return self._try("write events", patch, gone_is_fine=True)

    def label_node(self, name: str, labels: Mapping[str, str | None]) -> bool:
        """Set labels of a node, and remove those whose value is None; return whether the API took it. Others stay."""
        body = {"metadata": {"labels": dict(labels)}}
        kind = "application/merge-patch+json"
        return self._try(
            f"label node {name}", lambda: self._ask("PATCH", f"/api/v1/nodes/{_segment(name)}", body, kind)
        )

    def _try(self, what: str, act: Callable[[], object], *, gone_is_fine: bool = False) -> bool:
        try:
            act()
        except KubeError as error:
            if not (gone_is_fine and error.status == HTTPStatus.NOT_FOUND):
                self._complain(what, error)
            return False
        with self._lock:
            self._failing.discard(what)
        return True

    def _complain(self, what: str, error: KubeError) -> None:
        with self._lock:
            first = what not in self._failing
            self._failing.add(what)
        log.log(logging.WARNING if first else logging.DEBUG, "cannot %s: %s", what, error)

    # -- what does -----------------------------------------------------------------------------------------------------

    def get_node(self, name: str) -> dict[str, Any]:
        """Return a node as the API describes it. Raises KubeError (`status` 404: there is none)."""
        return self._ask("GET", f"/api/v1/nodes/{_segment(name)}")

    def _create_event(self, pod: PodReference, reason: str, message: str, kind: str, name: str) -> None:
        stamp = _stamp()
        about = {"apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name}
        if pod.uid:
            about["uid"] = pod.uid
        source = {"component": self._component} | ({"host": self._node_name} if self._node_name else {})
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name or event_name(pod), "namespace": pod.namespace},
            "involvedObject": about,
            "reason": reason[:128],
            "message": message[:MAX_MESSAGE],
            "type": kind,
            "source": source,
            "reportingComponent": self._component,
            "reportingInstance": self._node_name,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        self._ask("POST", f"/api/v1/namespaces/{_segment(pod.namespace)}/events", event)

    # -- one call ------------------------------------------------------------------------------------------------------

    def _ask(
        self, verb: str, path: str, body: Mapping[str, Any] | None = None, kind: str = "application/json"
    ) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token()}", "Accept": "application/json", "User-Agent": "cachefs"}
        content = None
        if body is not None:
            headers["Content-Type"] = kind
            content = json.dumps(body).encode()
        deadline = time.monotonic() + self._timeout_s
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._trust())
        try:
            connection.request(verb, path, content, headers)
            with connection.getresponse() as answer:
                raw = _read(answer, connection, deadline)
                status = answer.status
        except (OSError, http.client.HTTPException) as error:
            where = f"https://{join_address(self._host, self._port)}"
            raise KubeError(f"the Kubernetes API at {where} does not answer: {_reason(error)}") from error
        finally:
            connection.close()
        return _understood(verb, path, status, raw)

    def _token(self) -> str:
        try:
            token = (self._directory / "token").read_text("ascii").strip()
        except (OSError, ValueError) as error:
            raise KubeError(f"no service account token in {self._directory}: {_reason(error)}") from error
        if not token or not token.isprintable():
            raise KubeError(f"the service account token in {self._directory} is empty or damaged")
        return token

    def _trust(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=str(self._directory / "ca.crt"))
        except (OSError, ValueError) as error:
            raise KubeError(f"{self._directory}/ca.crt cannot be used: {_reason(error)}") from error


def _read(answer: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float) -> bytes:
    """Read an answer to its end, and not beyond the deadline, however slowly it comes."""
    pieces: list[bytes] = []
    size = 0
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("its answer takes too long")
        if connection.sock is not None:
            connection.sock.settimeout(left_s)
        piece = answer.read1(64 << 10)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER:
            raise http.client.HTTPException("its answer is too long")


def _understood(verb: str, path: str, status: int, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw) if raw else {}
    except ValueError:
        found = {}
    described = found if isinstance(found, dict) else {}
    if 200 <= status < 300:
        return described
    why = " ".join(str(described.get("message") or "").split())[:300]
    raise KubeError(f"the Kubernetes API answers {status} to {verb} {path}{': ' if why else ''}{why}", status)


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _segment(name: str) -> str:
    """Return a name as part of a path. Raises KubeError for what cannot be one: it must not lead elsewhere."""
    if not _NAME.fullmatch(name):
        raise KubeError(f"{name[:80]!r} is no name of an object")
    return quote(name, safe="")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
