"""`python -m bench.epochs`: first epochs beside the peers, S3 far away, a dataset twice the cache, and waste."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click

from bench import dataset as datasets
from bench import machine
from bench.epochs import orders, runs
from bench.epochs.dataset import EpochFiles, generate, upload
from bench.epochs.report import FIRST, LARGER, ORIGIN, EpochResults, full_text, write_files
from bench.epochs.runs import Stage
from bench.far_link import FarLink, LinkUnavailable
from bench.s3_server import S3Server, S3ServerError
from bench.scenarios import ScenarioFailed
from bench.suite import BUCKET, FACTORIES, site_of
from bench.systems.port import Absent, System
from bench.workdir import work_directory

_HERE = Path(__file__).parent
SYSTEMS = ("cachefs", "juicefs", "rclone", "seaweedfs", "s3fs")
SCENARIOS = (*FIRST, "far", "larger", "waste")
FAILURES = (ScenarioFailed, RuntimeError, OSError)


@dataclass(frozen=True, slots=True)
class _Terms:
    """How large everything is."""

    small_count: int
    folders: int
    large_bytes: int
    far_without: int

    def generate(self, directory: Path) -> EpochFiles:
        return generate(directory, small_count=self.small_count, folders=self.folders, large_bytes=self.large_bytes)


@click.command()
@click.option("--files", type=click.IntRange(100), default=5000, show_default=True, help="Files of 110 KB.")
@click.option("--folders", type=click.IntRange(1), default=100, show_default=True, help="Class folders.")
@click.option("--large-mib", type=click.IntRange(64), default=1024, show_default=True, help="MiB of the large file.")
@click.option("--far-files", type=click.IntRange(50), default=400, show_default=True, help="Read without prefetch.")
@click.option("--rounds", type=click.IntRange(1, 10), default=2, show_default=True, help="Of first epochs.")
@click.option("--only", metavar="NAME,...", default="", help=f"Of: {', '.join(SCENARIOS)}.")
@click.option("--systems", metavar="NAME,...", default=",".join(SYSTEMS), show_default=True)
@click.option("--work-dir", metavar="DIR", default=str(_HERE.parents[1] / ".bench"), help="On the local disk.")
@click.option("--results-dir", metavar="DIR", default=str(_HERE.parent / "results"), help="Where epochs.* go.")
def main(
    files: int,
    folders: int,
    large_mib: int,
    far_files: int,
    rounds: int,
    only: str,
    systems: str,
    work_dir: str,
    results_dir: str,
) -> None:
    """Measure what prefetch and eviction are worth: tables, JSON and markdown."""
    missing = machine.missing_rights()
    if missing:
        raise click.ClickException("the bench needs " + "; ".join(missing))
    terms = _Terms(files, folders, large_mib << 20, far_files)
    chosen = _chosen(only, SCENARIOS, "scenario") or SCENARIOS
    named = _chosen(systems, tuple(FACTORIES), "system")
    results = EpochResults(
        machine.facts(),
        {"count": files, "folders": folders, "bytes": datasets.SMALL_BYTES, "large_bytes": terms.large_bytes},
    )
    begun = time.monotonic()
    work = Path(work_dir)
    work.mkdir(parents=True, exist_ok=True)
    runs.check_room(work, runs.room_needed(files, datasets.SMALL_BYTES, terms.large_bytes), click.ClickException)
    if "far" in chosen:
        _measure_far(terms, results, work)
    if set(chosen) - {"far"}:
        _measure_near(terms, results, work, chosen, named, rounds)
    results.seconds = time.monotonic() - begun
    click.echo(full_text(results))
    written = write_files(results, Path(results_dir))
    click.echo(f"\n{results.seconds:.0f} s; written: {', '.join(map(str, written))}", err=True)
    sys.exit(0 if results.first or results.far or results.larger or results.waste else 1)


def _chosen(text: str, allowed: tuple[str, ...], what: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in allowed:
            raise click.UsageError(f"unknown {what} '{name}'; there are: {', '.join(allowed)}")
    return names


def _server(work: Path, link: FarLink | None) -> S3Server:
    return S3Server(str(work)) if link is None else S3Server(str(work), address=link.address, enter=link.enter)


@contextmanager
def _stage(terms: _Terms, parent: Path, link: FarLink | None = None) -> Iterator[Stage]:
    """A server with the data set, behind a link or not."""
    with work_directory(parent) as work, _server(work, link) as server:
        files = terms.generate(work / "dataset")
        upload(files, server, BUCKET)
        site = site_of(work, server, files)
        yield Stage(replace(site, beside_server=link.enter) if link is not None else site, files)


def _measure_far(terms: _Terms, results: EpochResults, work: Path) -> None:
    click.echo("S3 20 ms away", err=True)
    try:
        with FarLink() as link, _stage(terms, work, link) as stage:
            stage.warm_server(BUCKET)
            results.far = runs.with_and_without(stage, terms.far_without)
    except (LinkUnavailable, S3ServerError, *FAILURES) as error:
        results.remarks.append(f"S3 20 ms away: not measured: {error}")


def _measure_near(
    terms: _Terms,
    results: EpochResults,
    work: Path,
    chosen: tuple[str, ...],
    named: tuple[str, ...],
    rounds: int,
) -> None:
    with _stage(terms, work) as stage:
        first = [name for name in FIRST if name in chosen]
        if first:
            _first_epochs(stage, results, first, _prepared(stage, results, named), rounds)
        if "larger" in chosen:
            for name in LARGER:
                _try(results, f"larger than the cache, {name}", partial(_larger, stage, results, name))
        if "waste" in chosen:
            _try(results, "waste", lambda: results.waste.update(runs.waste(stage)))


def _larger(stage: Stage, results: EpochResults, name: str) -> None:
    eviction = "lru" if name == "lru" else "epoch"
    results.larger[name] = runs.epochs_larger_than_cache(stage, eviction, plan=name == "plan", scan=name == "epoch")


def _prepared(stage: Stage, results: EpochResults, named: tuple[str, ...]) -> list[tuple[System, str]]:
    """Make the systems ready; those that cannot be measured leave a remark."""
    ready: list[tuple[System, str]] = []
    for name in named:
        system = FACTORIES[name](stage.site)
        try:
            version = system.version()
            click.echo(f"preparing {system.label} {version}", err=True)
            bucket = system.prepare()
        except (Absent, *FAILURES) as error:
            results.remarks.append(f"{system.label}: not measured: {error}")
            system.umount()
            continue
        if bucket is not None:
            results.labels[name] = system.label
            ready.append((system, bucket))
    results.labels[ORIGIN] = "obstore alone"
    return ready


def _first_epochs(
    stage: Stage, results: EpochResults, chosen: list[str], systems: list[tuple[System, str]], rounds: int
) -> None:
    flat, tree = stage.files.directory(), stage.files.tree()
    readings = {
        "listing": (orders.listed(flat), 1),
        "shuffled": (orders.shuffled(flat, 3), 1),
        "tree": (orders.shuffled(tree, 4), runs.WORKERS),
    }
    for number in range(1, rounds + 1):
        for scenario in chosen:
            order, workers = readings[scenario]
            results.add(scenario, ORIGIN, runs.server_rate(stage)["files_per_s"])
            for system, bucket in systems:
                what = f"round {number}: {scenario}, {system.label}"
                _try(results, what, partial(_first_epoch, stage, results, scenario, system, bucket, order, workers))


def _first_epoch(
    stage: Stage, results: EpochResults, scenario: str, system: System, bucket: str, order: orders.Order, workers: int
) -> None:
    rate = runs.first_epoch(stage, system, bucket, order, workers)["files_per_s"]
    results.add(scenario, system.name, rate)
    click.echo(f"  {rate:,.0f} files/s", err=True)


def _try(results: EpochResults, what: str, measure: Callable[[], object]) -> None:
    """Measure; a failure is a remark, and the run goes on."""
    click.echo(what, err=True)
    try:
        measure()
    except FAILURES as error:
        results.remarks.append(f"{what}: {error}")
        click.echo(f"FAILED: {error}", err=True)


if __name__ == "__main__":
    machine.end_in_order()
    main()
