"""What peers say to each other: the messages, the frames, and how large each of them may be. No sockets here.

    GET  /v1/blocks/<40 hex digits>[?length=N]  the bytes of one block that this node has (for people, with curl)
    POST /v1/blocks                             a BatchRequest; answered with one frame for each block, in its order
    POST /v1/listing                            a ListingRequest; answered with one frame
    POST /v1/jobs                               a JobRequest (`peer.jobs`); answered with JSON
    GET  /v1/status                             JSON

Bodies are MessagePack. Keys travel as bytes: names that are not UTF-8 are `str` with surrogate escapes inside cachefs.

A frame is a head of 17 bytes and a payload:

    offset 0   u8   status (`FrameStatus`)
           1   u32  number of the block in the request (0 for a listing)
           5   u32  length of the payload
           9   u64  xxh3_64 of the payload
          17        payload

All numbers are little endian. The head of the answer (200) goes out with the first frame if that is there soon, else
without it, and a WAIT frame every `WAIT_S` while there is nothing else to send: so the asker tells a dead node from a
slow store.

What always holds: nothing that comes in is believed. Numbers have bounds before anything is allocated for them, and the
asker knows the length of every block by itself.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec
import xxhash

from cachefs.errors import ProtocolError, StorageUnavailable
from cachefs.store.port import ListPage, ObjectInfo
from cachefs.types import BlockKey, ObjectId, ObjectVersion, block_count, block_key
from peer.members import PEER_PROTOCOL

PROTOCOL_HEADER = "Cachefs-Protocol"
PROTOCOL = str(PEER_PROTOCOL)
BLOCKS_PATH = "/v1/blocks"
LISTING_PATH = "/v1/listing"
STATUS_PATH = "/v1/status"
FRAMES_TYPE = "application/vnd.cachefs.frames"
MESSAGE_TYPE = "application/msgpack"

MAX_BLOCKS = 512
MAX_BATCH_BYTES = 64 << 20
MAX_HEAD_BYTES = 64 << 10
MAX_BODY_BYTES = 1 << 20
MAX_PAGE_ENTRIES = 10_000
MAX_PAGE_BYTES = 16 << 20
MAX_REASON_BYTES = 240
WAIT_S = 0.25
TREE_STEPS = 2

Buffer = bytes | bytearray | memoryview


class PeerUnavailable(StorageUnavailable):
    """Another node did not answer well, or is not asked now. Never an error for a reader: the next source is asked."""


class PeerSlow(PeerUnavailable):
    """Another node lives and does not get what it fetches for us: its way to the store may be bad, or the store is."""


class NotHeld(PeerUnavailable):
    """The other node answered well: it does not have the block, and does not fetch it for us."""


class BadMessage(ProtocolError):
    """A message that does not follow the rules of this module. Its text may be sent to whoever wrote it."""


# -- frames -----------------------------------------------------------------------------------------------------------


class FrameStatus(enum.IntEnum):
    """What a frame says. The values are on the wire: never renumber."""

    OK = 1
    """The payload is the block."""
    ABSENT = 2
    """This node does not have the block and does not fetch it (not asked to, or the volume is not here)."""
    WAIT = 3
    """No payload: alive, and still fetching."""
    FAILED = 4
    """This block only; the payload is a short reason."""


_FRAME = struct.Struct("<BIIQ")
FRAME_BYTES = _FRAME.size
NO_PAYLOAD = xxhash.xxh3_64_intdigest(b"")


class FrameHead(NamedTuple):
    """The head of one frame."""

    status: FrameStatus
    number: int
    length: int
    checksum: int


def frame_head(status: FrameStatus, number: int, length: int = 0, checksum: int = NO_PAYLOAD) -> bytes:
    """Return the head of a frame whose payload has this length and xxh3_64."""
    return _FRAME.pack(status, number, length, checksum)


def short_frame(status: FrameStatus, number: int, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    return frame_head(status, number, len(payload), checksum_of(payload)) + payload


def parse_frame_head(raw: Buffer) -> FrameHead:
    """Return what `FRAME_BYTES` bytes say. Raises BadMessage for a status that there is not."""
    status, number, length, checksum = _FRAME.unpack(raw)
    try:
        return FrameHead(FrameStatus(status), number, length, checksum)
    except ValueError as error:
        raise BadMessage(f"a frame has the status {status}") from error


def checksum_of(payload: Buffer) -> int:
    """Return the xxh3_64 of a payload."""
    return xxhash.xxh3_64_intdigest(payload)


def reason_bytes(text: str) -> bytes:
    """Return a reason as the payload of a FAILED frame."""
    return text.encode("utf-8", "backslashreplace")[:MAX_REASON_BYTES]


# -- blocks -----------------------------------------------------------------------------------------------------------

_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]
_Index = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
_Length = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH_BYTES)]
_Key = Annotated[bytes, msgspec.Meta(max_length=8192)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Volume = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
_Id = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Blocks `first` to `first + count` of one object version."""

    key: _Key
    etag: _Text
    size: _Size
    oid: _Id
    first: _Index
    count: _Count

    @property
    def version(self) -> ObjectVersion:
        """The object version."""
        return ObjectVersion(text_of(self.key), self.etag, self.size)


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Blocks of one volume: at most `MAX_BLOCKS`, with at most `MAX_BATCH_BYTES`."""

    volume: _Volume
    """16 hexadecimal digits: what the volume is called among peers."""
    block_size: _Length
    """In bytes. Peers with another one do not answer."""
    only_cached: bool
    """Give only what is there; fetch nothing."""
    behind: bool = False
    """Nobody waits for it yet: what has to be fetched for it is fetched behind what readers wait for."""
    step: Annotated[int, msgspec.Meta(ge=0, le=TREE_STEPS)] = 0
    """How far below the root of a tree whoever asks is (`peer.tree`); 0: there is none. Nodes of earlier versions do
    not know this field, nor the one before, and answer as if they were not there.
    """
    runs: Annotated[tuple[Run, ...], msgspec.Meta(min_length=1, max_length=MAX_BLOCKS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRequest:
    """Blocks of one object version: the usual question, a `BatchRequest` with one run."""

    volume: str
    version: ObjectVersion
    oid: ObjectId
    first: int
    count: int
    block_size: int
    only_cached: bool
    behind: bool = False
    step: int = 0

    def batch(self) -> BatchRequest:
        """Return it as it travels."""
        version = self.version
        run = Run(bytes_of(version.key), version.etag, version.size, self.oid, self.first, self.count)
        return BatchRequest(
            volume=self.volume,
            block_size=self.block_size,
            only_cached=self.only_cached,
            behind=self.behind,
            step=self.step,
            runs=(run,),
        )


@dataclass(frozen=True, slots=True)
class WantedBlock:
    """One block of a request."""

    number: int
    """In the request."""
    run: int
    """Which run of the request it belongs to."""
    index: int
    """In its object version."""
    key: BlockKey
    length: int
    """Bytes."""


def wanted_blocks(request: BatchRequest) -> list[WantedBlock]:
    """Return the blocks that a request is for, in its order.

    Raises BadMessage when it asks for blocks that do not exist, for too many, or for too many bytes.
    """
    if sum(run.count for run in request.runs) > MAX_BLOCKS:
        raise BadMessage(f"more than {MAX_BLOCKS} blocks")
    found: list[WantedBlock] = []
    total = 0
    for position, run in enumerate(request.runs):
        end = run.first + run.count
        if end > min(block_count(run.size, request.block_size), 1 << 32):
            raise BadMessage("blocks behind the end of the object")
        for index in range(run.first, end):
            length = min(request.block_size, run.size - index * request.block_size)
            total += length
            found.append(WantedBlock(len(found), position, index, block_key(ObjectId(run.oid), index), length))
    if total > MAX_BATCH_BYTES:
        raise BadMessage(f"more than {MAX_BATCH_BYTES} bytes")
    return found


# -- listings ---------------------------------------------------------------------------------------------------------


class ListingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a listing, at most `max_age_s` old."""

    volume: str
    prefix: str
    delimiter: str
    token: str | None
    limit: int
    max_age_s: float


class _ListingMessage(msgspec.Struct, frozen=True, array_like=True):
    volume: _Volume
    prefix: _Key
    delimiter: Annotated[bytes, msgspec.Meta(max_length=16)]
    token: _Key | None
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE_ENTRIES)]
    max_age_s: Annotated[float, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    key: bytes
    size: Annotated[int, msgspec.Meta(ge=0)]
    etag: str
    mtime_ns: int


class _Page(msgspec.Struct, frozen=True, array_like=True):
    objects: tuple[_Entry, ...]
    prefixes: tuple[bytes, ...]
    next_token: bytes | None


class _AgedPage(msgspec.Struct, frozen=True, array_like=True):
    age_s: Annotated[float, msgspec.Meta(ge=0)]
    page: _Page


_encoder = msgspec.msgpack.Encoder()
_batches = msgspec.msgpack.Decoder(BatchRequest)
_listings = msgspec.msgpack.Decoder(_ListingMessage)
_pages = msgspec.msgpack.Decoder(_Page)
_aged_pages = msgspec.msgpack.Decoder(_AgedPage)
_BAD = (msgspec.MsgspecError, UnicodeError, RecursionError)


def bytes_of(text: str) -> bytes:
    """Return a key as bytes, as it travels."""
    return text.encode("utf-8", "surrogateescape")


def text_of(raw: bytes) -> str:
    """Return a key as `str`, as cachefs has it."""
    return raw.decode("utf-8", "surrogateescape")


def encode_batch(request: BatchRequest) -> bytes:
    """Return the body of POST /v1/blocks."""
    return _encoder.encode(request)


def decode_batch(body: Buffer) -> BatchRequest:
    """Return what a body asks for; `wanted_blocks` checks the rest. Raises BadMessage."""
    try:
        return _batches.decode(body)
    except _BAD as error:
        raise BadMessage(f"no request for blocks: {error}") from error


def encode_listing_request(request: ListingRequest) -> bytes:
    """Return the body of POST /v1/listing."""
    token = None if request.token is None else bytes_of(request.token)
    message = _ListingMessage(
        request.volume, bytes_of(request.prefix), bytes_of(request.delimiter), token, request.limit, request.max_age_s
    )
    return _encoder.encode(message)


def decode_listing_request(body: Buffer) -> ListingRequest:
    """Return which page a body asks for. Raises BadMessage."""
    try:
        message = _listings.decode(body)
    except _BAD as error:
        raise BadMessage(f"no request for a listing: {error}") from error
    return ListingRequest(
        volume=message.volume,
        prefix=text_of(message.prefix),
        delimiter=text_of(message.delimiter),
        token=None if message.token is None else text_of(message.token),
        limit=message.limit,
        max_age_s=message.max_age_s,
    )


def encode_page(page: ListPage) -> bytes:
    """Return a page of a listing in little memory."""
    return _encoder.encode(_packed(page))


def decode_page(raw: Buffer) -> ListPage:
    """Return what `encode_page` was given. Raises BadMessage."""
    try:
        return _unpacked(_pages.decode(raw))
    except _BAD as error:
        raise BadMessage(f"no page of a listing: {error}") from error


def encode_aged_page(page: ListPage, age_s: float) -> bytes:
    """Return a page and its age as the payload of a frame. An age, no time: the clocks of nodes differ."""
    return _encoder.encode(_AgedPage(age_s, _packed(page)))


def decode_aged_page(raw: Buffer) -> tuple[ListPage, float]:
    """Return what `encode_aged_page` was given. Raises BadMessage."""
    try:
        aged = _aged_pages.decode(raw)
        return _unpacked(aged.page), aged.age_s
    except _BAD as error:
        raise BadMessage(f"no page of a listing: {error}") from error


def _packed(page: ListPage) -> _Page:
    entries = tuple(_Entry(bytes_of(found.key), found.size, found.etag, found.mtime_ns) for found in page.objects)
    token = None if page.next_token is None else bytes_of(page.next_token)
    return _Page(entries, tuple(map(bytes_of, page.prefixes)), token)


def _unpacked(page: _Page) -> ListPage:
    objects = tuple(ObjectInfo(text_of(entry.key), entry.size, entry.etag, entry.mtime_ns) for entry in page.objects)
    token = None if page.next_token is None else text_of(page.next_token)
    return ListPage(objects, tuple(map(text_of, page.prefixes)), token)
