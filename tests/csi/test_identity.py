"""The Identity service at its socket."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import cachefs
from cachefs.errors import StorageUnavailable
from csi.identity import Identity
from csi.records import RecordsRefused
from csi.status import Code, unavailable
from csi.v1 import csi_pb2
from tests.csi.rig import Client, served


def test_name_and_version(driver: Client) -> None:
    answer = driver.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest())
    assert answer.name == "cachefs.csi.k8s.io"
    assert re.fullmatch(r"[a-zA-Z][A-Za-z0-9.-]{0,61}[a-zA-Z]", answer.name)
    assert answer.vendor_version == cachefs.__version__


@pytest.mark.parametrize(
    ("controller", "topology", "wanted"),
    [
        (True, False, {"CONTROLLER_SERVICE"}),
        (True, True, {"CONTROLLER_SERVICE", "VOLUME_ACCESSIBILITY_CONSTRAINTS"}),
        (False, False, set()),
    ],
)
def test_capabilities_follow_the_mode(tmp_path: Path, *, controller: bool, topology: bool, wanted: set[str]) -> None:
    identity = Identity(controller=controller, has_topology=topology, name="other.name")
    with served(tmp_path / "csi.sock", [identity]) as client:
        answer = client.identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest())
        assert client.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest()).name == "other.name"
    kinds = csi_pb2.PluginCapability.Service.Type
    services = {kinds.Name(each.service.type) for each in answer.capabilities if each.HasField("service")}
    assert services == wanted
    expansions = [each.volume_expansion.type for each in answer.capabilities if each.HasField("volume_expansion")]
    assert expansions == [csi_pb2.PluginCapability.VolumeExpansion.ONLINE]


def test_probe_is_ready_when_everything_answers(driver: Client) -> None:
    assert driver.identity.Probe(csi_pb2.ProbeRequest()).ready.value


def test_probe_says_what_is_not_ready_once_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Exception):
        kind, text = "unavailable", "no keeper at /run/x"

    reasons: list[Exception | None] = [None, Gone(), StorageUnavailable("etcd is away"), unavailable("no node service")]

    def check() -> None:
        if reasons[0] is not None:
            raise reasons[0]

    caplog.set_level(logging.INFO)
    with served(tmp_path / "csi.sock", [Identity(controller=False, checks=(check,))]) as client:
        for ready in (True, False, False, False):
            assert client.identity.Probe(csi_pb2.ProbeRequest()).ready.value is ready
            reasons.append(reasons.pop(0))
    assert caplog.text.count("not ready") == 1, "a probe comes every few seconds"
    assert "no keeper at /run/x" in caplog.text


@pytest.mark.expect_warnings("Probe")
def test_probe_fails_when_somebody_has_to_change_something(tmp_path: Path) -> None:
    def check() -> None:
        raise RecordsRefused("etcd refuses the controller")

    with served(tmp_path / "csi.sock", [Identity(controller=True, checks=(check,))]) as client:
        refused = client.refused(client.identity.Probe, csi_pb2.ProbeRequest())
    assert refused == (Code.FAILED_PRECONDITION, "etcd refuses the controller")


def test_probe_notices_records_that_are_gone(driver: Client, tmp_path: Path) -> None:
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    assert not driver.identity.Probe(csi_pb2.ProbeRequest()).ready.value
