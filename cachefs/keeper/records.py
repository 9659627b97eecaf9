"""What the keeper has to know of its mounts after kill -9: one JSON file per mount, mode 0600, replaced as a whole.

    <runtime>/records/<mount>.json

They lie in memory (/run) and last until the next boot, as the mounts do. There is no secret in them: credentials reach
workers through files of which only names are here.

INVARIANT: a record is written before what it describes can be seen by others, and removed after that is gone: what is
not recorded was never promised to anybody.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachefs.runtime import own_directory, write_state

KEY = re.compile(r"[a-z0-9-]{1,64}")
_FORMAT = 1


@dataclass(slots=True, kw_only=True)
class Record:
    """One mount: what was asked for, and what the kernel and its workers have been told."""

    mount: str
    """Its name for keeper and node service: never used again, unlike the key."""
    key: str
    plan: dict[str, Any]
    environment: dict[str, str]
    fingerprint: str
    labels: dict[str, str]
    targets: dict[str, bool] = field(default_factory=dict)
    """Bind mounts of it: path, and whether read-only."""
    init: str = ""
    """The kernel's first message, in hex."""
    init_answered: bool = False
    attached: dict[str, Any] | None = None
    identity: str = ""
    """Number of the device, as "0:52"."""
    served: bool = False
    """Whether it has ever been served: whoever asked for it was told so."""
    leaving: bool = False
    """It was taken from its place, and its key is free; files of it are still open."""
    worker_pid: int = 0
    """Its last worker, as this process sees it."""
    restarts: int = 0
    started_at: float = field(default_factory=time.time)

    @classmethod
    def create(
        cls,
        key: str,
        plan: dict[str, Any],
        environment: dict[str, str],
        fingerprint: str,
        labels: dict[str, str],
    ) -> Record:
        """Return a record with a name of its own."""
        return cls(
            mount=f"{key}.{secrets.token_hex(4)}",
            key=key,
            plan=plan,
            environment=environment,
            fingerprint=fingerprint,
            labels=labels,
        )


class Records:
    """The directory of records. Raises OSError when it cannot be made."""

    def __init__(self, directory: str) -> None:
        own_directory(directory)
        self.directory = directory

    def load(self) -> tuple[list[Record], list[str]]:
        """Return all records, oldest first, and the files that make no sense."""
        found, wrong = [], []
        for left in Path(self.directory).glob("*.tmp"):  # of a keeper that was killed, or had no room
            left.unlink(missing_ok=True)
        for path in sorted(Path(self.directory).glob("*.json")):
            try:
                found.append(_parse(json.loads(path.read_bytes())))
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                wrong.append(str(path))
        return sorted(found, key=lambda record: record.started_at), wrong

    def save(self, record: Record) -> None:
        """Write one. Raises OSError, with a text for a person: the file is as it was."""
        try:
            write_state(self._path(record), {"format": _FORMAT, **dataclasses.asdict(record)})
        except OSError as error:
            raise OSError(error.errno, f"the keeper cannot write down what it mounts: {error.strerror}") from error

    def remove(self, record: Record) -> None:
        """Remove one. It may be gone already."""
        Path(self._path(record)).unlink(missing_ok=True)

    def _path(self, record: Record) -> str:
        return os.path.join(self.directory, f"{record.mount}.json")


def _parse(content: dict[str, Any]) -> Record:
    if content.pop("format") != _FORMAT:
        raise ValueError("another version wrote it")
    known = {field.name for field in dataclasses.fields(Record)}
    record = Record(**{name: value for name, value in content.items() if name in known})
    if not KEY.fullmatch(record.key) or not isinstance(record.plan["config"]["fuse"], dict):
        raise ValueError("not a record")
    bytes.fromhex(record.init)
    return record
