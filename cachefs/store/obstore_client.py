"""What `cachefs.store.s3` has to know of obstore: how to open it for one mount, which keys it takes, what it says.

obstore takes what it is not told from the AWS_* variables of this process, which are not the mount's, and shows every
error as text only. Nothing here makes a request.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cachefs.config import S3Config
from cachefs.errors import BadBody, ConfigError, StorageUnavailable
from cachefs.store.address import Address
from cachefs.store.signed import USER_AGENT, Proxies

if TYPE_CHECKING:
    import obstore.store

_MOST_PEM_BYTES = 16 << 20
_REASONS = (
    ("ConnectionRefused", "connection refused"),
    ("dns error", "its name is unknown"),
    ("ConnectionReset", "connection reset"),
    ("InvalidCertificate", "its certificate is not trusted, use --ca-bundle"),
    ("TimedOut", "no answer in time"),
    ("Timeout", "no answer in time"),
)


def new_client(
    config: S3Config,
    bucket: str,
    address: Address,
    *,
    certificates: bytes | None,
    proxies: Proxies,
    credentials: Callable[[], Any] | None,
) -> obstore.store.S3Store:
    """Open a bucket at an address; `credentials` None: anonymous."""
    from obstore.store import S3Store as ObstoreS3

    client: dict[str, Any] = {
        "allow_http": not address.secure,
        "timeout": f"{int(config.request_timeout_s * 1000)}ms",
        "connect_timeout": f"{int(config.connect_timeout_s * 1000)}ms",
        "user_agent": USER_AGENT,
    }
    if certificates is not None:
        client["root_certificate"] = certificates
    parts = urlsplit(address.service_url)
    if proxy := proxies.of(parts.scheme, parts.netloc):
        client["proxy_url"] = proxy
    # What is left out here comes from this process's variables; AWS_ENDPOINT_URL_S3 would even win over `endpoint`.
    options: dict[str, Any] = {
        "aws_endpoint_url_s3": address.bucket_host_url,
        "skip_signature": credentials is None,
        "request_payer": False,
    }
    if credentials is not None:
        options["credential_provider"] = credentials
    return ObstoreS3(
        bucket,
        endpoint=address.bucket_host_url,
        region=address.region,
        virtual_hosted_style_request=address.virtual_host,
        client_options=client,  # type: ignore[arg-type]
        retry_config={"max_retries": 0},
        **options,
    )


def fits(key: str) -> bool:
    """Whether obstore asks for exactly this key: it refuses control characters and normalises slashes."""
    if not key.isprintable() or "status code" in key or "<" in key:
        return False  # its messages quote the key, and are searched for a status and <Code>
    return not any(part in ("", ".", "..") for part in key.split("/"))


def transport_error(endpoint: str, key: str, text: str) -> StorageUnavailable:
    """Return what a message of obstore without an HTTP status means."""
    reason = next((words for mark, words in _REASONS if mark in text), "")
    if not reason and ("body error" in text or "non-partial" in text):
        return BadBody(f"the answer of {endpoint} for {key!r} is broken or ended early")
    return StorageUnavailable(f"endpoint {endpoint} does not answer for {key!r} ({reason or 'connection broken'})")


def read_certificates(path: str) -> bytes | None:
    """Return the CA bundle, None for no path. Raises ConfigError."""
    if not path:
        return None
    try:
        pem = _read_file(path)
    except OSError as error:
        raise ConfigError(f"the CA bundle {path!r} cannot be read: {error.strerror}") from error
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigError(f"the CA bundle {path!r} holds no certificate in PEM form")
    return pem


def _read_file(path: str) -> bytes:
    """A path may come from somebody who may not read our files: no pipe is waited for, no device is read to its end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read(_MOST_PEM_BYTES) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
