"""What one node asks another to warm up: the messages of POST /v1/jobs, and how large they may be. No sockets here.

One message begins a job, hands over more of its paths, asks how far it is, and stops it: whatever is asked is answered
with the state of the job, and may be asked again when the answer was lost. Paths come in numbered parts; the answer
says how many parts were taken, and one that was not is sent once more.

What always holds: nobody waits in such a call. A job whose asker is not heard of any more is ended by whoever has it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec

from peer.wire import BadMessage, Buffer

JOBS_PATH = "/v1/jobs"
MAX_CREW = 10_000
MAX_PART_PATHS = 2048
MAX_ANSWER_BYTES = 4 << 20

_Volume = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
_Node = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
_Job = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
_Path = Annotated[bytes, msgspec.Meta(max_length=8192)]


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One question about one job."""

    volume: _Volume
    """What it is called among peers."""
    job: _Job
    """Drawn by whoever asks."""
    begin: bool
    """Begin it if it is not known; else one that is not known is an error: it is over, with the agent that had it."""
    verb: Literal["warm", "check"]
    tier: Literal["", "shm", "disk"]
    force: bool
    crew: Annotated[tuple[_Node, ...], msgspec.Meta(max_length=MAX_CREW)] = ()
    """All nodes that warm up the same (with `begin`)."""
    part: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    """The number of the part with these paths."""
    paths: Annotated[tuple[_Path, ...], msgspec.Meta(max_length=MAX_PART_PATHS)] = ()
    """Relative to the root of the volume."""
    filled: bool = False
    """Whether this message has a part: one may be empty."""
    last: bool = False
    """Whether it is the last part."""
    stop: bool = False


class JobAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How the job is."""

    job: dict[str, Any]
    """See docs/WARMUP.md."""
    over: bool
    parts: Annotated[int, msgspec.Meta(ge=0)]
    """So many were taken."""


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    answer: JobAnswer | None = None
    error: str = ""


_requests = msgspec.msgpack.Decoder(JobRequest)
_BAD = (msgspec.MsgspecError, UnicodeError, RecursionError)


def encode_request(request: JobRequest) -> bytes:
    """Return the body of POST /v1/jobs."""
    return msgspec.msgpack.encode(request)


def decode_request(body: Buffer) -> JobRequest:
    """Return what a body asks for. Raises BadMessage."""
    try:
        return _requests.decode(body)
    except _BAD as error:
        raise BadMessage(f"no request for a job: {error}") from error


def encode_answer(answer: JobAnswer | str) -> bytes:
    """Return an answer, or why there is none. Names that are not UTF-8 stay what they are."""
    if isinstance(answer, str):
        return json.dumps({"error": answer}).encode()
    told = {"job": answer.job, "over": answer.over, "parts": answer.parts}
    return json.dumps({"answer": told}).encode()


def decode_answer(raw: Buffer) -> JobAnswer | str:
    """Return an answer, or why there is none. Raises BadMessage."""
    try:
        told = json.loads(bytes(raw))
        read = msgspec.convert(told, _Told)
    except (*_BAD, ValueError) as error:
        raise BadMessage(f"no answer about a job: {error}") from error
    return read.answer if read.answer is not None else read.error or "it says nothing"
