"""What pods may and what they see: least rights, pinned images, bounds, and three lifetimes that follow the nodes."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from tests.deploy.chart import SETS, container, containers_of, key_of, label_of, pod_of, render, rendered

ALL = [
    pytest.param(set_name, each, id=f"{set_name}-{each['metadata']['name']}")
    for set_name in SETS
    for each in rendered(set_name)
    if pod_of(each)
]
NODE_PARTS = ("keeper", "node", "csi")


def named(each: dict[str, Any]) -> dict[str, Any]:
    pod = pod_of(each)
    assert pod is not None
    return pod


def part_of(each: dict[str, Any]) -> str:
    return str(each["metadata"]["labels"]["app.kubernetes.io/component"])


@pytest.mark.parametrize(("set_name", "each"), ALL)
def test_only_the_keeper_is_privileged(set_name: str, each: dict[str, Any]) -> None:
    for one in containers_of(named(each)):
        security = one["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        if one["name"] == "keeper":
            assert security["privileged"] is True
            continue
        assert "privileged" not in security
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"]["drop"] == ["ALL"]
        added = {"own-cache": ["CHOWN"], "csi": ["CHOWN", "DAC_OVERRIDE", "FOWNER"]}
        on_node = each["kind"] == "DaemonSet"
        assert security["capabilities"].get("add", []) == (added.get(one["name"], []) if on_node else [])


@pytest.mark.parametrize(("set_name", "each"), ALL)
def test_who_runs_as_root(set_name: str, each: dict[str, Any]) -> None:
    pod, part = named(each), part_of(each)
    for one in containers_of(pod):
        user = one["securityContext"].get("runAsUser", pod.get("securityContext", {}).get("runAsUser"))
        root = part in ("keeper", "csi") or one["name"] == "own-cache"
        assert user == (0 if root else 65532), one["name"]
        if not root:
            context = {**pod.get("securityContext", {}), **one["securityContext"]}
            assert context["runAsNonRoot"] is True
    if part != "keeper":
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # LMDB's readers of two pods at a time (surge) and the fate of readers go by process number
    assert pod.get("hostPID", False) is (part in ("keeper", "node"))
    assert pod.get("hostIPC", False) is False
    assert pod.get("hostNetwork", False) is (part == "node" and set_name == "everything")


@pytest.mark.parametrize(("set_name", "each"), ALL)
def test_every_container_is_bounded_and_pinned(set_name: str, each: dict[str, Any]) -> None:
    for one in containers_of(named(each)):
        assert one["resources"]["requests"].keys() >= {"cpu", "memory"}, one["name"]
        assert one["resources"]["limits"]["memory"], one["name"]
        image = one["image"]
        tag = re.search(r"(@sha256:[0-9a-f]{64}|:v?[0-9]+\.[0-9]+\.[0-9]+(-[0-9]+)?)$", image)
        assert tag, image
        assert "//" not in image
        assert not image.startswith("/")


@pytest.mark.parametrize(("set_name", "each"), ALL)
def test_volumes_and_mounts_agree(set_name: str, each: dict[str, Any]) -> None:
    pod = named(each)
    claims = [claim["metadata"]["name"] for claim in each["spec"].get("volumeClaimTemplates") or ()]
    volumes = [volume["name"] for volume in pod.get("volumes") or ()] + claims
    assert len(volumes) == len(set(volumes))
    mounted = {mount["name"] for one in containers_of(pod) for mount in one.get("volumeMounts", ())}
    assert mounted == set(volumes)
    for one in containers_of(pod):
        places = [mount["mountPath"] for mount in one["volumeMounts"]]
        assert len(places) == len(set(places))
        names = [variable["name"] for variable in one.get("env", ())]
        assert len(names) == len(set(names)), f"{one['name']}: a variable twice"


@pytest.mark.parametrize(("set_name", "each"), ALL)
def test_ports_and_probes_agree(set_name: str, each: dict[str, Any]) -> None:
    pod = named(each)
    ports = [port["containerPort"] for one in containers_of(pod) for port in one.get("ports", ())]
    assert len(ports) == len(set(ports)), "containers of a pod share its ports"
    for one in containers_of(pod):
        known = {port["name"] for port in one.get("ports", ())} | {p["containerPort"] for p in one.get("ports", ())}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "httpGet" in one.get(probe, {}):
                assert one[probe]["httpGet"]["port"] in known


@pytest.mark.parametrize("set_name", SETS)
def test_the_pods_of_a_node_live_together(set_name: str) -> None:
    """On the same nodes, whatever taints they get, and longer than pods with volumes."""
    daemons = {part_of(each): each for each in rendered(set_name) if each["kind"] == "DaemonSet"}
    assert set(daemons) == set(NODE_PARTS)
    for one, other in itertools.pairwise(named(each) for each in daemons.values()):
        for key in ("nodeSelector", "affinity", "tolerations", "priorityClassName"):
            assert one.get(key) == other.get(key)
    for each in daemons.values():
        assert named(each)["tolerations"] == [{"operator": "Exists"}]
        assert named(each)["priorityClassName"] == "system-node-critical"
        notes = each["spec"]["template"]["metadata"]["annotations"]
        assert notes["cluster-autoscaler.kubernetes.io/enable-ds-eviction"] == "false"
    assert daemons["keeper"]["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert daemons["node"]["spec"]["updateStrategy"]["type"] == "RollingUpdate"


def test_a_new_node_service_starts_before_the_old_one_ends() -> None:
    [node] = [each for each in rendered("default") if label_of(each).endswith("/cachefs-node")][:1]
    [node] = [each for each in rendered("default") if key_of(each)[::2] == ("DaemonSet", "cachefs-node")]
    assert node["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    ports = container(rendered("default"), "DaemonSet", "-node", "node").get("ports", [])
    assert not [port for port in ports if "hostPort" in port]


@pytest.mark.parametrize("set_name", ["default", "everything", "second-instance"])
def test_paths_are_the_same_inside_and_outside(set_name: str) -> None:
    """Kubelet's paths travel to the keeper as they are, and the name of a tier follows from the path of the cache."""
    for part in NODE_PARTS:
        [each] = [one for one in rendered(set_name) if one["kind"] == "DaemonSet" and part_of(one) == part]
        pod = named(each)
        paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
        for one in containers_of(pod):
            for mount in one["volumeMounts"]:
                if mount["name"] in ("kubelet-dir", "runtime-dir", "cache"):
                    assert mount["mountPath"] == paths[mount["name"]]


@pytest.mark.parametrize("set_name", SETS)
def test_propagation(set_name: str) -> None:
    """Mounts leave the keeper and arrive in the plugin; no container keeps a copy of one that was taken away."""
    found = {}
    for each in rendered(set_name):
        for one in containers_of(pod_of(each) or {"containers": []}):
            for mount in one.get("volumeMounts", ()):
                if mount["name"] in ("kubelet-dir", "plugin-dir"):
                    found[one["name"], mount["name"]] = mount["mountPropagation"]
                else:
                    assert "mountPropagation" not in mount
    comes_in = [
        ("csi", "kubelet-dir"),
        ("csi", "plugin-dir"),
        ("registrar", "plugin-dir"),
        ("liveness-probe", "plugin-dir"),
    ]
    assert found == {("keeper", "kubelet-dir"): "Bidirectional", **dict.fromkeys(comes_in, "HostToContainer")}


def test_what_cannot_be_mended_by_a_restart_causes_none() -> None:
    """A plugin without its keeper is not ready; it is not killed before kubelet has forgotten its earlier restarts."""
    for kind, suffix in (("DaemonSet", "-csi"), ("Deployment", "-controller")):
        one = container(rendered("default"), kind, suffix, "csi")
        probe = one["livenessProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 600
        assert one["readinessProbe"]["httpGet"]["port"] == "healthz"
        assert "startupProbe" not in one


def test_the_socket_is_where_kubelet_is_told() -> None:
    for set_name in ("default", "second-instance", "everything"):
        objects = rendered(set_name)
        [each] = [one for one in objects if one["kind"] == "DaemonSet" and part_of(one) == "csi"]
        paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in named(each)["volumes"]}
        arguments = container(objects, "DaemonSet", "-csi", "registrar")["args"]
        assert f"--kubelet-registration-path={paths['plugin-dir']}/csi.sock" in arguments
        assert "--endpoint=unix:///csi/csi.sock" in container(objects, "DaemonSet", "-csi", "csi")["args"]
        [driver] = [one["metadata"]["name"] for one in objects if one["kind"] == "CSIDriver"]
        assert paths["plugin-dir"].endswith(f"/plugins/{driver}")


def test_the_shm_tier_outlives_the_pod() -> None:
    """And the plugin sees how large it is, or it would refuse the settings of the agent."""
    for part in ("node", "csi"):
        [each] = [one for one in rendered("default") if one["kind"] == "DaemonSet" and part_of(one) == part]
        [shm] = [volume for volume in named(each)["volumes"] if volume["name"] == "shm"]
        assert shm["hostPath"] == {"path": "/dev/shm", "type": "Directory"}
        mounts = container(rendered("default"), "DaemonSet", f"-{part}", part)["volumeMounts"]
        [mount] = [mount for mount in mounts if mount["name"] == "shm"]
        assert mount["mountPath"] == "/dev/shm"
        assert mount.get("readOnly", False) is (part == "csi")


def test_one_controller_is_never_two() -> None:
    """Without a leader to be elected, the old one has to end first; and no budget keeps its node from being drained."""
    [controller] = [each for each in rendered("default") if each["kind"] == "Deployment"]
    assert controller["spec"]["strategy"] == {"type": "Recreate"}
    assert not [each for each in rendered("default") if each["kind"] == "PodDisruptionBudget"]
    for set_name in ("external-etcd", "everything"):
        objects = rendered(set_name)
        assert [each for each in objects if each["kind"] == "PodDisruptionBudget" and part_of(each) == "controller"]
        for name in ("provisioner", "resizer"):
            assert "--leader-election" in container(objects, "Deployment", "-controller", name)["args"]


def test_records_on_a_claim() -> None:
    objects = tuple(render({"etcd": {"mode": "none"}, "controller": {"state": "cachefs-records"}}))
    [controller] = [each for each in objects if each["kind"] == "Deployment"]
    [state] = [volume for volume in named(controller)["volumes"] if volume["name"] == "state"]
    assert state["persistentVolumeClaim"] == {"claimName": "cachefs-records"}
    assert "--state=file:///state" in container(objects, "Deployment", "-controller", "csi")["args"]


def test_selectors_find_their_pods_only() -> None:
    for set_name in SETS:
        owners = [each for each in rendered(set_name) if pod_of(each) and "selector" in each["spec"]]
        for owner in owners:
            labels = owner["spec"]["template"]["metadata"]["labels"]
            selected = [one for one in owners if one["spec"]["selector"]["matchLabels"].items() <= labels.items()]
            assert selected == [owner]


def test_service_accounts_exist_and_tokens_are_given_to_who_asks() -> None:
    asking = {"controller", "uninstall-check"}
    for set_name in SETS:
        objects = rendered(set_name)
        accounts = {each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"}
        for each in objects:
            if pod := pod_of(each):
                assert pod["serviceAccountName"] in accounts
                wanted = part_of(each) in asking
                wanted |= part_of(each) == "node" and set_name == "everything"
                assert pod["automountServiceAccountToken"] is wanted
