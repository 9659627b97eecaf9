"""What cachefs has to reach beside its peers, and whether this run reached it.

Ratios compare medians of one run. A target whose peer is absent, or whose scenario was not measured, is neither reached
nor missed: it is reported as not measured.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bench.results import Pass, Results

_MIB = 1 << 20
_SUBJECT = "cachefs"
JUICEFS_MEMORY = "juicefs-memory"

R = TypeVar("R")
"""The results of a run."""


class Verdict(enum.StrEnum):
    """How a target ended."""

    REACHED = "yes"
    MISSED = "no"
    UNMEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Target(Generic[R]):
    """One line of the list of targets."""

    text: str
    bound: float
    reached: Callable[[R], float | None]
    at_most: bool = False
    unit: str = "x"

    def judge(self, results: R, write: Callable[[float], str]) -> Judgement:
        """Compare it with a run; see `compare`."""
        value = self.reached(results)
        return compare(self.text, self.bound, value, at_most=self.at_most, unit=self.unit, write=write)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A target and what came of it."""

    text: str
    bound: str
    reached: str
    verdict: Verdict

    def as_plain(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"target": self.text, "bound": self.bound, "reached": self.reached, "verdict": self.verdict.value}


def ratio(
    scenario: str, *peers: str, which: Pass = Pass.INSTALLED, of: str = _SUBJECT
) -> Callable[[Results], float | None]:
    """Return the function that compares cachefs (or another system) with the best of `peers`."""

    def compute(results: Results) -> float | None:
        ours = results.median(which, of, scenario)
        theirs = [value for peer in peers if (value := results.median(which, peer, scenario)) is not None]
        return ours / max(theirs) if ours is not None and theirs else None

    return compute


def figure(scenario: str) -> Callable[[Results], float | None]:
    """Return the function that takes a figure of cachefs as it is."""
    return lambda results: results.median(Pass.INSTALLED, _SUBJECT, scenario)


def fact(name: str) -> Callable[[Results], float | None]:
    """Return the function that takes a single fact."""
    return lambda results: results.facts.get(name)


def peak_mib(role: str) -> Callable[[Results], float | None]:
    """Return the function that takes the peak anonymous memory of one of our processes."""

    def compute(results: Results) -> float | None:
        record = results.systems.get(_SUBJECT)
        peak = record.memory.get(f"anon.{role}") if record is not None else None
        return peak / _MIB if peak is not None else None

    return compute


def _against_juicefs(which: Pass, page: float, shm: float, large: float, random: float) -> list[Target[Results]]:
    name = "JuiceFS (memory cache)" + (" with the guard held for everyone" if which is Pass.GUARD else " as installed")
    lines = [
        ("page-warm small files", "small-page", page),
        ("shm-warm small files", "small-shm", shm),
        ("shm-warm sequential", "large-shm", large),
        ("random 4 KiB shm-warm", "random-shm", random),
    ]
    return [
        Target(f"{text}, against {name}", bound, ratio(scenario, JUICEFS_MEMORY, which=which))
        for text, scenario, bound in lines
    ]


_S3_PEERS = ("juicefs", JUICEFS_MEMORY, "rclone", "s3fs")
_PEERS = (*_S3_PEERS, "seaweedfs")

cold_ceiling = ratio("large-cold", *_PEERS, of="obstore")
"""How much faster than the best peer the bare client reads the cold large file."""

TARGETS = (
    *_against_juicefs(Pass.INSTALLED, 3.5, 3.0, 2.3, 4.5),
    *_against_juicefs(Pass.GUARD, 1.5, 1.4, 1.7, 2.2),
    Target("page-warm small files, against the local file system", 0.5, ratio("small-page", "ext4")),
    Target("page-warm sequential, against the local file system", 0.6, ratio("large-page", "ext4")),
    Target("cold small files, against the best of JuiceFS, rclone, s3fs", 1.0, ratio("small-cold", *_S3_PEERS)),
    Target("cold sequential, against the best peer", 2.0, ratio("large-cold", *_PEERS)),
    Target("cold sequential, against obstore alone", 0.7, ratio("large-cold", "obstore")),
    Target("disk-warm sequential, against the local file system", 0.8, ratio("large-disk", "ext4")),
    Target("disk-warm small files, against JuiceFS (disk cache)", 1.0, ratio("small-disk", "juicefs")),
    Target("listing, second time", 100_000, figure("list-second"), unit="entries/s"),
    Target("S3 requests of listed names", 0, fact("cachefs.requests_for_listed_names"), at_most=True, unit="requests"),
    Target("longest stall of a reader under kill -9", 1000, figure("survival"), at_most=True, unit="ms"),
    Target("CPU of all processes while idle", 1.0, figure("idle"), at_most=True, unit="%"),
    Target("anonymous memory of the supervisor", 20, peak_mib("supervisor"), at_most=True, unit="MiB"),
    Target("anonymous memory of the worker", 120, peak_mib("worker"), at_most=True, unit="MiB"),
    Target("anonymous memory of the agent", 250, peak_mib("agent"), at_most=True, unit="MiB"),
)


def judge(results: Results) -> list[Judgement]:
    """Compare every target with this run."""
    return [target.judge(results, _plain) for target in TARGETS]


def compare(
    text: str, bound: float, value: float | None, *, at_most: bool, unit: str, write: Callable[[float], str]
) -> Judgement:
    """Compare a value with what has to be reached; `write` puts both into words."""
    said = f"{'<=' if at_most else '>='} {write(bound)} {unit}".rstrip()
    if value is None:
        return Judgement(text, said, "-", Verdict.UNMEASURED)
    good = value <= bound if at_most else value >= bound
    return Judgement(text, said, f"{write(value)} {unit}".rstrip(), Verdict.REACHED if good else Verdict.MISSED)


def brief(value: float) -> str:
    """Write a value with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.2f}"
