"""boto3 for the few requests that change a bucket (`cachefs.store.admin`): the client, its streams, its errors.

The client is made of the session that `CredentialSource` describes, so it never reads this process's environment, and
asks it for keys at every request: keys that were replaced are used at once. Its own retries are off, since
`cachefs.store.retry` has the one policy.

INVARIANT: no exception of botocore or urllib3 leaves `translated`, and no message holds a key, a signature or a text
of the server.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from cachefs.config import S3Config
from cachefs.errors import AlreadyExists, BadBody, CachefsError, ConfigError, StorageUnavailable
from cachefs.store.address import Address
from cachefs.store.credentials import CredentialSource
from cachefs.store.obstore_client import read_certificates
from cachefs.store.refusals import Refusal, error_of
from cachefs.store.signed import USER_AGENT, proxies_of, unreachable
from cachefs.store.source import parse_source

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ANSWER_S = 120.0
"""How long a server may be silent: it may copy up to 5 GiB before it answers."""


class Control:
    """The boto3 client of one bucket, made when it is first asked for. Thread-safe."""

    def __init__(self, config: S3Config, environment: Mapping[str, str], credentials: CredentialSource) -> None:
        """Raises ConfigError for an endpoint or certificates that cannot be used."""
        self._config = config
        self._credentials = credentials
        self._proxies = proxies_of(environment)
        self._endpoint_url = config.endpoint_url or (
            environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
        )
        self._bucket = parse_source(config.source).bucket
        self._address("")  # refuses what is no address
        read_certificates(config.ca_bundle)
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._closed = False

    @property
    def endpoint(self) -> str:
        """What messages call the server."""
        return self._endpoint_url or "https://s3.amazonaws.com"

    def client(self) -> S3Client:
        """Return the client. Raises StorageUnavailable when it is closed, ConfigError for a profile that is none."""
        with self._lock:
            if self._closed:
                raise StorageUnavailable("the store is closed", retryable=False)
            if self._client is None:
                self._client = self._new_client()
            return self._client

    def close(self) -> None:
        """Close idle connections; there is no client any more."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    @contextmanager
    def translated(self, bucket: str, key: str | None, operation: str) -> Iterator[None]:
        """Turn botocore's exceptions into ours. 412 is AlreadyExists: only conditional requests meet it."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
        from botocore.exceptions import ConnectionError as NoConnection

        try:
            yield
        except ClientError as error:
            raise self._refused(error.response, bucket, key, operation) from error
        except (HTTPClientError, NoConnection) as error:
            raise unreachable(self.endpoint, error) from error
        except BotoCoreError as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"{operation} in bucket {bucket!r} cannot be asked for: {text}") from error
        except OSError as error:
            raise StorageUnavailable(f"the connection to {self.endpoint} broke ({error})") from error

    def _refused(self, answer: Mapping[str, Any], bucket: str, key: str | None, operation: str) -> CachefsError:
        said, described = answer.get("Error", {}), answer.get("ResponseMetadata", {})
        headers = described.get("HTTPHeaders", {})
        status = int(described.get("HTTPStatusCode", 0))
        code = str(said.get("Code", ""))
        if code == "PreconditionFailed" or status == 412:
            return AlreadyExists(f"{key!r} exists already in bucket {bucket!r}")
        if code == "ConditionalRequestConflict":  # somebody else writes the same key at this moment
            return StorageUnavailable(f"{key!r} in bucket {bucket!r} is being written by somebody else")
        if code.isdigit():  # of a HEAD, which has no body: botocore writes its status there
            code = ""
        if status == 200:  # an error in the body of an answer that had begun well
            status = 500
        after = headers.get("retry-after", "")
        refusal = Refusal(
            status, code, headers.get("x-amz-bucket-region", ""), float(after) if after.isdigit() else None
        )
        return error_of(refusal, bucket=bucket, endpoint=self.endpoint, key=key, verb=_VERBS.get(operation, ""))

    def _address(self, region: str) -> Address:
        return Address.parse(self._bucket, region, self._endpoint_url, self._config.addressing)

    def _new_client(self) -> S3Client:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        config, region = self._config, self._credentials.region()
        address = self._address(region)
        parts = urlsplit(address.service_url)
        proxy = self._proxies.of(parts.scheme, parts.netloc)
        options: dict[str, Any] = {"signature_version": UNSIGNED} if config.anonymous else {}
        session = self._credentials.new_session()
        session.register_component("data_loader", _descriptions())
        if not config.anonymous:
            session.register_component("credential_provider", _Resolver(self._credentials))
        settings = Config(
            user_agent_extra=USER_AGENT,
            connect_timeout=config.connect_timeout_s,
            read_timeout=max(config.request_timeout_s, ANSWER_S),
            max_pool_connections=config.max_requests,
            proxies={parts.scheme: proxy} if proxy else {},
            retries={"total_max_attempts": 1, "mode": "standard"},
            s3={"addressing_style": "virtual" if address.virtual_host else "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **options,
        )
        made: S3Client = boto3.Session(botocore_session=session, region_name=region).client(
            "s3", endpoint_url=self._endpoint_url or None, verify=config.ca_bundle or None, config=settings
        )
        return made


@functools.cache
def _descriptions() -> Any:
    """Return botocore's descriptions of services, read once: a controller opens a client for each call."""
    from botocore.loaders import create_loader

    return create_loader()


def was_refused(error: CachefsError) -> bool:
    """Whether an error is what a server said, and not that nothing could be asked."""
    from botocore.exceptions import ClientError

    return isinstance(error.__cause__, ClientError)


class _Resolver:
    """What botocore asks for credentials: gives out an object that asks the mount's source at every signature."""

    def __init__(self, credentials: CredentialSource) -> None:
        self._credentials = credentials

    def load_credentials(self) -> Any:
        from botocore.credentials import Credentials

        source = self._credentials

        class Current(Credentials):
            def get_frozen_credentials(self) -> Any:
                return source.current()

        return Current("current", "current", method="cachefs")


_VERBS = {"get": "read", "head": "read", "list": "list", "put": "write", "delete": "delete", "copy": "copy"}


class Body(io.RawIOBase):
    """The body of an answer as a file that raises our errors."""

    def __init__(self, body: Any, size: int) -> None:
        super().__init__()
        self._body = body
        self._left = size

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> BinaryIO:
        """Return the body of an answer to GetObject, buffered."""
        return cast("BinaryIO", io.BufferedReader(cls(answer["Body"], int(answer["ContentLength"])), 1 << 20))

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`. Raises BadBody when the body ends before its length."""
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        view = memoryview(buffer)
        try:
            piece: bytes = self._body.read(len(view))
        except (BotoCoreError, HTTPError, OSError) as error:
            raise BadBody("the connection broke while an object was read") from error
        if not piece and self._left > 0:
            raise BadBody("the body of an object ended early")
        self._left -= len(piece)
        view[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """Release the connection."""
        if not self.closed:
            self._body.close()
        super().close()
