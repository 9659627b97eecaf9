"""The client of the Kubernetes API, against a real HTTPS server that plays the API."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import trustme

from csi.kube import WARNING, KubeClient, KubeError, PodReference, event_name
from tests.csi.fake_kube import FakeApi

POD = PodReference("team", "train-0", "uid-1")


# -- calls -------------------------------------------------------------------------------------------------------------


def test_an_event_names_the_pod_and_who_says_it(api: FakeApi) -> None:
    assert api.client().emit_event(POD, "WarmingUp", "10 of 20 files", WARNING)
    [(verb, path, proof, kind, event)] = api.calls
    assert (verb, path) == ("POST", "/api/v1/namespaces/team/events")
    assert (proof, kind["type"]) == ("Bearer first", "application/json")
    assert event["involvedObject"] == {
        "apiVersion": "v1", "kind": "Pod", "namespace": "team", "name": "train-0", "uid": "uid-1",
    }  # fmt: skip
    assert (event["type"], event["reason"], event["message"]) == ("Warning", "WarmingUp", "10 of 20 files")
    assert event["source"] == {"component": "cachefs.csi.k8s.io", "host": "node-a"}
    assert event["metadata"]["namespace"] == "team"
    assert event["metadata"]["name"].startswith("train-0.")


def test_events_are_events_for_kubernetes(api: FakeApi, tmp_path: Path) -> None:
    from kubernetes_validate import validate

    assert api.client().emit_event(PodReference("team", "x" * 253), "R" * 300, "m" * 5000)
    event = api.calls[0][4]
    validate(event, "1.31", strict=True)
    assert len(event["metadata"]["name"]) <= 253
    assert len(event["message"]) == 1024


def test_an_event_goes_on(api: FakeApi) -> None:
    client, name = api.client(), event_name(PodReference("team", "x" * 199 + "-1"))
    assert "-." not in name
    assert client.emit_event(POD, "WarmingUp", "10 of 20 files", name=name)
    assert client.follow_event(POD, name, "m" * 5000, 2)
    verb, path, _, kind, body = api.calls[1]
    assert (verb, path) == ("PATCH", f"/api/v1/namespaces/team/events/{name}")
    assert kind["type"] == "application/merge-patch+json"
    assert set(body) == {"message", "count", "lastTimestamp"}
    assert (api.events[name]["count"], len(api.events[name]["message"])) == (2, 1024)
    assert client.follow_event(POD, "train-0.gone", "nobody is warned", 3) is False


@pytest.mark.expect_warnings("is no name of an object")
def test_an_event_leads_nowhere_else(api: FakeApi) -> None:
    assert not api.client().follow_event(PodReference("../nodes", "x"), "name", "text", 2)
    assert not api.client().follow_event(POD, "../../pods/x", "text", 2)
    assert api.calls == []


def test_labels_are_merged(api: FakeApi) -> None:
    assert api.client().label_node("node-a", {"x": "1", "y": None})
    [(verb, path, _, kind, body)] = api.calls
    assert (verb, path, kind["type"]) == ("PATCH", "/api/v1/nodes/node-a", "application/merge-patch+json")
    assert body == {"metadata": {"labels": {"x": "1", "y": None}}}
    assert api.labels == {"zone": "a", "x": "1"}
    assert api.client().get_node("node-a")["metadata"]["labels"]["x"] == "1"


def test_the_token_is_read_for_each_call(api: FakeApi) -> None:
    client = api.client()
    client.get_node("node-a")
    api.set_token("second")
    client.get_node("node-a")
    assert [call[2] for call in api.calls] == ["Bearer first", "Bearer second"]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.expect_warnings("cannot write events")
def test_what_is_refused_is_one_warning_until_it_works(api: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    client = api.client()
    api.status = 403
    for _ in range(5):
        assert not client.emit_event(POD, "R", "m")
    [text] = warnings()
    assert text == (
        "cannot write events: the Kubernetes API answers 403 to POST /api/v1/namespaces/team/events: it is forbidden"
    )
    api.status = 0
    assert client.emit_event(POD, "R", "m")
    api.status = 500
    assert not client.emit_event(POD, "R", "m")
    assert len(warnings()) == 2
    with pytest.raises(KubeError) as caught:
        client.get_node("node-a")
    assert caught.value.status == 500
    assert "first" not in str(caught.value)


@pytest.mark.expect_warnings("cannot label node")
def test_an_api_that_hangs_or_drips_keeps_nobody_for_long(api: FakeApi) -> None:
    for name in ("delay_s", "drip_s"):
        setattr(api, name, 0.1 if name == "drip_s" else 1.0)
        api.status = 403
        began = time.monotonic()
        assert not api.client(timeout_s=0.4).label_node("node-a", {"x": "1"})
        assert time.monotonic() - began < 1.5
        setattr(api, name, 0.0)


@pytest.mark.expect_warnings("cannot write events")
def test_nobody_there_a_foreign_certificate_or_no_token_never_raise(
    api: FakeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not KubeClient("127.0.0.1", 1, service_account=str(tmp_path)).emit_event(POD, "R", "m")
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    assert not api.client().emit_event(POD, "R", "m")
    (tmp_path / "ca.crt").write_text("no certificate")
    assert not api.client().emit_event(POD, "R", "m")
    for spoilt in ("", "a\nHost: b"):
        api.set_token(spoilt)
        assert not api.client().emit_event(POD, "R", "m")
    (tmp_path / "token").unlink()
    assert not api.client().emit_event(POD, "R", "m")
    assert api.calls == []
    assert len(caplog.records) == 6


@pytest.mark.expect_warnings("cannot label node")
@pytest.mark.parametrize("name", ["", "a/../../secrets/b", "a?b", "A", "a b"])
def test_names_lead_nowhere_else(api: FakeApi, name: str) -> None:
    assert not api.client().label_node(name, {"x": "1"})
    assert api.calls == []
