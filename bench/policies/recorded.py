"""What was read on a machine, from a file: the access log of a mount, or a read in each line or record.

    cat MOUNT/.cachefs/accesslog > job.log          the access log: both a trace of blocks and a load of readers
    time,key,size                                   a .csv; `key`: 40 hexadecimal digits of a block, or any name
    RECORD, RECORD, ..                              binary

The access log has the requests that the kernel sends: what its page cache answers is not in there. Requests of one
process for one block that follow on each other are one read. How large a file is the log does not say: as large as what
was read of it.
"""

from __future__ import annotations

import csv
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from bench.policies.loads import Load, Read, Reader
from bench.policies.traces import BLOCK_BYTES, Trace
from cachefs.types import BlockKey, ObjectId, block_key

RECORD = struct.Struct("<d20sI")
"""A read in a binary trace: time (seconds), key of the block, bytes of it."""
_LINE = re.compile(
    rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.]\d+ \[uid:\d+,gid:\d+,pid:(\d+)\] ([A-Z_0-9]+) \(([^)]*)\) (.*) <[0-9.]+>"
)
_SNIFFED = 1 << 16


def _key_of(text: str) -> BlockKey:
    """Return the key that is written as 40 hexadecimal digits, else one made from any other name."""
    if len(text) == 40:
        try:
            return BlockKey(bytes.fromhex(text))
        except ValueError:
            pass  # a name like others
    return block_key(ObjectId(xxhash.xxh3_128_digest(text.encode())), 0)


def _csv_reads(path: Path) -> Iterable[tuple[BlockKey, int]]:
    with path.open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.reader(stream), start=1):
            if not row or row[0].startswith("#") or (number == 1 and row[-1].strip() == "size"):
                continue
            try:
                _, name, size = row
                yield _key_of(name), int(size)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: must be time,key,size") from error


def load(path: Path, capacity: int) -> Trace:
    """Return a recorded trace. Raises OSError, ValueError."""
    if is_log(path):
        return _trace_of(path, capacity)
    if path.suffix == ".csv":
        reads = list(_csv_reads(path))
    else:
        content = path.read_bytes()
        if len(content) % RECORD.size:
            raise ValueError(f"{path}: must be records of {RECORD.size} bytes")
        reads = [(BlockKey(key), size) for _, key, size in RECORD.iter_unpack(content)]
    if not reads:
        raise ValueError(f"{path}: no read is in it")
    return Trace(path.stem, str(path), [key for key, _ in reads], capacity, dict(reads), (len(reads),))


# -- access logs -------------------------------------------------------------------------------------------------------


def is_log(path: Path) -> bool:
    """Whether a file is an access log. Raises OSError."""
    with path.open("rb") as stream:
        for line in stream.read(_SNIFFED).splitlines():
            if not line.startswith(b"#"):
                return _LINE.fullmatch(line) is not None
    return False


def _requests(path: Path) -> Iterator[tuple[int, str, int, int]]:
    """Give process, path, offset and size of each request to read. Raises ValueError."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.startswith(b"#") or not line.strip():
                continue
            match = _LINE.fullmatch(line.rstrip(b"\n"))
            if match is None:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {number}: is no line of an access log")
                continue  # it was cut off when the reader stopped
            if match[2] != b"READ" or match[4] == b"-":
                continue  # or of a file that has no name: one of `.cachefs`, or removed
            try:
                _, size, offset = map(int, match[3].split(b","))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: must have inode, size and offset") from error
            if size > 0:
                yield int(match[1]), match[4].decode("utf-8", "backslashreplace"), offset, size


def _reads(path: Path) -> tuple[list[tuple[int, Read]], dict[str, int]]:
    """Return who read what, and how much each file has. Raises OSError, ValueError."""
    reads: list[tuple[int, Read]] = []
    last: dict[int, int] = {}
    sizes: dict[str, int] = {}
    for pid, name, offset, size in _requests(path):
        sizes[name] = max(sizes.get(name, 0), offset + size)
        for block in range(offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES + 1):
            end = min(BLOCK_BYTES, offset + size - block * BLOCK_BYTES)
            before = reads[last[pid]][1] if pid in last else None
            if before is not None and (before.path, before.block) == (name, block):
                reads[last[pid]] = pid, before._replace(length=max(before.length, end))
            else:
                last[pid] = len(reads)
                reads.append((pid, Read(name, block, end)))
    if not reads:
        raise ValueError(f"{path}: no read is in it")
    return reads, sizes


def _trace_of(path: Path, capacity: int) -> Trace:
    reads, files = _reads(path)
    oids = {name: ObjectId(xxhash.xxh3_128_digest(name.encode())) for name in files}
    keys = [block_key(oids[read.path], read.block) for _, read in reads]
    sizes = {
        key: min(BLOCK_BYTES, files[read.path] - read.block * BLOCK_BYTES)
        for key, (_, read) in zip(keys, reads, strict=True)
    }
    return Trace(path.stem, str(path), keys, capacity, sizes, (len(keys),))


def load_readers(path: Path, capacity: int) -> Load:
    """Return an access log as a load: one reader for each process, as fast as it can. Raises OSError, ValueError."""
    reads, files = _reads(path)
    mine: dict[int, list[Read]] = {}
    for pid, read in reads:
        mine.setdefault(pid, []).append(read)
    return Load(path.stem, str(path), files, [Reader([each], compute_s=0.0) for each in mine.values()], capacity)
