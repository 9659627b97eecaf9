"""ServiceMonitor, PodMonitor, alerts and dashboard: they ask for metrics that are served, by labels that those have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from cachefs.exporter.table import FAMILIES, Kind
from tests.deploy.chart import SETS, container, pod_of, render, rendered

OF_THE_TARGET = {"job", "node", "namespace", "pod", "instance", "container", "endpoint"}
"""Labels that the Prometheus operator and the relabelling of the monitors add."""
FIELDS: dict[str, set[str]] = {
    "ServiceMonitor": {"selector", "namespaceSelector", "endpoints"},
    "PodMonitor": {"selector", "namespaceSelector", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
    "endpoint": {"port", "path", "interval", "relabelings"},
    "relabeling": {"action", "sourceLabels", "targetLabel", "replacement"},
    "group": {"name", "rules"},
    "rule": {"alert", "expr", "for", "labels", "annotations"},
}
"""Of monitoring.coreos.com/v1, those that the chart uses (Documentation/api-reference/api.md of the operator)."""
MONITORS = {"ServiceMonitor": ("serviceMonitor", "endpoints"), "PodMonitor": ("podMonitor", "podMetricsEndpoints")}
"""By kind: the value that asks for it, and its field with the endpoints."""
BY = {"release": "prometheus"}


def one(kind: str, objects: Any = None) -> dict[str, Any]:
    [found] = [each for each in objects or rendered("everything") if each["kind"] == kind]
    return dict(found)


def dashboard() -> dict[str, Any]:
    [found] = [each for each in rendered("everything") if each["metadata"]["name"] == "cachefs-dashboard"]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["annotations"] == {"grafana_folder": "Storage"}
    [text] = found["data"].values()
    return dict(json.loads(text))


def rules() -> list[dict[str, Any]]:
    [group] = one("PrometheusRule")["spec"]["groups"]
    return list(group["rules"])


def questions() -> Iterator[tuple[str, str]]:
    """Yield every expression and what it is for."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


@pytest.mark.parametrize(("what", "expression"), list(questions()))
def test_what_is_asked_for_is_served(what: str, expression: str) -> None:
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")
    names = re.findall(r"\bcachefs_\w+", re.sub(r'"[^"]*"', "", expression))
    assert names
    for name in names:
        assert name in FAMILIES, f"{what}: nobody serves {name}"
    for name, selector, window in re.findall(r"\b(cachefs_\w+)(?:\{([^}]*)\})?(\[[^]]*\])?", expression):
        family = FAMILIES.get(name)
        if family is None:
            continue  # a name within quotes
        for label in re.findall(r"(\w+)=~?", re.sub(r'"[^"]*"', "", selector)):
            assert label in {*family.labels, *OF_THE_TARGET}, f"{what}: {name} has no label {label}"
        assert bool(window) is (family.kind is Kind.COUNTER), f"{what}: {name} is a {family.kind.value}"
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        for label in labels.split(", "):
            assert all(label in {*FAMILIES[name].labels, *OF_THE_TARGET} for name in names), f"{what}: {label}"


def test_legends_and_texts_use_labels_that_are_there() -> None:
    for rule in rules():
        known = {label for name in re.findall(r"\bcachefs_\w+", rule["expr"]) for label in labels_of(name)}
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= known | {"node"}, rule["alert"]
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            kept = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
            plain = "by (" not in target["expr"] and "sum(" not in target["expr"]
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert wanted <= (OF_THE_TARGET if plain else kept), panel["title"]


def labels_of(name: str) -> tuple[str, ...]:
    return FAMILIES[name].labels if name in FAMILIES else ()


def with_monitor(kind: str, **more: Any) -> list[dict[str, Any]]:
    """Return the chart with this monitor and the alerts."""
    monitor = {MONITORS[kind][0]: {"enabled": True, "labels": BY}}
    metrics = {"enabled": True, "port": 9909, "rules": {"enabled": True}, **monitor}
    return render({"metrics": metrics, **more}, namespace="storage")


def of_the_node(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith("-node")]
    return found


@pytest.mark.parametrize("kind", MONITORS)
def test_a_monitor_finds_the_port_of_the_node_service(kind: str) -> None:
    objects = with_monitor(kind)
    monitor, daemon = one(kind, objects), of_the_node(objects, "DaemonSet")
    chosen, labels = monitor["spec"]["selector"]["matchLabels"], daemon["spec"]["template"]["metadata"]["labels"]
    [endpoint] = monitor["spec"][MONITORS[kind][1]]
    node = container(tuple(objects), "DaemonSet", "-node", "node")
    assert {"name": "metrics", "containerPort": 9909} in node["ports"]
    assert "--metrics=:9909" in node["args"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": [daemon["metadata"]["namespace"]]}
    assert monitor["metadata"]["labels"].items() >= BY.items()
    if kind == "PodMonitor":
        assert chosen.items() <= labels.items()
        assert not [each for each in objects if each["kind"] == "Service" and "node" in each["metadata"]["name"]]
        return
    [service] = [
        each for each in objects if each["kind"] == "Service" and chosen.items() <= each["metadata"]["labels"].items()
    ]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"] == [{"name": "metrics", "port": 9909, "targetPort": "metrics"}]
    assert service["spec"]["clusterIP"] == "None"


def job_of(monitor: dict[str, Any]) -> str:
    """Return the label `job` of what this monitor brings, as the operator makes it (its getting-started document)."""
    if monitor["kind"] == "PodMonitor":
        return f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"
    [endpoint] = monitor["spec"]["endpoints"]
    [job] = [each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job"]
    return str(job)


@pytest.mark.parametrize("kind", MONITORS)
def test_alerts_are_for_this_installation(kind: str) -> None:
    objects = with_monitor(kind, instance="b")
    wanted = f'job="{job_of(one(kind, objects))}"'
    assert wanted == 'job="storage/cachefs-b-node"'
    for rule in one("PrometheusRule", objects)["spec"]["groups"][0]["rules"]:
        for selector in re.findall(r"cachefs_\w+\{([^}]*)\}", rule["expr"]):
            assert wanted in selector, rule["alert"]


def test_alerts_have_their_values() -> None:
    assert not [rule["alert"] for rule in rules() if re.search("JOB|AMPLIFICATION", rule["expr"])]
    assert {rule["alert"] for rule in rules()} >= {
        "CachefsMountFailed", "CachefsAgentDown", "CachefsStoreRefused", "CachefsAmplification",
    }  # fmt: skip
    assert "> 0) > 2\n" in rules()[-1]["expr"]  # nothing is divided by nothing where nodes have no peers


@pytest.mark.parametrize("kind", MONITORS)
def test_only_fields_that_exist(kind: str) -> None:
    objects = with_monitor(kind)
    monitor, rule = one(kind, objects)["spec"], one("PrometheusRule", objects)["spec"]
    assert set(monitor) <= FIELDS[kind]
    assert set(rule) <= FIELDS["PrometheusRule"]
    for endpoint in monitor[MONITORS[kind][1]]:
        assert set(endpoint) <= FIELDS["endpoint"]
        assert all(set(each) <= FIELDS["relabeling"] for each in endpoint["relabelings"])
        assert {each["targetLabel"] for each in endpoint["relabelings"]} <= {"node", "job"}
    for group in rule["groups"]:
        assert set(group) <= FIELDS["group"]
        for each in group["rules"]:
            assert set(each) <= FIELDS["rule"]
            assert each["labels"]["severity"] in ("warning", "critical")
            assert re.fullmatch(r"\d+m", each["for"])


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("everything", "second-instance")])
def test_nothing_listens_that_was_not_asked_for(name: str) -> None:
    node = container(rendered(name), "DaemonSet", "-node", "node")
    assert not [each for each in node["args"] if "metrics" in each]
    assert "metrics" not in [port["name"] for port in node.get("ports", ())]
    assert not [each for each in rendered(name) if each["apiVersion"].startswith("monitoring.")]


def test_one_container_alone_has_the_token_for_events() -> None:
    for name in SETS:
        wanted = name != "minimal"
        [daemon] = [
            each for each in rendered(name) if each["kind"] == "DaemonSet" and each["metadata"]["name"].endswith("-csi")
        ]
        pod = pod_of(daemon)
        assert pod is not None
        assert pod["automountServiceAccountToken"] is False
        having = [
            each["name"]
            for each in pod["containers"]
            for mount in each["volumeMounts"]
            if mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
        ]
        assert having == (["csi"] if wanted else [])
        assert ("--events" in container(rendered(name), "DaemonSet", "-csi", "csi")["args"]) is wanted
        assert bool([volume for volume in pod["volumes"] if "projected" in volume]) is wanted
