"""What makes a node a peer: a certificate of our authority, the shared secret, or both.

Mutual TLS: any certificate that the authority of `--peer-ca` signed is a peer's (no host names are checked: nodes have
addresses that come and go). It needs the extended key usages of server and client, or none. The secret: see
`peer.digest`.

What moves: the files. They are looked at when a connection is made; a change gives another TLS context, or another
secret, for the connections from then on. New files that are broken (a key is replaced a moment after its certificate)
leave what was, with one warning.

What always holds: no error text, log line or repr contains the secret or a key.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cachefs.errors import UsageError
from cachefs.store.watched_files import WatchedFiles
from peer.digest import SharedSecret

log = logging.getLogger(__name__)

MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """For both directions; each asks the other side for a certificate of our authority."""

    server: ssl.SSLContext
    client: ssl.SSLContext


class _Reloaded(Generic[T]):
    """What was made of a few files, made anew when they have changed. Any thread."""

    def __init__(self, what: str, paths: tuple[str, ...], make: Callable[[], T]) -> None:
        """Raises UsageError when it cannot be made."""
        self._what = what
        self._paths = paths
        self._make = make
        self._files = WatchedFiles()
        self._lock = threading.Lock()
        self._files.note(paths)
        self._made = make()

    def now(self) -> T:
        """Return it; what was, when the files have changed into something that is no good."""
        with self._lock:
            if self._files.changed():
                self._files.note(self._paths)
                try:
                    self._made = self._make()
                    log.info("%s was read again", self._what)
                except UsageError as error:
                    log.warning("%s has changed and cannot be used, the old one stays: %s", self._what, error)
            return self._made


class PeerCredentials:
    """Of one node. Any thread. `repr` shows no more than which kinds there are."""

    def __init__(
        self, cert: str | Path = "", key: str | Path = "", ca: str | Path = "", secret_file: str | Path = ""
    ) -> None:
        """All are paths; empty: not given. Raises UsageError for files that cannot be used, or that are missing."""
        files = {"--peer-cert": str(cert), "--peer-key": str(key), "--peer-ca": str(ca)}
        missing = [option for option, path in files.items() if not path]
        if missing and len(missing) < len(files):
            raise UsageError(f"mutual TLS needs --peer-cert, --peer-key and --peer-ca; missing: {', '.join(missing)}")
        self._tls: _Reloaded[TlsContexts] | None = None
        if not missing:
            paths = (str(cert), str(key), str(ca))
            self._tls = _Reloaded("the peer certificate", paths, lambda: _tls_contexts(*paths))
        self._secret: _Reloaded[SharedSecret] | None = None
        if secret_file:
            path = str(secret_file)
            self._secret = _Reloaded("the peer secret", (path,), lambda: _read_secret(path))

    def __repr__(self) -> str:
        return f"PeerCredentials(tls={self.tls}, secret={self.has_secret})"

    @property
    def tls(self) -> bool:
        """Whether connections are TLS."""
        return self._tls is not None

    @property
    def has_secret(self) -> bool:
        """Whether both sides prove that they know the secret."""
        return self._secret is not None

    def tls_contexts(self) -> TlsContexts | None:
        """Return the contexts for new connections; None: no TLS."""
        return None if self._tls is None else self._tls.now()

    def secret(self) -> SharedSecret | None:
        """Return the secret as it is now; None: there is none."""
        return None if self._secret is None else self._secret.now()


def _tls_contexts(cert: str, key: str, ca: str) -> TlsContexts:
    contexts = TlsContexts(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    contexts.client.check_hostname = False
    contexts.server.num_tickets = 0  # nobody resumes a session, so nobody needs tickets
    for context in (contexts.server, contexts.client):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        _load("--peer-ca", ca, lambda context=context: context.load_verify_locations(ca))  # type: ignore[misc]
        _load("--peer-cert", cert, lambda context=context: context.load_cert_chain(cert, key, _no_password))  # type: ignore[misc]
    return contexts


def _load(option: str, path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        why = (error.reason or "").lower().replace("_", " ") or "is it PEM?"
        raise UsageError(f"{option} {path} cannot be used: {why}") from error
    except OSError as error:
        name = error.filename or path
        raise UsageError(f"{option}: {name} cannot be read: {error.strerror or type(error).__name__}") from error
    except _LockedKey as error:
        raise UsageError(f"{option} {path}: its key is locked with a password, which cannot be given") from error


class _LockedKey(Exception):
    """A key wants a password."""


def _no_password() -> str:
    """Answer OpenSSL, which would otherwise ask on the terminal."""
    raise _LockedKey


def _read_secret(path: str) -> SharedSecret:
    try:
        with open(path, "rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            raw = stream.read(MAX_SECRET_BYTES + 2)
    except OSError as error:
        raise UsageError(f"--peer-secret-file: {path} cannot be read: {error.strerror}") from error
    if stat.S_ISREG(mode) and mode & stat.S_IRWXO:
        raise UsageError(f"--peer-secret-file: {path} is open to all users of this machine: chmod o= {path}")
    secret = raw.removesuffix(b"\n").removesuffix(b"\r")
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise UsageError(
            f"--peer-secret-file: {path} must hold {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes "
            f"(for instance: openssl rand -hex 32 > {path})"
        )
    return SharedSecret.derive(secret)


def check_listen(address: str, credentials: PeerCredentials, insecure: bool) -> None:
    """Refuse to serve the blocks of this node to whoever reaches `address`, unless told so.

    BLOCKS (may look up a name). Raises UsageError.
    """
    if credentials.tls or credentials.has_secret or is_loopback(address):
        return
    if not insecure:
        raise UsageError(
            f"peers would be served at {address} without any proof of who they are: give --peer-cert, --peer-key and "
            "--peer-ca, or --peer-secret-file (or --peer-insecure: whoever reaches that address reads all cached files)"
        )
    log.warning("peers are served at %s without any proof of who they are, as --peer-insecure says", address)


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address or a name. BLOCKS for a name."""
    try:
        return _is_loopback(address.partition("%")[0])
    except ValueError:
        pass
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        return bool(found) and all(_is_loopback(str(entry[4][0]).partition("%")[0]) for entry in found)
    return False


def _is_loopback(literal: str) -> bool:
    address = ipaddress.ip_address(literal)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
