"""The chart: it renders for every set of values, Kubernetes takes what comes out, and wrong values are refused."""

from __future__ import annotations

import base64
import copy
import functools
import json
import re
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from cryptography import x509

import cachefs
from cachefs.cli.options import SETTINGS
from tests.deploy.chart import (
    CHART,
    FOREIGN_KINDS,
    REPOSITORY,
    SETS,
    VERSIONS,
    container,
    key_of,
    label_of,
    mistakes_of,
    pod_of,
    render,
    render_text,
    rendered,
    values_of,
)


@pytest.mark.parametrize("name", SETS)
def test_lint(name: str) -> None:
    found = helm_python.lint(str(CHART), values_of(name), strict=True, namespace="cachefs")
    assert found["errors"] == []
    assert [message for message in found["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SETS)
def test_kubernetes_takes_every_object(name: str, version: str) -> None:
    assert [mistake for each in rendered(name) for mistake in mistakes_of(each, version)] == []


def test_the_schemas_find_mistakes() -> None:
    wrong = copy.deepcopy(next(each for each in rendered("default") if each["kind"] == "DaemonSet"))
    wrong["spec"]["template"]["spec"]["tolerationz"] = []
    assert "tolerationz" in " ".join(mistakes_of(wrong, "1.30"))
    assert mistakes_of({**wrong, "spec": {}}, "1.37")


def test_only_foreign_kinds_are_skipped() -> None:
    seen = {(each["apiVersion"], each["kind"]) for name in SETS for each in rendered(name)}
    wanted = {key for key, why in FOREIGN_KINDS.items() if key[1] != "VolumeSnapshot" and why}
    assert seen >= wanted
    assert all(api.split("/")[0].endswith("k8s.io") or "." not in api for api, _ in seen - wanted)


@pytest.mark.parametrize("name", SETS)
def test_every_name_is_there_once(name: str) -> None:
    keys = [key_of(each) for each in rendered(name)]
    assert len(keys) == len(set(keys))


def test_two_instances_share_nothing() -> None:
    first, second = rendered("default"), rendered("second-instance")
    assert {key_of(each) for each in first}.isdisjoint(key_of(each) for each in second)
    assert driver_of(first) != driver_of(second) == "b.cachefs.csi.k8s.io"
    shared = host_paths(first) & host_paths(second)
    # what belongs to the node itself; names within it differ by driver and by cache directory
    assert shared == {"/var/lib/kubelet", "/var/lib/kubelet/plugins_registry", "/dev/shm"}
    clusters = {variables(each, "node")["CACHEFS_CLUSTER"] for each in (first, second)}
    assert len(clusters) == 2


def driver_of(objects: tuple[dict[str, Any], ...]) -> str:
    [found] = [each["metadata"]["name"] for each in objects if each["kind"] == "CSIDriver"]
    return str(found)


def host_paths(objects: tuple[dict[str, Any], ...]) -> set[str]:
    pods = [pod for each in objects if (pod := pod_of(each))]
    return {volume["hostPath"]["path"] for pod in pods for volume in pod.get("volumes", ()) if "hostPath" in volume}


def variables(objects: tuple[dict[str, Any], ...], name: str) -> dict[str, Any]:
    kind = "Deployment" if name == "controller" else "DaemonSet"
    inner = "csi" if name == "controller" else name
    found = container(objects, kind, f"-{name}", inner)["env"]
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in found}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [({}, True), ({"tokensInSecrets": False}, None), ({"tokensInSecrets": True, "tokenAudiences": []}, None)],
)
def test_tokens_are_secrets_where_kubernetes_can(values: dict[str, Any], wanted: bool | None) -> None:
    [driver] = [each for each in render({"csi": values}) if each["kind"] == "CSIDriver"]
    assert driver["spec"].get("serviceAccountTokenInSecrets") is wanted


def test_the_minimum_has_no_dead_weight() -> None:
    kinds = sorted(each["kind"] for each in rendered("minimal"))
    assert kinds == ["CSIDriver", *["DaemonSet"] * 3, *["ServiceAccount"] * 3]
    assert "CACHEFS_NODE_NAME" not in variables(rendered("minimal"), "node")  # refused without --etcd


def test_numbers_of_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == cachefs.__version__


def test_memory_of_the_node_follows_the_tiers() -> None:
    node = container(rendered("default"), "DaemonSet", "-node", "node")["resources"]
    assert node == {"requests": {"cpu": "200m", "memory": "2368Mi"}, "limits": {"memory": "5376Mi"}}
    node = container(tuple(render({"cache": {"shmSize": "0", "memoryLimit": "1GiB"}})), "DaemonSet", "-node", "node")
    assert node["resources"]["limits"]["memory"] == "4096Mi"
    node = container(rendered("everything"), "DaemonSet", "-node", "node")["resources"]
    assert node["limits"] == {"cpu": "8", "memory": "80Gi"}
    assert node["requests"] == {"cpu": "2", "memory": f"{64 * 1024 + 1024 + 64}Mi"}


def test_all_images_come_from_the_registry_of_an_air_gapped_cluster() -> None:
    pods = [pod for each in rendered("air-gapped") if (pod := pod_of(each))]
    images = {each["image"] for pod in pods for each in [*pod.get("initContainers", ()), *pod["containers"]]}
    assert all(image.startswith("registry.internal:5000/mirror/") for image in images)
    assert len(images) == 6
    assert all(pod["imagePullSecrets"] == [{"name": "registry-a"}, {"name": "registry-b"}] for pod in pods)


def test_classes_carry_parameters_and_secrets() -> None:
    classes = {each["metadata"]["name"]: each for each in rendered("everything") if each["kind"] == "StorageClass"}
    assert classes["imagenet"]["parameters"] == {
        "bucket": "datasets", "prefix": "imagenet/", "mode": "immutable", "warmup": "/", "warmupWait": "10m",
        "authSource": "secret",
    } | {
        f"csi.storage.k8s.io/{call}-secret-{part}": {"name": "s3-keys", "namespace": "${pvc.namespace}"}[part]
        for call in ("provisioner", "node-stage", "node-publish", "controller-expand")
        for part in ("name", "namespace")
    }  # fmt: skip
    assert classes["imagenet"]["allowVolumeExpansion"] is False
    assert classes["scratch"]["allowVolumeExpansion"] is True
    assert classes["scratch"]["parameters"]["pathTemplate"] == "${pvc.namespace}/${pvc.name}"


# -- certificates -----------------------------------------------------------------------------------------------------


def secret_of(objects: list[dict[str, Any]], name: str) -> dict[str, bytes]:
    [found] = [each for each in objects if each["kind"] == "Secret" and each["metadata"]["name"] == name]
    return {key: base64.b64decode(value) for key, value in found["data"].items()}


@pytest.mark.parametrize("made_by", ["chart", "script"])
def test_certificates_are_good_for_their_names(made_by: str, tmp_path: Path) -> None:
    objects = render({}) if made_by == "chart" else from_script()
    server = secret_of(objects, "cachefs-etcd-server-tls")
    for name in ("cachefs-peer-tls", "cachefs-etcd-server-tls", "cachefs-etcd-client-tls"):
        files = secret_of(objects, name)
        assert files["ca.crt"] == server["ca.crt"]
        certificate = x509.load_pem_x509_certificate(files["tls.crt"])
        authority = x509.load_pem_x509_certificate(files["ca.crt"])
        certificate.verify_directly_issued_by(authority)
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert {usage._name for usage in usages} == {"serverAuth", "clientAuth"}
        for key, content in files.items():
            (tmp_path / key).write_bytes(content)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    names = x509.load_pem_x509_certificate(server["tls.crt"]).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    host = re.search(r"https://([^:]+)", variables(rendered("default"), "node")["CACHEFS_ETCD"])
    assert host is not None
    wildcards = [name.removeprefix("*") for name in names.value.get_values_for_type(x509.DNSName)]
    assert "." + host[1].partition(".")[2] in wildcards


@functools.cache
def from_script() -> list[dict[str, Any]]:
    done = subprocess.run([REPOSITORY / "deploy/kubernetes/certificates"], capture_output=True, check=True, timeout=30)
    return list(yaml.safe_load_all(done.stdout))


def test_no_pod_sees_the_key_of_the_authority() -> None:
    assert secret_of(render({}), "cachefs-ca")["tls.key"].startswith(b"-----BEGIN")
    for name in SETS:
        for each in rendered(name):
            pod = pod_of(each) or {}
            secrets = [volume["secret"]["secretName"] for volume in pod.get("volumes", ()) if "secret" in volume]
            assert not [secret for secret in secrets if secret.endswith("-ca")]


def test_certificates_that_are_there_are_kept() -> None:
    # `lookup` finds nothing here; what it would find is used as it is, which the text shows
    text = (CHART / "templates/certificates.yaml").read_text(encoding="utf-8")
    assert text.count("lookup ") == 3
    assert 'tls.key: {{ index $have.data "tls.key" }}' in text


# -- wrong values -----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"kubeletDirectory": "/x"}, "kubeletDirectory"),
    "unknown key within": ({"cache": {"diskSize": "1GiB"}}, "diskSize"),
    "unknown setting": ({"node": {"settings": {"evictions": "lru"}}}, "evictions"),
    "size of Kubernetes": ({"cache": {"shmSize": "2Gi"}}, "/cache/shmSize"),
    "size as number": ({"cache": {"size": 5}}, "/cache/size"),
    "relative path": ({"cache": {"hostPath": "var/cache"}}, "/cache/hostPath"),
    "runtime directory too long": ({"runtimeDir": "/" + "x" * 60}, "/runtimeDir"),
    "instance in capitals": ({"instance": "B"}, "/instance"),
    "latest": ({"image": {"tag": "latest"}}, "/image/tag"),
    "monitor of nothing": ({"metrics": {"podMonitor": {"enabled": True}}}, "metrics.podMonitor: nothing is served"),
    "service of nothing": ({"metrics": {"serviceMonitor": {"enabled": True}}}, "metrics.serviceMonitor: nothing is"),
    "two monitors": (
        {"metrics": {"enabled": True, "podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
        "metrics.podMonitor: every node would be scraped twice",
    ),
    "alerts of nothing": ({"metrics": {"enabled": True, "rules": {"enabled": True}}}, "metrics.rules: the alerts"),
    "low port for metrics": ({"metrics": {"enabled": True, "port": 80}}, "/metrics/port"),
    "one port twice": ({"metrics": {"enabled": True}, "node": {"peerPort": 9815}}, "metrics.port: is that"),
    "two pods at one port": (
        {"metrics": {"enabled": True}, "node": {"hostNetwork": True}}, "cannot have metrics.port on one node"
    ),
    "digest": ({"image": {"digest": "sha256:12"}}, "/image/digest"),
    "mode of etcd": ({"etcd": {"mode": "internal"}}, "/etcd/mode"),
    "two members": ({"etcd": {"bundled": {"replicas": 2}}}, "/etcd/bundled/replicas"),
    "password in the address": ({"etcd": {"external": {"endpoints": ["https://a:b@e"]}}}, "/etcd/external/endpoints"),
    "class without parameters": ({"storageClasses": [{"name": "a"}]}, "parameters"),
    "class with a typo": ({"storageClasses": [{"name": "a", "parameters": {}, "reclaim": "Delete"}]}, "reclaim"),
    "external without address": ({"etcd": {"mode": "external"}}, "etcd.external.endpoints"),
    "user without password": ({"etcd": {"external": {"user": "u"}}}, "etcd.external.passwordSecret"),
    "nowhere for records": ({"etcd": {"mode": "none"}}, "controller.state"),
    "records in memory": ({"etcd": {"bundled": {"persistence": {"enabled": False}}}}, "persistence"),
    "two controllers, one file": ({"controller": {"state": "claim", "replicas": 2}}, "controller.replicas"),
    "no certificates": ({"tls": {"mode": "none"}}, "peers.auth"),
    "existing, but which": ({"tls": {"mode": "existing"}}, "tls.existing"),
    "surge and unavailable": ({"node": {"updateStrategy": {"maxSurge": 1, "maxUnavailable": 1}}}, "updateStrategy"),
    "neither": ({"node": {"updateStrategy": {"maxSurge": 0, "maxUnavailable": 0}}}, "updateStrategy"),
    "two pods, one port": ({"node": {"hostNetwork": True, "peerPort": 7070}}, "peerPort"),
    "snapshots without sidecar": ({"snapshotClasses": [{"name": "a"}]}, "controller.snapshotter"),
    "capacity of nowhere": ({"controller": {"storageCapacity": True}}, "csi.topology"),
    "labels without a cluster": (
        {"node": {"labelNodes": True}, "etcd": {"mode": "none"}, "controller": {"enabled": False}},
        "node.labelNodes",
    ),
    "secret anywhere": (
        {"storageClasses": [{"name": "a", "parameters": {}, "secret": {"name": "k", "namespace": "${pvc.namespace}"}}]},
        "controller.readAllSecrets",
    ),
    "authority from nowhere": ({"s3": {"caFile": "ca.pem"}}, "s3.caConfigMap"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_by_name(case: str) -> None:
    values, named = WRONG[case]
    with pytest.raises(helm_python.HelmError) as caught:
        render_text(values)
    assert named in str(caught.value)


def test_the_schema_knows_the_settings_of_the_node() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    allowed = set(schema["properties"]["node"]["properties"]["settings"]["properties"])
    known = {setting.key for setting in SETTINGS if setting.section in ("cache", "peer")}
    assert allowed <= known
    # the others are decided by values of their own, or by the pod
    own = {name.removeprefix("CACHEFS_").lower().replace("_", "-") for name in decided()}
    assert known - allowed - own == {"agent-idle-timeout"}


def decided() -> set[str]:
    names: set[str] = set()
    for name in SETS:
        names |= {key for key in variables(rendered(name), "node") if key.startswith("CACHEFS_")}
    open_to_all = tuple(render({"peers": {"auth": "insecure"}}))
    return names | {key for key in variables(open_to_all, "node") if key.startswith("CACHEFS_")}


def test_every_value_is_explained_and_in_the_schema() -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load(text)
    assert set(values) == set(schema["properties"]) - {"global"}
    for key in values:
        before = text[: re.search(rf"^{key}:", text, re.MULTILINE).start()]  # type: ignore[union-attr]
        assert before.rstrip("\n").rpartition("\n")[2].startswith("#"), f"{key} has no comment"
    assert walk(values, schema, schema["$defs"]) == []


def walk(values: Any, schema: dict[str, Any], known: dict[str, Any], where: str = "") -> list[str]:
    """Return the keys of the schema that values.yaml does not show."""
    if "$ref" in schema:
        schema = known[schema["$ref"].rpartition("/")[2]]
    if not isinstance(values, dict) or "properties" not in schema:
        return []
    optional = {"global", "pullPolicy", "settings"}
    missing = [f"{where}/{key}" for key in schema["properties"] if key not in values and key not in optional]
    if where.endswith(("/seLinuxOptions", "/settings", "/resources")) or where == "/seLinuxOptions":
        missing = []
    for key, value in values.items():
        missing += walk(value, schema["properties"].get(key, {}), known, f"{where}/{key}")
    return missing


# -- plain manifests and notes ----------------------------------------------------------------------------------------


def test_plain_manifests_are_the_chart() -> None:
    script = REPOSITORY / "scripts/render-manifests"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def plain() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((REPOSITORY / "deploy/kubernetes/cachefs.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_plain_manifests(version: str) -> None:
    objects = plain()
    assert [mistake for each in objects for mistake in mistakes_of(each, version)] == []
    assert not [label_of(each) for each in objects if each["kind"] == "Secret"]
    assert "helm" not in json.dumps(objects).lower()


def test_the_secrets_of_the_plain_manifests_are_those_of_the_script() -> None:
    made = {each["metadata"]["name"] for each in from_script()}
    wanted = {
        volume["secret"]["secretName"]
        for each in plain()
        for volume in (pod_of(each) or {}).get("volumes", ())
        if "secret" in volume
    }
    assert made == wanted


@pytest.mark.parametrize("name", SETS)
def test_notes_name_what_is_there(name: str) -> None:
    [notes] = [text for file, text in render_text(values_of(name)).items() if file.endswith("NOTES.txt")]
    daemons = [each["metadata"]["name"] for each in rendered(name) if each["kind"] == "DaemonSet"]
    for mentioned in re.findall(r"daemonset/(\S+)", notes):
        assert mentioned in daemons
    assert driver_of(rendered(name)) in notes
    assert "\n\n\n" not in notes
