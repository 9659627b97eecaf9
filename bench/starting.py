"""Starting a server of ours on loopback ports that were free a moment ago."""

from __future__ import annotations

from collections.abc import Callable

START_ATTEMPTS = 3


def start_on_free_ports(start: Callable[[], None], failure: type[Exception]) -> None:
    """Call `start`, which chooses ports and starts a server there, until it works, at most `START_ATTEMPTS` times.

    Between choosing the ports and binding them somebody else may have taken one. Raises the last `failure`, and at once
    whatever else `start` raises.
    """
    for _ in range(START_ATTEMPTS - 1):
        try:
            start()
        except failure:
            continue
        return
    start()
