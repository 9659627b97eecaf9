"""Programs and small functions that read a mount as its users do."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def content(name: str, size: int) -> bytes:
    """Return `size` bytes that look random and are always the same for a name."""
    return random.Random(f"{name}:{size}").randbytes(size)


def evict_pages(path: Path) -> None:
    """Drop the kernel's pages of one file, so that the next read comes to cachefs."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_and_compare(root: Path, objects: Mapping[str, bytes]) -> None:
    """Read every object below a directory from cachefs (not from the kernel's pages) and compare."""
    for name, body in objects.items():
        evict_pages(root / name)
        assert (root / name).read_bytes() == body, name


def run_program(
    arguments: Sequence[str | Path], *, timeout_s: float = 60.0, cwd: Path = REPOSITORY, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a program that reads a mount, in a group of its own that is killed when it takes too long."""
    child = subprocess.Popen(
        [str(argument) for argument in arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    try:
        output, complaints = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, complaints = child.communicate(timeout=10)
        raise AssertionError(f"{arguments[0]} took over {timeout_s:g} s\n{output}\n{complaints}") from None
    assert not check or child.returncode == 0, f"{arguments} -> {child.returncode}\n{output}\n{complaints}"
    return subprocess.CompletedProcess(child.args, child.returncode, output, complaints)


def run_python(source: str, *arguments: str | Path, timeout_s: float = 60.0) -> str:
    """Run a piece of Python in a process of its own (a page fault on a mount would hold our interpreter lock)."""
    return run_program([sys.executable, "-c", source, *arguments], timeout_s=timeout_s).stdout


def errno_of(action: Callable[[], object]) -> int:
    """Return the errno that an action fails with, 0 when it works."""
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


def errno_name(action: Callable[[], object]) -> str:
    """Return the name of the errno that an action fails with, "" when it works."""
    code = errno_of(action)
    return errno.errorcode.get(code, str(code)) if code else ""


def tree_of(root: Path) -> dict[str, bytes | None]:
    """Return every path below a directory with its bytes (None for directories)."""
    found: dict[str, bytes | None] = {}
    for directory, names, files in os.walk(root, onerror=_raise):
        for name in names:
            found[os.path.relpath(os.path.join(directory, name), root)] = None
        for name in files:
            path = Path(directory, name)
            found[os.path.relpath(path, root)] = path.read_bytes()
    return found


def tree_from_keys(objects: Mapping[str, bytes]) -> dict[str, bytes | None]:
    """Return what `tree_of` must return for a bucket with these objects (keys that all can be paths)."""
    tree: dict[str, bytes | None] = {}
    for key, body in objects.items():
        parts = key.split("/")
        for depth in range(1, len(parts)):
            tree["/".join(parts[:depth])] = None
        if parts[-1] and tree.get(key, b"") is not None:
            tree[key] = body
    return {path: body for path, body in tree.items() if body is None or not _is_directory(path, objects)}


def _is_directory(path: str, objects: Iterable[str]) -> bool:
    return any(key.startswith(f"{path}/") for key in objects)


def _raise(error: OSError) -> None:
    raise error
