"""`cachefs warmup`: bring files into the caches before somebody reads them, and look whether they are there.

The work is the agent's (`cachefs.agent.jobs`); this finds the mounts, hands the paths over, and shows how far it is.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import IO, Any, NamedTuple

import click

from cachefs.agent import messages
from cachefs.cli import output
from cachefs.cli.agent_errand import Errand
from cachefs.cli.groups import chosen_nodes
from cachefs.cli.load import build_config
from cachefs.cli.mounted_paths import Mounts, Place
from cachefs.cli.options import CONFIG_PARAMETER
from cachefs.cli.progress import Progress, sources
from cachefs.errors import CachefsError, NotFound, UsageError
from cachefs.runtime import RuntimeDir

SHOWN_PROBLEMS = 20
"""Lines for people; `--json` has up to a thousand."""
MAX_LINE = 1 << 20


@click.command()
@click.argument("paths", nargs=-1, type=click.Path())
@click.option("--list", "list_file", metavar="FILE", help="Also the paths in FILE, one per line (-: stdin).")
@click.option("--wait/--background", "wait", default=True, help="Wait for the end (default), or return at once.")
@click.option("--check", is_flag=True, help="Fetch nothing: say what is in no cache, exit code 1 if anything is not.")
@click.option(
    "--tier",
    type=click.Choice(["shm", "disk"]),
    help="Where it is to be: disk, so that nothing leaves shm for it; shm, also what is on disk (default: shm while "
    "that has room, else disk).",
)
@click.option("--nodes", metavar="all|N|GROUP", help="On all nodes that mount this, so many of them, or a group.")
@click.option("--group", metavar="NAME", help="On the nodes of a group (`cachefs mount --group`).")
@click.option("--force", is_flag=True, help="Also more than the caches can hold, without asking.")
@click.option("--stop", "stop", metavar="JOB", help="End a job (`cachefs status` shows them).")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object per line (docs/WARMUP.md).")
@click.option("--runtime-dir", metavar="DIR", default=None, help="Runtime directory of the mounts.")
@click.option(
    "--config", CONFIG_PARAMETER, metavar="FILE", default=None, help="Configuration file that the mounts use."
)
def warmup(
    paths: tuple[str, ...],
    *,
    list_file: str | None,
    wait: bool,
    check: bool,
    tier: str | None,
    nodes: str | None,
    group: str | None,
    force: bool,
    stop: str | None,
    as_json: bool,
    runtime_dir: str | None,
    config_file: str | None,
) -> int:
    """Bring files, and directories with all that is below them, into the caches of this node, or of several.

    What is there already is left out, so a warm-up that was interrupted is simply run again. Exit code 1 when something
    did not come; the paths are listed.
    """
    runtime = runtime_of(runtime_dir, config_file)
    if stop is not None:
        stop_job(runtime, stop)
        return 0
    if check and not wait:
        raise UsageError("--check looks and says what it saw: it cannot be in the background")
    verb = "check" if check else "warm"
    where = Where(tier or "", *chosen_nodes(nodes, group))
    return run_verb(
        runtime, verb, paths, list_file,
        force=force, background=not wait, as_json=as_json, summary=summary, where=where,
    )  # fmt: skip


def runtime_of(runtime_dir: str | None, config_file: str | None) -> RuntimeDir:
    """Return the runtime directory of the mounts. Raises CachefsError when nothing was mounted there."""
    path = build_config({"runtime_dir": runtime_dir}, os.environ, config_file).cache.runtime_dir
    if not os.path.isdir(path):
        raise CachefsError("nothing is mounted")
    if not os.access(path, os.R_OK | os.X_OK):
        raise CachefsError(f"{path} belongs to another user: ask as that user, or as root")
    return RuntimeDir(path)


# -- paths -------------------------------------------------------------------------------------------------------------


def listed_paths(paths: Iterable[str], list_file: str | None) -> Iterator[str]:
    """Yield the paths that were typed, then those of the list. Raises UsageError."""
    yield from paths
    if list_file is None:
        return
    with ExitStack() as stack:
        file: IO[bytes] = sys.stdin.buffer if list_file == "-" else stack.enter_context(open(list_file, "rb"))
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise UsageError(f"{list_file}: a line of more than {MAX_LINE} bytes")
            if path := line.rstrip(b"\r\n"):
                yield os.fsdecode(path)


def by_mount(mounts: Mounts, paths: Iterable[str]) -> tuple[Place, Iterator[bytes]]:
    """Return the mount that all paths are in, and the paths in it. Raises UsageError, also while they are read."""
    rest = iter(paths)
    first = next(rest, None)
    if first is None:
        raise UsageError("no path was given")
    place = mounts.locate(first)

    def inside() -> Iterator[bytes]:
        yield place.path
        for path in rest:
            other = mounts.locate(path)
            if other.mount_id != place.mount_id:
                raise UsageError(
                    f"{output.plain(path)} is in {output.plain(other.mountpoint)}, and others in "
                    f"{output.plain(place.mountpoint)}: one mount at a time"
                )
            yield other.path

    return place, inside()


# -- jobs --------------------------------------------------------------------------------------------------------------


class Where(NamedTuple):
    """Where files are to be: see `messages.Work`."""

    tier: str = ""
    nodes: int = -1
    group: str = ""


def run_verb(
    runtime: RuntimeDir,
    verb: str,
    paths: Iterable[str],
    list_file: str | None,
    *,
    summary: Any,
    force: bool = False,
    background: bool = False,
    as_json: bool = False,
    for_s: float = 0.0,
    where: Where | None = None,
) -> int:
    """Have a job done and show it; returns the exit code. `summary` writes the last state for a person."""
    if list_file == "-" and sys.stdin.isatty():
        click.echo("cachefs: reading paths from the terminal, one per line; Ctrl-D ends them", err=True)
    place, inside = by_mount(Mounts(runtime), listed_paths(paths, list_file))
    asks = sys.stdin.isatty() and list_file != "-" and not as_json

    def build(identity: int) -> messages.Work:
        tier, nodes, group = where or Where()
        return messages.Work(
            id=identity, mount_id=place.mount_id, verb=verb, force=force, background=background, for_s=for_s,
            tier=tier, nodes=nodes, group=group,
        )  # fmt: skip

    with Errand.to(runtime, place) as errand, Progress(as_json=as_json) as progress:

        def consent(job: Mapping[str, Any]) -> bool:
            progress.pause()
            return _consent(job, asks=asks)

        job = errand.run(build, inside, progress.show, consent)
    if not as_json:
        for text in summary(job):
            click.echo(text)
    if job["error"]:
        raise CachefsError(job["error"])
    return 0 if job["state"] == "done" or job["background"] else 1


def _consent(job: Mapping[str, Any], *, asks: bool) -> bool:
    """Say that a job is too large, and ask on a terminal."""
    needs, holds = output.size(job["needs_bytes"]), output.size(job["capacity_bytes"])
    click.echo(
        f"cachefs: {output.count(job['files'])} files take {needs}, and the caches hold {holds} at most: "
        "what comes first will be gone when the rest is there",
        err=True,
    )
    if asks:
        return click.confirm("Fetch all the same?", default=False, err=True)
    click.echo("cachefs: nothing was fetched (--force fetches all the same)", err=True)
    return False


def stop_job(runtime: RuntimeDir, identity: str) -> None:
    """End a job, whichever agent has it. Raises CachefsError when none has."""
    for path in runtime.agent_sockets():
        try:
            with Errand(path) as errand:
                errand.ask(lambda i: messages.StopJob(id=i, job=identity), messages.Done)
                return
        except NotFound:
            continue
        except CachefsError:
            continue  # an agent that ended
    raise CachefsError(f"there is no job {output.plain(identity)}")


def problem_lines(job: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with which paths."""
    for example in itertools.islice(job["examples"], SHOWN_PROBLEMS):
        path = os.path.join(job["mountpoint"], example["path"]).rstrip("/")
        on = f" (on {output.plain(example['node'])})" if "node" in example else ""
        yield f"  {output.plain(path)}: {output.plain(example['why'])}{on}"
    nodes = job.get("nodes") or []
    for node in nodes:
        if node["error"]:
            yield f"  {output.plain(node['node'])}: {output.plain(node['error'])}"
    problems = job["problems"] - sum(bool(node["error"]) for node in nodes)
    if problems > SHOWN_PROBLEMS:
        more = problems - min(SHOWN_PROBLEMS, len(job["examples"]))
        yield f"  and {output.count(more)} more (--json lists up to 1,000)"


def summary(job: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about a warm-up or a check that is over, or has gone into the background."""
    of = f"{output.count(job['files'])} files, {output.size(job['bytes'])}"
    if job.get("nodes"):
        of = f"{output.count(len(job['nodes']))} nodes: {of}"
    if job["background"] and job["state"] not in ("done", "incomplete", "stopped", "failed"):
        yield (
            f"job {job['job']} goes on in the background "
            f"(`cachefs status` shows it, `cachefs warmup --stop {job['job']}` ends it)"
        )
        return
    if job["state"] == "stopped":
        yield f"stopped: {sources(job)} of {of}"
    elif job["state"] == "failed":
        yield f"failed: {sources(job)} of {of}"
    elif job["verb"] == "check":
        if job["missing_blocks"]:
            missing, blocks = output.count(job["missing_blocks"]), output.count(job["blocks"])
            yield f"{missing} of {blocks} blocks, in {output.count(job['missing_files'])} of {of}, are in no cache"
        else:
            yield f"all of {of} is cached" if not job["problems"] else f"all that is there of {of} is cached"
    else:
        seconds = max(job["elapsed_s"], 0.001)
        rate = f", {output.size(job['fetched_bytes'] / seconds)}/s" if job["fetched_bytes"] else ""
        yield f"{of}: {sources(job)}; {seconds:.1f} s{rate}"
        if job["missing_blocks"]:
            yield f"{output.count(job['missing_blocks'])} blocks are in no cache"
    yield from problem_lines(job)
