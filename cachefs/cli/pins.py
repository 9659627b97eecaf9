"""`cachefs evict`, `pin` and `unpin`: what leaves the caches now, and what stays whatever else has to go."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import click

from cachefs.agent import messages
from cachefs.cli import output
from cachefs.cli.agent_errand import Errand
from cachefs.cli.mounted_paths import Mounts
from cachefs.cli.options import CONFIG_PARAMETER, parse_duration
from cachefs.cli.warmup import by_mount, listed_paths, problem_lines, run_verb, runtime_of
from cachefs.errors import CachefsError, UsageError
from cachefs.runtime import RuntimeDir

_LIST = click.option("--list", "list_file", metavar="FILE", help="Also the paths in FILE, one per line (-: stdin).")
_JSON = click.option("--json", "as_json", is_flag=True, help="Write JSON (docs/WARMUP.md).")
_RUNTIME = click.option("--runtime-dir", metavar="DIR", default=None, help="Runtime directory of the mounts.")
_CONFIG = click.option(
    "--config", CONFIG_PARAMETER, metavar="FILE", default=None, help="Configuration file that the mounts use."
)


@click.command()
@click.argument("paths", nargs=-1, type=click.Path())
@_LIST
@_JSON
@_RUNTIME
@_CONFIG
def evict(
    paths: tuple[str, ...], *, list_file: str | None, as_json: bool, runtime_dir: str | None, config_file: str | None
) -> int:
    """Take files, and directories with all that is below them, out of the caches of this node.

    They stay readable: the next read fetches them again. Pinned files stay, and are listed.
    """
    runtime = runtime_of(runtime_dir, config_file)
    return run_verb(runtime, "evict", paths, list_file, as_json=as_json, summary=_evicted)


def _evicted(job: Mapping[str, Any]) -> Iterator[str]:
    yield f"{output.count(job['evicted_blocks'])} blocks of {output.count(job['files'])} files left the caches"
    yield from problem_lines(job)


@click.command()
@click.argument("paths", nargs=-1, type=click.Path())
@_LIST
@click.option(
    "--for", "how_long", metavar="TIME", default="forever", help="For how long, such as 24h (default: until unpin)."
)
@click.option("--show", "show", is_flag=True, help="Show what is pinned.")
@_JSON
@_RUNTIME
@_CONFIG
def pin(
    paths: tuple[str, ...],
    *,
    list_file: str | None,
    how_long: str,
    show: bool,
    as_json: bool,
    runtime_dir: str | None,
    config_file: str | None,
) -> int:
    """Keep files, and directories with all that is below them now, in the caches of this node, whatever else has to go.

    Fetches nothing: `cachefs warmup` does. Without a path, or with --show, what is pinned is shown.
    """
    runtime = runtime_of(runtime_dir, config_file)
    if show or not (paths or list_file):
        _show(runtime, as_json=as_json)
        return 0
    try:
        for_s = parse_duration(how_long)
    except ValueError as error:
        raise UsageError(f"--for {error}") from error
    if for_s <= 0:
        raise UsageError("--for: must be more than 0")
    for_s = 0.0 if math.isinf(for_s) else for_s
    return run_verb(runtime, "pin", paths, list_file, as_json=as_json, for_s=for_s, summary=_pinned)


def _pinned(job: Mapping[str, Any]) -> Iterator[str]:
    if job["state"] in ("done", "incomplete"):
        yield f"pinned: {output.count(job['files'])} files, {output.size(job['bytes'])}"
    yield from problem_lines(job)


def _show(runtime: RuntimeDir, *, as_json: bool) -> None:
    """Write what all agents of the runtime directory have pinned."""
    found: list[dict[str, Any]] = []
    for path in runtime.agent_sockets():
        try:
            with Errand(path) as errand:
                found += errand.ask(lambda i: messages.Pins(id=i), messages.PinList).pins
        except CachefsError:
            continue  # an agent that ended
    if as_json:
        click.echo(json.dumps({"pins": found}, indent=2))
        return
    if not found:
        click.echo("nothing is pinned")
        return
    rows = [["PATH", "FILES", "TAKES", "UNTIL"]]
    rows += [
        [
            output.plain(each["path"]),
            output.count(each["files"]),
            output.size(each["takes_bytes"]),
            _until(each["until"]),
        ]
        for each in found
    ]
    click.echo("\n".join(output.table(rows, right=(1, 2))))


def _until(until: float | None) -> str:
    return "unpin" if until is None else f"{datetime.fromtimestamp(until).astimezone():%Y-%m-%d %H:%M}"


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@_RUNTIME
@_CONFIG
def unpin(paths: tuple[str, ...], *, runtime_dir: str | None, config_file: str | None) -> int:
    """Let go of what was pinned at these paths, or below them. Exit code 1 when nothing was."""
    runtime = runtime_of(runtime_dir, config_file)
    place, inside = by_mount(Mounts(runtime), listed_paths(paths, None))
    meant = list(inside)
    with Errand.to(runtime, place) as errand:
        gone = errand.ask(lambda i: messages.Unpin(id=i, mount_id=place.mount_id, paths=meant), messages.PinList).pins
    for each in gone:
        click.echo(f"{output.plain(each['path'])}: let go of {output.count(each['files'])} files")
    if not gone:
        raise CachefsError("nothing is pinned there, or below it (`cachefs pin --show` shows what is)")
    return 0
