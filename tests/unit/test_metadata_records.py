"""The records keep what is put into them, and their format is pinned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachefs.types import FileKind, Ino
from metadata import records
from metadata.names import sort_key
from metadata.records import Counters, Dentry, Directory, Inode

u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
inos = u64.map(Ino)
names = st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name)
small = st.none() | st.integers(0, 2**32 - 1)


@given(st.builds(Inode, inos, st.sampled_from(FileKind), inos, names, u64, i64, st.text(), small, small, small))
def test_inodes(inode: Inode):
    assert records.unpack_inode(inode.ino, records.pack_inode(inode)) == inode


@given(st.builds(Dentry, inos, st.sampled_from(FileKind), names, u64, i64, i64, st.integers(0, 2**32 - 1)))
def test_dentries(dentry: Dentry):
    assert records.unpack_dentry(sort_key(dentry.name, dentry.kind), records.pack_dentry(dentry)) == dentry


@given(st.builds(Directory, st.integers(0, 2**32 - 1), i64, st.booleans(), i64, st.binary(), u64, u64, i64))
def test_directories(directory: Directory):
    assert records.unpack_directory(records.pack_directory(directory)) == directory


@given(st.tuples(u64, u64), st.tuples(u64, u64))
def test_keys_sort_as_numbers(one: tuple[int, int], two: tuple[int, int]):
    assert (records.due_key(*one) < records.due_key(*two)) == (one < two)
    assert records.due_of_key(records.due_key(*one)) == one
    assert (records.ino_key(one[0]) < records.ino_key(two[0])) == (one[0] < two[0])


def test_the_format_is_pinned():
    """When this fails an environment of an older version would be misread: raise records.FORMAT."""
    inode = Inode(Ino(7), FileKind.FILE, Ino(1), b"name", 3, 4, "etag", 0o644, None, 100, True)
    assert records.pack_inode(inode).hex() == (
        "01020d010000000000000003000000000000000400000000000000a4010000000000006400000004006e616d6565746167"
    )
    dentry = Dentry(Ino(7), FileKind.FILE, b"name", 3, 4, 5, 6, shadowed=True)
    assert records.pack_dentry(dentry).hex() == (
        "010201070000000000000003000000000000000400000000000000050000000000000006000000"
    )
    directory = Directory(1, 2, True, 3, b"f", 4, 5, 6)
    assert records.pack_directory(directory).hex() == (
        "0101010000000200000000000000060000000000000003000000000000000400000000000000050000000000000066"
    )
    assert Counters.unpack(Counters(1, 2, 3).pack()) == Counters(1, 2, 3)
    assert records.FORMAT == 1
