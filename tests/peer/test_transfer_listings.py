"""Listings between real servers and clients: those that take long, and those of a store that hangs."""

from __future__ import annotations

import contextlib
import threading
import time

import msgspec
import pytest

from peer.limits import ServerLimits
from peer.wire import PeerSlow, PeerUnavailable
from tests.peer.fake_holdings import VOLUME
from tests.peer.rig import Askers, Nodes, asker, leaves_nothing, node
from tests.peer.test_transfer import LISTING

__all__ = ["asker", "leaves_nothing", "node"]


def test_a_listing_that_takes_long_is_waited_for(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker(silence_s=0.6)
    there.holdings.before_list = lambda: time.sleep(1.2)
    assert here.client.list_page(there.member, LISTING)[0] == there.holdings.page


def test_listings_of_a_volume_that_hang_keep_no_other_waiting(node: Nodes, asker: Askers) -> None:
    over = threading.Event()
    there, here = node(limits=ServerLimits(listing_threads=1)), asker()
    there.holdings.before_listing_of = lambda volume: volume == VOLUME or over.wait(20)
    hanging = msgspec.structs.replace(LISTING, volume="f" * 16)

    def hang() -> None:
        with contextlib.suppress(PeerUnavailable):
            here.client.list_page(there.member, hanging)

    threads = [threading.Thread(target=hang) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    assert here.client.list_page(there.member, LISTING)[0] == there.holdings.page
    assert here.client.status(there.member)["version"] == "9.9.9"
    assert time.monotonic() - began < 0.5
    over.set()
    for thread in threads:
        thread.join(10)


def test_a_slow_listing_says_nothing_about_blocks(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker(patience_s=0.3)
    there.holdings.before_list = lambda: time.sleep(1.0)
    with pytest.raises(PeerSlow):
        here.client.list_page(there.member, LISTING)
    assert here.client.health(there.member)["state"] == "closed"


def test_a_listing_that_takes_too_long(node: Nodes, asker: Askers) -> None:
    there, here = node(limits=ServerLimits(listing_s=0.3)), asker()
    there.holdings.before_list = lambda: time.sleep(0.8)
    with pytest.raises(PeerUnavailable, match="too long"):
        here.client.list_page(there.member, LISTING)
