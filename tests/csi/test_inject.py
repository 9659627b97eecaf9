"""`cachefs inject`: what comes out, and that what is not concerned comes out as it went in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cachefs.cli.inject import injected
from cachefs.errors import UsageError
from csi.workloads import sidecar
from csi.workloads.documents import read_stream, write_stream
from csi.workloads.wishes import Wishes

JOB = """\
# Source: training/templates/job.yaml
apiVersion: batch/v1
kind: Job
metadata:
  name: train   # the name
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers:
        # the one that matters
        - name: main
          image: "pytorch:2"
          args: ['--data', /data]   # quoted as it was
          env:
            - {name: SWITCH, value: "yes"}
        - name: other
          image: busybox
# nothing below
"""
CONFIG_MAP = """\
apiVersion: v1
kind: ConfigMap
metadata: {name:   odd,   labels: {a: b}}
data:
    script: |
        --- no marker
        # no remark
    mode: 0644
"""
POD_SPEC: dict[str, Any] = {"containers": [{"name": "main", "image": "busybox"}]}


def pod_of(kind: str) -> dict[str, Any]:
    """An object of a kind of Kubernetes itself."""
    named: dict[str, Any] = {"metadata": {"name": "it"}}
    template = {"metadata": {"labels": {"app": "it"}}, "spec": dict(POD_SPEC)}
    chosen = {"selector": {"matchLabels": {"app": "it"}}, "template": template}
    once = {"metadata": {}, "spec": {**POD_SPEC, "restartPolicy": "Never"}}
    match kind:
        case "Pod":
            return {"apiVersion": "v1", "kind": kind, **named, "spec": dict(POD_SPEC)}
        case "Deployment" | "DaemonSet" | "ReplicaSet":
            return {"apiVersion": "apps/v1", "kind": kind, **named, "spec": chosen}
        case "StatefulSet":
            return {"apiVersion": "apps/v1", "kind": kind, **named, "spec": {**chosen, "serviceName": "it"}}
        case "Job":
            return {"apiVersion": "batch/v1", "kind": kind, **named, "spec": {"template": once}}
        case "CronJob":
            spec = {"schedule": "0 * * * *", "jobTemplate": {"spec": {"template": once}}}
            return {"apiVersion": "batch/v1", "kind": kind, **named, "spec": spec}
    raise AssertionError(kind)


KINDS = ("Pod", "Deployment", "DaemonSet", "ReplicaSet", "StatefulSet", "Job", "CronJob")


def wishes(**more: Any) -> Wishes:
    return Wishes(**{"source": "s3://bucket/set", "path": "/data", "image": "cachefs:1", "settings": {}, **more})


def out(text: str, **more: Any) -> str:
    return injected(text, wishes(**more))[0]


def spec_in(found: Any) -> dict[str, Any]:
    """The pod's spec in an object."""
    while "containers" not in found:
        found = found.get("spec") or found.get("template") or found.get("jobTemplate")
    spec: dict[str, Any] = found
    return spec


def added(before: str, after: str) -> list[str]:
    """What is in the second text only; nothing of the first may be lost."""
    rest = iter(after.splitlines())
    more: list[str] = []
    for line in before.splitlines():
        for found in rest:
            if found == line:
                break
            more.append(found)
        else:
            raise AssertionError(f"lost: {line!r}")
    return more + list(rest)


# -- what it makes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_valid_for_kubernetes_afterwards(kind: str) -> None:
    text = out(yaml.safe_dump(pod_of(kind)), secret="keys", settings={"etcd": "http://etcd:2379"})
    kubernetes_validate.validate(yaml.safe_load(text), "1.31", strict=True)
    assert spec_in(yaml.safe_load(text))["initContainers"][0]["restartPolicy"] == "Always"


def test_the_sidecar_has_what_it_needs() -> None:
    text = out(
        JOB, secret="keys", cpu="2",
        settings={"shm_size_bytes": 1 << 30, "cache_size_bytes": 10 << 30, "etcd": "http://e:1", "cache": True},
    )  # fmt: skip
    spec = spec_in(yaml.safe_load(text))
    [made] = spec["initContainers"]
    assert made["command"] == ["cachefs", "sidecar"]
    assert made["args"][:2] == ["s3://bucket/set", "/cachefs/mount"]
    assert {"--cache-size=10GiB", "--shm-size=1GiB", "--etcd=http://e:1", "--cache"} <= set(made["args"])
    assert made["securityContext"]["privileged"] is True
    assert made["startupProbe"]["exec"]["command"] == ["cachefs", "sidecar", "--check", "/cachefs/mount"]
    assert "lifecycle" not in made, "kubelet runs preStop hooks while the containers still read"
    references = {each["name"]: each["valueFrom"] for each in made["env"]}
    assert references["AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "keys", "key": "accessKeyId"}}
    assert references["AWS_SESSION_TOKEN"]["secretKeyRef"]["optional"] is True
    assert references["CACHEFS_NODE_NAME"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    mounts = {each["mountPath"]: each for each in made["volumeMounts"]}
    assert mounts["/cachefs"]["mountPropagation"] == "Bidirectional"
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert set(volumes) == {each["name"] for each in made["volumeMounts"]}
    assert volumes["cachefs-cache"]["emptyDir"]["sizeLimit"] == "12Gi"
    assert volumes["cachefs-shm"]["emptyDir"]["medium"] == "Memory"
    shm_mib = int(volumes["cachefs-shm"]["emptyDir"]["sizeLimit"].removesuffix("Mi"))
    assert int(made["resources"]["limits"]["memory"].removesuffix("Mi")) == 768 + shm_mib
    for container in spec["containers"]:
        assert container["volumeMounts"] == [
            {
                "name": "cachefs", "mountPath": "/data", "subPath": "mount",
                "mountPropagation": "HostToContainer", "readOnly": True,
            }
        ]  # fmt: skip
        assert "securityContext" not in container


def test_the_arguments_are_options_of_mount() -> None:
    """What the sidecar runs is understood by this version of `cachefs mount`."""
    from cachefs.cli.mount import mount
    from cachefs.cli.options import SETTINGS

    settings = {setting.field: setting.default for setting in SETTINGS if setting.field in ("uid", "prefetch", "cache")}
    spec = spec_in(yaml.safe_load(out(JOB, settings={**settings, "metadata_ttl_s": float("inf"), "file_mode": 0o440})))
    context = mount.make_context("mount", spec["initContainers"][0]["args"])
    assert context.params["source"] == "s3://bucket/set"
    assert (context.params["metadata_ttl_s"], context.params["file_mode"]) == (float("inf"), 0o440)
    assert context.params["cache_dir"] == sidecar.CACHE_DIR


def test_a_directory_of_the_node_no_memory_and_other_keys() -> None:
    spec = spec_in(
        yaml.safe_load(
            out(JOB, cache_path="/mnt/nvme/cache/", secret="s", secret_keys="id,word", settings={"shm_size_bytes": 0})
        )
    )
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert volumes["cachefs-cache"]["hostPath"] == {"path": "/mnt/nvme/cache", "type": "DirectoryOrCreate"}
    assert "cachefs-shm" not in volumes
    [made] = spec["initContainers"]
    assert [each["valueFrom"]["secretKeyRef"]["key"] for each in made["env"]] == ["id", "word"]
    assert made["resources"]["limits"]["memory"] == "768Mi"


def test_only_the_containers_that_are_named_get_it() -> None:
    text = JOB.replace(
        "      containers:", "      initContainers:\n        - name: prepare\n          image: b\n      containers:"
    )
    spec = spec_in(yaml.safe_load(out(text, containers=("other", "prepare"))))
    assert [each["name"] for each in spec["initContainers"]] == ["cachefs", "prepare"], "it starts first"
    assert ["volumeMounts" in each for each in (spec["initContainers"][1], *spec["containers"])] == [True, False, True]
    narrowed = spec_in(yaml.safe_load(out(out(text, containers=("other", "prepare")), containers=("main",))))
    assert ["volumeMounts" in each for each in (narrowed["initContainers"][1], *narrowed["containers"])] == [
        False, True, False,
    ]  # fmt: skip


# -- the text ----------------------------------------------------------------------------------------------------------


def test_everything_else_stays_as_it_was_written() -> None:
    stream = f"{CONFIG_MAP}---\n{JOB}---\n\n--- # an empty one\n...\n---\n{CONFIG_MAP}"
    text = out(stream)
    before, after = read_stream(stream), read_stream(text)
    assert [each.text() for each in before if each.number != 2] == [each.text() for each in after if each.number != 2]
    assert text.startswith(CONFIG_MAP)
    assert text.endswith(CONFIG_MAP)
    assert all("cachefs" in line or line.strip() for line in added(JOB, before[1].text() and after[1].text()[4:]))


def test_lists_keep_their_indentation() -> None:
    made = out(JOB)
    added(JOB, made)
    assert "\n        - name: cachefs\n" in made
    dense = yaml.safe_dump(pod_of("Deployment"))
    made = out(dense)
    added(dense, made)
    assert "\n      - name: cachefs\n" in made


def test_twice_is_once_and_other_options_are_a_change() -> None:
    once = out(JOB, secret="keys")
    assert out(once, secret="keys") == once
    other = out(once, secret="keys", image="cachefs:2", settings={"prefetch": "off"}, path="/elsewhere")
    assert other != once
    assert other.count("image: cachefs:2") == 1
    assert "/elsewhere" in other
    assert "mountPath: /data" not in other
    assert out(other, secret="keys") == once
    assert yaml.safe_load(out(JOB)) == yaml.safe_load(out(other)), "no Secret any more"


def test_it_can_be_taken_out_again() -> None:
    made = out(JOB, secret="keys")
    assert out(made, remove=True) == JOB
    assert out(JOB, remove=True) == JOB
    two = out(made, name="second", path="/second", source="s3://other-bucket")
    assert len(spec_in(yaml.safe_load(two))["initContainers"]) == 2
    kubernetes_validate.validate(yaml.safe_load(two), "1.31", strict=True)
    assert out(two, name="second", remove=True) == made


def test_json_stays_json() -> None:
    text = json.dumps(pod_of("Deployment"), indent=4) + "\n"
    made = out(text)
    assert made.startswith('{\n    "apiVersion"')
    assert spec_in(json.loads(made))["initContainers"][0]["name"] == "cachefs"
    assert out(made) == made


def test_lists_of_objects_and_kinds_of_others() -> None:
    roles = {"Master": {"replicas": 1, "template": {"spec": POD_SPEC}}, "Worker": {"template": {"spec": POD_SPEC}}}
    torch = {
        "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "t"},
        "spec": {"pytorchReplicaSpecs": roles},
    }  # fmt: skip
    listed = {"apiVersion": "v1", "kind": "List", "items": [pod_of("Pod"), json.loads(CONFIG_MAP_JSON), torch]}
    found = json.loads(out(json.dumps(listed)))
    assert "initContainers" in spec_in(found["items"][0])
    assert found["items"][1] == json.loads(CONFIG_MAP_JSON)
    for role in found["items"][2]["spec"]["pytorchReplicaSpecs"].values():
        assert role["template"]["spec"]["initContainers"][0]["name"] == "cachefs"


CONFIG_MAP_JSON = '{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}'


def test_windows_line_ends_a_missing_last_one_and_words_of_yaml_1_1() -> None:
    dos = JOB.replace("\n", "\r\n")
    made = out(dos, name="on", secret="null")
    assert "\r\n" in made
    assert "\n" not in made.replace("\r\n", "")
    assert '"on"' in made, "YAML 1.1 reads a bare on as true"
    assert spec_in(yaml.safe_load(made))["initContainers"][0]["name"] == "on"
    assert yaml.safe_load(made) == yaml.safe_load(out(JOB.removesuffix("\n"), name="on", secret="null"))


def test_containers_that_share_a_list_are_told_apart() -> None:
    text = JOB.replace(
        "          image: busybox\n", "          image: busybox\n          volumeMounts: *shared\n"
    ).replace(
        "          env:\n", "          volumeMounts: &shared\n            - {name: v, mountPath: /v}\n          env:\n"
    )  # fmt: skip
    both = spec_in(yaml.safe_load(out(text)))
    assert [len(each["volumeMounts"]) for each in both["containers"]] == [2, 2]
    for name, counts in (("main", [2, 1]), ("other", [1, 2])):
        made = out(text, containers=(name,))
        assert [len(each["volumeMounts"]) for each in spec_in(yaml.safe_load(made))["containers"]] == counts
        assert out(made, containers=(name,)) == made
    merged = JOB.replace("        - name: main\n", "        - &first\n          name: main\n")
    merged = merged.replace("        - name: other\n", "        - <<: *first\n          name: other\n")
    merged = merged.replace("          env:\n", "          volumeMounts: [{name: v, mountPath: /v}]\n          env:\n")
    for name, counts in (("main", [2, 1]), ("other", [1, 2])):
        spec = spec_in(yaml.safe_load(out(merged, containers=(name,))))
        assert [len(each["volumeMounts"]) for each in spec["containers"]] == counts


# -- annotations -------------------------------------------------------------------------------------------------------


def annotated(text: str = JOB, **said: str) -> str:
    notes = "".join(f"        cachefs.io/{name}: {value}\n" for name, value in said.items())
    return text.replace("  template:\n", f"  template:\n    metadata:\n      annotations:\n{notes}")


def test_annotations_say_the_same_and_options_win() -> None:
    text = annotated(source="s3://noted/x", path="/noted", containers="main", options="prefetch=off,uid=7")
    spec = spec_in(yaml.safe_load(out(text, source=None, path=None)))
    assert spec["initContainers"][0]["args"][0] == "s3://noted/x"
    assert {"--prefetch=off", "--uid=7"} <= set(spec["initContainers"][0]["args"])
    assert spec["containers"][0]["volumeMounts"][0]["mountPath"] == "/noted"
    assert "volumeMounts" not in spec["containers"][1]
    spec = spec_in(yaml.safe_load(out(text, settings={"uid": 8})))
    assert spec["initContainers"][0]["args"][0] == "s3://bucket/set"
    assert "--uid=8" in spec["initContainers"][0]["args"]


def test_pods_that_ask_for_nothing_stay(caplog: pytest.LogCaptureFixture) -> None:
    stream = f"{JOB}---\n{annotated(source='s3://noted', path='/noted')}"
    made = out(stream, source=None, path=None)
    assert made.startswith(JOB)
    assert made.count("cachefs.io/source") == made.count("name: cachefs\n          image") == 1
    same, notes = injected(JOB, wishes(source=None))
    assert same == JOB
    assert "cachefs.io/source" in notes[0]
    assert injected(CONFIG_MAP, wishes()) == (CONFIG_MAP, ["there is no pod in the input"])
    assert out(stream, only=("job/train",)) != stream
    assert out(stream, only=("Job/other",)) == stream


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("a: [", {}, "document 1, line 1"),
        (f"{CONFIG_MAP}---\na: b\n c: d\n", {}, "document 2, line 11: this is no YAML"),
        (f"{CONFIG_MAP}---\n- a\n", {}, "document 2: this is no Kubernetes object"),
        ("kind: 7\n", {}, "it has no kind"),
        ("a: 1\na: 2\n", {}, "document 1, line 2"),
        (JOB.replace("containers:", "container:"), {}, "document 1 (Job train), spec.template.spec.containers"),
        (JOB, {"containers": ("missing",)}, "no container 'missing' (there are: main, other)"),
        (JOB, {"name": "main"}, "spec.template.spec.containers[0]: a container 'main' is there already"),
        (JOB, {"path": "relative"}, "the path cannot be 'relative'"),
        (JOB, {"path": "/"}, "the path cannot be '/'"),
        (JOB, {"path": "/a:b"}, "the path cannot be"),
        (JOB, {"path": None}, "where shall it be?"),
        (JOB, {"source": "file:///x"}, "write s3://BUCKET"),
        (JOB, {"name": "Capital"}, "--name cannot be"),
        (JOB, {"secret": "a/b"}, "--secret cannot be"),
        (JOB, {"secret_keys": "one"}, "--secret-keys needs"),
        (JOB, {"cpu": "many"}, "--cpu cannot be"),
        (annotated(path="/d", options="cache-dir=/x"), {}, "'cache-dir' cannot be set here"),
        (annotated(path="/d", options="uid=x"), {}, "uid: 'x' is not a whole number"),
        (annotated(path="/d"), {"source": None}, "cachefs.io/source is not"),
        (JOB.replace("restartPolicy", "hostUsers: false\n      restartPolicy"), {}, "user namespace"),
        (
            JOB.replace("          env:", "          volumeMounts: [{name: v, mountPath: /data/}]\n          env:"),
            {},
            "spec.template.spec.containers[0].volumeMounts[0]: volume 'v' is mounted at /data already",
        ),
        (JOB.replace("      containers", "      volumes: [{name: cachefs-run}]\n      containers"), {}, "volumes[0]"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_with_its_place(text: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        out(text, **more)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_laughing_aliases_end() -> None:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    text = f"kind: Strange\n{laughs}"
    assert out(text) == text
    assert write_stream(read_stream("")) == ""


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cachefs.cli.main", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=30)


def test_the_command_reads_and_writes_streams_and_files(tmp_path: Path) -> None:
    what = ["--source=s3://bucket/set", "--path=/data", "--image=cachefs:1"]
    piped = run("inject", "-f", "-", *what, "--endpoint-url=http://x:1", "--no-cache", stdin=JOB)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert "--no-cache" in piped.stdout
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    path.chmod(0o640)
    done = run("inject", "-f", str(path), "-o", str(path), *what, "--endpoint-url=http://x:1", "--no-cache")
    assert (done.returncode, done.stdout) == (0, "")
    assert path.read_text() == piped.stdout
    assert path.stat().st_mode & 0o777 == 0o640
    bad = run("inject", "-f", str(path), "-o", str(path), *what, "--name", "main")
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1
    assert path.read_text() == piped.stdout, "an error leaves the file as it was"
    missing = run("inject", "-f", str(tmp_path / "no"), *what)
    assert (missing.returncode, "No such file" in missing.stderr) == (2, True)
    assert run("inject", "-f", "-", *what, "--cache-dir=/x", stdin=JOB).returncode == 2
