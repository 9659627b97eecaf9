"""The one place where errors become gRPC codes, and the few words to refuse a call with.

A method of a service refuses with one of the functions below (`raise invalid("name", "must be given")`) or lets an
error of `cachefs.errors` or of the keeper pass; `csi.server` turns either into a status by `status_of`. The text is one
line for a person, because Kubernetes shows it as the event of a claim or a pod; the fields of a request are named as in
the protocol (`volume_capabilities[0].access_mode`).

INVARIANT: an error that nobody foresaw is INTERNAL, and its text says no more than its kind.
"""

from __future__ import annotations

import enum
import re

import grpc

from cachefs import errors
from cachefs.errors import CachefsError


class Code(enum.Enum):
    """The codes that the driver answers with; the values are those of gRPC."""

    OK = grpc.StatusCode.OK
    INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
    DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
    NOT_FOUND = grpc.StatusCode.NOT_FOUND
    ALREADY_EXISTS = grpc.StatusCode.ALREADY_EXISTS
    PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED
    RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
    FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
    ABORTED = grpc.StatusCode.ABORTED
    OUT_OF_RANGE = grpc.StatusCode.OUT_OF_RANGE
    UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
    INTERNAL = grpc.StatusCode.INTERNAL
    UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
    UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


class Refused(CachefsError):
    """A call that ends with a code other than OK."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


_CODES: tuple[tuple[type[BaseException], Code], ...] = (
    (errors.AlreadyExists, Code.ALREADY_EXISTS),
    (errors.BucketNotFound, Code.NOT_FOUND),
    (errors.NotFound, Code.NOT_FOUND),
    (errors.CredentialsError, Code.UNAUTHENTICATED),
    (errors.AccessDenied, Code.PERMISSION_DENIED),
    (errors.StaleObject, Code.ABORTED),  # an object changed while it was copied: another try sees the new one
    (errors.Unsupported, Code.INVALID_ARGUMENT),
    (errors.StorageFull, Code.RESOURCE_EXHAUSTED),
    (errors.StorageUnavailable, Code.UNAVAILABLE),
    (errors.AgentUnavailable, Code.UNAVAILABLE),
    (errors.UsageError, Code.INVALID_ARGUMENT),
    (errors.MountError, Code.INTERNAL),
)
"""The first that fits. What is missing here (and is no `Refused`) is INTERNAL."""

_KINDS = {
    "unavailable": Code.UNAVAILABLE,
    "exists": Code.ALREADY_EXISTS,
    "busy": Code.FAILED_PRECONDITION,
    "usage": Code.INVALID_ARGUMENT,
    "missing": Code.NOT_FOUND,
}
"""What the keeper says instead of the name of a class of `cachefs.errors`."""


_OPTIONS = {
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a --profile, or use --anonymous for a public bucket": (
        "with authSource 'node', which is the default, the driver's pods need some; else let the class or the volume "
        "say authSource 'secret' and name a Secret, or 'pod', or 'anonymous' for a public bucket"
    ),
    "--ca-bundle": "the parameter caBundle",
    "--endpoint-url": "the parameter endpoint",
    "--path-style": "the parameter pathStyle",
    "--region": "the parameter region",
}
_OPTION = re.compile(rf"(?:{'|'.join(map(re.escape, _OPTIONS))})(?![\w-])")


def worded(text: str) -> str:
    """Return what a store says to somebody who mounts by hand as it is for somebody who writes a class or a volume."""
    return _OPTION.sub(lambda found: _OPTIONS[found.group()], text)


def invalid(field: str, text: str) -> Refused:
    """INVALID_ARGUMENT: a field of the request is missing or cannot be used. The text begins with its name."""
    return Refused(Code.INVALID_ARGUMENT, f"{field}: {text}")


def not_found(text: str) -> Refused:
    """NOT_FOUND: a volume, a snapshot or a path that the request names does not exist."""
    return Refused(Code.NOT_FOUND, text)


def already_exists(text: str) -> Refused:
    """ALREADY_EXISTS: it is there, and not as the request wants it."""
    return Refused(Code.ALREADY_EXISTS, text)


def out_of_range(text: str) -> Refused:
    """OUT_OF_RANGE: a capacity that cannot be."""
    return Refused(Code.OUT_OF_RANGE, text)


def failed_precondition(text: str) -> Refused:
    """FAILED_PRECONDITION: something else has to be done first; the text says what."""
    return Refused(Code.FAILED_PRECONDITION, text)


def aborted(text: str) -> Refused:
    """ABORTED: another call is at work on the same thing, or a token is none; the caller tries again."""
    return Refused(Code.ABORTED, text)


def unavailable(text: str) -> Refused:
    """UNAVAILABLE: a part of the system does not answer now; the caller tries again."""
    return Refused(Code.UNAVAILABLE, text)


def code_of_kind(kind: str) -> Code:
    """Return the code for the kind of an error of the keeper: one of its words, or a class of `cachefs.errors`."""
    if kind in _KINDS:
        return _KINDS[kind]
    found = getattr(errors, kind, None)
    return _code_of_class(found) if isinstance(found, type) and issubclass(found, CachefsError) else Code.INTERNAL


def status_of(error: BaseException) -> tuple[Code, str]:
    """Return code and text of an error that ended a call. Errors that nobody foresaw are INTERNAL."""
    if isinstance(error, Refused):
        return error.code, str(error)
    kind = getattr(error, "kind", None)
    if isinstance(kind, str):  # of the keeper, which this module need not know
        return code_of_kind(kind), worded(str(getattr(error, "text", error)))
    if isinstance(error, CachefsError):
        return _code_of_class(type(error)), worded(str(error)) or type(error).__name__
    return Code.INTERNAL, f"an error in cachefs itself ({type(error).__name__}): the log of the driver has the details"


def _code_of_class(kind: type[BaseException]) -> Code:
    for base, code in _CODES:
        if issubclass(kind, base):
            return code
    return Code.INTERNAL
