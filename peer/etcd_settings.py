"""Where etcd is and who we are there: what a person configures, checked. Imports nothing of gRPC."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from cachefs import errors

DEFAULT_PORT = 2379
_CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSettings:
    """Where etcd is and who we are there. Raises ConfigError when it cannot be meant like that."""

    endpoints: tuple[str, ...]
    """http://HOST[:PORT] or https://HOST[:PORT]; the port is 2379 by default."""
    cluster: str = "default"
    """Nodes see each other only within one cluster."""
    ca: Path | None = None
    """Whom to trust with https; the certificates of the system by default."""
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password_file: Path | None = None
    """Read anew for every session. A line end at its end does not count."""

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise errors.ConfigError("no etcd endpoint is given")
        for endpoint in self.endpoints:
            split_endpoint(endpoint)
        if not _CLUSTER.fullmatch(self.cluster):
            raise errors.ConfigError(f"cluster name {self.cluster!r}: use 1 to 64 letters, digits, '.', '_' and '-'")
        if (self.cert is None) != (self.key is None):
            raise errors.ConfigError("a client certificate for etcd needs both the certificate and its key")
        if (self.user is None) != (self.password_file is None):
            raise errors.ConfigError("a user of etcd needs a password file, and the other way round")


def split_endpoint(endpoint: str) -> tuple[bool, str, int]:
    """Return whether an endpoint speaks TLS, its host (IPv6: in brackets) and its port. Raises ConfigError."""
    try:
        parts = urllib.parse.urlsplit(endpoint)
        port = parts.port or DEFAULT_PORT
    except ValueError as error:
        raise errors.ConfigError(f"etcd endpoint: {error}") from error
    if "@" in parts.netloc:  # and do not repeat it: it may hold a password
        raise errors.ConfigError("an etcd endpoint holds no user: there are settings for user and password file")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise errors.ConfigError(f"etcd endpoint {endpoint!r}: write it as http://HOST:PORT or https://HOST:PORT")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts.scheme == "https", host, port
