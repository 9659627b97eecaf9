"""How large volumes have become: the context that a node is given says how large they were when they were made.

A node that stages a volume asks the controller's records for its size, where it reaches them (they are in etcd, which
nodes use for their peers). The size is a number that is shown, so nobody waits for it long: records that do not answer
are left alone for a while, and the volume shows what its context says.
"""

from __future__ import annotations

import logging
import math
import re
import time

from cachefs.errors import CachefsError
from csi.records import VOLUMES, VolumeRecords
from csi.volumes import Volume

log = logging.getLogger(__name__)

PAUSE_S = 60.0
"""For so long records are not asked that did not answer."""
TIMEOUT_S = 1.0
"""For each server of etcd."""
_MADE_HERE = re.compile(r"v1-[0-9a-f]{40}")
"""Ids of volumes that the controller makes (`csi.volumes.volume_id_of`)."""


class Sizes:
    """Any thread. BLOCKS for seconds at most, and never raises."""

    def __init__(self, records: VolumeRecords | None = None) -> None:
        """`records` of the controller; None: this node does not reach them."""
        self._records = records
        self._not_before = -math.inf

    def now(self, volume_id: str, first_bytes: int) -> int:
        """Return how large a volume is that had `first_bytes` when it was made."""
        if self._records is None or _MADE_HERE.fullmatch(volume_id) is None or time.monotonic() < self._not_before:
            return first_bytes
        try:
            record = self._records.get(VOLUMES, volume_id)
            return max(first_bytes, Volume.of_record(record).capacity_bytes if record is not None else 0)
        except CachefsError as error:
            self._not_before = time.monotonic() + PAUSE_S
            log.info("volume %s shows the size that it was made with: %s", volume_id, error)
            return first_bytes
