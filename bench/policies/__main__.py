"""Hit ratios of the eviction policies beside Belady's optimum, simulated.

    python -m bench.policies [--files 5000] [--only NAME] [--recorded FILE --cache 10GiB] [--output DIRECTORY]

Writes policies.json and policies.svg (also of a part of the traces) when a directory is given.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.policies import picture
from bench.policies.replay import Outcome, optimum, replay, replay_planned, replay_tiers
from bench.policies.traces import Trace, generate, load
from bench.report import plain_text
from cachefs.block.policies.choice import POLICIES
from cachefs.block.policies.epoch import EpochPolicy
from cachefs.cli.options import parse_size


def _later(trace: Trace, outcome: Outcome) -> float:
    """Return the share of hits after the first phase, in which a cache is cold."""
    if len(trace.phases) == 1:
        return outcome.hits[0]
    lengths = [end - start for start, end in zip(trace.phases, trace.phases[1:], strict=False)]
    return sum(hit * length for hit, length in zip(outcome.hits[1:], lengths, strict=True)) / sum(lengths)


def measure(trace: Trace) -> dict[str, Any]:
    """Return all figures of a trace."""
    outcomes = {"optimum": optimum(trace)}
    outcomes |= {name.value: replay(trace, make()) for name, make in POLICIES.items()}
    outcomes["plan"] = replay_planned(trace, EpochPolicy())
    tiers = {name.value: replay_tiers(trace, make) for name, make in POLICIES.items()}
    return {
        "name": trace.name,
        "title": trace.title,
        "reads": len(trace.keys),
        "capacity_bytes": trace.capacity,
        "hits": {name: [round(hit, 4) for hit in outcome.hits] for name, outcome in outcomes.items()},
        "ratio": {name: round(outcome.ratio(trace), 4) for name, outcome in outcomes.items()},
        "later": {name: round(_later(trace, outcome), 4) for name, outcome in outcomes.items()},
        "us_per_read": {name: round(outcome.us_per_read, 2) for name, outcome in outcomes.items() if name != "optimum"},
        "two_tiers": {
            name: {"later": round(_later(trace, outcome), 4), "disk_writes": round(outcome.written_per_read, 4)}
            for name, outcome in tiers.items()
        },
    }


def _print(figures: list[dict[str, Any]]) -> None:
    names = [name.value for name in POLICIES]
    rows = [["trace", "optimum", *names, "plan", *(f"{name} us" for name in names), *(f"{n} writes" for n in names)]]
    for one in figures:
        later = one["later"]
        rows.append(
            [
                one["name"],
                *(f"{later[name]:.3f}" for name in ("optimum", *names, "plan")),
                *(f"{one['us_per_read'][name]:.2f}" for name in names),
                *(f"{one['two_tiers'][name]['disk_writes']:.3f}" for name in names),
            ]
        )
    click.echo(plain_text(rows))
    click.echo(
        "\nhits per read after the first phase; us of CPU per read, median "
        + ", ".join(f"{name} {statistics.median(one['us_per_read'][name] for one in figures):.2f}" for name in names)
        + ";\nblocks written to the disk tier per read, with a tenth of the cache in the shm tier"
    )


@click.command()
@click.option("--files", type=click.IntRange(320), default=5000, show_default=True, help="Files of a dataset.")
@click.option("--only", multiple=True, help="Name of a trace; may be repeated.")
@click.option(
    "--recorded", type=click.Path(exists=True, path_type=Path), help="A trace: .csv (time,key,size) or binary."
)
@click.option("--cache", default="10GiB", show_default=True, help="Size of the cache for a recorded trace.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Where to write policies.json and .svg."
)
def main(files: int, only: tuple[str, ...], recorded: Path | None, cache: str, output: Path | None) -> None:
    """Replay traces through the eviction policies."""
    makers: list[Callable[[], Trace]] = generate(files)
    if recorded is not None:
        try:
            trace = load(recorded, parse_size(cache))
        except (OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        makers = [lambda: trace]
    figures = []
    for make in makers:
        made = make()
        if not only or made.name in only:
            figures.append(measure(made))
    if not figures:
        raise click.ClickException("there is no such trace")
    _print(figures)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "policies.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        picture.draw(figures, output / "policies.svg")


if __name__ == "__main__":
    main()
