"""How much of a volume a node holds: what stands in the record that says that it mounts the volume.

    /cachefs/<cluster>/volumes/<volume>/nodes/<node id>    empty, or {"held_bytes": N, "dataset": "16 digits"}

For those who place work where its files are. Who only wants to know the holders looks at the key, as all versions did
before there was a value; so the value is written seldom: every write is an event for every node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec
import xxhash

from cachefs.metrics import Counters
from peer.members import Member
from peer.records import Record
from peer.roster import MAX_RECORD_BYTES, Keys, Roster

LEAST_PAUSE_S = 60.0
SHARE = 0.05
"""A change of less than that is not worth an event."""
MOST_BYTES = 1 << 60
GRAIN_BYTES = 16 << 20
"""Nor is one of less than that, however little there is."""


class Holding(msgspec.Struct, frozen=True):
    """The value of a record."""

    held_bytes: int = 0
    dataset: str = ""
    """The name of its objects (`dataset_name`): several volumes may show the same."""


NOTHING = Holding()
_DECODER = msgspec.json.Decoder(Holding)


@dataclass(frozen=True, slots=True)
class Holder:
    """A member and how much of a volume it holds."""

    member: Member
    held_bytes: int


def dataset_name(endpoint: str, bucket: str, prefix: str) -> str:
    """Return what objects are called, whoever mounts them and as of when: 16 hexadecimal digits.

    `endpoint`: as `ObjectStore.endpoint`; an identity is a fragment of it.
    """
    parts = (endpoint.partition("#")[0], bucket, prefix)
    return xxhash.xxh3_64_hexdigest("\0".join(parts).encode("utf-8", "surrogateescape"))


def encode(held: Holding | None) -> bytes:
    """Return the value of a record; None: it is not known yet."""
    return b"" if held is None else msgspec.json.encode(held)


def decode(value: bytes | None) -> Holding:
    """Return what a value says; nothing where it says nothing, or nothing that makes sense."""
    if not value or len(value) > MAX_RECORD_BYTES:
        return NOTHING
    try:
        found = _DECODER.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return NOTHING
    return found if 0 <= found.held_bytes <= MOST_BYTES else NOTHING


def worth_telling(told: Mapping[str, Holding], held: Mapping[str, Holding]) -> bool:
    """Whether what is held differs enough from what was told."""
    for volume in {*told, *held}:
        before, now = told.get(volume, NOTHING).held_bytes, held.get(volume, NOTHING).held_bytes
        if bool(before) != bool(now) or abs(now - before) > max(GRAIN_BYTES, SHARE * before):
            return True
    return False


def by_dataset(held: Iterable[Holding]) -> dict[str, int]:
    """Return the bytes of each dataset."""
    sums: Counter[str] = Counter()
    for each in held:
        sums[each.dataset] += each.held_bytes
    return dict(sums)


def pause_s(members: int) -> float:
    """Return how long to wait between two looks: all nodes together write once a second at the most."""
    return max(LEAST_PAUSE_S, float(members))


def holders(keys: Keys, records: Iterable[Record]) -> dict[str, list[Holder]]:
    """Return who holds how much of each dataset, the most first, from all records of a cluster."""
    listed = list(records)
    known = Roster(keys, Counters()).read(listed)
    sums: dict[str, Counter[str]] = {}
    for record in listed:
        identity = keys.parse(record.key)
        if identity is None or not identity[0] or known.get(("", identity[1])) is None:
            continue
        held = decode(record.value)
        sums.setdefault(held.dataset or identity[0], Counter())[identity[1]] += held.held_bytes
    found: dict[str, list[Holder]] = {}
    for dataset, by_node in sums.items():
        some = [Holder(member, size) for node, size in by_node.items() if (member := known["", node]) is not None]
        found[dataset] = sorted(some, key=lambda holder: (-holder.held_bytes, holder.member.name))
    return found
