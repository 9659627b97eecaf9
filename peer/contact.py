"""How this node stands with etcd: connected since when, what went wrong last, and whether to believe in deaths.

What always holds:

* One warning for each outage, however long it lasts, however often is tried, and however often it seems to be over for
  less than ten seconds; another one only if the kind of fault changes. A reconnection that succeeds at once is not
  worth one.
* Doubt begins when etcd answers after it was silent for half a lease time, or has lost its records, and lasts one lease
  time. While it lasts, records that are gone may be of nodes that live.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import trio

from peer.etcd import EtcdFault, EtcdRefused, EtcdUnavailable, TokenExpired

log = logging.getLogger(__name__)

CALM_S = 10.0
"""An outage is over when the connection has lasted so long."""
ELECTION_S = 3.0
"""With several endpoints only what lasts longer is an outage: an etcd of three members whose leader dies refuses all
questions until it has chosen another, which takes one to two seconds.
"""


class Contact:
    """Used in one trio loop; its state may be read from any thread."""

    def __init__(self, cluster: str, endpoints: int) -> None:
        """`endpoints`: how many there are. A fault counts as an outage when all of them have failed."""
        self._cluster = cluster
        self._endpoints = endpoints
        self._grace_s = ELECTION_S if endpoints > 1 else 0.0
        self.connected = False
        self._ever = False
        self._since = time.monotonic()
        self._last_error: str | None = None
        self._said: type[EtcdFault] | None = None
        self._said_over = False
        self._last_answer: float | None = None
        self._doubt_until = 0.0

    def state(self) -> dict[str, Any]:
        """Return what is shown of it."""
        return {
            "connected": self.connected,
            "since_s": round(time.monotonic() - self._since, 1),
            "last_error": self._last_error,
        }

    # -- doubt --------------------------------------------------------------------------------------------------------

    @property
    def doubting(self) -> bool:
        """Whether what vanishes from etcd may live."""
        return trio.current_time() < self._doubt_until

    def doubt(self, ttl_s: float) -> None:
        """Begin to doubt."""
        self._doubt_until = trio.current_time() + ttl_s

    def heard(self, ttl_s: float) -> None:
        """etcd has answered. Call it before the answer is acted on."""
        now = trio.current_time()
        if self._last_answer is not None and now - self._last_answer > ttl_s / 2:
            self.doubt(ttl_s)
        self._last_answer = now

    # -- outages ------------------------------------------------------------------------------------------------------

    def gained(self, endpoint: str) -> None:
        """We know the cluster and are registered in it."""
        self.connected = self._ever = True
        self._since = time.monotonic()
        self._last_error = None
        level = logging.DEBUG if self._said is None or self._said_over else logging.INFO
        self._said_over = self._said is not None
        log.log(level, "in cluster %r through %s", self._cluster, endpoint)

    def lost(self, fault: EtcdFault, failures: int, members: int) -> None:
        """A session ended, after so many `failures` in a row; `members` are in the view that stays."""
        self._last_error = str(fault)
        if self.connected:
            if time.monotonic() - self._since > CALM_S:
                self._said = None
            self.connected = False
            self._since = time.monotonic()
        refused = isinstance(fault, EtcdRefused)
        for_long = failures >= self._endpoints and time.monotonic() - self._since >= self._grace_s
        lasting = for_long and not isinstance(fault, TokenExpired)
        kind = EtcdRefused if refused else EtcdUnavailable
        if kind is self._said or not (lasting or refused):
            log.debug("session with etcd ended: %s", fault)
            return
        self._said, self._said_over = kind, False
        if self._ever:
            log.warning("etcd is out of reach, the last %d members stay: %s", members, fault)
        else:
            log.warning("not in a cluster yet, this node begins alone and keeps trying: %s", fault)
