"""The command `cachefs`: exit codes, one line per error, and what starting it may cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import cachefs
from cachefs import errors
from cachefs.cli import main

REPOSITORY = Path(cachefs.__file__).parents[1]


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cachefs.cli.main", *arguments],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_version() -> None:
    done = start("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{cachefs.__version__}\n", "")
    assert start("--version").stdout == done.stdout


@pytest.mark.parametrize("command", ["version", "status", "doctor", "mount", "umount", "upgrade", "agent"])
def test_starting_imports_nothing_heavy(command: str) -> None:
    """Measured: 70 ms for `version`, 100 ms for `status`; boto3 alone would add 220 ms."""
    arguments = [command] if command == "version" else [command, "--help"]
    script = (
        "import sys; from cachefs.cli.main import run; code = run(sys.argv[1:]); "
        "heavy = {'trio', 'boto3', 'botocore', 'obstore', 'pyfuse3', 'lmdb', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_has_help() -> None:
    overview = start("--help")
    assert overview.returncode == 0
    assert start().stdout == overview.stdout
    for name in ("mount", "umount", "upgrade", "status", "doctor", "agent", "version"):
        assert f"\n  {name} " in overview.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["agent", "--shm-sise", "1GiB"], "No such option '--shm-sise'"),
        (["agent", "--shm-size", "1 apple"], "'1 apple' is not a size"),
        (["agent", "--block-size", "3MiB"], "--block-size 3MiB: must be a power of two"),
        (["status", "a", "b"], "extra argument"),
        (["status", "--config", "/nonexistent.toml"], "cannot read the configuration file /nonexistent.toml"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: list[str], says: str) -> None:
    done = start(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("cachefs: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_variable_that_cannot_be_used() -> None:
    done = start("status", CACHEFS_CACHE_SIZE="lots")
    assert (done.returncode, done.stderr) == (
        2,
        "cachefs: environment variable CACHEFS_CACHE_SIZE: 'lots' is not a size such as 50GiB, 64MiB or 1.5GB\n",
    )


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.ConfigError("--x: no"), 2, "cachefs: --x: no"),
        (errors.MountError("busy:\n  by you"), 1, "cachefs: busy: by you"),
        (errors.NotFound(), 1, "cachefs: NotFound"),
        (PermissionError(13, "Permission denied", "/run/cachefs"), 1, "cachefs: /run/cachefs: Permission denied"),
        (FileNotFoundError(2, "No such file or directory", b"/a\xff"), 1, "cachefs: /a\\udcff: No such file"),
        (OSError("odd"), 1, "cachefs: odd"),
        (click.ClickException("no"), 1, "cachefs: no"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "cachefs: ZeroDivisionError: division by zero (an error in cachefs itself;",
        ),
    ],
)
def test_errors_become_one_line(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.report(error) == code
    written = capsys.readouterr().err
    assert written.startswith(line)
    assert written.count("\n") == 1


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEFS_DEBUG", "1")
    try:
        raise errors.MountError("busy") from OSError("why")
    except errors.MountError as error:
        main.report(error)
    written = capsys.readouterr().err
    assert "Traceback" in written
    assert "why" in written
    assert written.endswith("cachefs: busy\n")


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (click.Abort(), 130), (click.exceptions.Exit(3), 3), (errors.UsageError("x"), 2)],
)
def test_exit_codes(raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise raised

    monkeypatch.setattr(main.cli, "main", fail)
    assert main.run(["version"]) == code


def test_a_closed_pipe_is_quiet() -> None:
    script = f"{sys.executable} -m cachefs.cli.main agent --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode in (0, 1)  # whether the other side was still there
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cachefs.cli.main", "version"],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "cachefs: No space left on device\n")
