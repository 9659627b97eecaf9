"""docs/KUBERNETES.md and the guides of deploy/: what they name exists, what they compute is so."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from cachefs.cli.main import COMMANDS
from cachefs.cli.reference import TABLES, with_table
from csi.credentials import keys_of_secret
from tests.deploy.chart import CHART, REPOSITORY, SETS, container, key_of, render, rendered

GUIDE = REPOSITORY / "docs/KUBERNETES.md"
DOCUMENTS = [GUIDE, *sorted((REPOSITORY / "deploy").rglob("*.md"))]
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
OF_OTHERS = {
    "driver name cachefs.csi.k8s.io not found in the list of registered CSI drivers",
    "violates PodSecurity", "Pending", "insufficient quota to match these scopes", "Insufficient memory", "OOMKilled",
    "Transport endpoint is not connected",
}  # fmt: skip
"""Messages of Kubernetes itself, and of the kernel."""


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        file, _, heading = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", text_of(there), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", one).strip().lower().replace(" ", "-") for one in headings}, (
                target
            )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_of_cachefs_exist(path: Path) -> None:
    for line in re.findall(r"(?:`|-- |^ {4,})(cachefs [a-z][^`\n|]*)", text_of(path), re.MULTILINE):
        words = shlex.split(line)
        assert words[1] in COMMANDS, line
        module, _, attribute = COMMANDS[words[1]][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[2:]:
            if word.startswith("-"):
                assert word.partition("=")[0] in known, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"\b((?:deploy|scripts|docs)/[A-Za-z0-9_./-]+[A-Za-z0-9_-])", text_of(path)):
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_values_that_are_named_exist(path: Path) -> None:
    sections = "|".join(key for key, value in VALUES.items() if isinstance(value, dict))
    for name in re.findall(rf"`((?:{sections})\.[A-Za-z.]+?)(?::[^`]*)?`", text_of(path)):
        at: Any = VALUES
        for key in name.split("."):
            assert isinstance(at, dict), name
            assert key in at, f"{path.name}: {name} is no value of the chart"
            at = at[key]


def test_objects_that_are_named_exist() -> None:
    names = {each["metadata"]["name"] for each in rendered("default")}
    for path in DOCUMENTS:
        for name in re.findall(r"(?:daemonset|job|deployment|statefulset)/([a-z-]+)", text_of(path)):
            assert name in names | {"cachefs-sweep"}, f"{path.name}: {name}"


def test_the_table_of_parameters_is_current() -> None:
    for name, (what, write) in TABLES.items():
        text = text_of(REPOSITORY / "docs" / name)
        assert write() in text, "run `make docs`"
        assert with_table(text, what, write()) == text
        assert with_table(text.replace("| `bucket` |", "| `bukkit` |"), what, write()) == text


def messages() -> list[str]:
    section = text_of(GUIDE).split("\n## Troubleshooting\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!message |---)(.*?) \|", section, re.MULTILINE)
    return [part for row in rows for part in re.findall(r"`([^`]+)`", row)]


def test_messages_are_those_of_the_code() -> None:
    """Each piece of a message that the guide explains stands in the code that says it."""
    code = "".join(
        text_of(path)
        for package in ("csi", "cachefs/keeper", "cachefs/cli", "cachefs/store")
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if not path.name.endswith("_pb2.py")
    )
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # texts that go on in the next line
    assert len(messages()) > 20
    for message in messages():
        if message in OF_OTHERS or message.startswith("cachefs-"):
            continue
        for piece in re.split(r"\s*\.\.\.\s*|\bN\b", message):
            assert piece.strip(" :") in joined, f"{message!r}: nobody says {piece!r}"


def test_the_install_example_is_what_the_chart_takes() -> None:
    text = text_of(GUIDE).split("cat > values.yaml <<'END'\n")[1].split("       END")[0]
    objects = render(yaml.safe_load(text))
    assert [each["metadata"]["name"] for each in objects if each["kind"] == "StorageClass"] == ["imagenet"]


def test_the_readme_installs_what_its_example_needs() -> None:
    """The commands of its part about Kubernetes, typed one after the other by somebody who has read nothing else."""
    part = text_of(REPOSITORY / "README.md").split("\n## Kubernetes\n")[1]
    lines = [shlex.split(line, comments=True) for line in part.split("```sh\n")[1].split("```")[0].splitlines()]
    typed = [" ".join(words) for words in lines]
    [install] = [words for words in lines if words[:2] == ["helm", "install"]]
    assert (REPOSITORY / install[3]).samefile(CHART)
    namespace = install[install.index("--namespace") + 1]
    assert install[install.index("--set") + 1] == "image.registry=REGISTRY"
    objects = tuple(render({"image": {"registry": "REGISTRY"}}, namespace=namespace))
    image = container(objects, "DaemonSet", "-keeper", "keeper")["image"]
    assert f"docker build -f deploy/docker/Dockerfile -t {image} . && docker push {image}" in typed
    assert (
        f"kubectl create namespace {namespace} && "
        f"kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=privileged"
    ) in typed
    [secret] = [words for words in lines if words[3:6] == ["create", "secret", "generic"]]
    keys_of_secret(dict(word.removeprefix("--from-literal=").split("=") for word in secret[7:]))
    [applied] = [words[-1] for words in lines if words[:3] == ["kubectl", "apply", "-f"]]
    example = list(yaml.safe_load_all(text_of(REPOSITORY / applied)))
    for each in example:
        where = each["metadata"].get("namespace", namespace)
        assert any(line.startswith(f"kubectl create namespace {where}") for line in typed), where
    [parameters] = [each["parameters"] for each in example if each["kind"] == "StorageClass"]
    assert parameters["csi.storage.k8s.io/node-stage-secret-name"] == secret[6]
    assert parameters["csi.storage.k8s.io/node-stage-secret-namespace"] == secret[2] == namespace
    [account] = [subject for each in example if each["kind"] == "RoleBinding" for subject in each["subjects"]]
    assert ("ServiceAccount", account["namespace"], account["name"]) in {key_of(each) for each in objects}
    order = [
        next(at for at, line in enumerate(typed) if word in line) for word in ("create secret", "helm install", applied)
    ]
    assert order == sorted(order)
    for name in re.findall(r"daemonset/(\S+)", part):
        assert ("DaemonSet", namespace, name) in {key_of(each) for each in objects}


def test_ports_are_those_of_the_chart() -> None:
    ports = {}
    for name in ("provisioner", "resizer", "snapshotter"):
        [port] = container(rendered("everything"), "Deployment", "-controller", name)["ports"]
        ports[name] = port["containerPort"]
    text = text_of(GUIDE)
    for name, port in ports.items():
        assert f"{port} ({name})" in text


# -- planning ---------------------------------------------------------------------------------------------------------


def example() -> dict[str, str]:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", text_of(REPOSITORY / "deploy/planning.md"), re.MULTILINE)
    return {name.strip("`"): cell for name, _, cell in rows}


def number(text: str) -> float:
    found = re.search(r"[\d.]+", text)
    assert found is not None
    return float(found[0])


def test_the_example_of_planning_is_computed_by_its_formulas() -> None:
    cells = example()
    nodes, disk = number(cells["nodes that read"]), number(cells["disk for the cache, of a node"])
    free = number(cells["memory of a node"]) - number(cells["of that, the jobs of a node"])
    dataset, volumes = number(cells["dataset"]), number(cells["volumes in use on a node at a time"])
    shm, memory_limit, workers = free // 2, 1, 1 + 128 * volumes / 1024
    assert number(cells["cache.shmSize"]) == shm
    assert number(cells["node.workersMemory"]) == workers
    limit = shm + memory_limit + workers
    assert number(cells["limit of `cachefs-node` (computed by the chart)"]) == limit * 1024
    assert number(cells["what remains for the system"]) == free - limit
    size = disk * 9 // 10
    assert number(cells["cache.size"]) == size
    together = nodes * (size + shm)
    assert cells["does the dataset fit into all caches together?"].startswith(f"{together:.0f} GiB / {dataset:.0f} GiB")
    assert f"= {int(together / dataset * 100) / 100}" in cells["does the dataset fit into all caches together?"]
    assert (
        number(cells["copies of each block that fit (1 is enough for no second read from S3)"]) == together // dataset
    )
    one = (size + shm) / dataset
    assert number(cells["does it fit into one node?"]) == round(one * 100)
    assert number(cells["first epoch, bound by S3"]) == round(dataset / number(cells["bandwidth of S3 for all nodes"]))
    network = number(cells["bandwidth of a node's network"])
    [later] = [cell for name, cell in cells.items() if name.startswith("later epochs")]
    assert number(later) == round((1 - one) * dataset / nodes / network)


def test_the_example_of_planning_is_what_the_chart_takes() -> None:
    text = text_of(REPOSITORY / "deploy/planning.md").split("```yaml\n")[1].split("```")[0]
    values = yaml.safe_load(text)
    cells = example()
    node = container(tuple(render(values)), "DaemonSet", "-node", "node")
    assert (
        node["resources"]["limits"]["memory"]
        == f"{number(cells['limit of `cachefs-node` (computed by the chart)']):.0f}Mi"
    )
    assert values["cache"]["size"] == f"{number(cells['cache.size']):.0f}GiB"
    assert (
        values["csi"]["maxVolumes"]
        == number(cells["csi.maxVolumes"])
        == number(cells["volumes in use on a node at a time"])
    )
    assert values["cache"]["shmSize"] == f"{number(cells['cache.shmSize']):.0f}GiB"


def test_all_sets_are_in_use() -> None:
    assert {path.stem for path in Path(__file__).with_name("values").glob("*.yaml")} == set(SETS)
