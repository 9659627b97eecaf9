"""Writes the reference documents from the code: ``python -m cachefs.cli.reference docs`` (or ``make docs``).

    docs/CONFIGURATION.md    every setting of `cachefs.config`
    docs/COUNTERS.md         every counter of `cachefs.metrics`
    docs/METRICS.md          every metric of `cachefs.exporter.table`
    docs/KUBERNETES.md       the table of parameters of `csi.parameter_table`; the rest is written by hand

A test compares the files with what is written here, so nothing without documentation can be released.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cachefs.cli.load import FALLBACKS
from cachefs.cli.options import SETTINGS, Setting, choices, render
from cachefs.exporter import table as exported
from cachefs.exporter.samples import MOST_MOUNTS, MOST_VOLUMES
from cachefs.metrics import METRICS
from csi.parameter_table import markdown_table

_SECTION_TITLES = {
    "s3": "The store",
    "cache": "The cache of the node",
    "metadata": "How new names have to be",
    "fuse": "The mount",
    "limits": "What a volume may do in the cache of the node",
    "peer": "Peers: nodes that share their caches",
    "log": "Logging",
}

_DOCUMENT_HEAD = """\
# Configuration

<!-- Written by `make docs`; change cachefs/config.py instead. -->

Every setting is an option of `cachefs mount`, an environment variable and a key of a configuration file. Where one is
given more than once, the first of these wins: **option, environment variable, file, default**.

* **File**: TOML without tables, given with `--config FILE` or `CACHEFS_CONFIG`. A key that does not exist is an error.

      endpoint-url = "https://s3.example.com"
      cache-size = "200GiB"
      metadata-ttl = "5m"
      allow-other = true

* **Sizes**: `50GiB`, `64MiB`, `1.5GB` (decimal units), `512M` (the same as `512MiB`), or plain bytes.
* **Times**: `250ms`, `60s`, `5m`, `1h`, `7d`, plain seconds, or `forever`.
* **Modes**: octal, in a file as a string: `"0444"`.
* **Yes or no**: `--allow-other` or `--no-allow-other`; `true` or `false` in a file or a variable.
* **Mount options**: `-o cache-size=50GiB,allow-other` means the same as the options; fstab uses this form, with
  `config=FILE` for `--config`. `-o remount` succeeds when nothing would have to change; otherwise it says what.

A value that cannot work is refused with one line and exit code 2; what somebody wrote is never adjusted. Sizes of the
tiers that nobody gave fit themselves to the machine or container: `cachefs mount` says so in one line each, and
`cachefs doctor` shows them. A tier that would have less than 16 blocks, or less than 16 MiB, is off then.

These variables of the AWS tools are used where neither option, `CACHEFS_` variable nor file says anything:
{fallbacks}.
Keys come from where all AWS tools take them: profile, `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, web identity,
instance role. They have no option on purpose: a command line can be read by every user of the machine.
Files and services are asked again when their keys have changed or were refused; for other variables, mount again.
"""


def configuration() -> str:
    """Return the text of docs/CONFIGURATION.md."""
    fallbacks = ", ".join(f"{' or '.join(f'`{name}`' for name in names)} (`{key}`)" for key, names in FALLBACKS.items())
    lines = [_DOCUMENT_HEAD.format(fallbacks=fallbacks)]
    for section, title in _SECTION_TITLES.items():
        lines += [
            f"## {title}",
            "",
            "| option | variable | key | default | meaning |",
            "| --- | --- | --- | --- | --- |",
        ]
        for setting in (s for s in SETTINGS if s.section == section):
            option = f"`{setting.option.replace('/', '`, `')}`" if setting.option else f"(argument `{setting.metavar}`)"
            if setting.field == "addressing":
                option += ", `--path-style`, `--virtual-host-style`"
            shown = f"`{render(setting, setting.default)}`".replace("``", "")
            cells = (option, f"`{setting.variable}`", f"`{setting.key}`", shown, _meaning(setting))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _meaning(setting: Setting) -> str:
    text = setting.help
    if choices(setting):
        text += f" One of {', '.join(f'`{value}`' for value in choices(setting))}."
    return text.replace("|", "\\|")


_COUNTERS_HEAD = """\
# Counters

<!-- Written by `make docs`; change cachefs/metrics.py instead. -->

What the `counters` of `cachefs status --json` mean ([STATUS.md](STATUS.md)). Counters only grow, and start again with
the process that counts: those of a mount with its worker, those of an agent with the agent. One that is not there is 0.
[METRICS.md](METRICS.md) says what Prometheus gets of them.

| counter | unit | meaning |
| --- | --- | --- |
"""


def counters() -> str:
    """Return the text of docs/COUNTERS.md."""
    rows = (f"| `{metric.name}` | {metric.unit.value} | {metric.help} |\n" for metric in METRICS.values())
    return _COUNTERS_HEAD + "".join(rows)


_METRICS_HEAD = """\
# Metrics for Prometheus

<!-- Written by `make docs`; change cachefs/exporter/table.py instead. -->

`cachefs node --metrics ADDR:PORT` and `cachefs agent --metrics ADDR:PORT` serve these at `/metrics`, in the text
format of Prometheus (0.0.4). `:9815` is the port on all addresses. Without the option nothing listens; there is no
password and no TLS: it is for the network of the cluster.

Each scrape asks the agent, and on a Kubernetes node the keeper, for at most two seconds each. Whoever does not answer
is left out but for `cachefs_agent_up 0` or `cachefs_keeper_up 0`; the answer comes all the same. `cachefs agent`
serves nothing of the keeper.

Counters start again with the process that counts ([COUNTERS.md](COUNTERS.md)): use `rate()` or `increase()`. Labels:

| label | what it says |
| --- | --- |
| `volume` | source: `s3://BUCKET/PREFIX` |
| `volume_id` | name of the volume in the agent: of one source there may be several (other keys, other `mode`) |
| `mount` | key of the mount in the keeper; where there is no keeper, the mount point |
| `tier` | `shm` or `disk` |
| `origin` | where a block came from: `store`, or `peer` |
| `state`, `part`, `of`, `handle`, `version` | see the metric |

At most {mounts} mounts and {volumes} volumes are shown, those with something wrong first; `cachefs_left_out` counts the
others. Answers that the kernel gives from its page cache reach nobody and are counted nowhere.

Two that are often wanted: the share of READ requests that a node answered without asking its agent, and the
amplification of reads from S3 (bytes from the store for each byte that the owner of its block fetched; 1 is the best
there is):

    1 - sum(rate(cachefs_mount_read_misses_total[5m])) / sum(rate(cachefs_mount_fuse_reads_total[5m]))
    sum(rate(cachefs_fill_bytes_total{{origin="store"}}[5m])) / sum(rate(cachefs_peer_owned_fill_bytes_total[5m]))

"""


def metrics_served() -> str:
    """Return the text of docs/METRICS.md."""
    return _METRICS_HEAD.format(mounts=MOST_MOUNTS, volumes=MOST_VOLUMES) + exported.markdown_table()


DOCUMENTS = {"CONFIGURATION.md": configuration, "COUNTERS.md": counters, "METRICS.md": metrics_served}
TABLES = {"KUBERNETES.md": ("parameters", markdown_table)}
"""Documents that are written by hand but for a table between two comments."""


def with_table(text: str, name: str, table: str) -> str:
    """Return a document with the table between `<!-- NAME: ... -->` and `<!-- end of NAME -->` replaced."""
    begin = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    return begin.sub(lambda found: f"{found[1]}\n{table}\n{found[2]}", text)


if __name__ == "__main__":
    for name, write in DOCUMENTS.items():
        Path(sys.argv[1], name).write_text(write(), encoding="utf-8")
    for name, (what, write) in TABLES.items():
        document = Path(sys.argv[1], name)
        if document.exists():
            document.write_text(with_table(document.read_text(encoding="utf-8"), what, write()), encoding="utf-8")
