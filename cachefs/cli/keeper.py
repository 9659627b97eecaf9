"""`cachefs keeper`: becomes the keeper's own process (exec), which is small: nothing of the command line stays."""

from __future__ import annotations

import os
import sys

import click


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def keeper(arguments: tuple[str, ...]) -> None:
    """Keep the mounts of a Kubernetes node: make them, hold them, bind them."""
    command = [sys.executable, "-m", "cachefs.keeper", *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606 - an argument list, and no shell is wanted
