"""`cachefs inject`: a pod that mounts a bucket by itself, without a StorageClass and without anything on the server.

Reads manifests and writes them again (`csi.workloads`): `cachefs inject -f job.yaml --source s3://b --path /data |
kubectl apply -f -`. What to mount is said by options, or by annotations in the pod template:

    cachefs.io/source: s3://BUCKET/PREFIX      cachefs.io/path: /data
    cachefs.io/containers: a,b                 cachefs.io/secret: NAME
    cachefs.io/options: prefetch=off,...

An option wins over an annotation. With --source every pod of the input gets the sidecar, without it those that have the
annotation. INVARIANT: what is written is complete, or nothing is: an error leaves no half of the output behind.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import cachefs
from cachefs.cli.options import CONFIG_PARAMETER, SETTINGS, config_options
from cachefs.cli.output import plain
from cachefs.durable import replace_durably
from cachefs.errors import UsageError

if TYPE_CHECKING:
    from csi.workloads.wishes import Wishes

OWN = frozenset({"cache_dir", "runtime_dir", "shm_dir", "foreground", "log_file", "identity"})
"""Settings that the container decides (see `csi.workloads.wishes.NOT_HERE`)."""


@click.command()
@click.option("-f", "--filename", required=True, metavar="FILE", help="Manifests, YAML or JSON (-: stdin).")
@click.option("-o", "--output", "target", default="-", metavar="FILE", help="Where to write (-: stdout, the default).")
@click.option("--source", metavar="SOURCE", help="What to mount: s3://BUCKET[/PREFIX].")
@click.option("--path", metavar="DIR", help="Where the containers see it.")
@click.option(
    "--container", "containers", multiple=True, metavar="NAME",
    help="Which container gets it, init containers too; may be repeated (default: all but init containers).",
)  # fmt: skip
@click.option("--only", multiple=True, metavar="KIND/NAME", help="Only this workload; may be repeated.")
@click.option("--name", default="cachefs", metavar="NAME", help="Of the sidecar, for a second one in a pod.")
@click.option("--secret", metavar="NAME", help="Secret with the keys of the bucket (default: the pod's own identity).")
@click.option(
    "--secret-keys", metavar="ID,SECRET[,TOKEN]", default="accessKeyId,secretAccessKey,sessionToken",
    help="What the keys are called in the Secret.", show_default=True,
)  # fmt: skip
@click.option(
    "--image", metavar="IMAGE", default=f"cachefs:{cachefs.__version__}", show_default=True, help="Of the sidecar."
)
@click.option(
    "--cache-path", metavar="DIR", default="",
    help="Directory of the node for the cache; one pod of a node at a time (default: an emptyDir).",
)  # fmt: skip
@click.option("--cpu", metavar="CPU", default="500m", show_default=True, help="What the sidecar requests.")
@click.option("--remove", is_flag=True, help="Take the sidecar out again.")
@config_options()
def inject(filename: str, target: str, **options: Any) -> None:
    """Put a sidecar into pods that mounts a bucket for their containers (Kubernetes 1.29 or newer).

    For Pod, Deployment, StatefulSet, DaemonSet, Job, CronJob, List, and other kinds with pod templates. What needs no
    change is written as it came; doing it again changes nothing, with other options it changes what is different.
    The options below go to `cachefs mount` in the sidecar; files that they name are files of its image.
    """
    from csi.workloads.wishes import Wishes

    names = {setting.field for setting in SETTINGS} - {"source"}
    settings = {name: value for name, value in options.items() if name in names and value is not None}
    wishes = Wishes(settings=settings, **{name: value for name, value in options.items() if name not in names})
    text = read_manifests(filename)
    written, notes = injected(text, wishes)
    for note in notes:
        click.echo(f"cachefs: {plain(note)}", err=True)
    write_manifests(target, written, was=text if target == filename else None)


inject.params = [param for param in inject.params if param.name not in OWN | {CONFIG_PARAMETER}]


def read_manifests(filename: str) -> str:
    """Return the text of a file, or of stdin. Raises UsageError."""
    try:
        raw = sys.stdin.buffer.read() if filename == "-" else Path(filename).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise UsageError(f"{filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{'stdin' if filename == '-' else filename} is no UTF-8 text") from error


def write_manifests(target: str, text: str, *, was: str | None = None) -> None:
    """Write to stdout, or replace a file; one that has this text (`was`) is left alone. Raises OSError."""
    if target == "-":
        sys.stdout.buffer.write(text.encode())
        return
    if was != text:
        path = Path(target)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
        replace_durably(path, text.encode())
        path.chmod(mode)


def injected(text: str, wishes: Wishes) -> tuple[str, list[str]]:
    """Return the text with the sidecar in it, or out of it, and what is to be said. Raises UsageError."""
    from csi.workloads import injection
    from csi.workloads.documents import read_stream, write_stream
    from csi.workloads.templates import find_templates
    from csi.workloads.wishes import wanted_in

    documents = read_stream(text)
    templates = [each for each in find_templates(documents) if each.is_meant(wishes.only)]
    notes, concerned = [], 0
    for template in templates:
        if wishes.remove:
            concerned += injection.remove(template, wishes.name)
            continue
        wanted = wanted_in(template, wishes)
        if wanted is not None:
            injection.inject(template, wanted)
            concerned += 1
    if not templates:
        notes.append("there is no pod in the input" + (" that --only means" if wishes.only else ""))
    elif not concerned and wishes.remove:
        notes.append(f"no pod has a sidecar '{wishes.name}'")
    elif not concerned:
        notes.append(f"no pod says what to mount: give --source, or the annotation {injection.SOURCE}")
    return write_stream(documents), notes
