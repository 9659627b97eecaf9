"""`cachefs schedule`: pods prefer the nodes whose caches hold most of their dataset.

Reads manifests and writes them again, as `cachefs inject` does. Who holds how much is in etcd, about a minute old. It
is a preference: with all of these nodes full, pods start elsewhere. INVARIANT: when nothing is known, the manifests
come out as they went in, with exit code 0, so that a pipe to kubectl works on the first day as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from cachefs.cli.inject import read_manifests, write_manifests
from cachefs.cli.load import build_config
from cachefs.cli.options import CONFIG_PARAMETER, SETTINGS, config_options
from cachefs.cli.output import plain, size
from cachefs.errors import UsageError

if TYPE_CHECKING:
    from cachefs.config import Config
    from csi.workloads.affinity import Preference

_USED = frozenset(
    {
        "endpoint_url", "region", "etcd", "etcd_ca", "etcd_cert", "etcd_key", "etcd_user", "etcd_password_file",
        "cluster", CONFIG_PARAMETER,
    }
)  # fmt: skip
_THRESHOLDS_GIB = (255, 63, 15, 3, 0)
"""For the label of a dataset, whose values are powers of two: each that is exceeded counts for a part of the weight."""


@click.command()
@click.option("-f", "--filename", required=True, metavar="FILE", help="Manifests, YAML or JSON (-: stdin).")
@click.option("-o", "--output", "target", default="-", metavar="FILE", help="Where to write (-: stdout, the default).")
@click.option("--dataset", metavar="SOURCE", help="s3://BUCKET[/PREFIX], as it is mounted.")
@click.option("--weight", type=click.IntRange(1, 100), default=100, show_default=True, help="Of the best node.")
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many nodes at most.")
@click.option("--only", multiple=True, metavar="KIND/NAME", help="Only this workload; may be repeated.")
@click.option(
    "--node-label", metavar="KEY", default="kubernetes.io/hostname", show_default=True,
    help="The label that has the names of nodes; metadata.name: no label, the name itself.",
)  # fmt: skip
@click.option("--by-label", is_flag=True, help="By the labels that nodes have for datasets; asks nobody.")
@click.option("--remove", is_flag=True, help="Take out what an earlier run has put in.")
@config_options("s3", "peer")
def schedule(
    filename: str,
    target: str,
    *,
    dataset: str | None,
    weight: int,
    top: int,
    only: tuple[str, ...],
    node_label: str,
    by_label: bool,
    remove: bool,
    config_file: str | None,
    **options: Any,
) -> None:
    """Let pods prefer the nodes that hold most of a dataset (preferred node affinity), as etcd knows them.

    When no node holds anything of it, the manifests are written as they came.
    """
    if bool(dataset) == remove:
        raise UsageError("say either what the pods read (--dataset s3://BUCKET/PREFIX), or --remove")
    text = read_manifests(filename)
    wanted = None
    if dataset:
        config = build_config({**options, "source": dataset}, os.environ, config_file)
        wanted = _by_label(config, weight) if by_label else _by_nodes(config, weight, top, node_label)
    written = text if wanted is None and not remove else _scheduled(text, wanted, only)
    write_manifests(target, written, was=text if target == filename else None)


_SETTINGS = {setting.field for setting in SETTINGS}
schedule.params = [param for param in schedule.params if param.name in _USED or param.name not in _SETTINGS]


def _scheduled(text: str, wanted: Preference | None, only: tuple[str, ...]) -> str:
    """Return the manifests with the preference (None: with none). Raises UsageError."""
    from csi.workloads import affinity
    from csi.workloads.documents import read_stream, write_stream
    from csi.workloads.templates import find_templates

    documents = read_stream(text)
    templates = [each for each in find_templates(documents) if each.is_meant(only)]
    if not templates:
        _say("there is no pod in the input" + (" that --only means" if only else ""))
    for template in templates:
        if wanted is None:
            affinity.forget(template)
        else:
            affinity.prefer(template, wanted)
    return write_stream(documents)


def _by_nodes(config: Config, weight: int, top: int, node_label: str) -> Preference | None:
    """Return the nodes that etcd names; None, with a note: there are none."""
    from csi.etcd_records import settings_of
    from csi.workloads.affinity import Preference, weighed
    from csi.workloads.holders import find_holders

    if not config.peer.etcd_endpoints:
        raise UsageError("where is etcd? Give --etcd, or --by-label to go by the labels of nodes")
    found = find_holders(config.s3, settings_of(config.peer))
    if found is None:
        _say(f"no node of cluster '{config.peer.cluster}' holds anything of {config.s3.source}: nothing is changed")
        return None
    if found.source != config.s3.source.rstrip("/"):
        _say(f"nobody mounts {config.s3.source}: these are the nodes that hold most of {found.source}")
    chosen = found.nodes[:top]
    best = ", ".join(f"{name} ({size(held)})" for name, held in chosen[:5])
    _say(f"{len(chosen)} of {len(found.nodes)} nodes are preferred: {best}{', ...' if len(chosen) > 5 else ''}")
    return Preference(node_label, weighed(chosen, weight))


def _by_label(config: Config, weight: int) -> Preference:
    from csi.labels import LABEL_PREFIX
    from csi.workloads.affinity import Preference
    from csi.workloads.holders import dataset_of

    steps = [max(1, weight // len(_THRESHOLDS_GIB))] * len(_THRESHOLDS_GIB)
    thresholds = tuple((f">{gib}", step) for gib, step in zip(_THRESHOLDS_GIB, steps, strict=True))
    return Preference(f"{LABEL_PREFIX}{dataset_of(config.s3)}", thresholds)


def _say(text: str) -> None:
    click.echo(f"cachefs: {plain(text)}", err=True)
