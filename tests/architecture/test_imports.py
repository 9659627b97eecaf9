"""Which module may import what, and what the packages provide."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("cachefs", "metadata", "peer", "csi")


def test_imports_point_downwards() -> None:
    """The contracts of .importlinter."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


@pytest.mark.parametrize(
    ("module", "own"), [("cachefs.mount.supervisor", "cachefs.mount."), ("cachefs.keeper.__main__", "cachefs.keeper.")]
)
def test_what_outlives_everything_needs_the_standard_library_only(module: str, own: str) -> None:
    """Supervisor and keeper live as long as their mounts: what they import is memory that is never given back."""
    script = (
        f"import sys; before = set(sys.modules); import {module}; "
        "print(*(set(sys.modules) - before - set(sys.stdlib_module_names)), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {script}"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert module in done.stdout.split()
    foreign = {name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names}
    allowed = {"cachefs", "cachefs.runtime", "cachefs.mount", "cachefs.fuse", "cachefs.fuse.protocol", own.rstrip(".")}
    assert {name for name in foreign if name not in allowed and not name.startswith(("cachefs.mount.", own))} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_only_this_distribution_provides_the_package(package: str) -> None:
    """The names are taken on PyPI by others: whoever installed one of those would run something else."""
    providers = set(importlib.metadata.packages_distributions().get(package, []))
    assert providers <= {"cachefs-s3"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (REPOSITORY / package / "py.typed").is_file()


def init_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("__init__.py"))]


@pytest.mark.parametrize("path", init_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_package_files_hold_a_docstring_only(path: Path) -> None:
    """So that importing a module costs that module, and no cycle goes through a package."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    if path.parent.name == "cachefs" and path.parent.parent == REPOSITORY:
        body = [
            node
            for node in body
            if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__")
        ]
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
    assert path.parent.name == "cachefs" or len(body) == 1
