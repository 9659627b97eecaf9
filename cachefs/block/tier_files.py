"""The files around a tier's LMDB environment: is what lies there ours and whole, and is there room to write?

Nothing here touches the environment itself; it looks at the directory before LMDB maps it, because LMDB trusts what it
maps (a torn or foreign file can end the process).

* `Stamp` (clean.json) says how the last user left the environment. LMDB without sync promises nothing after a power
  loss, so after a reboot the environment is only trusted when the stamp says that it was synced and not written
  since. A process killed with -9 loses nothing: the page cache belongs to the kernel.
* `take_away` takes a directory away that cannot be used: what is ours is deleted, what is foreign is set aside.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cachefs import errors
from cachefs.durable import replace_durably

log = logging.getLogger(__name__)

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
STAMP_FILE = "clean.json"
LOCK_BYTES = 64 << 10
"""Room for about 1,000 reader slots, reserved at once: a page fault in a full file system would be SIGBUS."""

FORMER_SUFFIX = ".former"
GONE_SUFFIX = ".gone-"
ASIDE_SUFFIX = ".aside-"
VERIFY_TIME_S = 10.0
VERIFY_FLAW = 3
_VERIFIER = f"""
import sys
from lmdb import verify
try:
    problems = verify.verify(sys.argv[1], subdir=False)
except verify.VerifyError as error:
    problems = [str(error)]
print(problems[0] if problems else "")
sys.exit({VERIFY_FLAW} if problems else 0)
"""
"""lmdb older than 3 has no verifier: the import fails, and the structure is trusted."""

_META = struct.Struct("=QHHHHIIQQ")
"""Page header (number, pad, flags, lower, upper), then magic, version, address, map size."""
_META_TAIL_OFFSET = _META.size + 2 * 48
_META_TAIL = struct.Struct("=QQ")
"""Last page, transaction."""
_LMDB_MAGIC = 0xBEEFC0DE
_LMDB_VERSIONS = (1, 2, 3, 999)
_PAGE_SIZE_AT = _META.size
"""The first field of the first database record is the page size."""


def boot_id() -> str:
    """Return the identity of this boot of the machine ("" when the kernel does not tell)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Meta:
    """What the newest meta page of a data file says."""

    page_size: int
    last_page: int
    txnid: int


def read_meta(directory: str) -> Meta | None:
    """Return the newest meta page, or None when there is no data file or an empty one.

    Raises: CorruptBlock when the file is not an LMDB data file of this machine, or is shorter than it says.
    """
    path = Path(directory, DATA_FILE)
    try:
        with path.open("rb") as file:
            head = file.read(128 << 10)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise errors.CorruptBlock("its data file is a directory") from error
    if size == 0:
        return None
    newest: Meta | None = None
    page_size = struct.unpack_from("=I", head, _PAGE_SIZE_AT)[0] if len(head) > 256 else 0
    if page_size not in (4096, 8192, 16384, 32768, 65536) or len(head) < page_size + 256:
        raise errors.CorruptBlock("it is not an LMDB data file")
    for offset in (0, page_size):
        magic, version = struct.unpack_from("=II", head, offset + 16)
        last_page, txnid = _META_TAIL.unpack_from(head, offset + _META_TAIL_OFFSET)
        if magic != _LMDB_MAGIC or version not in _LMDB_VERSIONS:
            raise errors.CorruptBlock("one of its meta pages is damaged")
        if newest is None or txnid > newest.txnid:
            newest = Meta(page_size, last_page, txnid)
    assert newest is not None
    if (newest.last_page + 1) * page_size > size:
        raise errors.CorruptBlock(f"it is truncated: {size} bytes, {newest.last_page + 1} pages in use")
    return newest


@dataclass(frozen=True, slots=True)
class Stamp:
    """How the environment was left. `txnid` is None while somebody writes to it."""

    boot_id: str
    txnid: int | None
    size: int
    mtime_ns: int

    @classmethod
    def load(cls, directory: str) -> Stamp | None:
        """Return the stamp, or None when there is none that can be read."""
        try:
            return cls(**json.loads(Path(directory, STAMP_FILE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def store(self, directory: str) -> None:
        """Replace the stamp, durably. Raises OSError."""
        replace_durably(Path(directory, STAMP_FILE), json.dumps(asdict(self)).encode())


def in_use() -> Stamp:
    """Return the stamp to store before the first write after opening (or after `left_clean`)."""
    return Stamp(boot_id(), None, 0, 0)


def left_clean(directory: str, txnid: int) -> Stamp:
    """Return the stamp for an environment that was just synced."""
    status = Path(directory, DATA_FILE).stat()
    return Stamp(boot_id(), txnid, status.st_size, status.st_mtime_ns)


def distrust(directory: str, meta: Meta, stamp: Stamp | None) -> bool:
    """Return whether the structure has to be checked before LMDB may map it.

    Raises: CorruptBlock when it cannot be trusted at all (the machine went down without a sync).
    """
    if stamp is None:
        raise errors.CorruptBlock("nothing says how it was left")
    if stamp.txnid is None:
        if stamp.boot_id != boot_id():
            raise errors.CorruptBlock("the machine went down while it was in use")
        return False  # killed, no more: the page cache has every committed transaction
    if stamp.txnid != meta.txnid:
        raise errors.CorruptBlock("it was written by somebody else since it was closed")
    status = Path(directory, DATA_FILE).stat()
    return (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns)


def remove(directory: str) -> None:
    """Remove our files in a directory, at once. Raises OSError."""
    for name in (DATA_FILE, LOCK_FILE, STAMP_FILE):
        path = Path(directory, name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def take_away(directory: str) -> str:
    """Take an environment away and return what was done. Raises OSError.

    One of ours is only a cache: it is deleted, in the background, because that takes seconds for many GiB
    (`remove_leftovers`, when the directory is opened again). What looks foreign may be somebody's only copy: it is set
    aside, and the newest of those is kept.
    """
    if is_ours(directory):
        os.rename(directory, f"{directory}{GONE_SUFFIX}{time.time_ns()}")
        return "deleted it"
    parent, base = os.path.split(directory)
    former = sorted(Path(parent).glob(f"{base}{ASIDE_SUFFIX}*"), key=lambda path: _number(path.name))
    for path in former:
        shutil.rmtree(path, ignore_errors=True)
    target = f"{directory}{ASIDE_SUFFIX}{_number(former[-1].name) + 1 if former else 1}"
    os.rename(directory, target)
    return f"set it aside as {target} (no cache of ours: keep it, or delete it; it counts to no limit)"


def is_ours(directory: str | Path) -> bool:
    """Return whether a directory holds an environment (or what is left of one) and nothing else."""
    names = {DATA_FILE, LOCK_FILE, STAMP_FILE, f"{STAMP_FILE}.tmp"}
    path = Path(directory, DATA_FILE)
    try:
        if Path(directory).is_symlink() or not names.issuperset(os.listdir(directory)):
            return False
        if not os.path.lexists(path):
            return True
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(128 << 10)
    except OSError:
        return False
    places = (0, 4096, 8192, 16384, 32768, 65536)  # the two meta pages, whatever the page size is
    return not head or any(
        struct.unpack_from("=I", head, at + 16)[0] == _LMDB_MAGIC for at in places if at + 20 <= len(head)
    )


def _number(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0


def reserve_lock_file(directory: str) -> None:
    """Make the lock file big and backed enough before LMDB maps it. Raises OSError."""
    fd = os.open(os.path.join(directory, LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size < LOCK_BYTES:
            os.posix_fallocate(fd, 0, LOCK_BYTES)
    finally:
        os.close(fd)


def allocated_bytes(directory: str) -> int:
    """Return how many bytes of the file system the data file takes. Raises OSError."""
    return Path(directory, DATA_FILE).stat().st_blocks * 512


def remove_leftovers(directory: str) -> None:
    """Remove, in the background, environments of ours that lie beside the tier and count to no limit: what was to be
    deleted when a process died, and what earlier versions have set aside.
    """
    parent, base = os.path.split(directory)
    beside = [
        *Path(parent).glob(f"{base}{GONE_SUFFIX}*"),
        *filter(is_ours, Path(parent).glob(f"{base}{ASIDE_SUFFIX}*")),
    ]
    if beside:
        threading.Thread(target=_remove_all, args=(beside,), name="tier-remover", daemon=True).start()


def _remove_all(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        log.info("deleted %s", path)


def structure_flaw(directory: str) -> str:
    """Return what is wrong with the tree of the data file, or "" (also when checking takes too long to wait for).

    Runs in a process of its own: it reads every page of the trees, and it must not be hurt by what it finds.
    """
    command = [sys.executable, "-I", "-c", _VERIFIER, os.path.join(directory, DATA_FILE)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=VERIFY_TIME_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == VERIFY_FLAW else ""
