"""The messages of peers: what goes in comes out, what is wrong is refused, and nothing is believed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.store.port import ListPage, ObjectInfo
from cachefs.types import ObjectId, ObjectVersion, block_key
from peer import wire
from peer.wire import BadMessage, BatchRequest, BlockRequest, FrameStatus, ListingRequest, Run

MIB = 1 << 20
VOLUME = "0123456789abcdef"
OID = ObjectId(b"o" * 16)

keys = st.binary(max_size=30).map(wire.text_of)
infos = st.builds(
    ObjectInfo,
    key=keys,
    size=st.integers(0, 1 << 50),
    etag=st.text(max_size=10),
    mtime_ns=st.integers(-(1 << 62), 1 << 62),
)
pages = st.builds(
    ListPage,
    objects=st.lists(infos, max_size=5).map(tuple),
    prefixes=st.lists(keys, max_size=5).map(tuple),
    next_token=st.none() | keys,
)


def run(size: int = 3 * MIB, first: int = 0, count: int = 1, key: bytes = b"key") -> Run:
    return Run(key, "etag", size, OID, first, count)


def batch(*runs: Run, block_size: int = MIB) -> BatchRequest:
    return BatchRequest(volume=VOLUME, block_size=block_size, only_cached=False, runs=runs)


def test_a_question_for_one_object_travels_as_a_batch() -> None:
    version = ObjectVersion("a/\udcff", "etag", 3 * MIB + 5)
    asked = BlockRequest(
        volume=VOLUME, version=version, oid=OID, first=1, count=3, block_size=MIB, only_cached=True
    ).batch()
    there = wire.decode_batch(wire.encode_batch(asked))
    assert there == asked
    assert there.runs[0].version == version
    blocks = wire.wanted_blocks(there)
    assert [(block.number, block.index, block.length) for block in blocks] == [(0, 1, MIB), (1, 2, MIB), (2, 3, 5)]
    assert blocks[2].key == block_key(OID, 3)


@pytest.mark.parametrize(
    "asked",
    [
        batch(run(first=2, count=2)),
        batch(run(first=(1 << 32) - 1, count=1)),
        batch(run(size=1 << 53, first=(1 << 32) - 1, count=2), block_size=1),
        batch(*[run(size=512 * MIB, count=300)] * 2),
        batch(run(size=512 * MIB, count=65)),
        batch(*[run(size=MIB)] * 65),
    ],
)
def test_more_than_there_is_or_may_be_is_refused(asked: BatchRequest) -> None:
    with pytest.raises(BadMessage):
        wire.wanted_blocks(asked)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("volume", "short"),
        ("volume", "0123456789abcdeF"),
        ("volume", "0123456789abcdef\n"),
        ("block_size", 0),
        ("block_size", wire.MAX_BATCH_BYTES + 1),
        ("only_cached", None),
        ("runs", []),
        ("runs", [[b"key", "etag", 0, OID, 0, 1]]),
        ("runs", [[b"key", "etag", 1, b"o" * 15, 0, 1]]),
        ("runs", [[b"key", "etag", 1, OID, -1, 1]]),
        ("runs", [[b"key", "etag", 1, OID, 0, 0]]),
        ("runs", [[b"key", "etag", 1, OID, 0, 513]]),
        ("runs", [[b"k" * 8193, "etag", 1, OID, 0, 1]]),
        ("runs", [[b"key", "etag", 1, OID, 0]]),
        ("runs", [[b"key", "etag", 1, OID, 0, 1]] * 513),
    ],
)
def test_values_out_of_bounds_are_refused(field: str, value: object) -> None:
    good = {"volume": VOLUME, "block_size": MIB, "only_cached": False, "runs": [[b"key", "etag", 1, OID, 0, 1]]}
    wire.wanted_blocks(wire.decode_batch(msgspec.msgpack.encode(good)))
    with pytest.raises(BadMessage):
        wire.decode_batch(msgspec.msgpack.encode({**good, field: value}))


@given(st.binary(max_size=200))
def test_anything_else_is_refused(raw: bytes) -> None:
    for decode in (wire.decode_batch, wire.decode_listing_request, wire.decode_page, wire.decode_aged_page):
        try:
            decode(raw)
        except BadMessage:
            pass


def test_a_deep_message_is_refused() -> None:
    for decode in (wire.decode_batch, wire.decode_page):
        with pytest.raises(BadMessage):
            decode(b"\x91" * 100_000)


@given(pages, st.floats(0, 1e6))
def test_pages(page: ListPage, age_s: float) -> None:
    assert wire.decode_page(wire.encode_page(page)) == page
    assert wire.decode_aged_page(wire.encode_aged_page(page, age_s)) == (page, age_s)


@given(keys, st.none() | keys, st.integers(1, 10_000))
def test_listing_requests(prefix: str, token: str | None, limit: int) -> None:
    asked = ListingRequest(volume=VOLUME, prefix=prefix, delimiter="/", token=token, limit=limit, max_age_s=1.5)
    assert wire.decode_listing_request(wire.encode_listing_request(asked)) == asked
    assert len({asked, msgspec.structs.replace(asked)}) == 1


@given(st.sampled_from(FrameStatus), st.integers(0, (1 << 32) - 1), st.binary(max_size=50))
def test_frames(status: FrameStatus, number: int, payload: bytes) -> None:
    frame = wire.short_frame(status, number, payload)
    head = wire.parse_frame_head(frame[: wire.FRAME_BYTES])
    assert head == (status, number, len(payload), wire.checksum_of(frame[wire.FRAME_BYTES :]))
    if not payload:
        assert wire.frame_head(status, number) == frame


@pytest.mark.parametrize("status", [0, 5, 255])
def test_a_status_that_there_is_not(status: int) -> None:
    with pytest.raises(BadMessage):
        wire.parse_frame_head(bytes([status]) + bytes(wire.FRAME_BYTES - 1))


def test_the_format_on_the_wire_stays() -> None:
    """Another format needs another `PEER_PROTOCOL`."""
    frame = wire.short_frame(FrameStatus.OK, 7, b"abc")
    assert wire.PROTOCOL == "1"
    assert frame.hex() == "01070000000300000050392f89945faf78" + b"abc".hex()
    body = wire.encode_batch(batch(run()))
    assert msgspec.msgpack.decode(body) == {
        "volume": VOLUME,
        "block_size": MIB,
        "only_cached": False,
        "runs": [[b"key", "etag", 3 * MIB, OID, 0, 1]],
    }


def test_what_earlier_versions_do_not_know_is_sent_only_when_it_is_needed() -> None:
    asked = msgspec.structs.replace(batch(run()), behind=True, step=2)
    told = msgspec.msgpack.decode(wire.encode_batch(asked))
    assert (told.pop("behind"), told.pop("step")) == (True, 2)
    assert told == msgspec.msgpack.decode(wire.encode_batch(batch(run())))
    assert wire.decode_batch(wire.encode_batch(asked)) == asked
    with pytest.raises(wire.BadMessage):
        wire.decode_batch(msgspec.msgpack.encode({**told, "step": 3}))


def test_a_reason_is_short_and_can_be_sent() -> None:
    assert wire.reason_bytes("why \udc80") == b"why \\udc80"
    assert len(wire.reason_bytes("x" * 1000)) == wire.MAX_REASON_BYTES
