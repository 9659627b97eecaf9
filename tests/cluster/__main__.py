"""A cluster for use by hand.

    python -m tests.cluster up [--nodes 3] [--no-peers] [--limit BYTES/S] [--files N]
    python -m tests.cluster status
    python -m tests.cluster down

`up` starts an S3 server with a few objects, an etcd, and nodes that have the bucket mounted; it prints where, and
leaves them to a process in the background. `down` ends that process and everything with it; what a killed one left is
removed as well. There is one such cluster at a time; those of running tests are shown by `status` and never touched.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click

from bench.cluster.dataset import Shape, upload
from bench.s3_server import S3Server
from tests.cluster import rig
from tests.cluster.namespaces import why_not
from tests.cluster.rig import Cluster
from tests.support.machine import kill
from tests.support.mounts import Bucket
from tests.support.programs import REPOSITORY

_START_S = 120.0
_END_S = 60.0
_POLL_S = 0.1


def by_hand() -> list[tuple[dict[str, Any], bool]]:
    """Return what is known of clusters that were made by hand, and whether they live."""
    return [(said, lives) for _, said, lives in rig.records() if "commands" in said]


@click.group()
def main() -> None:
    """A cluster of cachefs nodes on this machine, each in a network namespace of its own."""
    reason = why_not()
    if reason:
        raise click.ClickException(reason)


@main.command()
@click.option("--nodes", type=click.IntRange(1, 8), default=3, show_default=True)
@click.option("--peers/--no-peers", default=True, show_default=True, help="Whether nodes share their caches.")
@click.option("--limit", type=click.IntRange(1), default=None, help="Bytes per second that leave the S3 server.")
@click.option("--files", type=click.IntRange(1), default=20, show_default=True, help="Shards of 16 MiB.")
def up(nodes: int, peers: bool, limit: int | None, files: int) -> None:
    """Start a cluster and leave it running."""
    rig.remove_abandoned()
    if by_hand():
        raise click.ClickException("there is one already: `python -m tests.cluster status`, or `down` first")
    arguments = [f"--nodes={nodes}", "--peers" if peers else "--no-peers", f"--files={files}"]
    with tempfile.NamedTemporaryFile("w+", prefix="cachefs-cluster-", suffix=".log") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster", "serve", *arguments, *([f"--limit={limit}"] if limit else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        deadline = time.monotonic() + _START_S
        while not by_hand():
            if child.poll() is not None or time.monotonic() > deadline:
                kill(child.pid, signal.SIGTERM)
                raise click.ClickException(f"the cluster did not start:\n{Path(log.name).read_text()}")
            time.sleep(_POLL_S)
    _show()


@main.command()
def status() -> None:
    """Show the cluster and how to reach its nodes."""
    _show()


@main.command()
def down() -> None:
    """End the cluster and remove everything of it."""
    for said, lives in by_hand():
        if lives:
            kill(said["pid"], signal.SIGTERM)
    deadline = time.monotonic() + _END_S
    while any(lives for _, lives in by_hand()):
        if time.monotonic() > deadline:
            raise click.ClickException("it does not end; kill -9 its process and say `down` again")
        time.sleep(_POLL_S)
    rig.remove_abandoned()
    click.echo("down")


@main.command(hidden=True)
@click.option("--nodes", type=int)
@click.option("--peers/--no-peers")
@click.option("--limit", type=int, default=None)
@click.option("--files", type=int)
def serve(nodes: int, peers: bool, limit: int | None, files: int) -> None:
    """Be the process that the cluster belongs to, until SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    with (
        S3Server() as server,
        Bucket.create(server) as bucket,
        Cluster(server, nodes, peers=peers, faults=False) as cluster,
    ):
        shape = Shape(large_files=files, large_bytes=16 << 20, small_files=10 * files)
        upload(server, bucket.name, shape, cluster.record.directory / "manifest.json")
        cluster.network.limit(cluster.origin_place, limit)
        mounts = {node.name: str(node.mount(bucket.url).path) for node in cluster.nodes}
        cluster.record.say(commands=_commands(cluster, bucket, mounts))
        ended.wait()


def _commands(cluster: Cluster, bucket: Bucket, mounts: dict[str, str]) -> list[list[str]]:
    """Return (what, how) lines for a person."""
    lines = [["S3, inside", f"{cluster.endpoint_url} bucket {bucket.name}"]]
    lines += [["etcd, inside", cluster.etcd.url]] if cluster.peers else []
    for node in cluster.nodes:
        lines += [
            [node.name, node.place.address],
            ["  its mount", mounts[node.name]],
            ["  a shell there", f"nsenter --net=/run/netns/{node.place.namespace}"],
            ["  its state", f"{sys.executable} -m cachefs.cli.main status --runtime-dir={node.runtime_dir}"],
            ["  its cable out", f"ip -n {node.place.namespace} link set eth0 down   (and up again)"],
        ]
    return lines


def _show() -> None:
    found = rig.records()
    if not found:
        click.echo("no cluster")
    for directory, said, lives in found:
        state = "runs" if lives else "was killed; `python -m tests.cluster down` removes what it left"
        click.echo(f"cluster {directory.name}, process {said['pid']}: {state}")
        for what, how in said.get("commands", ()):
            click.echo(f"  {what:16} {how}")


if __name__ == "__main__":
    main()
