"""A shared secret without sending it: HTTP Digest access authentication (RFC 7616) with SHA-256, for both sides.

    asker                                  server
      |  a request without proof ------------> |
      |  <---- 401, a nonce of this connection |
      |  response = f(secret, nonce, nc, ...)  |
      |  --------------------------------------> checks it
      |  <----- rspauth = f(secret, nonce, ...)  the server knows the secret, too

What always holds: a nonce belongs to one connection and `nc` only grows on it, so a proof is good once. The proof of a
request with a body covers the body (auth-int). The server's proof is in the head of its answer, so nothing that an
impostor sends is used; it covers the question (nonce, nc, cnonce, path), not the bytes that follow: who cannot trust
the network between nodes needs mutual TLS. Comparisons take constant time, and no text here contains the secret.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

USER: Final = "cachefs"
REALM: Final = "cachefs"
ALGORITHM: Final = "SHA-256"
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 7230's word for such a text, no secret
_PARAMETER = re.compile(rf'[ \t]*({_TOKEN})[ \t]*=[ \t]*(?:"([^"\\]*)"|({_TOKEN}))[ \t]*(?:,|$)')
_SCHEME = re.compile(r"digest[ \t]+", re.IGNORECASE)
_NC = re.compile(r"[0-9a-fA-F]{8}")
_OPAQUE = re.compile(r"[!#-\[\]-~]{1,256}")  # what may stand between quotes as it is
_MAX_PARAMETERS = 16


def _hashed(*parts: str | bytes) -> str:
    """Return H(part:part:...) of RFC 7616 in hexadecimal digits."""
    joined = b":".join(part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape") for part in parts)
    return hashlib.sha256(joined).hexdigest()


@dataclass(frozen=True, slots=True)
class SharedSecret:
    """What a node derives from the secret: H(user:realm:secret), as good as the secret itself in this realm."""

    digest: str = field(repr=False)

    @classmethod
    def derive(cls, secret: bytes) -> SharedSecret:
        """Return what belongs to a secret."""
        return cls(_hashed(USER, REALM, secret))

    def proof(self, what: _Question, method: str, body: bytes) -> str:
        """Return the response of RFC 7616, 3.4.1; with an empty method the rspauth of 3.5."""
        covered = (_hashed(body),) if what.qop == "auth-int" else ()
        return _hashed(self.digest, what.nonce, what.nc, what.cnonce, what.qop, _hashed(method, what.target, *covered))


@dataclass(frozen=True, slots=True)
class _Question:
    """What both sides know of one request."""

    nonce: str
    nc: str
    cnonce: str
    qop: str
    target: str


def parse_parameters(header: str) -> dict[str, str]:
    """Return the parameters of a challenge, an authorization or an Authentication-Info, names in lower case.

    Raises ValueError for what is none.
    """
    found: dict[str, str] = {}
    at = 0
    while at < len(header):
        match = _PARAMETER.match(header, at)
        if match is None or len(found) == _MAX_PARAMETERS:
            raise ValueError("not a list of parameters")
        name = match[1].lower()
        if name in found:
            raise ValueError("a parameter twice")
        found[name] = match[2] if match[2] is not None else match[3]
        at = match.end()
    return found


def _after_scheme(header: str) -> dict[str, str]:
    match = _SCHEME.match(header)
    if match is None:
        raise ValueError("not the Digest scheme")
    return parse_parameters(header[match.end() :])


class DigestServer:
    """The server's side of one connection."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(16)
        self._last_nc = 0

    def challenge(self, authorization: str | None) -> str:
        """Return the WWW-Authenticate for a 401. `authorization`: what the request had."""
        try:
            stale = authorization is not None and _after_scheme(authorization).get("nonce") != self._nonce
        except ValueError:
            stale = False
        return f'Digest realm="{REALM}", qop="auth, auth-int", algorithm={ALGORITHM}, nonce="{self._nonce}"' + (
            ", stale=true" if stale else ""
        )

    def check(
        self, secret: SharedSecret, method: str, target: str, authorization: str | None, body: bytes
    ) -> str | None:
        """Return the Authentication-Info that answers a good proof, or None for anything else. Never raises."""
        try:
            given = _after_scheme(authorization or "")
        except ValueError:
            return None
        qop, nc = given.get("qop", ""), given.get("nc", "")
        if not self._is_ours(given, target) or qop not in ("auth", "auth-int") or not _NC.fullmatch(nc):
            return None
        if not _OPAQUE.fullmatch(given.get("cnonce", "")):
            return None
        if (body and qop != "auth-int") or int(nc, 16) <= self._last_nc:
            return None
        question = _Question(self._nonce, nc, given.get("cnonce", ""), qop, target)
        if not _equal(secret.proof(question, method, body), given.get("response", "")):
            return None
        self._last_nc = int(nc, 16)
        answer = _Question(self._nonce, nc, question.cnonce, "auth", target)
        rspauth = secret.proof(answer, "", b"")
        return f'rspauth="{rspauth}", qop=auth, nc={nc}, cnonce="{question.cnonce}"'

    def _is_ours(self, given: dict[str, str], target: str) -> bool:
        return (
            _equal(given.get("nonce", ""), self._nonce)
            and given.get("uri") == target
            and given.get("realm") == REALM
            and given.get("username") == USER
            and given.get("algorithm", "").upper() == ALGORITHM
        )


class DigestClient:
    """The asker's side of one connection. One request at a time."""

    def __init__(self, secret: SharedSecret, challenge: str) -> None:
        """`challenge`: the WWW-Authenticate of a 401. Raises ValueError when it is not one of ours."""
        given = _after_scheme(challenge)
        if given.get("algorithm", "").upper() != ALGORITHM or given.get("realm") != REALM:
            raise ValueError("a challenge of another kind")
        if not _OPAQUE.fullmatch(given.get("nonce", "")):
            raise ValueError("a challenge of another kind")
        if "auth-int" not in re.split(r"[ \t]*,[ \t]*", given.get("qop", "")):
            raise ValueError("a challenge without auth-int")
        self._secret = secret
        self._nonce = given["nonce"]
        self._nc = 0
        self._open: _Question | None = None

    def authorize(self, method: str, target: str, body: bytes) -> str:
        """Return the Authorization of the next request."""
        self._nc += 1
        qop = "auth-int" if body else "auth"
        question = self._open = _Question(self._nonce, f"{self._nc:08x}", secrets.token_hex(12), qop, target)
        return (
            f'Digest username="{USER}", realm="{REALM}", uri="{target}", algorithm={ALGORITHM}, '
            f'nonce="{question.nonce}", nc={question.nc}, cnonce="{question.cnonce}", qop={qop}, '
            f'response="{self._secret.proof(question, method, body)}"'
        )

    def proves_itself(self, authentication_info: str | None) -> bool:
        """Return whether the answer to the last request comes from one who knows the secret. Good once."""
        asked, self._open = self._open, None
        try:
            given = parse_parameters(authentication_info or "")
        except ValueError:
            return False
        if asked is None or given.get("nc") != asked.nc or given.get("cnonce") != asked.cnonce:
            return False
        if given.get("qop") != "auth":
            return False
        expected = self._secret.proof(_Question(asked.nonce, asked.nc, asked.cnonce, "auth", asked.target), "", b"")
        return _equal(given.get("rspauth", ""), expected)


def _equal(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode("utf-8", "surrogateescape"), right.encode("utf-8", "surrogateescape"))
