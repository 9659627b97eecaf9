"""A keeper that kills itself at one point of its work: python -m tests.keeper.dying_keeper POINT COUNT ARGUMENTS...

POINT names a step (see `STEPS`), with a plus at its end: right behind it. COUNT: which time.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from cachefs.keeper import binds
from cachefs.keeper.__main__ import main
from cachefs.keeper.records import Records
from cachefs.mount import kernel

STEPS: dict[str, tuple[object, str]] = {
    "mount": (kernel, "mount"),
    "unmount": (kernel, "unmount"),
    "bind": (binds, "_mount"),
    "unbind": (binds, "_unmount"),
    "save": (Records, "save"),
    "remove": (Records, "remove"),
}


def dying(step: Callable[..., Any], count: int, *, behind: bool) -> Callable[..., Any]:
    left = count

    @functools.wraps(step)
    def run(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if not left and not behind:
            os.kill(os.getpid(), signal.SIGKILL)
        outcome = step(*arguments, **more)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    return run


if __name__ == "__main__":
    point, number, *rest = sys.argv[1:]
    where, name = STEPS[point.removesuffix("+")]
    setattr(where, name, dying(getattr(where, name), int(number), behind=point.endswith("+")))
    sys.exit(main(rest))
