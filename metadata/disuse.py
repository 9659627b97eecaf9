"""Metadata that nobody uses any more: every other bucket, prefix or rule of freshness leaves an environment behind.

An environment in use is marked now and then (the time of its directory), whether something is written to it or not. One
without a mark, or any other sign of life, for `UNUSED_S` is removed, and so is what was set aside long ago.

INVARIANT: only what bears a name that metadata gives is looked at, and no links are followed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from metadata import custody

_log = logging.getLogger(__name__)

UNUSED_S = 30 * 86400.0
MARK_S = 3600.0
"""How often a mark is due."""
_OURS = re.compile(r"[0-9a-f]{16}(\.(aside|coming|gone)-\d+)?")
_CRASHED = ".aside-crash"
"""What the crash guard of the agent appends to the directory of all environments."""


def mark_used(path: str) -> None:
    """Note that an environment is in use. Never raises."""
    try:
        os.utime(path)
    except OSError as error:
        _log.debug("%s cannot be marked: %s", path, error)  # read-only: nothing is removed there either


def unused(home: Path, now_s: float) -> dict[Path, float]:
    """Return what was not used for too long, and for how many seconds. BLOCKS."""
    try:
        candidates = [path for path in home.iterdir() if _OURS.fullmatch(path.name)]
    except OSError:
        return {}
    candidates.append(home.with_name(home.name + _CRASHED))
    ages = {path: now_s - _last_use(path) for path in candidates if path.is_dir() and not path.is_symlink()}
    return {path: age_s for path, age_s in ages.items() if age_s > UNUSED_S}


def take_out(path: Path) -> Path | None:
    """Give the name of an environment free and return what is to be removed; None when that is not possible."""
    gone = path if "." in path.name else path.with_name(f"{path.name}.gone-1")
    try:
        if gone != path:
            path.rename(gone)
    except OSError as error:
        _log.info("%s cannot be removed: %s", path, error)
        return None
    return gone


def remove(path: Path) -> None:
    """Remove what was taken out. BLOCKS. Never raises."""
    shutil.rmtree(path, ignore_errors=True)


def _last_use(path: Path) -> float:
    times = []
    for place in (path, path / custody.DATA_FILE, path / custody.STAMP):
        try:
            times.append(os.stat(place).st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)
