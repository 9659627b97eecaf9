"""The examples: Kubernetes takes them, the driver takes their parameters, and what they refer to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi import mount_flags
from csi.credentials import keys_of_secret
from csi.parameters import parse
from tests.deploy.chart import REPOSITORY, VERSIONS, containers_of, key_of, label_of, mistakes_of, pod_of

FOLDER = REPOSITORY / "deploy/examples"
FILES = sorted(FOLDER.glob("*.yaml"))
DRIVER = "cachefs.csi.k8s.io"
ISSUE_WANTS = {
    "static-volume", "dynamic-dataset", "training-job", "inline-volume", "snapshot", "path-template", "pod-identity",
    "pytorch-ddp", "webdataset",
}  # fmt: skip


def load(file: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(file.read_text(encoding="utf-8")) if each]


EVERYTHING = [each for file in FILES for each in load(file)]


def with_files(*kinds: str) -> list[Any]:
    found = [(file, each) for file in FILES for each in load(file) if not kinds or each["kind"] in kinds]
    return [pytest.param(each, id=f"{file.stem}-{label_of(each)}".replace("/", "-")) for file, each in found]


def test_all_are_there_and_described() -> None:
    assert {file.stem for file in FILES} == ISSUE_WANTS
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[(\S+\.yaml)\]", readme)) == {file.name for file in FILES}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("each", with_files())
def test_kubernetes_takes_it(each: dict[str, Any], version: str) -> None:
    assert mistakes_of(each, version) == []


@pytest.mark.parametrize("each", with_files("StorageClass"))
def test_parameters_of_classes(each: dict[str, Any]) -> None:
    assert each["provisioner"] == DRIVER
    spec = parse(each["parameters"], where="parameters", of_class=True)
    spec.with_flags(mount_flags.parse(each.get("mountOptions", [])))
    if spec.auth_source == "secret":
        for call in ("provisioner", "node-stage", "node-publish"):
            assert f"csi.storage.k8s.io/{call}-secret-name" in each["parameters"]


@pytest.mark.parametrize("each", with_files("PersistentVolume"))
def test_static_volumes(each: dict[str, Any]) -> None:
    source = each["spec"]["csi"]
    assert source["driver"] == DRIVER
    spec = parse(source["volumeAttributes"])
    spec.with_flags(mount_flags.parse(each["spec"].get("mountOptions", [])))
    assert spec.auth_source != "secret" or "nodeStageSecretRef" in source


def test_inline_volumes() -> None:
    pods = [pod for each in EVERYTHING if (pod := pod_of(each))]
    found = [volume["csi"] for pod in pods for volume in pod.get("volumes", ()) if "csi" in volume]
    assert len(found) == 1
    assert found[0]["driver"] == DRIVER
    assert parse(found[0]["volumeAttributes"]).auth_source == "secret"
    assert found[0]["nodePublishSecretRef"]


def test_secrets_have_the_keys_of_the_driver() -> None:
    secrets = [each for each in EVERYTHING if each["kind"] == "Secret"]
    assert len(secrets) == 2
    for each in secrets:
        assert keys_of_secret(each["stringData"])["accessKeyId"] == "REPLACE-ME"


def test_snapshot_classes_are_of_the_driver() -> None:
    [each] = [each for each in EVERYTHING if each["kind"] == "VolumeSnapshotClass"]
    assert each["driver"] == DRIVER
    assert all(key.startswith("csi.storage.k8s.io/") for key in each["parameters"])


def test_names_are_used_once_and_what_is_named_exists() -> None:
    keys = [key_of(each) for each in EVERYTHING]
    assert len(keys) == len(set(keys)), "two examples cannot be applied together"
    classes = {name for kind, _, name in keys if kind == "StorageClass"}
    claims = {(where, name) for kind, where, name in keys if kind == "PersistentVolumeClaim"}
    for each in EVERYTHING:
        if each["kind"] == "PersistentVolumeClaim":
            assert each["spec"]["storageClassName"] in classes | {""}
        if pod := pod_of(each):
            where = each["metadata"]["namespace"]
            for volume in pod.get("volumes", ()):
                if "persistentVolumeClaim" in volume:
                    assert (where, volume["persistentVolumeClaim"]["claimName"]) in claims
                if "configMap" in volume:
                    assert ("ConfigMap", where, volume["configMap"]["name"]) in keys
            if "serviceAccountName" in pod:
                assert ("ServiceAccount", where, pod["serviceAccountName"]) in keys


@pytest.mark.parametrize("each", with_files("Pod", "Job", "Deployment"))
def test_pods_are_pinned_and_mount_what_they_have(each: dict[str, Any]) -> None:
    pod = pod_of(each)
    assert pod is not None
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    for one in containers_of(pod):
        assert re.search(r":[0-9]+\.[0-9]+", one["image"])
        assert {mount["name"] for mount in one["volumeMounts"]} == volumes
        if one["command"][0] == "python":
            compile(one["command"][-1], one["name"], "exec")
    assert pod.get("restartPolicy") in {None, "Never", "OnFailure"}


def test_programs_in_config_maps_compile() -> None:
    programs = {name: text for each in EVERYTHING if each["kind"] == "ConfigMap" for name, text in each["data"].items()}
    assert programs
    for name, text in programs.items():
        compile(text, name, "exec")


def test_loaders_with_workers_have_room_to_hand_batches_over() -> None:
    """A container's own /dev/shm has 64 MiB: eight batches of 64 images already take more."""
    programs = {each["metadata"]["name"]: str(each["data"]) for each in EVERYTHING if each["kind"] == "ConfigMap"}
    found = []
    for each in EVERYTHING:
        pod = pod_of(each) or {"containers": []}
        maps = [volume["configMap"]["name"] for volume in pod.get("volumes", ()) if "configMap" in volume]
        for one in containers_of(pod):
            if "num_workers" in " ".join([*one["command"], *(programs[name] for name in maps)]):
                found.append(each["metadata"]["name"])
                assert "/dev/shm" in [mount["mountPath"] for mount in one["volumeMounts"]]
    assert found == ["ddp", "webdataset"]
