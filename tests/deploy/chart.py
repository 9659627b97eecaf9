"""The chart as Helm's own engine renders it, and Kubernetes' schemas to hold the result against.

Rendering needs no cluster: `lookup` finds nothing, as at a first install.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python
import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "deploy/helm/cachefs"
SETS = ("default", "external-etcd", "second-instance", "minimal", "everything", "air-gapped")
NAMESPACE = "cachefs"
VERSIONS = ("1.30", "1.37")
"""The oldest that the chart allows, and the newest whose schemas there are."""

FOREIGN_KINDS = {
    ("cert-manager.io/v1", "Certificate"): "a kind of cert-manager, not of Kubernetes: its schema is not packaged",
    ("cert-manager.io/v1", "Issuer"): "a kind of cert-manager, not of Kubernetes: its schema is not packaged",
    (
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
    ): "of the Prometheus operator: held against it in test_monitoring",
    ("monitoring.coreos.com/v1", "PodMonitor"): "the same",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "the same",
    ("snapshot.storage.k8s.io/v1", "VolumeSnapshotClass"): "a kind of external-snapshotter, not of Kubernetes",
    ("snapshot.storage.k8s.io/v1", "VolumeSnapshot"): "a kind of external-snapshotter, not of Kubernetes",
}
"""Kinds that Kubernetes' schemas do not have, and why."""


def values_of(name: str) -> dict[str, Any]:
    """Return a set of values by its name."""
    loaded = yaml.safe_load(Path(__file__).with_name("values").joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return dict(loaded)


def render_text(values: Mapping[str, Any], *, namespace: str = NAMESPACE) -> dict[str, str]:
    """Return what Helm makes of the chart, by template. Raises helm_python.HelmError."""
    chart = helm_python.Chart.load(CHART)
    try:
        return chart.render(dict(values), name="cachefs", namespace=namespace)
    finally:
        chart.close()


def render(values: Mapping[str, Any], *, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """Return all objects that Helm makes of the chart, hooks included."""
    found = []
    for template, text in render_text(values, namespace=namespace).items():
        if template.endswith(".yaml"):
            found += [each for each in yaml.safe_load_all(text) if each]
    return found


@functools.cache
def rendered(name: str) -> tuple[dict[str, Any], ...]:
    """Return the objects of a set of values. Shared: not to be changed."""
    return tuple(render(values_of(name)))


def key_of(each: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return what makes an object one of its own in a cluster."""
    return each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]


def label_of(each: Mapping[str, Any]) -> str:
    """Return the name of an object for people."""
    return "/".join(part for part in key_of(each) if part)


def pod_of(each: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the pod spec within an object, None when there is none."""
    spec = each.get("spec") or {}
    if each["kind"] == "Pod":
        return dict(spec)
    if each["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if each["kind"] in {"DaemonSet", "Deployment", "StatefulSet", "Job", "CronJob"}:
        return dict(spec["template"]["spec"])
    return None


def containers_of(pod: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all containers of a pod, those that run first first."""
    yield from pod.get("initContainers") or ()
    yield from pod["containers"]


def container(objects: tuple[dict[str, Any], ...], kind: str, suffix: str, name: str) -> dict[str, Any]:
    """Return the container of this name in the object whose name ends like this."""
    [owner] = [one for one in objects if one["kind"] == kind and one["metadata"]["name"].endswith(suffix)]
    pod = pod_of(owner)
    assert pod is not None
    [found] = [one for one in containers_of(pod) if one["name"] == name]
    return found


@functools.cache
def _schema_of(version: str, kind: str, api: str) -> Any:
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    flat = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api)
    schema = schema_contents(f"{folder}/{kind.lower()}-{flat}.json", version)
    registry: Registry[Any] = Registry()
    for text in (schema, schema_contents(f"{folder}/_definitions.json", version)):
        registry = Resource.from_contents(text) @ registry
    return jsonschema.validators.Draft202012Validator(schema, registry=registry)


def as_of(each: Mapping[str, Any], version: str) -> Mapping[str, Any]:
    """Return an object as the chart would make it for this version: rendering here is always for the newest."""
    if each["kind"] == "CSIDriver" and tuple(map(int, version.split("."))) < (1, 35):
        spec = {name: value for name, value in each["spec"].items() if name != "serviceAccountTokenInSecrets"}
        return {**each, "spec": spec}
    return each


def mistakes_of(each: Mapping[str, Any], version: str) -> list[str]:
    """Return what Kubernetes of this version would refuse in an object, unknown fields included."""
    api, kind = each["apiVersion"], each["kind"]
    if (api, kind) in FOREIGN_KINDS:
        return []
    errors = _schema_of(version, kind, api).iter_errors(as_of(each, version))
    return [f"{label_of(each)}: {error.json_path}: {error.message[:200]}" for error in errors]


assert kubernetes_validate.latest_version() >= VERSIONS[1]
