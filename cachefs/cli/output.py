"""How commands write for people: sizes, ratios, times and tables in plain text.

Output for programs is JSON and goes around this module. Text from outside (keys, mount points, log lines) passes
through `plain`, so that a name with control characters cannot move the cursor of whoever looks at it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def plain(text: str) -> str:
    """Return `text` with control characters and undecodable bytes written as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def size(number: float) -> str:
    """Write bytes with three digits or so: 1.2 GiB, 512 MiB, 17 B."""
    for unit, name in _UNITS:
        if number >= unit:
            value = number / unit
            return f"{value:.0f} {name}" if value >= 100 or value == int(value) else f"{value:.1f} {name}"
    return f"{number:.0f} B"


def count(number: float) -> str:
    """Write a number with separators: 1,234,567."""
    return f"{number:,.0f}"


def ratio(value: float | None) -> str:
    """Write a share as a percentage; "-" when nothing has been counted yet."""
    if value is None:
        return "-"
    shown = f"{value * 100:.1f}"
    # a single miss in a million is not "all"
    return ">99.9%" if shown == "100.0" and value < 1 else f"{shown.removesuffix('.0')}%"


def elapsed(seconds: float) -> str:
    """Write an age: 42s, 7m, 3h 12m, 5d 2h."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Align `rows` of equal length (the first is the head) in columns; those in `right` to the right."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
