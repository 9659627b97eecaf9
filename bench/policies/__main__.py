"""Hit ratios of the eviction policies beside Belady's optimum, and what the detectors bring ahead, simulated.

    python -m bench.policies [--files 5000] [--only NAME] [--part policies|prefetch] [--output DIRECTORY]
    python -m bench.policies --recorded FILE --cache 10GiB        a CSV, or what .cachefs/accesslog gave

Writes policies.json and policies.svg (also of a part of the traces) when a directory is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.policies import figures, loads, picture, recorded
from bench.policies.ahead import Timing
from bench.policies.traces import Trace, generate
from cachefs.cli.options import parse_size

PARTS = ("policies", "prefetch")


@click.command()
@click.option("--files", type=click.IntRange(320), default=5000, show_default=True, help="Files of a dataset.")
@click.option("--only", multiple=True, help="Name of a trace; may be repeated.")
@click.option("--part", type=click.Choice(PARTS), multiple=True, help="One of both; may be repeated.")
@click.option(
    "--recorded",
    "recording",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A trace: .csv (time,key,size), the access log of a mount, or binary.",
)
@click.option("--cache", default="10GiB", show_default=True, help="Size of the cache for a recorded trace.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="How often costs are measured.")
@click.option("--latency-ms", type=float, default=20.0, show_default=True, help="Of a request to the store.")
@click.option("--slots", type=click.IntRange(1), default=64, show_default=True, help="Requests ahead at a time.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Where to write policies.json and .svg."
)
def main(
    files: int, only: tuple[str, ...], part: tuple[str, ...], recording: Path | None, cache: str, rounds: int,
    latency_ms: float, slots: int, output: Path | None,
) -> None:  # fmt: skip
    """Replay traces through the eviction policies, and loads through the detectors."""
    traces, heard = generate(files), loads.generate(files)
    if recording is not None:
        traces, heard = _recorded(recording, parse_size(cache))
    parts = part or PARTS
    timing = Timing(latency_s=latency_ms / 1000, slots=slots)
    policies = [figures.of_trace(one, rounds) for one in _chosen(traces, only)] if "policies" in parts else []
    ahead = [figures.of_load(one, timing) for one in _chosen(heard, only)] if "prefetch" in parts else []
    if not policies and not ahead:
        raise click.ClickException("there is no such trace")
    if policies:
        click.echo(figures.policies_text(policies))
    if ahead:
        click.echo(figures.ahead_text(ahead))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        both = {"policies": policies, "prefetch": ahead}
        (output / "policies.json").write_text(json.dumps(both, indent=1) + "\n", encoding="utf-8")
        picture.draw(policies, ahead, output / "policies.svg")


def _chosen(makers: list[Callable[[], Any]], only: tuple[str, ...]) -> list[Any]:
    made = (make() for make in makers)
    return [one for one in made if not only or one.name in only]


def _recorded(path: Path, capacity: int) -> tuple[list[Callable[[], Trace]], list[Callable[[], loads.Load]]]:
    """Return a recording as a trace, and as a load if it says who read what."""
    try:
        trace = recorded.load(path, capacity)
        if not recorded.is_log(path):
            return [lambda: trace], []
        load = recorded.load_readers(path, capacity)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    return [lambda: trace], [lambda: load]


if __name__ == "__main__":
    main()
