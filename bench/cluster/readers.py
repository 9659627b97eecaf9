"""One reader for each node, started together: processes of `bench.cluster.reader`, and their outcomes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_REPOSITORY = Path(__file__).resolve().parents[2]
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reader tells at its end."""

    bytes_read: int
    seconds: float
    longest_ms: float
    stalls: list[tuple[float, float, str]]
    """(seconds after the start, milliseconds, what) of the longest steps, longest first."""
    errors: list[str]
    wrong: list[str]

    def longest_after(self, at_s: float) -> float:
        """Return the milliseconds of the longest step that ended later than `at_s` (0 when none was a stall)."""
        return max((ms for begun_s, ms, _ in self.stalls if begun_s + ms / 1e3 >= at_s), default=0.0)

    @property
    def is_clean(self) -> bool:
        """Neither errors nor wrong bytes."""
        return not self.errors and not self.wrong


class Reader:
    """One process that reads a dataset below a directory."""

    def __init__(self, name: str, directory: Path, manifest: Path, work: Path, **more: Any) -> None:
        """`more`: further fields of the specification (seed, threads, read_bytes)."""
        self.name = name
        self._progress = work / f"progress-{name}-{time.monotonic_ns()}"
        spec = {"directory": str(directory), "manifest": str(manifest), "progress": str(self._progress), **more}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.cluster.reader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_REPOSITORY,
            start_new_session=True,
        )
        self._tell(json.dumps(spec))

    def wait_until_ready(self) -> None:
        """Return when it has read its specification."""
        assert self._child.stdout is not None
        if self._child.stdout.readline() != "ready\n":
            raise RuntimeError(f"the reader on {self.name} did not start")

    def start(self) -> None:
        """Let it begin."""
        self._tell("go")

    @property
    def bytes_read(self) -> int:
        """How many bytes it has read and found right so far."""
        with contextlib.suppress(FileNotFoundError):
            return int.from_bytes(self._progress.read_bytes(), "little")
        return 0

    @property
    def is_running(self) -> bool:
        """Whether it still reads."""
        return self._child.poll() is None

    def wait(self, timeout_s: float) -> Outcome:
        """Return what it tells at its end; TimeoutError if that does not come."""
        try:
            printed, _ = self._child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"the reader on {self.name} has read {self.bytes_read:,} bytes in {timeout_s:g} s"
            ) from None
        if self._child.returncode not in (0, 3):
            raise RuntimeError(f"the reader on {self.name} ended with {self._child.returncode}")
        told = json.loads(printed)
        stalls = [(at, ms, what) for at, ms, what in told["stalls"]]
        return Outcome(told["bytes"], told["seconds"], told["longest_ms"], stalls, told["errors"], told["wrong"])

    def kill(self) -> None:
        """End it at once."""
        self._child.kill()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._child.wait()
        self._progress.unlink(missing_ok=True)

    def _tell(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{line}\n")
        self._child.stdin.flush()


class Readers:
    """Readers of several nodes that begin at the same moment. Context manager."""

    def __init__(self, readers: Iterable[Reader]) -> None:
        self.by_name: dict[str, Reader] = {}
        self._begun = 0.0
        try:
            for reader in readers:
                self.by_name[reader.name] = reader
            for reader in self.by_name.values():
                reader.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill whoever still runs."""
        for reader in self.by_name.values():
            reader.kill()

    def start(self) -> None:
        """Let all of them begin."""
        self._begun = time.monotonic()
        for reader in self.by_name.values():
            reader.start()

    def wait_for_bytes(self, least: int, timeout_s: float, *, of: Iterable[str] = ()) -> None:
        """Return when each of them (of those named) has read so much."""
        names = list(of) or list(self.by_name)
        deadline = time.monotonic() + timeout_s
        while any(self.by_name[name].bytes_read < least for name in names):
            if time.monotonic() > deadline:
                read = {name: self.by_name[name].bytes_read for name in names}
                raise TimeoutError(f"not within {timeout_s:g} s: {least:,} bytes each ({read})")
            time.sleep(_POLL_S)

    def outcomes(self, timeout_s: float, *, of: Iterable[str] = ()) -> dict[str, Outcome]:
        """Return what they tell (those named, or all), by name."""
        deadline = time.monotonic() + timeout_s
        names = list(of) or list(self.by_name)
        return {name: self.by_name[name].wait(max(deadline - time.monotonic(), 0.1)) for name in names}

    @property
    def seconds(self) -> float:
        """How long ago they began."""
        return time.monotonic() - self._begun
