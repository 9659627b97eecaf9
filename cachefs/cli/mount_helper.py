"""`mount.cachefs` and `mount.fuse.cachefs`: what mount(8) runs for an fstab line of type "cachefs" or "fuse.cachefs".

    s3://bucket/prefix  /mnt/images  fuse.cachefs  ro,_netdev,cache-size=200GiB,env-file=/etc/cachefs/images.env  0 0

mount(8) calls it as ``mount.fuse.cachefs SOURCE DIR [-sfnv] [-N NAMESPACE] [-t TYPE] -o OPTIONS`` and looks for it in
/sbin (``ln -s "$(command -v mount.fuse.cachefs)" /sbin/``). At boot there are no AWS variables: credentials come from
the instance role, from ``profile=NAME`` with ~/.aws of root, or from ``env-file=FILE`` with KEY=VALUE lines.

mount(8) adds "rw" to every line that does not say "ro", so "rw" cannot be told from nothing. It is treated as
mount(8) treats write-protected media: mounted read-only, with a warning. Exit codes are those of mount(8).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import click

from cachefs.cli.mount import mount_volume
from cachefs.cli.mount_options import parse_words
from cachefs.cli.output import plain
from cachefs.errors import CachefsError, UsageError

EXIT_USAGE, EXIT_FAILED = 1, 32
_WITH_VALUE = {"-o": "options", "-N": "namespace", "-t": "type"}
_SWITCHES = "sfnv"


class HelperArguments(NamedTuple):
    """What mount(8) passed."""

    source: str
    mountpoint: str
    options: tuple[str, ...]
    switches: frozenset[str]


def parse_arguments(arguments: Sequence[str]) -> HelperArguments:
    """Read the calling convention of mount(8). Raises UsageError."""
    places, options = [], []
    switches: set[str] = set()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, attached = word[:2], word[2:]
        if name in _WITH_VALUE:
            if not attached and not rest:
                raise UsageError(f"{name} needs a value")
            value = attached or rest.pop(0)
            if name == "-o":
                options.append(value)
            elif name == "-N":
                raise UsageError("-N: mounting in another name space is not offered")
        elif word.startswith("-") and len(word) > 1:
            if set(word[1:]) - set(_SWITCHES):
                raise UsageError(f"unknown option {word}")
            switches.update(word[1:])
        else:
            places.append(word)
    if len(places) != 2:
        raise UsageError("usage: mount.cachefs SOURCE DIRECTORY [-sfnv] [-o NAME[=VALUE],...]")
    return HelperArguments(places[0], places[1], tuple(options), frozenset(switches))


def run(arguments: Sequence[str], program: str) -> int:
    """Mount, print one line when that fails, and return the exit code."""

    def notify(line: str) -> None:
        click.echo(f"{program}: {plain(' '.join(line.split()))}", err=True)

    try:
        called = parse_arguments(arguments)
        words = parse_words(called.options, sloppy="s" in called.switches)
        if "f" in called.switches:
            return 0
        if words.wants_rw:
            notify(f"WARNING: {called.source} is mounted read-only: writing is not offered yet (ro spares this line)")
        mount_volume(called.source, called.mountpoint, {}, words, environment=os.environ, notify=notify)
    except UsageError as error:
        notify(str(error))
        return EXIT_USAGE
    except CachefsError as error:
        notify(str(error))
        return EXIT_FAILED
    except OSError as error:
        notify(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED
    return 0


def main() -> NoReturn:
    """Run as a program of /sbin."""
    sys.exit(run(sys.argv[1:], os.path.basename(sys.argv[0])))
