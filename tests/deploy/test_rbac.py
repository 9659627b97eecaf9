"""Rights in the cluster: what the sidecars document and the code calls, each for its own account, and nothing more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csi import kube
from tests.csi.fake_kube import FakeApi
from tests.deploy.chart import REPOSITORY, SETS, render, rendered

Rights = dict[str, set[str]]

PROVISIONER: Rights = {
    "persistentvolumes": {"get", "list", "watch", "create", "patch", "delete"},
    "persistentvolumeclaims": {"get", "list", "watch", "update"},
    "storage.k8s.io/storageclasses": {"get", "list", "watch"},
    "events": {"list", "watch", "create", "update", "patch"},
}
"""csi-provisioner v6.3.0, deploy/kubernetes/rbac.yaml, without snapshots, topology and attachments."""
TOPOLOGY: Rights = {"storage.k8s.io/csinodes": {"get", "list", "watch"}, "nodes": {"get", "list", "watch"}}
"""The same, for drivers with topology."""
RESIZER: Rights = {
    "persistentvolumes": {"get", "list", "watch", "patch"},
    "persistentvolumeclaims": {"get", "list", "watch"},
    "persistentvolumeclaims/status": {"patch"},
    "events": {"list", "watch", "create", "update", "patch"},
    "storage.k8s.io/volumeattributesclasses": {"get", "list", "watch"},
}
"""csi-resizer v2.2.1, deploy/kubernetes/rbac.yaml; its pods are for --handle-volume-inuse-error, which is off."""
SNAPSHOTTER: Rights = {
    "events": {"list", "watch", "create", "update", "patch"},
    "snapshot.storage.k8s.io/volumesnapshotclasses": {"get", "list", "watch"},
    "snapshot.storage.k8s.io/volumesnapshotcontents": {"get", "list", "watch", "update", "patch"},
    "snapshot.storage.k8s.io/volumesnapshotcontents/status": {"update", "patch"},
    "snapshot.storage.k8s.io/volumesnapshots": {"get", "list", "watch", "update"},
}
"""csi-snapshotter v8.6.0, deploy/kubernetes/csi-snapshotter/rbac-csi-snapshotter.yaml, without group snapshots (their
gate is off); the last is csi-provisioner's, which makes volumes from them.
"""
LEASES: Rights = {"coordination.k8s.io/leases": {"get", "watch", "list", "delete", "update", "create"}}
CAPACITY: Rights = {
    "storage.k8s.io/csistoragecapacities": {"get", "list", "watch", "create", "update", "patch", "delete"},
    "pods": {"get"},
    "apps/replicasets": {"get"},
}


def union(*rights: Rights) -> Rights:
    found: Rights = {}
    for each in rights:
        for resource, verbs in each.items():
            found[resource] = found.get(resource, set()) | verbs
    return found


def rights_of(objects: list[dict[str, Any]], account: str, *, cluster: bool) -> Rights:
    """What a service account may do, in the whole cluster or in its namespace; rules for single names are left out."""
    kind = "ClusterRole" if cluster else "Role"
    roles = set()
    for each in objects:
        if each["kind"] == f"{kind}Binding" and any(subject["name"] == account for subject in each["subjects"]):
            assert each["roleRef"]["kind"] == kind
            roles.add((each["roleRef"]["name"], each["metadata"].get("namespace", "")))
    found: Rights = {}
    for each in objects:
        if each["kind"] == kind and (each["metadata"]["name"], each["metadata"].get("namespace", "")) in roles:
            for rule in each["rules"]:
                if "resourceNames" in rule:
                    continue
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        name = f"{group}/{resource}" if group else resource
                        found[name] = found.get(name, set()) | set(rule["verbs"])
    return found


def of(set_name: str, account: str, *, cluster: bool = True) -> Rights:
    return rights_of(list(rendered(set_name)), account, cluster=cluster)


def test_the_controller_by_default() -> None:
    assert of("default", "cachefs-controller") == union(PROVISIONER, RESIZER)
    assert of("default", "cachefs-controller", cluster=False) == {}


def test_the_controller_with_everything() -> None:
    everything = union(PROVISIONER, RESIZER, TOPOLOGY, SNAPSHOTTER, {"secrets": {"get"}})
    assert of("everything", "cachefs-controller") == everything
    assert of("everything", "cachefs-controller", cluster=False) == union(LEASES, CAPACITY)


def test_replicas_elect_a_leader() -> None:
    assert of("external-etcd", "cachefs-controller", cluster=False) == LEASES


def test_secrets_are_allowed_one_by_one() -> None:
    roles = [each for each in rendered("air-gapped") if each["kind"] == "Role"]
    assert [(each["metadata"]["namespace"], each["rules"]) for each in roles] == [
        (
            "storage",
            [
                {
                    "apiGroups": [""],
                    "resources": ["secrets"],
                    "resourceNames": ["s3-keys", "s3-keys-models"],
                    "verbs": ["get"],
                }
            ],
        )
    ]
    assert "secrets" not in of("air-gapped", "cachefs-controller")


def test_flags_that_save_rights_are_given() -> None:
    """Each right that is left out above has a flag that makes the sidecar do without."""
    from tests.deploy.chart import container

    objects = rendered("default")
    assert "--handle-volume-inuse-error=false" in container(objects, "Deployment", "-controller", "resizer")["args"]
    assert (
        "--snapshot-orphan-sweep-interval=0" in container(objects, "Deployment", "-controller", "provisioner")["args"]
    )
    snapshotter = container(rendered("everything"), "Deployment", "-controller", "snapshotter")
    assert "--feature-gates=CSIVolumeGroupSnapshot=false" in snapshotter["args"]


def documented(call: str) -> Rights:
    """What csi.kube says that one of its calls needs."""
    found = re.search(
        rf"^    {call}\s+(\w+)\s*(?:\([^)]*\))?:\s*([a-z, ]+?)(?:,? in\b.*)?$", kube.__doc__ or "", re.MULTILINE
    )
    assert found, f"the docstring of csi.kube does not say what {call} needs"
    return {found[1]: {verb.strip() for verb in found[2].split(",") if verb.strip()}}


CALLS: dict[str, Callable[[kube.KubeClient], object]] = {
    "emit_event": lambda client: client.emit_event(kube.PodReference("team", "train-0"), "R", "m", name="e"),
    "follow_event": lambda client: client.follow_event(kube.PodReference("team", "train-0"), "e", "m", 2),
    "label_node": lambda client: client.label_node("node-a", {"x": "1"}),
    "get_node": lambda client: client.get_node("node-a"),
}
VERBS = {"POST": "create", "PATCH": "patch", "GET": "get"}


def test_all_calls_are_looked_at() -> None:
    public = {name for name in vars(kube.KubeClient) if not name.startswith("_")}
    assert public == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_needs_what_is_documented(call: str, tmp_path: Path) -> None:
    """What really goes to the API: the verb, and the resource of a single object of core/v1."""
    api = FakeApi(tmp_path)
    try:
        CALLS["emit_event"](api.client())  # there is something to follow
        CALLS[call](api.client())
    finally:
        api.close()
    verb, path = api.calls[-1][:2]
    assert api.status == 0
    parts = path.removeprefix("/api/v1/").removeprefix("namespaces/team/").split("/")
    assert len(parts) == (1 if verb == "POST" else 2)
    assert documented(call) == {parts[0]: {VERBS[verb]}}


def test_the_plugin_and_the_node_service() -> None:
    assert of("everything", "cachefs-csi") == union(documented("emit_event"), documented("follow_event"))
    assert of("minimal", "cachefs-csi") == {}, "csi.events is off"
    assert of("everything", "cachefs-node") == union(documented("label_node"), documented("get_node"))
    assert of("default", "cachefs-node") == {}


@pytest.mark.parametrize("set_name", SETS)
def test_nobody_else_has_rights(set_name: str) -> None:
    accounts = {each["metadata"]["name"] for each in rendered(set_name) if each["kind"] == "ServiceAccount"}
    for account in accounts:
        if account.endswith(("-keeper", "-etcd")):
            assert of(set_name, account) == of(set_name, account, cluster=False) == {}
    for each in rendered(set_name):
        for rule in each.get("rules") or ():
            assert "*" not in str(rule)
        for subject in each.get("subjects") or ():
            assert subject["kind"] == "ServiceAccount"
            assert subject["name"] in accounts


def test_the_check_before_an_uninstall_only_lists() -> None:
    wanted = {"persistentvolumes": {"list"}, "pods": {"list"}}
    assert of("default", "cachefs-uninstall-check") == {
        **wanted, "snapshot.storage.k8s.io/volumesnapshotcontents": {"list"},
    }  # fmt: skip


def test_versions_of_the_sidecars_are_those_that_were_read() -> None:
    """The tables above are for these versions: read the manifests of the new ones before you change the numbers."""
    text = (REPOSITORY / "deploy/helm/cachefs/values.yaml").read_text(encoding="utf-8")
    pairs = re.findall(r"repository: sig-storage/(\S+), tag: (\S+),", text)
    assert dict(pairs) == {
        "csi-provisioner": "v6.3.0",
        "csi-resizer": "v2.2.1",
        "csi-snapshotter": "v8.6.0",
        "csi-node-driver-registrar": "v2.17.0",
        "livenessprobe": "v2.19.0",
    }


def test_capacity_is_asked_for_only_when_the_scheduler_listens() -> None:
    for objects, wanted in ((rendered("default"), False), (rendered("everything"), True)):
        [driver] = [each for each in objects if each["kind"] == "CSIDriver"]
        assert driver["spec"]["storageCapacity"] is wanted
    assert render({"controller": {"enabled": False, "storageCapacity": True}})
