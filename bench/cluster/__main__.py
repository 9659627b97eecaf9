"""`python -m bench.cluster`: what peers are worth on this machine, in one run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from bench import machine, placement
from bench.cluster import runs, transfer
from bench.cluster.dataset import Shape
from bench.cluster.report import ClusterResults, full_text, write_files
from bench.cluster.runs import Figures, ScenarioFailed, Stage, Terms
from bench.workdir import work_directory
from tests.cluster.namespaces import why_not

MIB = 1 << 20
_HERE = Path(__file__).parent
TRANSFER_S = 2.0
SHARD, SMALL = 16 * MIB, 100_000
FULL = {
    "shape": Shape(large_files=28, large_bytes=SHARD, small_files=650, small_bytes=SMALL),
    "shards": Shape(large_files=32, large_bytes=SHARD),
    "small": Shape(large_files=0, large_bytes=SHARD, small_files=1300, small_bytes=SMALL),
}
QUICK = {
    "shape": Shape(large_files=8, large_bytes=SHARD, small_files=190, small_bytes=SMALL),
    "shards": Shape(large_files=10, large_bytes=SHARD),
    "small": Shape(large_files=0, large_bytes=SHARD, small_files=400, small_bytes=SMALL),
}

SCENARIOS: dict[str, Callable[[Stage], Figures]] = {
    "alone": lambda stage: runs.together(stage, stage.terms.shards, peers=False),
    "together": lambda stage: runs.together(stage, stage.terms.shards, peers=True),
    "small-alone": lambda stage: runs.together(stage, stage.terms.small, peers=False),
    "small-together": lambda stage: runs.together(stage, stage.terms.small, peers=True),
    "death-kill": lambda stage: runs.death(stage, runs.kill_node),
    "death-link": lambda stage: runs.death(stage, runs.take_link_down),
    "join": runs.join,
}


@click.command()
@click.option("--nodes", type=click.IntRange(2, 8), default=4, show_default=True)
@click.option("--quick", is_flag=True, help="A quarter of the data, one round.")
@click.option("--rounds", type=click.IntRange(1, 10), default=2, show_default=True)
@click.option("--only", metavar="NAME,...", default="", help=f"Of: transfer, {', '.join(SCENARIOS)}.")
@click.option("--limit", type=click.IntRange(1_000_000), default=100_000_000, show_default=True, help="Bytes/s of S3.")
@click.option("--work-dir", metavar="DIR", default=str(_HERE.parents[1] / ".bench"), help="On the local disk.")
@click.option("--results-dir", metavar="DIR", default=str(_HERE.parent / "results"), help="Where cluster.* go.")
def main(nodes: int, quick: bool, rounds: int, only: str, limit: int, work_dir: str, results_dir: str) -> None:
    """Measure a cluster of this machine's network namespaces: table, JSON and markdown."""
    reason = why_not()
    if reason:
        raise click.ClickException(reason)
    chosen = [name.strip() for name in only.split(",") if name.strip()] or ["transfer", *SCENARIOS]
    for name in chosen:
        if name not in ("transfer", *SCENARIOS):
            raise click.UsageError(f"unknown scenario '{name}'; there are: transfer, {', '.join(SCENARIOS)}")
    terms = Terms(nodes=nodes, bytes_per_s=limit, **(QUICK if quick else FULL))
    results = measure(terms, chosen, 1 if quick else rounds, Path(work_dir))
    click.echo(full_text(results))
    written = write_files(results, Path(results_dir))
    click.echo(f"\n{results.seconds:.0f} s; written: {', '.join(str(path) for path in written)}", err=True)
    sys.exit(1 if results.failures else 0)


def measure(terms: Terms, chosen: list[str], rounds: int, work_dir: Path) -> ClusterResults:
    """Measure placement, transfer, and clusters."""
    results = ClusterResults(machine.facts(), terms)
    begun = time.monotonic()
    results.placement = placement.measure_all(5000)
    with work_directory(work_dir) as work:
        if "transfer" in chosen:
            click.echo("transfer", err=True)
            try:
                results.transfer = transfer.measure(work, TRANSFER_S)
            except (RuntimeError, OSError) as error:
                results.failures.append(f"transfer: {error}")
        play(results, [name for name in chosen if name != "transfer"], rounds, work)
    results.seconds = time.monotonic() - begun
    return results


def play(results: ClusterResults, chosen: list[str], rounds: int, work: Path) -> None:
    """Play the scenarios of clusters, round after round."""
    if not chosen:
        return
    with Stage(results.terms, work) as stage:
        for number in range(rounds):
            figures: dict[str, Figures] = {}
            results.rounds.append(figures)
            for name in chosen:
                click.echo(f"round {number + 1}: {name}", err=True)
                try:
                    figures[name] = SCENARIOS[name](stage)
                except (ScenarioFailed, TimeoutError, AssertionError) as error:
                    results.failures.append(f"{name}: {error}")


if __name__ == "__main__":
    machine.end_in_order()
    main()
