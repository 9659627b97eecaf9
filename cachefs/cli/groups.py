"""Names of groups, and what `--nodes` and `--group` of `cachefs warmup` mean: all nodes, so many, those of a group."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cachefs.config import MAX_GROUPS
from cachefs.errors import ConfigError, UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Of nodes, zones, clusters and groups."""
ALL = "all"
MOST_NODES = 10_000
LETTERS = "letters, digits, dots, hyphens and underscores, at most 63"


def validate_groups(groups: Sequence[str]) -> None:
    """Refuse groups that a node cannot be in. Raises ConfigError."""
    for name in groups:
        if not _is_group(name):
            raise ConfigError(f"--group {name!r}: must be a name ({LETTERS}, neither a number nor 'all')")
    if len(groups) > MAX_GROUPS:
        raise ConfigError(f"--group: {len(groups)} groups, a node can be in {MAX_GROUPS} at most")


def chosen_nodes(nodes: str | None, group: str | None) -> tuple[int, str]:
    """Return how many nodes are meant (0: all there are), and of which group ("": of any). -1: this node alone.

    Raises UsageError.
    """
    count = -1
    if nodes is not None:
        if nodes == ALL or nodes.isdigit():
            count = 0 if nodes == ALL else int(nodes) if nodes.isascii() else 0
            if nodes != ALL and not 0 < count <= MOST_NODES:
                raise UsageError(f"--nodes {nodes}: must be 'all', a number from 1 to {MOST_NODES}, or a group")
        elif group is not None:
            raise UsageError("--nodes names a group, and so does --group: one of them")
        else:
            group = nodes
    if group is None:
        return count, ""
    if not _is_group(group):
        raise UsageError(f"{group!r} is no name of a group ({LETTERS}, neither a number nor 'all')")
    return max(count, 0), group


def _is_group(name: str) -> bool:
    return NAME.fullmatch(name) is not None and name != ALL and not name.isdigit()
