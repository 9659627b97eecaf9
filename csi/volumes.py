"""What the controller knows of a volume that CreateVolume made: its record, its id, and what fits to it.

    dataset    shows a prefix that others own and share: nothing of it is ever deleted
    prefix     a prefix of its own (`pathTemplate`), empty or a copy; deleted with it, if it was empty when it came
    manifest   shows what a manifest of its own pins: made from a snapshot, or the clone of a dataset

INVARIANTS: the id follows from the name alone, so that the same request comes to the same volume before and after its
record is written. `owned` is decided before the first object is written, and never becomes true later.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from csi.parameters import CAPACITY_KEY, MANIFEST_KEY, VolumeSpec, parse
from csi.records import VOLUMES, CorruptRecord, Value, VolumeRecords
from csi.v1 import csi_pb2


class Made(enum.StrEnum):
    """What CreateVolume made of a request."""

    DATASET = "dataset"
    PREFIX = "prefix"
    MANIFEST = "manifest"


class State(enum.StrEnum):
    """How far a volume is."""

    MAKING = "making"
    READY = "ready"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """One volume."""

    volume_id: str
    name: str
    parameters: Mapping[str, str]
    """Of the class, as they were given."""
    made: Made
    owned: bool
    """Whether DeleteVolume deletes what lies below the prefix."""
    prefix: str
    """What it shows, or what its manifest pins: "" or "x/y/"."""
    claim: str = ""
    """namespace/name of the claim, if the provisioner told it."""
    source: Mapping[str, str] = field(default_factory=dict)
    """{"volume": id} or {"snapshot": id}."""
    manifest: str = ""
    """Key of its manifest; only with `Made.MANIFEST`."""
    capacity_bytes: int = 0
    first_capacity_bytes: int = 0
    """As it was made: what the context says, which never changes."""
    topology: tuple[Mapping[str, str], ...] = ()
    state: State = State.MAKING
    created_ns: int = 0

    @property
    def context(self) -> dict[str, str]:
        """What nodes get to know of it (`volume_context`)."""
        given = {name: text for name, text in self.parameters.items() if name not in ("pathTemplate", "prefix")}
        if self.prefix:
            given["prefix"] = self.prefix
        if self.made is Made.MANIFEST:
            given.pop("metadataTTL", None)
            given |= {"mode": "immutable", MANIFEST_KEY: self.manifest}
        if self.first_capacity_bytes:
            given[CAPACITY_KEY] = str(self.first_capacity_bytes)
        return given

    @property
    def spec(self) -> VolumeSpec:
        """Its context, parsed."""
        return parse(self.context)

    @property
    def place(self) -> str:
        """Where its prefix is, as one text."""
        spec = self.spec
        return f"{spec.endpoint} s3://{spec.bucket}/{self.prefix}"

    def overlaps(self, prefix: str, spec: VolumeSpec) -> bool:
        """Whether a prefix and this volume have objects in common, or may have."""
        return self._is_there(spec) and (prefix.startswith(self.prefix) or self.prefix.startswith(prefix))

    def is_within(self, prefix: str, spec: VolumeSpec) -> bool:
        """Whether all that it shows lies below a prefix."""
        return self._is_there(spec) and self.prefix.startswith(prefix)

    def _is_there(self, spec: VolumeSpec) -> bool:
        own = self.spec
        return (own.endpoint, own.bucket) == (spec.endpoint, spec.bucket)

    def is_unfinished_copy_of(self, source: Volume) -> bool:
        """Whether it was to be made from a volume, and is not ready (or is being deleted)."""
        return self.state is not State.READY and self.source.get("volume") == source.volume_id

    def message(self) -> csi_pb2.Volume:
        """Return it as the protocol has it."""
        source = None
        if "volume" in self.source:
            wanted = csi_pb2.VolumeContentSource.VolumeSource(volume_id=self.source["volume"])
            source = csi_pb2.VolumeContentSource(volume=wanted)
        elif "snapshot" in self.source:
            origin = csi_pb2.VolumeContentSource.SnapshotSource(snapshot_id=self.source["snapshot"])
            source = csi_pb2.VolumeContentSource(snapshot=origin)
        return csi_pb2.Volume(
            volume_id=self.volume_id,
            capacity_bytes=self.capacity_bytes,
            volume_context=self.context,
            content_source=source,
            accessible_topology=[csi_pb2.Topology(segments=dict(segments)) for segments in self.topology],
        )

    def record(self) -> dict[str, Any]:
        """Return it as its record has it."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {"made": str(self.made), "state": str(self.state), "topology": [dict(t) for t in self.topology]}

    @classmethod
    def of_record(cls, record: Value) -> Volume:
        """Read a record; what a later version wrote in addition is ignored. Raises CorruptRecord."""
        try:
            known = {name: record[name] for name in cls.__slots__}
            known |= {"made": Made(known["made"]), "state": State(known["state"]), "topology": tuple(known["topology"])}
            volume = cls(**known)
            well = all(isinstance(known[name], str) for name in ("prefix", "manifest", "volume_id"))
        except (KeyError, ValueError, TypeError) as error:
            raise CorruptRecord(f"the record of the volume {record.get('volume_id')!r} cannot be read") from error
        if not well or (volume.made is Made.PREFIX and not volume.prefix) or not isinstance(known["owned"], bool):
            raise CorruptRecord(f"the record of the volume {volume.volume_id!r} says what cannot be")
        return volume


def volume_id_of(name: str) -> str:
    """Return the id of the volume of this name."""
    return f"v1-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:40]}"


def find(records: VolumeRecords, volume_id: str) -> Volume | None:
    """Return a volume, None: there is none of this id."""
    record = records.get(VOLUMES, volume_id)
    return None if record is None else Volume.of_record(record)


def every(records: VolumeRecords) -> list[Volume]:
    """Return all volumes."""
    return [Volume.of_record(record) for _, record in records.page(VOLUMES)]
