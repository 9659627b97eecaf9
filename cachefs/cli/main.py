"""The command `cachefs`: finds the subcommand, and is the one place where errors become a line and an exit code.

Subcommands are imported when they are run, so that `cachefs version` and `cachefs status` start in a tenth of a second.

    exit 0    it worked
    exit 1    it did not: "cachefs: ..." on stderr says why, in one line
    exit 2    what was typed, or a configuration, cannot be used
    exit 130  interrupted

CACHEFS_DEBUG=1 shows the traceback as well.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

import cachefs
from cachefs.cli.output import plain
from cachefs.errors import CachefsError, UsageError

COMMANDS = {
    "mount": ("cachefs.cli.mount:mount", "Mount a bucket as a directory."),
    "umount": ("cachefs.cli.mount:umount", "Take a mount away."),
    "upgrade": (
        "cachefs.cli.mount:upgrade",
        "Replace the worker of a mount by the installed version, without unmounting.",
    ),
    "warmup": ("cachefs.cli.warmup:warmup", "Bring files into the caches, or check that they are there."),
    "evict": ("cachefs.cli.pins:evict", "Take files out of the caches."),
    "pin": ("cachefs.cli.pins:pin", "Keep files in the caches."),
    "unpin": ("cachefs.cli.pins:unpin", "Let go of pinned files."),
    "status": ("cachefs.cli.status:status", "Show mounts, caches and where bytes came from."),
    "peers": ("cachefs.cli.peers:peers", "Show the nodes that share their caches with this one."),
    "doctor": ("cachefs.cli.doctor:doctor", "Check this machine, and a bucket, and say what to do."),
    "inject": ("cachefs.cli.inject:inject", "Put a sidecar that mounts a bucket into Kubernetes manifests."),
    "schedule": ("cachefs.cli.schedule:schedule", "Let pods prefer the nodes that hold most of a dataset."),
    "sidecar": ("cachefs.cli.sidecar:sidecar", "Mount a bucket for the other containers of a pod."),
    "agent": ("cachefs.cli.agent:agent", "Run the agent of a cache directory in the foreground."),
    "keeper": ("cachefs.cli.keeper:keeper", "Keep the mounts of a Kubernetes node."),
    "node": ("cachefs.cli.node:node", "Run agent and workers of a Kubernetes node for its keeper."),
    "csi": ("cachefs.cli.csi:csi", "Run the CSI driver for Kubernetes."),
    "version": ("cachefs.cli.main:version", "Print the version."),
}


class _LazyGroup(click.Group):
    """A group that knows the names of its commands and imports one only when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(cachefs.__version__, message="%(version)s")
def cli() -> None:
    """An S3 bucket as a directory of plain paths, cached on this node."""


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(cachefs.__version__)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code. Never raises, except for SystemExit of a command."""
    try:
        result = cli.main(args=list(arguments) or ["--help"], prog_name="cachefs", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return 130
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return 130
    except BrokenPipeError:
        # `cachefs status | head`: nobody reads on. As quiet as click is about it; stdout must not be flushed again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the outermost boundary: everything ends as one line
        return report(error)


def report(error: Exception) -> int:
    """Print one line about `error` on stderr (and its traceback when CACHEFS_DEBUG is set); return the exit code."""
    text, code = _describe(error)
    if os.environ.get("CACHEFS_DEBUG"):
        traceback.print_exception(error)
    click.echo(f"cachefs: {plain(' '.join(text.split()))}", err=True)
    return code


def _describe(error: Exception) -> tuple[str, int]:
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx is not None else "cachefs"
        return f"{error.format_message().rstrip('.')} (see '{command} --help')", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, CachefsError):
        return str(error) or type(error).__name__, 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return (f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes) else reason), 1
    return f"{type(error).__name__}: {error} (an error in cachefs itself; run it with CACHEFS_DEBUG=1 for details)", 1


if __name__ == "__main__":
    main()
