"""Where a node says that it can be reached, when nobody tells: the address from which it reaches etcd."""

from __future__ import annotations

import pytest

from cachefs.agent.peering import address_towards
from cachefs.errors import UsageError

NOWHERE = "http://no-such-host.invalid:2379"


def test_the_address_towards_etcd() -> None:
    assert address_towards("http://127.0.0.1:2379") == "127.0.0.1"
    assert address_towards("http://127.0.0.1") == "127.0.0.1"


def test_an_endpoint_whose_name_is_unknown_is_passed_over() -> None:
    assert address_towards(NOWHERE, "https://127.0.0.1:2379/") == "127.0.0.1"


def test_no_way_to_any_of_them() -> None:
    with pytest.raises(UsageError) as refusal:
        address_towards(NOWHERE, "http://other.invalid")
    text = str(refusal.value)
    assert "no-such-host" in text
    assert "other.invalid" in text
    assert "--advertise" in text
