"""One table from what an S3 server says (status, <Code>) to `cachefs.errors`.

Messages name the bucket, the key and the endpoint, and what to do; never credentials, signatures or server text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cachefs.errors import (
    AccessDenied,
    BadBody,
    BucketNotFound,
    CachefsError,
    ConfigError,
    CredentialsError,
    NotFound,
    StorageFull,
    StorageUnavailable,
)

_UNKNOWN_KEYS = {
    "InvalidAccessKeyId": "does not know the access key",
    "SignatureDoesNotMatch": "refuses the signature: the secret key is wrong",
    "InvalidSecurity": "refuses the credentials",
    "ExpiredToken": "says that the session token has expired",
    "ExpiredTokenException": "says that the session token has expired",
    "TokenRefreshRequired": "says that the session token has expired",
    "InvalidToken": "refuses the session token",
    "InvalidClientTokenId": "does not know the access key",
    "RequestTimeTooSkewed": "says that the clock of this machine is wrong by more than 15 minutes",
    "AccountProblem": "says that there is a problem with the account",
    "NotSignedUp": "says that the account has not signed up for S3",
}
# Those that other keys may cure: the ones in use were replaced, or their time is over.
_OTHER_KEYS = frozenset(_UNKNOWN_KEYS) - {"RequestTimeTooSkewed", "AccountProblem", "NotSignedUp"}
_SLOW_DOWN = frozenset({"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"})
_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
_OTHER_REGION = frozenset(
    {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
# Refusals that are about the moment, though their status is 400.
_RETRYABLE = frozenset({"RequestTimeout", "InternalError", "ServiceUnavailable", "IncompleteBody"})

_CODE = re.compile(r"<Code>\s*(\w+)\s*</Code>")
_REGION = re.compile(r"<(?:Region|BucketRegion)>\s*([\w-]+)\s*</")
_NO_ROOM = 507
_RETRYABLE_STATUS = frozenset({408, 425, 500, 502, 503, 504, 509, 520, 522, 524, 529})


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is not what was asked for."""

    status: int
    code: str = ""
    """<Code> of the body; HEAD answers have none."""
    region: str = ""
    """Where the bucket is, when the answer says so."""
    retry_after_s: float | None = None

    @classmethod
    def parse(cls, status: int, body: str, *, region: str = "", retry_after: str = "") -> Refusal:
        """Read what a body (or obstore's message, which quotes it) says."""
        code, place = _CODE.search(body), _REGION.search(body)
        seconds = float(retry_after) if retry_after.isdigit() else None  # a date in Retry-After is not worth parsing
        return cls(status, code[1] if code else "", region or (place[1] if place else ""), seconds)

    @property
    def elsewhere(self) -> bool:
        """Whether the bucket lives in another region than the request was made for."""
        return self.status in (301, 307, 308) or (self.status == 400 and self.code in _OTHER_REGION)

    @property
    def throttled(self) -> bool:
        """Whether it asks for fewer requests."""
        return self.status in (429, 503) or self.code in _SLOW_DOWN

    @property
    def about_keys(self) -> bool:
        """Whether it says that the keys are not good; without a code (HEAD has no body) whether it may say so."""
        return self.code in _OTHER_KEYS or (not self.code and self.status in (400, 401, 403))


def error_of(refusal: Refusal, *, bucket: str, endpoint: str, key: str | None, verb: str = "") -> CachefsError:
    """Return what to raise. `key` None: the request was about the bucket. 412 is the caller's: it knows the version.

    `verb`: what the request wanted to do; by default to list the bucket or to read the object.
    """
    code, status = refusal.code, refusal.status
    what = f"bucket {bucket!r}" if key is None else f"{key!r} in bucket {bucket!r}"
    said = f"{status} {code}" if code else str(status)
    if code in _UNKNOWN_KEYS:
        return CredentialsError(f"{endpoint} {_UNKNOWN_KEYS[code]}")
    if code == "NoSuchBucket" or (status == 404 and key is None):
        return BucketNotFound(f"bucket {bucket!r} does not exist at {endpoint}")
    if status == 404:
        return NotFound(f"no object {what}")
    if refusal.elsewhere:
        hint = f"use --region {refusal.region}" if refusal.region else "set --region or --endpoint-url"
        return ConfigError(f"bucket {bucket!r} is in another region ({said}): {hint}")
    if code in _FULL or status == _NO_ROOM:
        return StorageFull(f"{endpoint} has no room for {what} ({said})", retryable=False)
    if status in (401, 403):
        verb = verb or ("list" if key is None else "read")
        return AccessDenied(f"these credentials may not {verb} {what} ({said})")
    if refusal.throttled:
        return StorageUnavailable(
            f"{endpoint} asks to slow down ({said})", throttled=True, retry_after_s=refusal.retry_after_s
        )
    if status in (200, 206, 416):
        return BadBody(f"the answer for {what} is not the range that was asked for ({said})")
    retryable = status in _RETRYABLE_STATUS or code in _RETRYABLE
    return StorageUnavailable(
        f"{endpoint} failed for {what} ({said})", retryable=retryable, retry_after_s=refusal.retry_after_s
    )
