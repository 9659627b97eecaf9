"""What was measured: samples by pass, system and scenario, and everything a report needs to tell them truthfully.

INVARIANT: a figure exists only if bytes were read and were right. What failed or is absent has a reason and no figure.
"""

from __future__ import annotations

import enum
import statistics
from dataclasses import dataclass, field
from typing import Any


class Pass(enum.StrEnum):
    """How the machine was set while measuring."""

    INSTALLED = "installed"
    GUARD = "guard"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One column of the table."""

    name: str
    title: str
    unit: str
    warm: bool = True
    """Whether it is measured again with the guard held (cold ones are not: they would cost the time of a whole run)."""


SCENARIOS = (
    Scenario("list-first", "list, first time", "entries/s", warm=False),
    Scenario("list-second", "list, again", "entries/s"),
    Scenario("stat", "stat of listed names", "files/s"),
    Scenario("small-cold", "small files, cold", "files/s", warm=False),
    Scenario("small-far", "small files, cold, S3 20 ms away", "files/s", warm=False),
    Scenario("small-disk", "small files, disk-warm", "files/s"),
    Scenario("small-shm", "small files, shm-warm", "files/s"),
    Scenario("small-page", "small files, page-warm", "files/s"),
    Scenario("large-cold", "large file, cold", "MB/s", warm=False),
    Scenario("large-far", "large file, cold, S3 20 ms away", "MB/s", warm=False),
    Scenario("large-disk", "large file, disk-warm", "MB/s"),
    Scenario("large-shm", "large file, shm-warm", "MB/s"),
    Scenario("large-page", "large file, page-warm", "MB/s"),
    Scenario("random-disk", "random 4 KiB, disk-warm", "reads/s"),
    Scenario("random-shm", "random 4 KiB, shm-warm", "reads/s"),
    Scenario("readahead-128", "large, shm-warm, 128 KiB read-ahead", "MB/s"),
    Scenario("readahead-4096", "large, shm-warm, 4 MiB read-ahead", "MB/s"),
    Scenario("unguarded-small", "small files, shm-warm, --low-latency off", "files/s"),
    Scenario("unguarded-large", "large file, shm-warm, --low-latency off", "MB/s"),
    Scenario("unguarded-random", "random 4 KiB, shm-warm, --low-latency off", "reads/s"),
    Scenario("survival", "longest stall under kill -9", "ms", warm=False),
    Scenario("idle", "CPU while idle", "%", warm=False),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@dataclass(slots=True)
class SystemRecord:
    """One system of the table."""

    label: str
    version: str = ""
    absent: str | None = None
    """Why it was not measured at all."""
    notes: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    """Peaks in bytes, see `bench.memory.MemorySampler`."""
    cpu_s_per_gib: dict[str, list[float]] = field(default_factory=dict)
    """What the large file, cold, took: by the S3 server ("server") and by the system's own processes ("own")."""


@dataclass(slots=True)
class Results:
    """Everything of one run."""

    machine: dict[str, Any]
    options: dict[str, Any]
    systems: dict[str, SystemRecord] = field(default_factory=dict)
    samples: dict[tuple[Pass, str, str], list[float]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    """Single figures that are no rate, e.g. requests made by the second listing."""
    remarks: list[str] = field(default_factory=list)
    """What a reader must know that is about no single system."""
    slow: set[tuple[Pass, str, str]] = field(default_factory=set)
    """Scenarios that are not repeated because one sample took too long."""
    seconds: float = 0.0

    def add(self, which: Pass, system: str, scenario: str, value: float) -> None:
        """Record a sample."""
        assert scenario in BY_NAME, scenario
        self.samples.setdefault((which, system, scenario), []).append(value)

    def add_cpu(self, system: str, who: str, seconds: float, size: int) -> None:
        """Record the CPU time that somebody ("server" or "own") spent on a cold reading of `size` bytes."""
        self.systems[system].cpu_s_per_gib.setdefault(who, []).append(seconds * (1 << 30) / size)

    def count(self, which: Pass, system: str, scenario: str) -> int:
        """Return how many samples there are."""
        return len(self.samples.get((which, system, scenario), ()))

    def median(self, which: Pass, system: str, scenario: str) -> float | None:
        """Return the median, or None when nothing was measured."""
        values = self.samples.get((which, system, scenario))
        return statistics.median(values) if values else None

    def note(self, system: str, text: str) -> None:
        """Keep a remark for the report, once."""
        notes = self.systems[system].notes
        if text not in notes:
            notes.append(text)

    def as_plain(self) -> dict[str, Any]:
        """Return JSON-able values."""
        figures: dict[str, Any] = {}
        for (which, system, scenario), values in self.samples.items():
            figures.setdefault(which.value, {}).setdefault(system, {})[scenario] = {
                "median": statistics.median(values),
                "unit": BY_NAME[scenario].unit,
                "samples": [round(value, 3) for value in values],
            }
        systems = {
            name: {
                "label": record.label,
                "version": record.version,
                "absent": record.absent,
                "notes": record.notes,
                "peak_memory_bytes": record.memory,
                "large_cold_cpu_s_per_gib": {
                    who: round(statistics.median(spent), 2) for who, spent in record.cpu_s_per_gib.items()
                },
            }
            for name, record in self.systems.items()
        }
        return {
            "machine": self.machine,
            "options": self.options,
            "seconds": round(self.seconds, 1),
            "systems": systems,
            "figures": figures,
            "facts": self.facts,
            "remarks": self.remarks,
        }
