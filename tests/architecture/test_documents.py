"""The documents say what the code says."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs import errors
from cachefs.cli import main, peers, status
from cachefs.cli.options import SETTINGS
from cachefs.cli.reference import DOCUMENTS
from cachefs.fuse.errno_map import ERRNO

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


@pytest.mark.parametrize(("name", "write"), DOCUMENTS.items())
def test_generated_documents_are_current(name: str, write: Callable[[], str]) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == write(), "run `make docs`"


def test_make_docs_writes_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cachefs.cli.reference", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=30)
    assert {path.name for path in tmp_path.iterdir()} == set(DOCUMENTS)


def test_every_setting_is_documented() -> None:
    text = (DOCS / "CONFIGURATION.md").read_text(encoding="utf-8")
    for setting in SETTINGS:
        assert f"`{setting.variable}`" in text
        assert f"| `{setting.key}` |" in text
        assert not setting.option or f"`{setting.option.split('/')[0]}`" in text


def keys_of(section: str) -> list[str]:
    """The keys in the first table below a heading of docs/STATUS.md."""
    text = (DOCS / "STATUS.md").read_text(encoding="utf-8")
    part = text.split(f"\n## {section}\n")[1].split("\n## ")[0].strip()
    rows = part.partition("\n\n")[0] if part.startswith("|") else part
    return re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)


def test_the_keys_of_status_are_documented() -> None:
    assert keys_of("Top level") == list(status.collect("/nonexistent"))
    assert sorted(keys_of("An element of `mounts`")) == sorted(status.MOUNT_KEYS)
    assert sorted(keys_of("An element of `agents`")) == sorted(status.AGENT_KEYS)


def test_the_keys_of_peers_are_documented() -> None:
    told = peers.describe_cluster({"cluster": {"members": [{}]}})
    assert sorted(keys_of("An element of `clusters`")) == sorted(told)
    assert sorted(keys_of("An element of `members`")) == sorted(peers.MEMBER_KEYS) == sorted(told["members"][0])


def test_every_command_has_a_module_that_exists() -> None:
    for name in main.COMMANDS:
        module, _, attribute = main.COMMANDS[name][0].partition(":")
        assert getattr(importlib.import_module(module), attribute).name == name


def leaf_errors(cls: type[errors.CachefsError] = errors.CachefsError) -> list[type[errors.CachefsError]]:
    below = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
    return [leaf for sub in below for leaf in leaf_errors(sub)] if below else [cls]


@pytest.mark.parametrize("error", leaf_errors(), ids=lambda cls: cls.__name__)
def test_every_error_has_an_errno(error: type[errors.CachefsError]) -> None:
    assert error in ERRNO
    assert 0 < ERRNO[error] < 200


@pytest.mark.parametrize("error", leaf_errors(), ids=lambda cls: cls.__name__)
def test_every_error_says_what_it_means(error: type[errors.CachefsError]) -> None:
    assert error.__doc__


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_tests_that_promises_name_exist() -> None:
    text = (DOCS / "SEMANTICS.md").read_text(encoding="utf-8")
    part = text.split("\n## Kubernetes\n")[1].split("\n## ")[0]
    promises = re.split(r"^\* (?=\*\*K\d+\*\*)", part, flags=re.MULTILINE)[1:]
    assert [promise.split("**")[1] for promise in promises] == [f"K{number + 1}" for number in range(len(promises))]
    for promise in promises:
        named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", promise)
        assert named, f"nothing tests {promise[:60]}"
        for file, name in named:
            assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"
