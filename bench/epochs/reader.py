"""Reads an epoch: given paths in a given order, by one process or by several to which batches are dealt.

A program of its own, specification as JSON on standard input, like `bench.reader`, and like that only the standard
library and xxhash. Every file is compared with its sum; wrong bytes end the run.

    {"root": "/mnt", "sums": "sums.json", "paths": "order.json", "workers": 4, "batch": 32}

`paths` is a file with a list of [path, number]. Worker w reads the batches w, w + workers, w + 2 workers, and so on, as
the workers of PyTorch's DataLoader do. The directories are listed before, which is not timed: who reads in the order of
a listing has it. The time is that of the wall clock, from when all workers are let go to the end of the last.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from bench.reader import PAGE, WRONG_BYTES_EXIT, Outcome, Spec, WrongBytes, read_file

_LONGEST = 1 << 22


def share_of(items: list[Any], worker: int, workers: int, batch: int) -> list[Any]:
    """Return what a worker reads."""
    starts = range(worker * batch, len(items), workers * batch)
    return [item for start in starts for item in items[start : start + batch]]


def read_all(root: str, wanted: list[tuple[str, int]], sums: list[int]) -> Outcome:
    """Read files one after the other. Raises OSError, WrongBytes."""
    view = memoryview(bytearray(_LONGEST + PAGE))
    size, longest = 0, 0
    for path, number in wanted:
        begun = time.perf_counter_ns()
        full = f"{root}/{path}"
        got = read_file(full, _LONGEST, [view])
        longest = max(longest, time.perf_counter_ns() - begun)
        if xxhash.xxh3_64_intdigest(view[:got]) != sums[number]:
            raise WrongBytes(f"{full}: wrong bytes ({got} read)")
        size += got
    return {"count": len(wanted), "bytes": size, "longest_ms": longest / 1e6}


def list_all(root: str, items: list[tuple[str, int]]) -> None:
    """List the directories of all files, with attributes, as a job does before it knows what to read."""
    for directory in dict.fromkeys(os.path.dirname(path) for path, _ in items):
        with os.scandir(f"{root}/{directory}") as entries:
            for entry in entries:
                entry.stat()


def read_epoch(spec: Spec) -> Outcome:
    """Let the workers read, and return the sum of what they read."""
    sums: list[int] = json.loads(Path(spec["sums"]).read_bytes())
    items: list[tuple[str, int]] = json.loads(Path(spec["paths"]).read_bytes())
    workers, batch = int(spec.get("workers", 1)), int(spec.get("batch", 32))
    list_all(spec["root"], items)
    gate_out, gate_in = os.pipe()
    pipes = []
    for worker in range(workers):
        result_out, result_in = os.pipe()
        if os.fork() == 0:
            os.close(gate_in)
            _work(spec["root"], share_of(items, worker, workers, batch), sums, gate_out, result_in)
        os.close(result_in)
        pipes.append(result_out)
    os.close(gate_out)
    begun = time.perf_counter()
    os.close(gate_in)
    outcomes = [_answer(pipe) for pipe in pipes]
    seconds = time.perf_counter() - begun
    for _ in pipes:
        with contextlib.suppress(ChildProcessError):
            os.wait()
    for outcome in outcomes:
        if "error" in outcome:
            return outcome
    return {
        "count": sum(outcome["count"] for outcome in outcomes),
        "bytes": sum(outcome["bytes"] for outcome in outcomes),
        "longest_ms": max(outcome["longest_ms"] for outcome in outcomes),
        "seconds": seconds,
    }


def _work(root: str, wanted: list[tuple[str, int]], sums: list[int], gate: int, result: int) -> NoReturn:
    """A worker: wait until the gate is opened, read, say what came of it, and end."""
    gc.collect()
    gc.disable()
    os.read(gate, 1)  # ends when everybody's last writing end is closed
    try:
        try:
            outcome = read_all(root, wanted, sums)
        except WrongBytes as error:
            outcome = {"error": str(error), "exit": WRONG_BYTES_EXIT}
        except OSError as error:
            outcome = {"error": f"{error.strerror}: {error.filename}", "exit": 1}
        os.write(result, json.dumps(outcome).encode())
    finally:
        os._exit(0)  # whatever happened: what follows is the parent's


def _answer(pipe: int) -> Outcome:
    """Wait for the outcome of a worker."""
    with os.fdopen(pipe, "rb") as stream:
        text = stream.read()
    return dict(json.loads(text)) if text else {"error": "a reading process ended without a word", "exit": 1}


def main() -> int:
    """Read the specification, run it, print the outcome."""
    outcome = read_epoch(json.load(sys.stdin))
    print(json.dumps(outcome))
    return int(outcome.get("exit", 0))


if __name__ == "__main__":
    sys.exit(main())
