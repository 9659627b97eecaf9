"""A steady reader beside a test: it goes on while processes are killed, and at its end says what it saw.

The stall that is asserted leaves room for a busy machine; the benchmark asserts one second.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.programs import REPOSITORY

MAX_STALL_S = 3.0


class Reading:
    """A steady reader in a process of its own; `outcome` is what it saw, once it has stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.outcome: dict[str, Any] = {}

    def stop(self) -> None:
        """End it and read its report."""
        output, complaints = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, complaints
        self.outcome = json.loads(output)


@contextmanager
def reading(directory: Path, objects: Mapping[str, bytes]) -> Iterator[Reading]:
    """A reader that goes on during the block; at its end no read may have failed or waited too long."""
    sums = {name: hashlib.md5(body).hexdigest() for name, body in objects.items()}
    file = directory.parent / f"sums-{directory.name}.json"
    file.write_text(json.dumps(sums))
    command = [sys.executable, "-m", "tests.fuse.steady_reader", str(directory), str(file)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        run = Reading(process)
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "reading"
            yield run
            run.stop()
        finally:
            process.kill()
    print(f"{run.outcome['files']} files, longest wait {run.outcome['longest_s']:.2f} s")
    assert run.outcome["faults"] == []
    assert run.outcome["files"] > 0
    assert run.outcome["longest_s"] < MAX_STALL_S
