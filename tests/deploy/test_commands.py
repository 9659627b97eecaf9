"""What the chart types: every command line and every CACHEFS_ variable is one that the real command takes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from pathlib import Path
from typing import Any

import click
import pytest

from cachefs.cli import load
from cachefs.cli.main import COMMANDS
from cachefs.cli.options import SETTINGS
from cachefs.keeper import __main__ as keeper
from tests.deploy.chart import SETS, containers_of, label_of, pod_of, rendered
from tests.deploy.test_image import ENTRYPOINT

OF_SETTING = {setting.variable: setting for setting in SETTINGS}
DOWNWARD = {
    "spec.nodeName": "node-7", "status.podIP": "10.0.0.7", "status.hostIP": "192.168.0.7",
    "metadata.labels['topology.kubernetes.io/zone']": "zone-a",
}  # fmt: skip

CALLS = [
    pytest.param(one, id=f"{name}-{label_of(each)}-{one['name']}".replace("/", "-"))
    for name in SETS
    for each in rendered(name)
    for one in containers_of(pod_of(each) or {"containers": []})
    if "command" not in one and one["args"][0] in COMMANDS
]


def variables_of(one: dict[str, Any]) -> dict[str, str]:
    """What the program finds in its environment, as far as the chart says it."""
    found: dict[str, str] = {}
    for variable in one.get("env", ()):
        source = variable.get("valueFrom", {})
        if "fieldRef" in source:
            found[variable["name"]] = DOWNWARD[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" in source:
            found[variable["name"]] = "from-a-secret"
        else:
            found[variable["name"]] = expanded(variable["value"], found)
    return found


def expanded(text: str, variables: dict[str, str]) -> str:
    """$(NAME) as kubelet replaces it: by variables that come before."""
    for name in re.findall(r"\$\(([^)]+)\)", text):
        assert name in variables, f"{text}: {name} is not known there"
        text = text.replace(f"$({name})", variables[name])
    return text


def command_of(name: str) -> click.Command:
    module, _, attribute = COMMANDS[name][0].partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def test_all_parts_are_checked() -> None:
    assert {parameter.values[0]["name"] for parameter in CALLS} == {"keeper", "node", "csi"}  # type: ignore[index]
    assert ENTRYPOINT == ["cachefs"]


@pytest.mark.parametrize("one", CALLS)
def test_the_command_line_is_accepted(one: dict[str, Any]) -> None:
    variables = variables_of(one)
    name, *arguments = [expanded(argument, variables) for argument in one["args"]]
    if name == "keeper":  # its command becomes another process at once, which reads the rest
        assert keeper.parse(arguments).driver_name.endswith("cachefs.csi.k8s.io")
    else:
        command_of(name).make_context(name, list(arguments))


def test_the_command_line_is_really_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        keeper.parse(["--rot=/var/lib/kubelet"])
    assert "--rot" in capsys.readouterr().err
    with pytest.raises(click.NoSuchOption):
        command_of("csi").make_context("csi", ["--endpoint=unix:///x", "--kubelet=/x"])


@pytest.mark.parametrize("one", CALLS)
def test_the_variables_are_settings_of_the_command(
    one: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {parameter.name for parameter in command_of(one["args"][0]).params}
    found = {name: text for name, text in variables_of(one).items() if name.startswith("CACHEFS_")}
    for name in found:
        assert name in OF_SETTING, f"{name} is no setting"
        assert OF_SETTING[name].field in fields, f"`cachefs {one['args'][0]}` does not read {name}"
    mounts = [mount["mountPath"] for mount in one["volumeMounts"]]
    for name, text in found.items():
        if text.startswith("/etc/cachefs/"):
            assert any(text.startswith(f"{place}/") for place in mounts), f"{name}: {text} is in no volume"
            file = tmp_path / name
            file.write_text("x" * 32)
            found[name] = str(file)
    # as a container's variables are read: merged, fitted and validated together, on a node whose tmpfs is large enough
    large = os.statvfs_result((4096, 4096, 1 << 40, 1 << 40, 1 << 40, 1 << 40, 1 << 40, 1 << 40, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: large)
    loaded = load.load({}, found)
    assert loaded.given >= {OF_SETTING[name].field for name in found}


def test_the_plugin_and_the_node_service_say_the_same() -> None:
    """The plan of a mount is made by the plugin and carried out by the node service."""
    for name in SETS:
        both = {}
        for parameter in CALLS:
            one: dict[str, Any] = parameter.values[0]  # type: ignore[assignment]
            if str(parameter.id).startswith(f"{name}-DaemonSet") and one["name"] in ("node", "csi"):
                both[one["name"]] = variables_of(one)
        sections = {"cache", "peer", "log"}
        wanted = {key: text for key, text in both["node"].items() if key.startswith("CACHEFS_")}
        assert {key for key in wanted if OF_SETTING[key].section not in sections} == set()
        assert wanted.items() <= both["csi"].items()


def test_the_agent_fits_its_container() -> None:
    """Nothing is left to guess from a container: sizes are said, and they are within its memory."""
    from cachefs.config import MIB

    for parameter in CALLS:
        one: dict[str, Any] = parameter.values[0]  # type: ignore[assignment]
        if one["name"] != "node":
            continue
        found = {
            key: text for key, text in variables_of(one).items() if key in ("CACHEFS_SHM_SIZE", "CACHEFS_MEMORY_LIMIT")
        }
        cache = load.build_config({}, found).cache
        limit = one["resources"]["limits"]["memory"]
        allowed = int(limit[:-2]) * {"Mi": MIB, "Gi": MIB << 10}[limit[-2:]]
        assert cache.shm_size_bytes + cache.memory_limit_bytes + 512 * MIB <= allowed
        assert {"cache_size_bytes", "shm_size_bytes"} <= load.build({}, variables_of(one)).given


def test_ready_means_what_the_probes_ask() -> None:
    """The programs of the probes use names that exist."""
    from cachefs.keeper.client import KeeperClient, KeeperStatus

    programs = set()
    for parameter in CALLS:
        one: dict[str, Any] = parameter.values[0]  # type: ignore[assignment]
        if "exec" in one.get("readinessProbe", {}):
            python, dash, program = one["readinessProbe"]["exec"]["command"]
            assert (python, dash) == ("python", "-c")
            compile(program, "probe", "exec")
            programs.add(program.partition("KeeperClient(")[0])
    assert len(programs) == 2
    assert callable(KeeperClient.status)
    assert "runner" in {field.name for field in dataclasses.fields(KeeperStatus)}
