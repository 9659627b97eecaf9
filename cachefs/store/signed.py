"""HTTP requests with botocore's signature over a urllib3 pool: listings, and all that obstore cannot express.

boto3's client spends 1.3 ms of CPU per request and far more on parsing a listing; obstore refuses keys with control
characters, empty parts or a slash at the end, and hides the headers of errors. Here a request costs one signature
(`S3SigV4Auth`, in headers: no presigned URL exists that could leak into a log) and one `urlopen`.

* The path goes out exactly as it was signed: `urlopen` of a pool, unlike `urllib3.request`, leaves dot segments alone.
* Every wait ends: connecting, each read, and the whole body (`request_timeout_s`), so a server that drips bytes cannot
  hold a thread for ever.
* Proxies: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY of the mount's environment, else of this process.
* Redirects are not followed: the signature would not hold for the other host. Another region is `Refusal.elsewhere`.

Thread-safe. botocore and urllib3 are imported on first use.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cachefs
from cachefs.config import S3Config
from cachefs.errors import BadBody, ConfigError, StorageUnavailable
from cachefs.store.credentials import CredentialSource
from cachefs.store.refusals import Refusal

if TYPE_CHECKING:
    import urllib3

USER_AGENT = f"cachefs/{cachefs.__version__}"
_PIECE = 256 << 10
_RECORD = 16 << 10
QUICK_S = 0.1
"""A record that comes in this time is from a server that does not drip."""
_EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. `headers` has lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def refusal(self) -> Refusal:
        """What it says, when it is not what was asked for."""
        return Refusal.parse(
            self.status,
            self.body.decode("utf-8", "replace") if self.status >= 300 else "",
            region=self.headers.get("x-amz-bucket-region", ""),
            retry_after=self.headers.get("retry-after", ""),
        )


class OpenAnswer:
    """An answer whose body is still on its way. Its time is counted from when the request was sent."""

    def __init__(self, response: urllib3.BaseHTTPResponse, deadline: float) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}
        self.ended = False
        """Whether the body was read to its end."""
        self._response = response
        self._deadline = deadline
        self._quick = False

    def whole(self, most_bytes: int) -> Answer:
        """Return the answer with all of its body, which raises in urllib3 if it is shorter than announced."""
        pieces = []
        size = 0
        while piece := self._next(_PIECE):
            size += len(piece)
            if size > most_bytes:
                raise BadBody(f"the answer is longer than the {most_bytes} bytes that were asked for")
            pieces.append(piece)
        self.ended = True
        return Answer(self.status, self.headers, b"".join(pieces))

    def fill(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes of the body. Raises BadBody when it ends before."""
        at, size = 0, len(buffer)
        while at < size:
            piece = self._next(min(_PIECE, size - at))
            if not piece:
                raise BadBody("the answer ended early")
            buffer[at : at + len(piece)] = piece
            at += len(piece)

    def end(self) -> None:
        """Make sure that the body ends here. Raises BadBody when it does not."""
        if self._next(1):
            raise BadBody("the answer is longer than announced")
        self.ended = True

    def _next(self, most: int) -> bytes:
        """Return what comes next, b"" at the end.

        What is there now is all that is asked of a slow server, so that one that drips is noticed at each drop. A
        quick one is asked for as much as fits: TLS comes in records of 16 KiB, and a call for each costs half as much
        again.
        """
        began = time.monotonic()
        piece: bytes = self._response.read(most) if self._quick else self._response.read1(most)
        now = time.monotonic()
        if now > self._deadline:
            raise StorageUnavailable("the answer took too long")
        self._quick = now - began < QUICK_S and len(piece) >= min(most, _RECORD)
        return piece


class SignedRequests:
    """See the module."""

    def __init__(self, config: S3Config, environment: Mapping[str, str], credentials: CredentialSource) -> None:
        self._config = config
        self._proxies = proxies_of(environment)
        self._credentials = credentials
        self._lock = threading.Lock()
        self._pools: dict[tuple[str, str, int | None], urllib3.HTTPConnectionPool] = {}
        self._closed = False

    def send(
        self,
        method: str,
        url: str,
        region: str,
        headers: Mapping[str, str] | None = None,
        *,
        most_bytes: int,
    ) -> Answer:
        """Send one request without a body, return whatever is answered.

        Raises BadBody for more than `most_bytes` and for a truncated answer, StorageUnavailable when none comes,
        CredentialsError when it cannot be signed, ConfigError for a certificate that is not trusted.
        """
        with self.open(method, url, region, headers) as opened:
            return opened.whole(most_bytes)

    @contextlib.contextmanager
    def open(
        self, method: str, url: str, region: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[OpenAnswer]:
        """Send one request without a body; the answer's body is read within `with`. Raises as `send`.

        The connection is used again if the body was read to its end.
        """
        import urllib3

        parts = urllib.parse.urlsplit(url)
        endpoint = f"{parts.scheme}://{parts.netloc}"
        signed = self._signed(method, url, region, headers or {})
        pool, proxied = self._pool(parts)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        target = url if proxied and parts.scheme == "http" else path
        deadline = time.monotonic() + self._config.request_timeout_s
        try:
            response = pool.urlopen(
                method,
                target,
                headers=signed,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
            opened = OpenAnswer(response, deadline)
            try:
                yield opened
            finally:
                if opened.ended:
                    response.release_conn()
                else:
                    response.close()
        except urllib3.exceptions.HTTPError as error:
            raise unreachable(endpoint, error) from error
        except OSError as error:
            raise StorageUnavailable(f"the connection to {endpoint} broke ({_reason(error)})") from error

    def close(self) -> None:
        """Close idle connections; those in use close when their request ends."""
        with self._lock:
            self._closed = True
            pools = list(self._pools.values())
            self._pools.clear()
        for pool in pools:
            pool.close()

    def _signed(self, method: str, url: str, region: str, headers: Mapping[str, str]) -> dict[str, str]:
        plain = {"User-Agent": USER_AGENT, **headers}
        if self._credentials.anonymous:
            return plain
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        keys: Any = self._credentials.current()
        request = AWSRequest(method, url, headers={**headers, "X-Amz-Content-SHA256": _EMPTY_SHA256}, data=b"")
        S3SigV4Auth(keys, "s3", region).add_auth(request)
        return {**dict(request.headers.items()), **plain}

    def _pool(self, parts: urllib.parse.SplitResult) -> tuple[urllib3.HTTPConnectionPool, bool]:
        """Return the pool of the host, and whether a proxy is between."""
        host = parts.hostname or ""
        proxy = self._proxies.of(parts.scheme, parts.netloc)
        with self._lock:
            if self._closed:
                raise StorageUnavailable("the store is closed", retryable=False)
            pool = self._pools.get((parts.scheme, host, parts.port))
            if pool is None:
                pool = self._new_pool(parts, host, proxy)
                self._pools[parts.scheme, host, parts.port] = pool
        return pool, bool(proxy)

    def _new_pool(self, parts: urllib.parse.SplitResult, host: str, proxy: str) -> urllib3.HTTPConnectionPool:
        import urllib3

        config = self._config
        options: dict[str, Any] = {
            "maxsize": config.max_requests,
            "timeout": urllib3.Timeout(connect=config.connect_timeout_s, read=config.request_timeout_s),
        }
        if parts.scheme == "https" and config.ca_bundle:
            options["ca_certs"] = config.ca_bundle
        pools = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
        return pools.connection_from_host(host, parts.port, parts.scheme)


def unreachable(endpoint: str, error: Exception) -> StorageUnavailable | ConfigError:
    """Return what an exception of urllib3 (or one that was raised because of it) means."""
    import ssl

    from urllib3 import exceptions as foreign

    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return ConfigError(f"the certificate of {endpoint} is not trusted: use --ca-bundle")
    if isinstance(error, foreign.ProtocolError) and not any(isinstance(cause, OSError) for cause in causes):
        return BadBody(f"{endpoint} ended its answer early")
    return StorageUnavailable(f"endpoint {endpoint} does not answer ({_reason(error)})")


def _reason(error: BaseException) -> str:
    """Say in a few words why a connection failed."""
    import ssl

    from urllib3 import exceptions as foreign

    for cause in _causes(error):
        if isinstance(cause, foreign.NameResolutionError):
            return "its name is unknown"
        if isinstance(cause, (foreign.ReadTimeoutError, TimeoutError)):
            return "no answer in time"
        if isinstance(cause, (ssl.SSLError, foreign.SSLError)):
            return "it does not speak TLS"
        if isinstance(cause, OSError) and cause.errno:
            return (cause.strerror or errno.errorcode.get(cause.errno, str(cause.errno))).lower()
    return "connection broken"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what lies behind it: urllib3 keeps causes in `__cause__`, its context, or its arguments."""
    seen: list[BaseException] = []
    pending = [error]
    while pending:
        error = pending.pop(0)
        if error is None or error in seen:
            continue
        seen.append(error)
        yield error
        pending += [error.__cause__, error.__context__]
        pending += [argument for argument in error.args if isinstance(argument, BaseException)]


@dataclass(frozen=True, slots=True)
class Proxies:
    """Proxy settings: of the mount's environment when it has any, else of this process (obstore reads those too)."""

    by_scheme: Mapping[str, str]

    def of(self, scheme: str, netloc: str) -> str:
        """Return the proxy for a host; empty: none."""
        proxy = self.by_scheme.get(scheme) or self.by_scheme.get("all", "")
        if not proxy or urllib.request.proxy_bypass_environment(netloc, dict(self.by_scheme)):  # type: ignore[attr-defined]
            return ""
        return proxy if "://" in proxy else f"http://{proxy}"


def proxies_of(environment: Mapping[str, str]) -> Proxies:
    """Read HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, also in lower case."""
    lowered = {name.lower(): value for name, value in environment.items() if value}
    found = {name: lowered[f"{name}_proxy"] for name in ("http", "https", "all", "no") if f"{name}_proxy" in lowered}
    return Proxies(found or urllib.request.getproxies_environment())
