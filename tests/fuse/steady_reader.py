"""A reader that goes on until its standard input ends, checks every byte and measures how long it had to wait.

    python -m tests.fuse.steady_reader DIRECTORY SUMS.json   ->   {"files": 321, "longest_s": 0.41, "faults": []}

It reads whole files in pieces of odd sizes, opens each anew and drops the kernel's pages first, so that every round
comes to cachefs; every third file is read through a memory map. It is a program of its own because a reader that hangs
must not hang the tests.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import select
import sys
import time
from pathlib import Path

PIECES = (4096, 65_536, 100_001, 1 << 20)
MAX_FAULTS = 20


class SteadyReader:
    """Reads files whose MD5 sums are known; `longest_s` is the longest that one system call or page fault took."""

    def __init__(self, root: Path, sums: dict[str, str]) -> None:
        self.root = root
        self.sums = sums
        self.longest_s = 0.0
        self.files = 0
        self.faults: list[str] = []
        self._random = random.Random(1)

    def round(self) -> None:
        """Read every file once, in another order each time."""
        names = list(self.sums)
        self._random.shuffle(names)
        for name in names:
            if stopped():
                return
            try:
                found = self._digest(self.root / name)
                if found != self.sums[name]:
                    self.faults.append(f"{name}: wrong bytes")
            except OSError as error:
                self.faults.append(f"{name}: {error}")
            self.files += 1

    def _digest(self, path: Path) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        started = time.monotonic()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            started = self._lap(started)
            if self.files % 3 == 0 and os.fstat(descriptor).st_size:
                with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
                    for start in range(0, len(mapped), 1 << 20):
                        digest.update(mapped[start : start + (1 << 20)])
                        started = self._lap(started)
                return digest.hexdigest()
            while piece := os.read(descriptor, self._random.choice(PIECES)):
                started = self._lap(started)
                digest.update(piece)
        finally:
            os.close(descriptor)
            self._lap(started)
        return digest.hexdigest()

    def _lap(self, started: float) -> float:
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - started)
        return now


def stopped() -> bool:
    """Whether standard input has ended."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def main() -> None:
    """Read until told to stop; print what was seen."""
    reader = SteadyReader(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    print("reading", flush=True)
    while not stopped() and len(reader.faults) < MAX_FAULTS:
        reader.round()
    print(json.dumps({"files": reader.files, "longest_s": reader.longest_s, "faults": reader.faults}))


if __name__ == "__main__":
    main()
