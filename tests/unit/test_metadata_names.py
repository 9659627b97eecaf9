"""Keys, names, the order of listings, and what the store says about names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.store.port import ListPage, ObjectInfo
from cachefs.types import FileKind
from metadata.facts import head_facts, page_entries
from metadata.names import decode_key, encode_key, frontier_of, name_of, normal_prefix, sort_key, usable


def listed(key: str, size: int = 1) -> ObjectInfo:
    return ObjectInfo(key, size, "etag", 10**18)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"a", True),
        (b"...", True),
        (b"new\nline", True),
        (b"\xff\xfe", True),
        ("é" * 127 + "x", True),
        (b"x" * 255, True),
        (b"x" * 256, False),
        ("é" * 128, False),
        (b"", False),
        (b".", False),
        (b"..", False),
        (b"a\0b", False),
        (b"a/b", False),
    ],
)
def test_usable_names(name: bytes | str, expected: bool):
    assert usable(name.encode() if isinstance(name, str) else name) is expected


@given(st.binary(max_size=40))
def test_bytes_survive_being_a_key(raw: bytes):
    assert encode_key(decode_key(raw)) == raw


def test_prefix_ends_with_the_slash_that_belongs_to_it():
    assert [normal_prefix(p) for p in ("", "a", "a/", "a//", "/")] == ["", "a/", "a/", "a//", "/"]


@given(st.lists(st.text("a-./0z", min_size=1, max_size=4), unique=True))
def test_sort_keys_have_the_order_of_a_listing(keys: list[str]):
    names: dict[bytes, None] = {}
    for key in sorted(keys):  # as S3 lists
        name, slash, _ = key.partition("/")
        if usable(name.encode()):
            names.setdefault(sort_key(name.encode(), FileKind.DIRECTORY if slash else FileKind.FILE), None)
    assert list(names) == sorted(names)
    assert [sort_key(*name_of(key)) for key in names] == list(names)


@given(st.lists(st.tuples(st.text("a-./0", min_size=1, max_size=3), st.booleans()), min_size=1, unique=True), st.data())
def test_nothing_follows_below_the_frontier_in_either_order(entries: list[tuple[str, bool]], draw: st.DataObject):
    keys = [
        sort_key(name.encode(), FileKind.DIRECTORY if directory else FileKind.FILE)
        for name, directory in entries
        if usable(name.encode())
    ]
    with_slash = sorted(set(keys))
    without_slash = sorted(set(keys), key=name_of)  # SeaweedFS: `a`, `a/`, `a-b`
    for order in (with_slash, without_slash):
        cut = draw.draw(st.integers(0, len(order)))
        assert all(key >= frontier_of(order[:cut]) for key in order[cut:])


def test_a_page_of_a_listing():
    page = ListPage(
        (listed("d/"), listed("d/b", 7), listed("d/a"), listed("d/.."), listed("d/" + "x" * 256), listed("d/nul\0")),
        ("d/a/", "d//", "d/./", "d/c/"),
        "token",
    )
    found = page_entries(page, "d/")
    assert [key for key, _ in found.entries] == [b"a", b"a/", b"b", b"c/"]
    assert [facts.size if facts else None for _, facts in found.entries] == [1, None, 7, None]
    assert (found.hidden, found.found, found.next_token) == (5, 10, "token")


def test_a_marker_is_no_entry_but_proves_the_directory():
    found = page_entries(ListPage((listed("d/", 0),), (), None), "d/")
    assert (found.entries, found.hidden, found.found) == ((), 0, 1)


def test_the_root_without_a_prefix_has_no_marker_but_a_hidden_key():
    found = page_entries(ListPage((), ("/", "a/"), None), "")
    assert [key for key, _ in found.entries] == [b"a/"]
    assert found.hidden == 1


def user(**values: str):
    return head_facts(ObjectInfo("k", 1, "e", 5, values))


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("33188", 0o644),  # s3fs: decimal with the type
        ("33060", 0o444),  # the same, and only octal digits
        ("100644", 0o644),  # rclone: octal with the type
        ("644", 0o644),
        ("0600", 0o600),
        ("0o755", 0o755),
        ("36863", 0o777),  # set-user-id and such are dropped
        ("16877", None),  # a directory
        ("40755", None),
        ("41471", None),  # a symbolic link
        ("120777", None),
        ("", None),
        ("rw-r--r--", None),
        ("-1", None),
        ("9", None),
        ("99999999999999", None),
        ("٣", None),
    ],
)
def test_modes_as_other_programs_write_them(text: str, mode: int | None):
    assert user(mode=text).mode == mode


@pytest.mark.parametrize(
    ("text", "mtime_ns"),
    [
        ("1700000000", 1_700_000_000_000_000_000),
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("1.5e9", 1_500_000_000_000_000_000),
        ("0", 0),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("1e99", None),
        ("yesterday", None),
        ("", None),
        ("1" * 50, None),
    ],
)
def test_times_as_other_programs_write_them(text: str, mtime_ns: int | None):
    facts = user(mtime=text)
    assert (facts.mtime_ns, facts.own_time) == ((5, False) if mtime_ns is None else (mtime_ns, True))


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("1000", 1000), ("4294967295", None), ("-1", None), ("x", None)]
)
def test_owners_as_other_programs_write_them(text: str, number: int | None):
    assert (user(uid=text).uid, user(gid=text).gid) == (number, number)


@given(st.text(max_size=50))
def test_user_metadata_never_raises(text: str):
    facts = user(mode=text, uid=text, gid=text, mtime=text)
    assert facts.mode is None or 0 <= facts.mode <= 0o777
    assert 0 <= facts.mtime_ns < 2**63
