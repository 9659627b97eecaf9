"""Other releases of cachefs: this checkout with another version and protocol, in an environment of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

from tests.support.mounts import COMMAND_S, Node
from tests.support.programs import REPOSITORY


class Release:
    """A release with `cachefs` of its own."""

    def __init__(self, base: Path, version: str, *, protocol: int, serves: int) -> None:
        self.version = version
        tree = base / f"tree-{version}"
        for package in ("cachefs", "metadata"):
            shutil.copytree(REPOSITORY / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
        _set(tree / "cachefs/__init__.py", "__version__", f'"{version}"')
        _set(tree / "cachefs/agent/messages.py", "PROTOCOL_VERSION", str(protocol))
        _set(tree / "cachefs/agent/messages.py", "OLDEST_PROTOCOL", str(serves))
        place = base / f"venv-{version}"
        venv.create(place, symlinks=True)
        self.python = str(place / "bin/python")
        (packages,) = place.glob("lib/python*/site-packages")
        (packages / "release.pth").write_text(f"{tree}\n{sysconfig.get_path('purelib')}\n")

    def run(self, node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this release on a node."""
        environment = {name: value for name, value in node.environment.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.python, "-m", "cachefs.cli.main", *arguments],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )


def _set(path: Path, name: str, value: str) -> None:
    text, changed = re.subn(
        rf"^{name} = .*$", f"{name} = {value}", path.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert changed == 1, f"{name} is not in {path}"
    path.write_text(text, encoding="utf-8")
