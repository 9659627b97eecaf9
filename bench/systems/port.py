"""What a scenario needs from a system, and where the systems find the S3 server and the data set."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.dataset import Dataset
from bench.memory import Roles


class Absent(Exception):
    """The system cannot be measured here; the message is the reason that the report shows."""


class Warmth(enum.StrEnum):
    """Which copy of the bytes answers a read that the page cache does not answer."""

    DISK = "disk"
    SHM = "shm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One S3 server with one bucket that holds the data set, and a directory for whatever a system has to keep."""

    work: Path
    dataset: Dataset
    endpoint_url: str
    access_key: str
    secret_key: str
    region: str
    environment: dict[str, str]
    bucket: str
    filer_address: str
    server_session: int = 0
    """The session that the processes of the S3 server are in (0: not known)."""
    beside_server: tuple[str, ...] = ()
    """What starts a program where the server is, when that is behind a link."""

    def place(self, *parts: str) -> Path:
        """Return a directory below the work directory, made when missing."""
        directory = self.work.joinpath(*parts)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def clean_environment(self, **more: str) -> dict[str, str]:
        """The environment for a system's processes: no proxies, no home directory with somebody's settings."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return kept | {"HOME": str(self.place("home")), "TMPDIR": str(self.place("tmp"))} | self.environment | more


class System(Protocol):
    """A way to reach the data set below a directory. Methods block; they raise `Absent` or `RuntimeError`."""

    name: str
    """As on the command line."""
    label: str
    """As in the table."""
    warmth: tuple[Warmth, ...]
    """The tiers it has of its own; empty for a local file system."""

    def version(self) -> str:
        """Return the version of the installed program. Raises Absent."""
        ...

    def prepare(self) -> str | None:
        """Bring the data set where the system can read it; return the bucket that its reads are served from, if any."""
        ...

    def mount(self) -> Path:
        """Mount and return the directory that holds the data set."""
        ...

    def umount(self) -> None:
        """Unmount and end every process, so that no memory tier survives. Does nothing when not mounted."""
        ...

    def reset(self) -> None:
        """Empty every cache (while unmounted): the next mount is a first one."""
        ...

    def roles(self) -> Roles:
        """Return the processes of the mounted system."""
        ...

    def origin_requests(self) -> int | None:
        """Return how many requests went to S3 so far, where the system says so."""
        ...


def program(name: str) -> str:
    """Return the path of a program: beside the running interpreter first, then from PATH. Raises Absent."""
    import shutil

    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Absent(f"`{name}` is not installed")
    return found


def run(arguments: list[str], *, environment: dict[str, str], timeout_s: float = 60, title: str = "") -> str:
    """Run a program to its end and return what it printed. Raises RuntimeError with the last lines on failure."""
    command = title or f"{Path(arguments[0]).name} {arguments[1]}"
    try:
        done = subprocess.run(
            arguments, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False, cwd="/"
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"`{command}` did not end within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        tail = " | ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise RuntimeError(f"`{command}` ended with {done.returncode}: {tail}")
    return done.stdout or done.stderr
