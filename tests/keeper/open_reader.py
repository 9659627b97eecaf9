"""Holds a file open and reads pieces of it, again and again, until its standard input ends.

    python -m tests.keeper.open_reader FILE COPY [once]   ->   {"reads": 1234, "longest_s": 0.7, "faults": []}

Every piece is compared with the copy, and the kernel's pages are dropped first, so that every read comes to cachefs.
Each tenth time the file is opened anew as well, unless it is to be opened once.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import time
from pathlib import Path

PIECE_BYTES = 200_000


def main() -> None:
    """Read until told to stop; print what was seen."""
    path, copy = sys.argv[1], Path(sys.argv[2]).read_bytes()
    held = os.open(path, os.O_RDONLY)
    reads, longest_s = 0, 0.0
    faults: list[str] = []
    choice = random.Random(7)
    print("reading", flush=True)
    while not select.select([sys.stdin], [], [], 0.01)[0] and len(faults) < 20:
        start = choice.randrange(max(1, len(copy) - PIECE_BYTES))
        began = time.monotonic()
        try:
            os.posix_fadvise(held, 0, 0, os.POSIX_FADV_DONTNEED)
            if os.pread(held, PIECE_BYTES, start) != copy[start : start + PIECE_BYTES]:
                faults.append(f"wrong bytes at {start}")
            if reads % 10 == 0 and len(sys.argv) < 4:
                os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            faults.append(str(error))
        reads, longest_s = reads + 1, max(longest_s, time.monotonic() - began)
    print(json.dumps({"reads": reads, "longest_s": longest_s, "faults": faults}))


if __name__ == "__main__":
    main()
