"""`cachefs node`: the node service of a Kubernetes node. Runs the agent, and the workers that the keeper orders."""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from cachefs.cli.load import load
from cachefs.cli.metrics_option import Address, metrics_option, serving
from cachefs.cli.options import CONFIG_PARAMETER, config_options, parse_duration
from cachefs.config import Config, LogFormat
from cachefs.errors import MountError, UsageError
from cachefs.logs import configure

if TYPE_CHECKING:
    from cachefs.mount.journal import Journal
    from csi.labels import NodeLabels

KEEPER_S = 60.0
KEEPER_STEP_S = 0.05


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.option(
    "--keeper",
    "keeper_socket",
    metavar="SOCKET",
    envvar="CACHEFS_KEEPER",
    default="/run/cachefs/keeper.sock",
    show_default=True,
    help="Where the keeper listens.",
)
@click.option(
    "--grace",
    "grace_s",
    type=_seconds,
    metavar="TIME",
    envvar="CACHEFS_GRACE",
    default="5s",
    show_default=True,
    help="How long workers go on after SIGTERM while no other node service has taken their mounts over.",
)
@click.option(
    "--label-node",
    metavar="NAME",
    envvar="CACHEFS_LABEL_NODE",
    help="Label this Kubernetes node with the datasets that it holds much of (needs --etcd, and the right to get and "
    "patch nodes).",
)
@metrics_option
@config_options("cache", "peer", "log")
def node(keeper_socket: str, grace_s: float, label_node: str | None, metrics: Address | None, **options: Any) -> int:
    """Run the agent of this node, and the workers of its mounts for the keeper, until SIGTERM. Needs no rights."""
    loaded = load(options, os.environ, options[CONFIG_PARAMETER])
    config = loaded.config
    configure(config.log, "node")

    from cachefs.keeper.node import NodeService
    from cachefs.mount.journal import Journal

    journal = Journal(config.log.log_level, config.log.log_format is LogFormat.JSON, "node", "cachefs.keeper.node")
    for notice in loaded.notices:
        journal.info(notice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # three descriptors for each mount
    _wait_for_directory(config.cache.runtime_dir, keeper_socket, journal)
    try:
        service = NodeService(config, keeper_socket, os.environ, grace_s=grace_s, journal=journal)
    except OSError as error:
        raise MountError(f"--runtime-dir {config.cache.runtime_dir}: {error.strerror or error}") from error
    labels = _labels(label_node, config) if label_node else None
    with serving(metrics, config.cache, keeper_socket):
        if labels is not None:
            labels.start()
        code = service.run()
        if labels is not None:
            labels.close()
    sys.stderr.flush()
    os._exit(code)  # the agent's watch may still wait for it


def _wait_for_directory(path: str, keeper_socket: str, journal: Journal) -> None:
    """Wait for a directory that the keeper has yet to make: we may not, and after a boot both pods start at once."""
    may_make = os.geteuid() == 0 or os.access(os.path.dirname(path), os.W_OK)
    if may_make or os.path.isdir(path) or os.path.exists(keeper_socket):
        return
    journal.info(f"waiting for the keeper, which makes {path}")
    deadline = time.monotonic() + KEEPER_S
    while not os.path.exists(keeper_socket) and time.monotonic() < deadline:
        time.sleep(KEEPER_STEP_S)


def _labels(name: str, config: Config) -> NodeLabels:
    """Return what labels the node. Raises UsageError outside of a pod, or without peers."""
    from csi.labels import labels_of_node

    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not port.isdigit():
        raise UsageError("--label-node: KUBERNETES_SERVICE_HOST and _PORT do not say where the Kubernetes API is")
    if not config.peer.etcd_endpoints:
        raise UsageError("--label-node needs --etcd: what is held is counted for the cluster")
    return labels_of_node(name, config.cache.runtime_dir, host, int(port))
