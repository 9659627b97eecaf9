"""One whole run: one S3 server, one data set, every system visited in turn, round after round.

Repeats are interleaved (round 1 of everybody, then round 2 of everybody): noise of the machine hits all. Before the
rounds comes one with a server of its own that is far away, and fewer small files: each costs a round trip or more.
Whatever happens, every mount, process and link of the run is gone and its directory removed when `run_suite` returns.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench import dataset as datasets
from bench import machine
from bench.far_link import FarLink, LinkUnavailable
from bench.memory import cpu_seconds
from bench.results import Pass, Results, SystemRecord
from bench.s3_server import S3Server, S3ServerError
from bench.scenarios import ScenarioFailed, Visit, measure_origin
from bench.systems.cachefs import Cachefs
from bench.systems.ext4 import LocalFiles
from bench.systems.juicefs import JuiceFS
from bench.systems.port import Absent, Site, System, Warmth
from bench.systems.rclone import Rclone
from bench.systems.s3fs import S3FS
from bench.systems.seaweedfs import SeaweedMount
from bench.workdir import work_directory

BUCKET = "bench-files"
FAR_SCENARIOS = ("small-far", "large-far")

FACTORIES: dict[str, Callable[[Site], System]] = {
    "ext4": LocalFiles,
    "cachefs": Cachefs,
    "juicefs": lambda site: JuiceFS(site, Warmth.DISK),
    "juicefs-memory": lambda site: JuiceFS(site, Warmth.SHM),
    "rclone": Rclone,
    "seaweedfs": SeaweedMount,
    "s3fs": S3FS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions:
    """What a person asked for."""

    work_dir: Path
    small_count: int
    far_small_count: int
    large_bytes: int
    repeats: int
    time_limit_s: float
    systems: tuple[str, ...]
    scenarios: tuple[str, ...]
    passes: tuple[Pass, ...] = (Pass.INSTALLED, Pass.GUARD)

    def wants(self, scenario: str) -> bool:
        """Whether a scenario is to be measured (a bare "small" means all of its states)."""
        return not self.scenarios or any(scenario == name or scenario.startswith(f"{name}-") for name in self.scenarios)


def run_suite(options: SuiteOptions, say: Callable[[str], None]) -> Results:
    """Measure everything. `say` gets one line per step."""
    begun = time.monotonic()
    results = Results(machine.facts(), _plain_options(options))
    if any(map(options.wants, FAR_SCENARIOS)):
        _measure_far(options, results, say)
    if not options.scenarios or not set(options.scenarios) <= set(FAR_SCENARIOS):
        _measure_near(options, results, begun + options.time_limit_s, say)
    results.seconds = time.monotonic() - begun
    return results


def _measure_near(options: SuiteOptions, results: Results, deadline: float, say: Callable[[str], None]) -> None:
    with work_directory(options.work_dir) as work, S3Server(str(work)) as server:
        site = make_site(work, server, options, say)
        systems = _prepare(site, options, results, say)
        try:
            _rounds(options, results, site, systems, deadline, say)
        finally:
            for system, _ in systems:
                system.umount()


def _measure_far(options: SuiteOptions, results: Results, say: Callable[[str], None]) -> None:
    """One visit to every system, with a server at the other end of a link with a delay."""
    try:
        with (
            work_directory(options.work_dir) as work,
            FarLink() as link,
            S3Server(str(work), address=link.address, enter=link.enter) as server,
        ):
            few = replace(options, small_count=options.far_small_count)
            site = replace(make_site(work, server, few, say), beside_server=link.enter)
            results.facts["far.round_trip_ms"] = _round_trip_ms(link.address, server.port)
            _visit_far(few, results, site, say)
            results.facts["far.link_cpu_s_per_gib"] = cpu_seconds(link.pid) * (1 << 30) / link.carried_bytes()
    except (LinkUnavailable, S3ServerError) as error:
        results.remarks.append(f"S3 far away: not measured ({error})")
        say(f"S3 far away: not measured: {error}")


def _visit_far(options: SuiteOptions, results: Results, site: Site, say: Callable[[str], None]) -> None:
    systems = _prepare(site, options, results, say)
    measure_origin(site, results, options.wants, "far")
    for system, bucket in systems:
        if bucket is None:
            continue
        say(f"S3 far away: {system.label}")
        try:
            Visit(system, site, results, options.wants).far(bucket)
        except (ScenarioFailed, RuntimeError, OSError) as error:
            results.note(system.name, f"S3 far away: {error}")
            say(f"FAILED: {system.label}: {error}")
        finally:
            system.umount()


def _round_trip_ms(address: str, port: int) -> float:
    """Return the shortest time that a connection took to be made, which is one round trip."""
    shortest = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        with socket.create_connection((address, port), timeout=5):
            shortest = min(shortest, time.perf_counter() - begun)
    return shortest * 1000


def make_site(work: Path, server: S3Server, options: SuiteOptions, say: Callable[[str], None]) -> Site:
    """Generate the data set and put it into the bucket."""
    say(f"data set: {options.small_count} x {datasets.SMALL_BYTES} bytes + {options.large_bytes >> 20} MiB")
    dataset = datasets.generate(work / "dataset", small_count=options.small_count, large_bytes=options.large_bytes)
    datasets.upload(dataset, server, BUCKET)
    return site_of(work, server, dataset)


def site_of(work: Path, server: S3Server, dataset: datasets.Dataset) -> Site:
    """Return where systems find the server and a data set that is in its bucket."""
    return Site(
        work=work,
        dataset=dataset,
        endpoint_url=server.endpoint_url,
        access_key=server.access_key,
        secret_key=server.secret_key,
        region=server.region,
        environment=server.environment,
        bucket=BUCKET,
        filer_address=server.filer_address,
        server_session=server.pid,
    )


def _prepare(
    site: Site, options: SuiteOptions, results: Results, say: Callable[[str], None]
) -> list[tuple[System, str | None]]:
    """Make the systems ready; those that cannot be measured keep the reason."""
    ready: list[tuple[System, str | None]] = []
    for name in options.systems:
        system = FACTORIES[name](site)
        record = results.systems.setdefault(name, SystemRecord(system.label))
        try:
            record.version = system.version()
            say(f"preparing {system.label} {record.version}")
            ready.append((system, system.prepare()))
            record.absent = None
        except (Absent, RuntimeError, OSError) as error:
            record.absent = str(error)
            say(f"absent: {system.label}: {error}")
            system.umount()
    results.systems.setdefault(
        "obstore", SystemRecord("obstore alone (no file system)", results.machine["libraries"]["obstore"])
    )
    return ready


def _rounds(
    options: SuiteOptions,
    results: Results,
    site: Site,
    systems: list[tuple[System, str | None]],
    deadline: float,
    say: Callable[[str], None],
) -> None:
    failures: dict[str, int] = {}
    for number in range(1, options.repeats + 1):
        begun = time.monotonic()
        measure_origin(site, results, options.wants)
        for system, bucket in systems:
            if failures.get(system.name, 0) >= 2:
                continue
            say(f"round {number} of {options.repeats}: {system.label}")
            try:
                Visit(system, site, results, options.wants).run(bucket, options.passes)
            except (ScenarioFailed, RuntimeError, OSError) as error:
                failures[system.name] = failures.get(system.name, 0) + 1
                results.note(system.name, f"round {number}: {error}")
                say(f"FAILED: {system.label}: {error}")
            finally:
                system.umount()
            say(f"  {time.monotonic() - begun:.0f} s into the round")
        results.options["rounds_done"] = number
        if time.monotonic() + (time.monotonic() - begun) > deadline:
            say(f"stopping after round {number}: another one would pass the time limit")
            return


def _plain_options(options: SuiteOptions) -> dict[str, object]:
    return {
        "small_files": options.small_count,
        "far_small_files": options.far_small_count,
        "small_bytes": datasets.SMALL_BYTES,
        "large_bytes": options.large_bytes,
        "repeats": options.repeats,
        "systems": list(options.systems),
        "scenarios": list(options.scenarios),
    }
