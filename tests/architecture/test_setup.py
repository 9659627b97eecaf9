"""`scripts/setup` on machines that lack everything, played with programs that only write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOOLS = ("bash", "env", "sha256sum", "cut", "cat", "dirname", "mkdir", "touch", "chmod", "rm")
PYTHON = """#!/bin/bash
echo "python $*" >> "$CALLS"
case "$1 $2 $3" in
  *version_info*">="*|*"< (3, 11)"*) exit "${OLD:-0}" ;;
  *"import venv, ensurepip"*) [ -e "$STATE/python3-venv" ] || [ -e "$STATE/python3.11-venv" ] ;;
  *Python.h*) [ -e "$STATE/python3-dev" ] || [ -e "$STATE/python3.11-dev" ] ;;
  *"%d.%d"*) echo 3.99 ;;
  *"import pip"*) [ -e .venv/has-pip ] ;;
  "-m venv"*) mkdir -p .venv/bin; touch .venv/has-pip; cp_self ;;
  "-m pip install") touch .venv/bin/cachefs; chmod +x .venv/bin/cachefs ;;
esac
"""
APT = """#!/bin/bash
echo "apt-get $*" >> "$CALLS"
for package in "$@"; do
  touch "$STATE/$package"
  case "$package" in
    fuse3) program=fusermount3 ;;
    *-dev|-*|install|update|ca-certificates|python*) continue ;;
    *) program=$package ;;
  esac
  [ -e "$BIN/$program" ] || { echo "#!/bin/bash" > "$BIN/$program"; chmod +x "$BIN/$program"; }
done
"""


class Machine:
    """A checkout and a PATH of its own."""

    def __init__(self, base: Path) -> None:
        self.tree, self.bin, self.state, self.calls = base / "tree", base / "bin", base / "state", base / "calls"
        for directory in (self.tree / "scripts", self.bin, self.state):
            directory.mkdir(parents=True)
        for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
            shutil.copy(REPOSITORY / name, self.tree / name)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)
        own = 'install -D "$0" .venv/bin/python'.replace("install -D", "/usr/bin/install -D")
        self.program("python3.12", PYTHON.replace("cp_self", own))
        self.program("apt-get", APT)
        self.program("id", "#!/bin/bash\necho 0\n")

    def program(self, name: str, text: str) -> None:
        """Put a program into PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> tuple[int, str, list[str]]:
        """Run the script; return its exit code, what it said on stderr, and how it called apt-get and pip."""
        self.calls.write_text("")
        places = {"PATH": self.bin, "BIN": self.bin, "STATE": self.state, "CALLS": self.calls}
        done = subprocess.run(
            ["bash", str(self.tree / "scripts/setup"), *arguments],
            env={**{name: str(path) for name, path in places.items()}, **environment},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        lines = self.calls.read_text().splitlines()
        return done.returncode, done.stderr, [line for line in lines if line.startswith(("apt-get", "python -m"))]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_without_anything(machine: Machine) -> None:
    code, said, calls = machine.setup()
    assert (code, said) == (0, "")
    assert calls[0] == "apt-get update -qq"
    wanted = set(calls[1].split()) - {"apt-get", "install", "-qq", "-y", "--no-install-recommends", "ca-certificates"}
    needed = {"fuse3", "pkg-config", "libfuse3-dev", "gcc", "rsync", "etcd-server", "iproute2", "fio", "git"}
    needed |= {"python3.99-venv", "python3.99-dev"}
    assert wanted - {"libc6-dev"} == needed
    assert calls[2] == "python -m venv --clear .venv"
    assert calls[3] == "python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]"


def test_the_second_time_nothing_is_done(machine: Machine) -> None:
    machine.setup()
    assert machine.setup() == (0, "", [])
    with (machine.tree / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    code, _, calls = machine.setup()
    assert code == 0
    assert [call.split(" --")[0] for call in calls if "pip" in call] == ["python -m pip install"]
    assert not [call for call in calls if "venv" in call and "apt-get" not in call]


def test_the_benchmark_needs_more(machine: Machine) -> None:
    machine.setup()
    code, _, calls = machine.setup("--bench")
    assert code == 0
    assert any(call.startswith("apt-get install") and " s3fs" in call for call in calls)
    assert any("-e .[dev,bench]" in call for call in calls)
    assert machine.setup("--bench") == (0, "", [])
    assert machine.setup() == (0, "", [])


def test_where_nothing_can_be_installed(machine: Machine) -> None:
    (machine.bin / "apt-get").unlink()
    code, said, calls = machine.setup()
    assert code == 1
    assert "please install these packages first (Debian's names): fuse3 pkg-config libfuse3-dev gcc" in said
    assert calls == []


def test_users_use_sudo(machine: Machine) -> None:
    machine.program("id", "#!/bin/bash\necho 1000\n")
    code, said, _ = machine.setup()
    assert (code, "please install" in said) == (1, True)
    machine.program("sudo", '#!/bin/bash\necho "python -m sudo" >> "$CALLS"\nexec "$@"\n')
    code, _, calls = machine.setup()
    assert code == 0
    assert calls[0] == "python -m sudo"


def test_a_machine_whose_python_is_too_old(machine: Machine) -> None:
    shutil.copy(machine.bin / "python3.12", machine.bin / "python3")
    code, said, calls = machine.setup(OLD="1")
    assert code == 1
    assert "no Python 3.11 or newer found" in said
    assert " python3.11 python3.11-dev python3.11-venv" in calls[1]


def test_wrong_arguments(machine: Machine) -> None:
    code, said, calls = machine.setup("--benchmark")
    assert (code, said, calls) == (2, "usage: scripts/setup [--bench]\n", [])


def test_make_targets_that_are_promised() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    for target in ("setup", "demo", "test", "test-all", "check", "bench"):
        done = subprocess.run(
            [make, "-n", "-C", str(REPOSITORY), target], capture_output=True, text=True, timeout=30, check=False,
            env={**os.environ, "MAKEFLAGS": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "scripts/setup" in done.stdout
