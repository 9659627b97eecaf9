"""Whether the files of a metadata environment can be trusted after a crash, and what is done with them when not.

The environment is written without fsync (it is a cache). After a crash of processes that is safe, for the kernel
still has the pages. After a crash of the machine it is not: pages can be on disk in any mixture, and reading such a
file could crash the process. So a STAMP lies beside it:

    {"boot": <boot id>, "clean": null}                            written to since the last sync: good for this boot
    {"boot": <boot id>, "clean": {"txn":, "size":, "mtime_ns":}}  synced at this transaction and not written to since

INVARIANT: the stamp on disk is dirty (and fsynced) before the first write after a sync reaches the kernel. A stamp
that was only compared with the last transaction would not do: pages of later transactions may be on disk while their
number is not.

An environment that cannot be trusted is set aside (`<directory>.aside-<n>`, only the newest is kept), never repaired.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from cachefs.durable import replace_durably

STAMP = "clean.json"
DATA_FILE = "data.mdb"
BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies the state of the environment's file after a sync."""

    txn: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Stamp:
    """The stamp's content."""

    boot: str
    clean: Fingerprint | None


def current_boot_id() -> str:
    """Return the number of this boot of the machine."""
    return Path(BOOT_ID_FILE).read_text(encoding="ascii").strip()


def fingerprint(directory: str, txn: int) -> Fingerprint:
    """Return the fingerprint of an environment whose last transaction is `txn`."""
    status = os.stat(Path(directory, DATA_FILE))
    return Fingerprint(txn, status.st_size, status.st_mtime_ns)


def file_identity(directory: str) -> tuple[int, int]:
    """Return what tells the environment's file from one that took its place. Raises OSError."""
    status = os.stat(Path(directory, DATA_FILE))
    return status.st_dev, status.st_ino


def read_stamp(directory: str) -> Stamp | None:
    """Return the stamp, None when there is none or it cannot be read."""
    try:
        fields = json.loads(Path(directory, STAMP).read_bytes())
        clean = fields["clean"]
        return Stamp(str(fields["boot"]), Fingerprint(**clean) if clean is not None else None)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_stamp(directory: str, stamp: Stamp) -> None:
    """Replace the stamp; it is on disk when this returns. Raises OSError."""
    clean = stamp.clean
    fields = {
        "boot": stamp.boot,
        "clean": None if clean is None else {"txn": clean.txn, "size": clean.size, "mtime_ns": clean.mtime_ns},
    }
    replace_durably(Path(directory, STAMP), json.dumps(fields).encode())


def occupied(directory: str) -> bool:
    """Return whether something is at this path already, other than an empty directory."""
    path = Path(directory)
    return path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir())))


def private(directory: str) -> bool:
    """Return whether nobody else can have put anything into a directory: the tmpfs is open to all users."""
    try:
        status = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def distrust(directory: str, boot: str) -> str | None:
    """Return why the environment must not even be opened, None when its stamp speaks for it."""
    path = Path(directory, DATA_FILE)
    if not path.is_file():
        return "it has no file with records"
    stamp = read_stamp(directory)
    if stamp is None:
        return "it has no readable stamp"
    if stamp.clean is not None:
        if stamp.clean != fingerprint(directory, stamp.clean.txn):
            return "it was changed after it was closed"
        return None
    if stamp.boot != boot:
        return "the machine went down while it was in use"
    return None


def is_last(directory: str, last_txn: int) -> bool:
    """Return whether `last_txn` is the transaction that the stamp names (True when the environment was not closed)."""
    stamp = read_stamp(directory)
    return stamp is not None and (stamp.clean is None or stamp.clean.txn == last_txn)


def closed_cleanly(directory: str) -> bool:
    """Return whether the last writer synced the environment and wrote nothing after that."""
    stamp = read_stamp(directory)
    return stamp is not None and stamp.clean is not None


def set_aside(directory: str) -> str:
    """Rename the environment, delete what was set aside before, and return the new name. Raises OSError."""
    path = Path(directory)
    older = sorted(path.parent.glob(f"{path.name}.aside-*"))
    number = 1 + max((int(old.suffix.rpartition("-")[2]) for old in older if _numbered(old)), default=0)
    for old in older:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)
    target = path.with_name(f"{path.name}.aside-{number}")
    path.rename(target)
    return str(target)


def _numbered(path: Path) -> bool:
    return path.suffix.rpartition("-")[2].isdigit()
