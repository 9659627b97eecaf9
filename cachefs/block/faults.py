"""What a tier says about its faults: every one is counted, and each kind is warned of at most once a minute."""

from __future__ import annotations

import logging
import time

from cachefs.logs import ThrottledWarning
from cachefs.metrics import Counters
from cachefs.types import Tier

log = logging.getLogger(__name__)


class Faults:
    """The faults of one tier. Any thread."""

    def __init__(self, name: str, tier: Tier, counters: Counters) -> None:
        self._name = name
        self._tier = tier
        self._counters = counters
        self._bad_blocks = ThrottledWarning()
        self._faults = ThrottledWarning()

    def bad_block(self, error: Exception) -> None:
        """A block failed its check and is being dropped."""
        self._counters.add(f"{self._tier}_corrupt")
        more = self._bad_blocks.due(time.monotonic())
        if more is not None:
            log.warning("dropped a bad block of %s: %s%s", self._name, error, more)

    def fault(self, error: Exception) -> None:
        """The tier could not do something; whoever asked was told that the block is not there."""
        self._counters.add(f"{self._tier}_faults")
        more = self._faults.due(time.monotonic())
        if more is not None:
            log.warning("%s is not usable now: %s%s", self._name, error, more)
