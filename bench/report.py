"""The figures as text: the table on the terminal, the markdown for the README, the JSON for machines."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from bench.results import BY_NAME, SCENARIOS, Pass, Results
from bench.targets import Judgement, Verdict, cold_ceiling

_MIB = 1 << 20
_TITLES = {Pass.INSTALLED: "as installed", Pass.GUARD: "with the wake-up guard held for everyone"}
_SINGLE = (
    "survival", "idle", "readahead-128", "readahead-4096", "unguarded-small", "unguarded-large", "unguarded-random",
)  # fmt: skip
"""Scenarios of cachefs alone: a line of their own, no column."""


def number(value: float | None) -> str:
    """Write a figure for a table cell."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(results: Results, which: Pass) -> list[list[str]]:
    """Return rows of cells: one column per system, one row per scenario, head first. Absent systems have no column."""
    systems = [
        name
        for name in results.systems
        if any((which, name, scenario.name) in results.samples for scenario in SCENARIOS)
    ]
    rows = [["scenario", "unit", *(results.systems[name].label for name in systems)]]
    for scenario in SCENARIOS:
        cells = [number(results.median(which, name, scenario.name)) for name in systems]
        if scenario.name not in _SINGLE and any(cell != "-" for cell in cells):
            rows.append([scenario.title, scenario.unit, *cells])
    return rows


def memory_rows(results: Results) -> list[list[str]]:
    """Return the peak memory of every system that has processes, head first."""
    rows = [["peak memory (MiB)", "anonymous", "resident", "PSS"]]
    for record in results.systems.values():
        peaks = record.memory
        if not peaks.get("rss"):
            continue
        rows.append(
            [record.label, *(number(peaks[name] / _MIB) if name in peaks else "-" for name in ("anon", "rss", "pss"))]
        )
        roles = sorted(name for name in peaks if name.startswith("anon."))
        if len(roles) > 1:
            rows.extend([f"  {name.partition('.')[2]}", number(peaks[name] / _MIB), "", ""] for name in roles)
    return rows


def cpu_rows(results: Results) -> list[list[str]]:
    """Return what the large file, cold, cost whom, head first."""
    rows = [["CPU seconds per GiB of the large file, cold", "S3 server", "own processes"]]
    measured = [record for record in results.systems.values() if record.cpu_s_per_gib]
    return rows + [
        [one.label, *(_cpu_cell(one.cpu_s_per_gib.get(who, [])) for who in ("server", "own"))] for one in measured
    ]


def _cpu_cell(spent: list[float]) -> str:
    return f"{statistics.median(spent):.2f}" if spent else "-"


def plain_text(rows: list[list[str]]) -> str:
    """Align rows in columns: text left, figures right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(widths[0]) if at == 0 else cell.rjust(widths[at]) for at, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def markdown(rows: list[list[str]]) -> str:
    """Write rows as a markdown table."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|"]
    lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in body]
    return "\n".join(lines)


def target_rows(judgements: list[Judgement]) -> list[list[str]]:
    """Return the targets as rows, head first."""
    return [["target", "wanted", "reached", ""]] + [[j.text, j.bound, j.reached, j.verdict.value] for j in judgements]


def remarks(results: Results) -> list[str]:
    """What a reader must know beside the figures: absences, failures, single figures."""
    lines = []
    for record in results.systems.values():
        if record.absent is not None:
            lines.append(f"{record.label}: absent ({record.absent})")
        lines += [f"{record.label}: {note}" for note in record.notes]
    lines += results.remarks + far_remarks(results) + ceiling_remarks(results)
    lines.append(
        "before each reading of the cold large file, memory of three times its size is touched and freed again: the "
        "host of a virtual machine hands memory out at the first touch, at the cost of whoever touches it"
    )
    for name in _SINGLE:
        for which in Pass:
            value = results.median(which, "cachefs", name)
            if value is not None:
                lines.append(f"cachefs, {BY_NAME[name].title} ({_TITLES[which]}): {number(value)} {BY_NAME[name].unit}")
    return lines


def far_remarks(results: Results) -> list[str]:
    """Say what "S3 20 ms away" is, when it was measured."""
    if "far.link_cpu_s_per_gib" not in results.facts:
        return []
    return [
        f"S3 20 ms away: {results.options['far_small_files']:,} of the small files and the large file, one visit each; "
        "the server is in a network namespace behind two TUN devices, and a process hands each packet on after 10 ms "
        f"(round trip measured: {results.facts['far.round_trip_ms']:.1f} ms; that process took "
        f"{results.facts['far.link_cpu_s_per_gib']:.1f} CPU seconds per GiB)"
    ]


def ceiling_remarks(results: Results) -> list[str]:
    """Say how far any file system over the store's own client could be ahead of the best peer here."""
    ceiling = cold_ceiling(results)
    if ceiling is None:
        return []
    return [
        f"large file, cold: obstore alone is {ceiling:.2f} x as fast as the best peer; whatever reads through S3 and "
        "the kernel on this machine is below that"
    ]


def machine_line(results: Results) -> str:
    """One line about when and where."""
    facts = results.machine
    gib = facts["memory_bytes"] / (1 << 30)
    rounds = results.options.get("rounds_done", 0)
    return (
        f"{facts['date'][:10]}, {facts['cpus']} CPUs ({facts['cpu_model']}), {gib:.0f} GiB, Linux {facts['kernel']}; "
        f"{results.options['small_files']:,} files of {results.options['small_bytes']:,} bytes and one of "
        f"{results.options['large_bytes'] >> 20:,} MiB; "
        + (f"medians of {rounds} rounds" if rounds > 1 else "one round")
    )


def full_text(results: Results, judgements: list[Judgement]) -> str:
    """Everything for the terminal."""
    tables = [f"{title}\n\n{plain_text(rows)}" if title else plain_text(rows) for title, rows in _tables(results)]
    parts = [machine_line(results), *tables]
    if any(judgement.verdict is not Verdict.UNMEASURED for judgement in judgements):
        parts.append(plain_text(target_rows(judgements)))
    parts.append("\n".join(remarks(results)))
    return "\n\n".join(part for part in parts if part)


def full_markdown(results: Results, judgements: list[Judgement]) -> str:
    """Everything for the README."""
    tables = [
        f"**{title.capitalize()}**\n\n{markdown(rows)}" if title else markdown(rows) for title, rows in _tables(results)
    ]
    versions = [f"{r.label} {r.version}" for r in results.systems.values() if r.version]
    parts = [
        f"Measured {machine_line(results)}.",
        *tables,
        markdown(target_rows(judgements)),
        "\n".join(f"* {line}" for line in remarks(results)),
        "Versions: " + ", ".join(versions) + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tables(results: Results) -> list[tuple[str, list[list[str]]]]:
    """Return (title, rows) of every table that has rows besides its head."""
    tables = [(_TITLES[which], table(results, which)) for which in Pass]
    tables += [("", memory_rows(results)), ("", cpu_rows(results))]
    return [(title, rows) for title, rows in tables if len(rows) > 1]


def write_files(results: Results, judgements: list[Judgement], directory: Path) -> list[Path]:
    """Write latest.json and latest.md; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    document = results.as_plain() | {"targets": [judgement.as_plain() for judgement in judgements]}
    files = {
        directory / "latest.json": json.dumps(document, indent=1, sort_keys=True) + "\n",
        directory / "latest.md": full_markdown(results, judgements),
    }
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)
