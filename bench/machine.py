"""The machine under the measurements: its facts, its page cache, its wake-up latency, its mount table."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

DMA_LATENCY = Path("/dev/cpu_dma_latency")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def facts() -> dict[str, Any]:
    """What a reader of the figures has to know about this machine."""
    uname = os.uname()
    memory = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": uname.release,
        "architecture": uname.machine,
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_model": _cpu_model(),
        "memory_bytes": int(memory["MemTotal"]) * 1024,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "libraries": {
            name: importlib.metadata.version(name) for name in ("pyfuse3", "trio", "lmdb", "obstore", "boto3")
        },
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


_TOUCH = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]))
for offset in range(0, len(memory), mmap.PAGESIZE):
    memory[offset] = 1
"""


def make_memory_resident(size: int) -> None:
    """Touch `size` bytes of memory (half of what is free at the most) and free them again.

    The host of a virtual machine gives memory when it is touched for the first time, and takes back what is free for
    some seconds. That costs whoever touches it next up to 2.5 s of CPU per GiB, more than any file system, and a
    measurement must not depend on who was here before.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    subprocess.run([sys.executable, "-c", _TOUCH, str(min(size, free // 2))], check=True)


def filesystem_of(path: Path) -> str:
    """Return the type of the file system that holds `path` (ext4, xfs, overlay, ...)."""
    best, kind = "", "unknown"
    resolved = str(path.resolve())
    for fields in _mountinfo():
        mountpoint = fields[4]
        inside = resolved == mountpoint or resolved.startswith(mountpoint.rstrip("/") + "/")
        if inside and len(mountpoint) >= len(best):
            best, kind = mountpoint, fields[fields.index("-") + 1]
    return kind


def _mountinfo() -> list[list[str]]:
    return [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def is_mounted(path: Path) -> bool:
    """Whether something is mounted at `path`, asked without touching the mount itself (it may hang)."""
    escaped = str(path.absolute()).replace("\\", r"\134").replace(" ", r"\040")
    return any(fields[4] == escaped for fields in _mountinfo())


def mounts_below(path: Path) -> list[Path]:
    """The mount points below `path`, deepest first."""
    prefix = f"{path.absolute()}/"
    return sorted((Path(f[4]) for f in _mountinfo() if f[4].startswith(prefix)), reverse=True)


def detach(mountpoint: Path) -> None:
    """Unmount; a busy or dead mount is detached from the tree instead."""
    for command in (["umount", str(mountpoint)], ["umount", "-l", str(mountpoint)]):
        for _ in range(3):
            if not is_mounted(mountpoint):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=20, check=False)
            time.sleep(0.1)


def drop_page_cache() -> None:
    """Forget every clean page of file content; the entries and inodes the kernel knows stay."""
    os.sync()
    DROP_CACHES.write_text("1")


def set_read_ahead(directory: Path, kib: int) -> int:
    """Set the kernel's read-ahead for the mount that holds `directory`; return what it was."""
    device = directory.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    before = int(setting.read_text())
    setting.write_text(str(kib))
    return before


@contextlib.contextmanager
def wakeup_guard(hold: bool) -> Iterator[None]:
    """Hold the system-wide wake-up guard (idle CPUs poll instead of halting); the kernel undoes it when we end."""
    if not hold:
        yield
        return
    fd = os.open(DMA_LATENCY, os.O_WRONLY)
    try:
        os.write(fd, struct.pack("=i", 0))
        yield
    finally:
        os.close(fd)


def missing_rights() -> list[str]:
    """What this user may not do and the bench needs, in words for a person."""
    missing = []
    if os.geteuid() != 0:
        missing.append("root (mounting, dropping the page cache, holding /dev/cpu_dma_latency): run it with sudo")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        missing.append("/dev/fuse: load the fuse module (modprobe fuse), or pass --device /dev/fuse to the container")
    if not os.access(DROP_CACHES, os.W_OK):
        missing.append(f"writing {DROP_CACHES}: a privileged container or the host itself")
    return missing


def end_in_order() -> None:
    """From now on SIGTERM and SIGHUP are an exception, so that every mount is taken away on the way out."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, end)
