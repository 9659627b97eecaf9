"""What the supervision of a mount lives in, and whom it tells how its start went."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop
from cachefs.mount.worker_link import MakeWorker
from cachefs.runtime import RuntimeDir


class Ready(Protocol):
    """Whoever waits for the mount."""

    @property
    def sent(self) -> bool:
        """Whether it is known how the start went."""

    def succeed(self) -> None:
        """Say that the mount is being served. Later reports are ignored."""

    def fail(self, kind: str, text: str) -> None:
        """Say why there will be no mount. `kind` is the name of a class in `cachefs.errors`."""


class Surroundings(NamedTuple):
    """What a supervision lives in."""

    loop: Loop
    journal: Journal
    runtime: RuntimeDir
    """Where its state file and its control socket are."""
    make_worker: MakeWorker
