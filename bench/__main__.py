"""`python -m bench`: measure cachefs beside its peers; `python -m bench million`: a directory of a million objects."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bench import machine
from bench.results import BY_NAME, Pass
from bench.suite import FACTORIES, SuiteOptions, run_suite

_HERE = Path(__file__).parent
_FULL_LIMIT_S, _QUICK_LIMIT_S = 1500.0, 330.0


@click.group(invoke_without_command=True)
@click.option("--quick", is_flag=True, help="A tenth of the data, for a first impression (under 6 minutes).")
@click.option("--only", metavar="SYSTEM,...", default="", help=f"Systems to measure: {', '.join(FACTORIES)}.")
@click.option(
    "--scenario", metavar="NAME,...", default="", help="Scenarios: a full name (small-cold) or its first word (small)."
)
@click.option("--idle", is_flag=True, help="Measure only the CPU that an idle cachefs takes (20 s).")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds over all systems.")
@click.option("--small-files", type=click.IntRange(2), default=5000, show_default=True, help="Files of 110 KB.")
@click.option("--far-files", type=click.IntRange(1), default=250, show_default=True, help="Of them, with S3 far away.")
@click.option("--large-mib", type=click.IntRange(1), default=1024, show_default=True, help="MiB of the large file.")
@click.option("--no-guard", is_flag=True, help="Leave out the pass with the wake-up guard held for everyone.")
@click.option("--time-limit", type=float, default=None, help="Seconds after which no new round begins.")
@click.option("--work-dir", metavar="DIR", default=str(_HERE.parent / ".bench"), help="On the local disk.")
@click.option("--results-dir", metavar="DIR", default=str(_HERE / "results"), help="Where latest.* go.")
@click.pass_context
def main(
    context: click.Context,
    quick: bool,
    only: str,
    scenario: str,
    idle: bool,
    repeats: int,
    small_files: int,
    far_files: int,
    large_mib: int,
    no_guard: bool,
    time_limit: float | None,
    work_dir: str,
    results_dir: str,
) -> None:
    """Measure cachefs beside its peers on one S3 server: table, JSON, markdown and chart."""
    _check_rights()
    if context.invoked_subcommand is not None:
        return
    shrink = 10 if quick else 1
    options = SuiteOptions(
        work_dir=Path(work_dir),
        small_count=max(small_files // shrink, 2),
        far_small_count=max(min(far_files, small_files) // shrink, 2),
        large_bytes=max(large_mib // shrink, 1) << 20,
        repeats=repeats,
        time_limit_s=time_limit or (_QUICK_LIMIT_S if quick else _FULL_LIMIT_S),
        systems=("cachefs",) if idle else _chosen(only, list(FACTORIES), "system"),
        scenarios=("idle",) if idle else _chosen(scenario, [], "scenario"),
        passes=(Pass.INSTALLED,) if no_guard or idle else tuple(Pass),
    )
    sys.exit(_measure(options, Path(results_dir)))


def _measure(options: SuiteOptions, results_dir: Path) -> int:
    from bench import chart, report
    from bench.targets import judge

    results = run_suite(options, lambda line: click.echo(line, err=True))
    judgements = judge(results)
    click.echo(report.full_text(results, judgements))
    written = report.write_files(results, judgements, results_dir)
    if chart.draw(results, results_dir / "latest.svg"):
        written.append(results_dir / "latest.svg")
    click.echo(f"\n{results.seconds:.0f} s; written: {', '.join(str(path) for path in written)}", err=True)
    return 0 if results.samples else 1


@main.command()
@click.option(
    "--objects", type=click.IntRange(1), default=1_000_000, show_default=True, help="Objects in the directory."
)
@click.option("--work-dir", metavar="DIR", default=str(_HERE.parent / ".bench"), help="On the local disk.")
@click.option("--results-dir", metavar="DIR", default=str(_HERE / "results"), help="Where million.json goes.")
def million(objects: int, work_dir: str, results_dir: str) -> None:
    """List a directory of a million objects twice, watching time, requests and memory."""
    from bench.million import run_million

    sys.exit(run_million(objects, Path(work_dir), Path(results_dir)))


def _chosen(text: str, allowed: list[str], what: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    known = allowed or [*BY_NAME, *{name.partition("-")[0] for name in BY_NAME}]
    for name in names:
        if name not in known:
            raise click.UsageError(f"unknown {what} '{name}'; there are: {', '.join(known)}")
    return names or tuple(allowed)


def _check_rights() -> None:
    missing = machine.missing_rights()
    if missing:
        raise click.ClickException("the bench needs " + "; ".join(missing))


if __name__ == "__main__":
    machine.end_in_order()
    main()
