"""What is made of what agent and keeper say: names, labels, bounds, and nonsense."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.exporter import samples, table
from cachefs.exporter.exposition import Sample, exposition
from cachefs.exporter.samples import agent_samples, keeper_samples, mount_name
from cachefs.exporter.table import AGENT_COUNTERS, FAMILIES, MOUNT_COUNTERS, STORE_COUNTERS, Kind
from cachefs.keeper.client import Bind, KeeperStatus, MountState, Runner
from cachefs.metrics import METRICS
from tests.exporter.strict_format import read

STATUS: dict[str, Any] = {
    "version": "1.2.3", "uptime_s": 12.5, "rss_anon_bytes": 1 << 26, "memory_limit_bytes": 1 << 28,
    "tiers": {
        "shm": {"state": "on", "used_bytes": 10, "limit_bytes": 20, "blocks": 1},
        "disk": {"state": "full", "used_bytes": 30, "limit_bytes": 30, "blocks": 3, "spill_pending": 4},
        "fills": {"under_way": 2, "held_bytes": 5, "budget_bytes": 6},
    },
    "cluster": {"problem": None, "etcd": {"connected": True}, "members": [{}, {}, {}]},
    "counters": {"shm_hits": 7, "disk_hits": 8, "origin_fills": 9, "peer_fill_bytes": 11, "origin_requests": 99},
    "volumes": {
        "v1": {
            "source": "s3://bucket/p", "objects": 5, "bytes": 6, "origin": {"failing": True},
            "counters": {"origin_requests": 13, "origin_errors_AccessDenied": 2},
            "limits": {"shm": {"quota_bytes": 0, "used_bytes": None}, "disk": {"quota_bytes": 100, "used_bytes": 50}},
        },
        "v2": {"source": "s3://bucket/p"},
    },
    "mounts": {
        "m1": {
            "mountpoint": "/var/lib/kubelet/plugins/cachefs.csi.k8s.io/mounts/pv-1", "volume_id": "v1",
            "counters": {"fuse_reads": 21, "read_miss_seconds": 0.25, "shm_hits": 22},
        }
    },
}  # fmt: skip


def mount(key: str, state: str = "serving", **changes: Any) -> MountState:
    values: dict[str, Any] = {
        "key": key, "mountpoint": f"/k/{key}", "state": state, "fingerprint": "f",
        "labels": {"volume": f"handle-{key}"},
        "targets": (Bind("/a", True), Bind("/b", True)), "worker_pid": 1, "worker_version": "1.2.3", "restarts": 3,
        "last_crash": None, "connection": 1, "started_at": 1.0, "source": "s3://bucket/p",
    }  # fmt: skip
    return MountState(**{**values, **changes})


def keeper(*mounts: MountState) -> KeeperStatus:
    return KeeperStatus("1.2.3", Runner(1, "1.2.3", True), mounts)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_counter_is_served() -> None:
    assert set(METRICS) == set(AGENT_COUNTERS) | set(STORE_COUNTERS) | set(MOUNT_COUNTERS)


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES.values():
        assert re.fullmatch(r"cachefs_[a-z0-9]+(_[a-z0-9]+)*", family.name)
        assert family.name.endswith("_total") is (family.kind is Kind.COUNTER)
        assert len(set(family.labels)) == len(family.labels)
        assert not {"le", "quantile", "job", "instance", "pod", "node", "namespace"} & set(family.labels)
        assert family.help.endswith("."), family.name
        assert not re.search(r"\b(those|such)\b (?!fills)|among them", family.help), f"{family.name} refers to another"
    for routes in (AGENT_COUNTERS, STORE_COUNTERS, MOUNT_COUNTERS):
        for name, route in routes.items():
            assert FAMILIES[route.family.name].help == route.family.help, f"{name}: one name, two meanings"
            unit = METRICS[name].unit.value
            assert unit == "count" or route.family.name.endswith(f"_{unit}_total")


# -- values ------------------------------------------------------------------------------------------------------------


def test_what_an_agent_says() -> None:
    found = read(exposition(agent_samples(STATUS)))
    assert found["cachefs_agent_uptime_seconds"].value() == 12.5
    assert found["cachefs_tier_state"].value(tier="disk", state="full") == 1
    assert found["cachefs_tier_state"].value(tier="disk", state="on") == 0
    assert found["cachefs_tier_used_bytes"].value(tier="shm") == 10
    assert found["cachefs_tier_hits_total"].value(tier="shm") == 7
    assert found["cachefs_tier_hits_total"].value(tier="disk") == 8
    assert found["cachefs_fills_total"].value(origin="store") == 9
    assert found["cachefs_fill_bytes_total"].value(origin="peer") == 11
    assert found["cachefs_fills_joined_total"].value() == 0  # nothing happened, which is said
    assert found["cachefs_spill_pending_blocks"].value() == 4
    assert found["cachefs_peers"].value() == 3
    assert found["cachefs_store_requests_total"].value(volume="s3://bucket/p", volume_id="v1") == 13
    assert found["cachefs_store_failing"].value(volume_id="v1") == 1
    assert found["cachefs_store_failing"].value(volume_id="v2") == 0
    assert list(found["cachefs_volume_quota_bytes"].values.values()) == [100]
    assert found["cachefs_mount_fuse_reads_total"].value(mount="pv-1", volume="s3://bucket/p") == 21
    assert found["cachefs_mount_read_miss_seconds_total"].value(mount="pv-1") == 0.25
    assert found["cachefs_mount_shm_hits_total"].value(mount="pv-1") == 22
    for name, one in found.items():
        assert (one.kind, one.help) == (FAMILIES[name].kind.value, FAMILIES[name].help)


def test_what_a_keeper_says() -> None:
    found = read(exposition(keeper_samples(keeper(mount("a"), mount("b", "failed")))))
    assert found["cachefs_mount_state"].value(mount="a", volume="s3://bucket/p", state="serving") == 1
    assert found["cachefs_mount_state"].value(mount="b") == 1
    assert found["cachefs_mount_restarts_total"].value(mount="a") == 3
    assert found["cachefs_mount_targets"].value(mount="a") == 2
    assert found["cachefs_mount_info"].value(mount="b", handle="handle-b", version="1.2.3") == 1
    assert found["cachefs_node_service_connected"].value() == 1


def test_a_node_without_peers_has_no_values_of_peers() -> None:
    found = read(exposition(agent_samples({**STATUS, "cluster": None})))
    assert not {"cachefs_peers", "cachefs_etcd_up", "cachefs_peering_up"} & set(found)
    found = read(exposition(agent_samples({**STATUS, "cluster": {"problem": "etcd is away", "etcd": {}}})))
    assert found["cachefs_peering_up"].value() == found["cachefs_etcd_up"].value() == 0


def test_what_is_served_is_bounded_and_trouble_comes_first() -> None:
    many = {f"v{number:04}": {"source": f"s3://b/{number}"} for number in range(2000)}
    many["v1999"]["origin"] = {"failing": True}  # type: ignore[assignment]
    of_agent = {"volumes": many, "mounts": {key: {"mountpoint": f"/m/{key}", "volume_id": key} for key in many}}
    found = read(exposition(agent_samples(of_agent)))
    assert found["cachefs_left_out"].value(of="volumes") == 2000 - samples.MOST_VOLUMES
    assert found["cachefs_store_failing"].value(volume_id="v1999") == 1
    states = [mount(f"m{number:04}") for number in range(1999)] + [mount("m1999", "failed")]
    text = exposition([*agent_samples(of_agent), *keeper_samples(keeper(*states))])
    found = read(text)
    assert found["cachefs_left_out"].value(of="mounts") == 2000 - samples.MOST_MOUNTS
    assert found["cachefs_mount_state"].value(mount="m1999") == 1
    assert all(len(one.values) <= 2 * samples.MOST_VOLUMES for one in found.values())
    assert len(text) < 4 << 20


def test_a_mount_that_leaves_does_not_hide_its_successor() -> None:
    found = read(exposition(keeper_samples(keeper(mount("a", targets=()), mount("a", "unmounting", targets=())))))
    assert found["cachefs_mount_state"].value(mount="a", state="serving") == 1


@pytest.mark.parametrize(
    ("mountpoint", "name"),
    [
        ("/var/lib/kubelet/plugins/x.cachefs.csi.k8s.io/mounts/pvc-1", "pvc-1"),
        ("/var/lib/cachefs/cachefs.csi.k8s.io/mounts/pvc-1", "pvc-1"),
        ("/mnt/mounts/pvc-1", "/mnt/mounts/pvc-1"),
        ("/data", "/data"),
    ],
)
def test_a_mount_is_called_as_the_keeper_calls_it(mountpoint: str, name: str) -> None:
    assert mount_name(mountpoint) == name


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional={key: ANY for key in STATUS if key != "cluster"}))
def test_an_agent_that_says_nonsense_leaves_a_text_that_can_be_read(status: dict[str, Any]) -> None:
    read(exposition(agent_samples(status)))


@given(st.text(max_size=30), st.text(max_size=30))
def test_labels_come_back_as_they_were(source: str, key: str) -> None:
    sample = Sample(table.MOUNT_STATE, (key, source, "serving"), 1)
    [found] = read(exposition([sample]))["cachefs_mount_state"].values
    assert dict(found) == {"mount": key, "volume": source, "state": "serving"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3, "3"), (3.0, "3"), (0.1, "0.1"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (True, "1"),
     (1e300, "1e+300"), (-2.5, "-2.5")],
)  # fmt: skip
def test_numbers(value: float, shown: str) -> None:
    assert exposition([Sample(table.UPTIME, (), value)]).endswith(f"cachefs_agent_uptime_seconds {shown}\n".encode())


def test_a_name_that_is_no_utf_8_is_shown_all_the_same() -> None:
    text = exposition(keeper_samples(keeper(mount("a", source='s3://b/\udcff\n"x\\'))))
    [labels] = read(text)["cachefs_mount_targets"].values
    assert dict(labels)["volume"] == 's3://b/\ufffd\n"x\\'
