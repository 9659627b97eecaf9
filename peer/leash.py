"""A call to another node as other threads may deal with it: they can end it, and it says when it gets nowhere.

What always holds: a connection is shut only while its call holds it, and a call lets go of it before it is closed or
kept for the next one: nobody else's connection is ever hit.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from peer.breaker import Breaker

T = TypeVar("T")


class Leash:
    """Of one call. `pull` may be called by any thread, everything else by the thread of the call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.pulled = False
        """Whether the call was ended by somebody else."""
        self.due = math.inf
        """When it is late (of time.monotonic), if nothing has been heard by then."""

    def holds(self, connection: socket.socket | None) -> None:
        """This connection is in use from now on; None: none is."""
        with self._lock:
            self._socket = connection
            if self.pulled:
                self._shut()

    def pull(self) -> None:
        """End the call: what it waits for on its connection fails."""
        with self._lock:
            self._pull()

    def _pull(self) -> None:
        """Under the lock."""
        self.pulled = True
        self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            shut(self._socket)

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for the call any more, through no fault of its node."""
        return self.pulled

    # -- what the call says --------------------------------------------------------------------------------------------

    def quiet(self) -> None:
        """Nothing was heard for a while."""

    def waited(self, seconds: float, usual_s: float) -> None:
        """The node lives, and has not had the next block for so long; `usual_s` would be nothing unusual.

        Raises PeerSlow when it is known that this is in vain.
        """

    def tell(self, breaker: Breaker) -> None:
        """Report on a call that was ended by `pull`: nobody waits for its answer."""
        breaker.abandoned()


def with_notice(
    connection: socket.socket,
    act: Callable[[], T],
    notice_s: float,
    most_s: float,
    late: Callable[[], None],
    again: Callable[[], T] | None = None,
) -> T:
    """Do what waits for a connection, for `most_s` at the longest, and call `late` when `notice_s` of it are over.

    `again` goes on with what `act` has begun; itself, by default. Raises TimeoutError, and what they raise.
    """
    first_s = min(most_s, max(0.001, notice_s))
    connection.settimeout(first_s)
    try:
        return act()
    except TimeoutError:
        if first_s >= most_s:
            raise
    late()
    connection.settimeout(most_s - first_s)
    return (again or act)()


def shut(connection: socket.socket) -> None:
    """Let whoever waits for a connection find it closed. Any thread.

    Not by `SSLSocket.shutdown`, which takes the TLS object away under a thread that is using it.
    """
    try:
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass  # it was not connected, or is closed by now
