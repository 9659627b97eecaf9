"""`cachefs csi`: the CSI driver for Kubernetes, as the side-cars and kubelet meet it at a socket.

The chart in deploy/helm runs it twice: on every node (`--mode node`) and once for the cluster (`--mode controller`).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Mapping
from typing import Any

import click

from cachefs.cli.load import load
from cachefs.cli.options import CONFIG_PARAMETER, ENVIRONMENT_PREFIX, config_options, parse_duration
from cachefs.errors import ConfigError
from cachefs.logs import configure

log = logging.getLogger(__name__)

END_S = 5.0
"""What the end of the driver itself gets beside the running calls."""
DRIVER_NAME = "cachefs.csi.k8s.io"
_NAME = re.compile(r"[a-zA-Z]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?")
_MAX_NODE_ID_BYTES = 256
AUTH_SOURCES = ("node", "secret", "pod", "anonymous")
"""Of `csi.parameter_table.AuthSource`, which costs more to import than the help of a command should."""


def _grace(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if not 0 <= seconds <= 3600:
        raise click.BadParameter(f"'{text}' is not a time up to an hour")
    return seconds


def _sources(text: str) -> frozenset[str]:
    found = frozenset(part.strip() for part in text.split(",") if part.strip())
    if unknown := sorted(found - set(AUTH_SOURCES)):
        raise click.BadParameter(f"'{unknown[0]}' is not one of: {', '.join(AUTH_SOURCES)}")
    return found


@click.command()
@click.option("--endpoint", required=True, metavar="URL", help="Socket to listen on: unix:///PATH.")
@click.option("--node-id", default="", metavar="NAME", help="Name of this node in Kubernetes (modes node and all).")
@click.option(
    "--mode",
    type=click.Choice(["all", "controller", "node"]),
    default="all",
    show_default=True,
    help="Which services are offered. all: for tests, and machines without Kubernetes; starts what it needs.",
)
@click.option("--driver-name", default=DRIVER_NAME, show_default=True, metavar="NAME", help="Name of the CSIDriver.")
@click.option(
    "--state",
    default="",
    metavar="URL",
    help="Where the controller keeps its records: file:///DIR (one replica), or etcd (that of --etcd). "
    "[default: etcd if --etcd is given, else file:///var/lib/cachefs/csi]",
)
@click.option(
    "--keeper",
    default="/run/cachefs/keeper.sock",
    show_default=True,
    metavar="FILE",
    help="Socket of `cachefs keeper`.",
)
@click.option(
    "--credentials-dir",
    default="",
    metavar="DIR",
    help="Where credentials of volumes are handed to the node service. [default: beside the keeper's socket]",
)
@click.option(
    "--kubelet-dir",
    default="",
    metavar="DIR",
    help="Directory of the kubelet: nothing is mounted outside of it. [default: /var/lib/kubelet; with --mode all: /]",
)
@click.option("--node-uid", default=65532, show_default=True, metavar="UID", help="Who the node service runs as.")
@click.option(
    "--max-volumes",
    type=click.IntRange(0, 1 << 31),
    default=0,
    metavar="N",
    help="Most volumes on this node (0: Kubernetes decides).",
)
@click.option(
    "--inline-auth",
    type=_sources,
    default=",".join(AUTH_SOURCES),
    show_default=True,
    metavar="LIST",
    help="What inline volumes may say as authSource. Everybody who may make pods writes them: without 'node' they "
    "cannot use the keys of the node; empty: there are none.",
)
@click.option(
    "--topology/--no-topology",
    default=False,
    help="Nodes are in zones (--zone) that Kubernetes shall know, and volumes have a place. [default: no]",
)
@click.option(
    "--events/--no-events",
    default=False,
    help="Tell pods in their events that they wait for a warm-up (needs podInfoOnMount in the CSIDriver, and the right "
    "to create and patch events). [default: no]",
)
@click.option(
    "--grace", type=_grace, default="20s", show_default=True, metavar="TIME", help="What running calls get at SIGTERM."
)
@config_options("s3", "cache", "peer", "log")
def csi(**options: Any) -> None:
    """Run the CSI driver until SIGTERM. Options of the store, the cache and of etcd are those of the node's agent."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core writes lines of its own; read at its import
    own = {name: options.pop(name) for name in _OWN}
    zone = _take_zone(options, os.environ)
    environment = {name: text for name, text in os.environ.items() if name != f"{ENVIRONMENT_PREFIX}ZONE" or not zone}
    loaded = load(options, environment, options[CONFIG_PARAMETER])
    configure(loaded.config.log, "csi")
    if own["mode"] == "all":  # the others have no agent of their own, and its sizes are not their business
        for notice in loaded.notices:
            log.info("%s", notice)

    from csi.driver import Driver, DriverSettings, Mode
    from csi.endpoint import parse_endpoint
    from csi.parameter_table import AuthSource

    if not _NAME.fullmatch(own["driver_name"]):
        raise ConfigError(f"--driver-name {own['driver_name']}: must be a domain name of at most 63 characters")
    if len(own["node_id"].encode()) > _MAX_NODE_ID_BYTES:
        raise ConfigError(f"--node-id: must have at most {_MAX_NODE_ID_BYTES} bytes")
    place = (zone or loaded.config.peer.zone) if own["topology"] else ""
    if own["topology"] and own["mode"] != "controller" and not place:
        raise ConfigError("--topology needs --zone: say where this node is")
    driver = Driver(
        DriverSettings(
            path=parse_endpoint(own["endpoint"]),
            mode=Mode(own["mode"]),
            config=loaded.config,
            environment=dict(os.environ),
            name=own["driver_name"],
            node_id=own["node_id"],
            zone=place,
            has_topology=own["topology"],
            max_volumes=own["max_volumes"],
            state=own["state"],
            keeper=own["keeper"],
            credentials_dir=own["credentials_dir"] or f"{os.path.dirname(own['keeper'])}/credentials",
            kubelet_dir=own["kubelet_dir"] or ("/" if own["mode"] == "all" else "/var/lib/kubelet"),
            node_uid=own["node_uid"],
            inline_auth=frozenset(map(AuthSource, own["inline_auth"])),
            has_events=own["events"],
        )
    )
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    driver.start()
    ended.wait()
    log.info("told to end: running calls have %g s", own["grace"])
    ending = threading.Thread(target=driver.stop, args=(own["grace"],), daemon=True)
    ending.start()
    ending.join(own["grace"] + END_S)  # a copy waits for a store that may be silent; it goes on with a later call
    logging.shutdown()
    os._exit(0)  # threads that still wait for a slow store must not keep a finished driver alive


_OWN = (
    "endpoint", "node_id", "mode", "driver_name", "state", "keeper", "credentials_dir", "kubelet_dir", "node_uid",
    "max_volumes", "inline_auth", "topology", "events", "grace",
)  # fmt: skip


def _take_zone(options: dict[str, Any], environment: Mapping[str, str]) -> str:
    """Return the zone if it is for Kubernetes alone, and take it out of the options: peers need --etcd, pods do not."""
    if options.get("etcd") or environment.get(f"{ENVIRONMENT_PREFIX}ETCD") or options.get(CONFIG_PARAMETER):
        return ""
    zone: str = options.get("zone") or environment.get(f"{ENVIRONMENT_PREFIX}ZONE", "")
    options["zone"] = None
    return zone
