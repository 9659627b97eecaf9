"""How far a job is, for people and for programs: a line that is rewritten on a terminal, plain lines otherwise, JSON.

What changes goes to stderr; the result is written to stdout by the command.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from cachefs.cli import output

BAR_CELLS = 20
PLAIN_S = 10.0
"""Lines that stay are written so often at most."""
WORDS = {
    "walking": "listing",
    "asking": "waiting",
    "fetching": "fetching",
    "checking": "checking",
    "evicting": "evicting",
    "pinning": "pinning",
}


class Progress:
    """Shows the states of one job as they come. Context manager: it leaves no half a line behind."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._rewrites = not as_json and sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def pause(self) -> None:
        """Leave the line for something else that is to be said."""
        if self._drawn:
            click.echo("\r\x1b[K", nl=False, err=True)
            self._drawn = False

    def show(self, job: Mapping[str, Any]) -> None:
        """Show one state. The last one is the command's business."""
        if self._as_json:
            click.echo(json.dumps(job))
        elif job["state"] not in WORDS:
            return
        elif self._rewrites:
            width = max(20, _columns() - 1)
            click.echo(f"\r\x1b[K{line(job)[:width]}", nl=False, err=True)
            self._drawn = True
        elif time.monotonic() >= self._shown_at + PLAIN_S:
            self._shown_at = time.monotonic()
            click.echo(line(job), err=True)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 80


def line(job: Mapping[str, Any]) -> str:
    """Return how far a job is, in one line."""
    word = WORDS.get(job["state"], job["state"])
    of = f"{output.count(job['files'])} files, {output.size(job['bytes'])}"
    if job["state"] not in ("fetching", "checking"):
        return f"{word}: {of}{_problems(job)}"
    done, whole = job["done_bytes"], job["bytes"]
    share = done / whole if whole else 1.0
    filled = int(share * BAR_CELLS)
    parts = [f"{word} [{'#' * filled}{'.' * (BAR_CELLS - filled)}] {share:4.0%} of {of}"]
    if job["state"] == "fetching":
        parts.append(f"{output.size(job['bytes_per_s'])}/s")
        if job["left_s"] is not None:
            parts.append(f"{output.elapsed(job['left_s'])} left")
        parts.append(sources(job))
    return ", ".join(parts) + _problems(job)


def sources(job: Mapping[str, Any]) -> str:
    """Return where the bytes came from, in a few words."""
    store = job["fetched_bytes"] - job["peer_bytes"]
    parts = [f"store {output.size(store)}"]
    if job["peer_bytes"]:
        parts.append(f"other nodes {output.size(job['peer_bytes'])}")
    parts.append(f"there {output.size(job['there_bytes'])}")
    return ", ".join(parts)


def _problems(job: Mapping[str, Any]) -> str:
    return f", {output.count(job['problems'])} problems" if job["problems"] else ""
