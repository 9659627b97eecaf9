"""One visit to one system: cold, then disk-warm, then shm-warm and page-warm, the latter twice (guard off and held).

States, the same for everybody:

* cold: no cache directory, freshly mounted; the S3 server's files are in the page cache (obstore just read them).
* far: cold, and the S3 server is at the other end of a link with a delay (`bench.far_link`).
* disk-warm: unmounted, every process ended, page cache dropped, mounted again: the system's own disk cache answers.
* shm-warm: page cache dropped, the system's memory tier has the file (cachefs reads large ones twice until it has).
* page-warm: read again at once.

A system without a disk cache (or without a memory tier) has no figure in that state. A local file system has only disk
and page.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import machine
from bench.dataset import LARGE_NAME, SMALL_DIRECTORY
from bench.memory import MemorySampler, cpu_seconds, session_members
from bench.results import BY_NAME, Pass, Results
from bench.systems.cachefs import Cachefs
from bench.systems.port import Site, System, Warmth

READER_TIMEOUT_S = 240.0
MOST_READINGS = 3
SLOW_SAMPLE_S = 15.0
"""A scenario whose first sample took longer is not repeated: it would eat the time of all others."""
LIST_PASSES = 4
RANDOM_COUNT = 20_000
RANDOM_LIMIT_S = 3.0
SURVIVAL_S = 6.0
IDLE_S = 20.0


class ScenarioFailed(Exception):
    """The reader got an error or wrong bytes; the message says which."""


def run_program(module: str, spec: dict[str, Any], enter: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run one of our measuring programs in a process of its own and return its outcome. Raises ScenarioFailed.

    `enter` is what starts a program elsewhere (`Site.beside_server`).
    """
    try:
        done = subprocess.run(
            [*enter, sys.executable, "-m", module],
            input=json.dumps(spec),
            capture_output=True,
            text=True,
            timeout=READER_TIMEOUT_S,
            check=False,
            cwd=Path(__file__).parent.parent,
        )
    except subprocess.TimeoutExpired as error:
        raise ScenarioFailed(f"{spec['action']} did not end within {READER_TIMEOUT_S:.0f} s") from error
    try:
        outcome: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise ScenarioFailed(f"{spec['action']}: {done.stderr.strip()[-300:]}") from error
    if "error" in outcome:
        raise ScenarioFailed(f"{spec['action']}: {outcome['error']}")
    return outcome


def rate(scenario: str, outcome: dict[str, Any]) -> float:
    """Return the figure of an outcome in the scenario's unit."""
    amount = outcome["bytes"] / 1e6 if BY_NAME[scenario].unit == "MB/s" else outcome["count"]
    return float(amount / outcome["seconds"])


class Visit:
    """Measures one system once. `wanted` says which scenarios the person asked for."""

    def __init__(self, system: System, site: Site, results: Results, wanted: Callable[[str], bool]) -> None:
        self.system = system
        self.site = site
        self.results = results
        self._wanted = wanted
        self._root = Path()
        self._pass = Pass.INSTALLED
        self._mounted = False
        self._loaded: set[str] = set()
        """Which parts of the data set the present mount has read."""

    # -- the states ---------------------------------------------------------------------------------------------------

    def run(self, bucket: str | None, passes: tuple[Pass, ...]) -> None:
        """Go through all states. Raises ScenarioFailed or RuntimeError; the caller unmounts."""
        with MemorySampler(self.system.roles) as sampler:
            self.cold(bucket)
            for which in passes:
                self._pass = which
                with machine.wakeup_guard(which is Pass.GUARD):
                    self.names()
                    self.disk_warm()
                    self.memory_warm()
            self._pass = Pass.INSTALLED
            sampler.sample(with_pss=True)
            memory = self.results.systems[self.system.name].memory
            for name, value in sampler.peaks.items():
                memory[name] = max(value, memory.get(name, 0))
            if isinstance(self.system, Cachefs):
                self.read_ahead()
                self.survival(self.system)
                self.idle(self.system)
                self.without_guard(self.system)

    def cold(self, bucket: str | None) -> None:
        """A first mount with nothing cached."""
        wanted = [name for name in ("list-first", "small-cold", "large-cold") if self._due(name)]
        if bucket is None or not wanted:
            self.mount()
            return
        self._mount_first_time(bucket)
        if self._due("list-first"):
            self.record("list-first", self.listing())
        if self._due("small-cold"):
            self.record("small-cold", self.small())
        if self._due("large-cold"):
            machine.make_memory_resident(3 * self.site.dataset.large_bytes)
            self.record("large-cold", self._with_cpu_counted(self.large))

    def far(self, bucket: str) -> None:
        """The same with a server that is far away; nothing else is measured there."""
        self._mount_first_time(bucket)
        if self._due("small-far"):
            self.listing(passes=1)
            self.record("small-far", self.small())
        if self._due("large-far"):
            machine.make_memory_resident(3 * self.site.dataset.large_bytes)
            self.record("large-far", self.large())

    def _mount_first_time(self, bucket: str) -> None:
        self.umount()
        self.system.reset()
        run_program("bench.origin", {"action": "warm", **origin_spec(self.site, bucket)}, self.site.beside_server)
        self.mount()

    def _with_cpu_counted(self, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Keep what a reading of the large file costs the server and the system."""
        own = [pid for pids in self.system.roles().values() for pid in pids]
        pids = {"server": server_processes(self.site), "own": own}
        before = {who: sum(map(cpu_seconds, some)) for who, some in pids.items()}
        outcome = action()
        for who, some in pids.items():
            self.results.add_cpu(self.system.name, who, sum(map(cpu_seconds, some)) - before[who], outcome["bytes"])
        return outcome

    def names(self) -> None:
        """What needs no file content. Counts the requests that the names cost once they are listed."""
        self.listing()
        before = self.system.origin_requests()
        if self._due("list-second"):
            outcome = self.listing()
            again = statistics.median(outcome["runs"][1:])
            self.record("list-second", outcome | {"seconds": again})
        if self._due("stat"):
            self.record("stat", self.read({"action": "stat", "directory": self.small_directory}))
        after = self.system.origin_requests()
        if before is not None and after is not None:
            self.results.facts[f"{self.system.name}.requests_for_listed_names"] = after - before

    def disk_warm(self) -> None:
        """The disk cache (or the local disk) answers."""
        local = not self.system.warmth
        if not local and Warmth.DISK not in self.system.warmth:
            return
        if not any(self._due(f"{part}-disk") for part in ("small", "large", "random")) and not local:
            return
        if not local:
            self.load("small", "large")
            self.umount()
        machine.drop_page_cache()
        self.mount()
        requests = self.system.origin_requests()
        for part, action in (("small", self.small), ("large", self.large)):
            machine.drop_page_cache()
            if self._due(f"{part}-disk") or self._due(f"{part}-page"):
                self.record(f"{part}-disk", action())
                if Warmth.SHM not in self.system.warmth:
                    self.record(f"{part}-page", action())
        after = self.system.origin_requests()
        if requests is not None and after is not None:
            self.results.facts[f"{self.system.name}.requests_while_disk_warm"] = after - requests
        if Warmth.SHM not in self.system.warmth and self._due("random-disk"):
            machine.drop_page_cache()
            self.record("random-disk", self.random())

    def memory_warm(self) -> None:
        """The memory tier answers, then the page cache."""
        if Warmth.SHM not in self.system.warmth:
            return
        for part, action in (("small", self.small), ("large", self.large)):
            if not (self._due(f"{part}-shm") or self._due(f"{part}-page")):
                continue
            self.load_into_memory(part)
            machine.drop_page_cache()
            self.record(f"{part}-shm", action())
            self.record(f"{part}-page", action())
        if self._due("random-shm"):
            self.load_into_memory("large")
            machine.drop_page_cache()
            self.record("random-shm", self.random())

    # -- what only cachefs is asked -----------------------------------------------------------------------------------

    def read_ahead(self) -> None:
        """The same reading with a small and a large read-ahead of the kernel."""
        for kib in (128, 4096):
            name = f"readahead-{kib}"
            if not self._due(name):
                continue
            self.load_into_memory("large")
            before = machine.set_read_ahead(self._root, kib)
            machine.drop_page_cache()
            self.record(name, self.large())
            machine.set_read_ahead(self._root, before)

    def survival(self, system: Cachefs) -> None:
        """Kill -9 the worker, then the agent, under a reader."""
        if not self._due("survival"):
            return
        self.load("small")
        spec = {"action": "watch", "directory": self.small_directory, "duration_s": SURVIVAL_S}
        outcome = self.read(spec, lambda: _kill_in_turn(system))
        if outcome["errors"]:
            raise ScenarioFailed(f"a reader saw an error when a process was killed: {outcome['errors'][0]}")
        self.results.add(Pass.INSTALLED, system.name, "survival", outcome["longest_ms"])

    def idle(self, system: Cachefs) -> None:
        """CPU share of all processes while nobody reads."""
        if not self._due("idle") or self.results.count(Pass.INSTALLED, system.name, "idle"):
            return
        pids = [pid for pids in system.roles().values() for pid in pids]
        time.sleep(2)
        before = sum(cpu_seconds(pid) for pid in pids)
        time.sleep(IDLE_S)
        spent = sum(cpu_seconds(pid) for pid in pids) - before
        self.results.add(Pass.INSTALLED, system.name, "idle", 100 * spent / IDLE_S)

    def without_guard(self, system: Cachefs) -> None:
        """What the wake-up guard is worth: what the memory tier answers, on a mount that never holds it."""
        actions = {"small": self.small, "large": self.large, "random": self.random}
        wanted = [part for part in actions if self._due(f"unguarded-{part}")]
        if not wanted:
            return
        self.umount()
        with system.with_more("--low-latency", "off"):
            self.mount()
            for part in wanted:
                self.load_into_memory("small" if part == "small" else "large")
                machine.drop_page_cache()
                self.record(f"unguarded-{part}", actions[part]())
            self.umount()

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def small_directory(self) -> str:
        """The directory of the small files below the mount."""
        return str(self._root / SMALL_DIRECTORY)

    def mount(self) -> None:
        """Mount when it is not mounted; its memory tier is empty then."""
        if not self._mounted:
            self._root = self.system.mount()
            self._mounted = True
            self._loaded.clear()

    def umount(self) -> None:
        """Unmount; nothing but the disk cache survives."""
        self._mounted = False
        self.system.umount()

    def load(self, *parts: str) -> None:
        """Read what the present mount has not read yet, without recording it."""
        for part in parts:
            if part not in self._loaded:
                (self.small if part == "small" else self.large)()

    def load_into_memory(self, part: str) -> None:
        """The same, until the memory tier has it."""
        self.load(part)
        readings = 0
        while part == "large" and isinstance(self.system, Cachefs) and not self.system.has_in_memory(LARGE_NAME):
            if readings > MOST_READINGS:
                raise ScenarioFailed("the large file does not come into the shm tier")
            readings += 1
            machine.drop_page_cache()
            self.large()

    def listing(self, passes: int = LIST_PASSES) -> dict[str, Any]:
        """List the directory of small files."""
        return self.read({"action": "list", "directory": self.small_directory, "passes": passes})

    def small(self) -> dict[str, Any]:
        """Read all small files."""
        outcome = self.read({"action": "small", "directory": self.small_directory})
        self._loaded.add("small")
        return outcome

    def large(self) -> dict[str, Any]:
        """Read the large file."""
        outcome = self.read({"action": "large", "path": str(self._root / LARGE_NAME)})
        self._loaded.add("large")
        return outcome

    def random(self) -> dict[str, Any]:
        """Read random pages of the large file."""
        spec = {"action": "random", "path": str(self._root / LARGE_NAME)}
        return self.read(spec | {"count": RANDOM_COUNT, "limit_s": RANDOM_LIMIT_S, "seed": 7})

    def read(self, spec: dict[str, Any], meanwhile: Callable[[], None] | None = None) -> dict[str, Any]:
        """Run the reader; `meanwhile` runs in this process at the same time."""
        complete = spec | {"manifest": str(self.site.dataset.manifest)}
        if meanwhile is None:
            return run_program("bench.reader", complete)
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(run_program, "bench.reader", complete)
            meanwhile()
            return reading.result()

    def record(self, scenario: str, outcome: dict[str, Any]) -> None:
        """Keep a sample, if it was asked for."""
        if not self._due(scenario):
            return
        self.results.add(self._pass, self.system.name, scenario, rate(scenario, outcome))
        if outcome["seconds"] > SLOW_SAMPLE_S:
            self.results.note(
                self.system.name, f"{BY_NAME[scenario].title}: one sample only, it took over {SLOW_SAMPLE_S:.0f} s"
            )
            self.results.slow.add((self._pass, self.system.name, scenario))

    def _due(self, scenario: str) -> bool:
        return self._wanted(scenario) and (self._pass, self.system.name, scenario) not in self.results.slow


def origin_spec(site: Site, bucket: str) -> dict[str, Any]:
    """What `bench.origin` needs to reach a bucket."""
    return {
        "bucket": bucket,
        "endpoint_url": site.endpoint_url,
        "region": site.region,
        "access_key": site.access_key,
        "secret_key": site.secret_key,
        "manifest": str(site.dataset.manifest),
        "directory": SMALL_DIRECTORY,
        "key": LARGE_NAME,
    }


def measure_origin(site: Site, results: Results, wanted: Callable[[str], bool], state: str = "cold") -> None:
    """Record what obstore alone gets from the server, for the rows of `state` (cold or far)."""
    names = [name for name in (f"small-{state}", f"large-{state}") if wanted(name)]
    if names:
        run_program("bench.origin", {"action": "warm", **origin_spec(site, site.bucket)}, site.beside_server)
    for name in names:
        if name.startswith("large"):
            machine.make_memory_resident(3 * site.dataset.large_bytes)
        server = server_processes(site)
        before = sum(map(cpu_seconds, server))
        outcome = run_program("bench.origin", {"action": name.partition("-")[0], **origin_spec(site, site.bucket)})
        results.add(Pass.INSTALLED, "obstore", name, rate(name, outcome))
        if name == "large-cold":
            results.add_cpu("obstore", "server", sum(map(cpu_seconds, server)) - before, outcome["bytes"])
            results.add_cpu("obstore", "own", outcome["cpu_s"], outcome["bytes"])


def server_processes(site: Site) -> list[int]:
    """The processes of the S3 server."""
    return session_members(site.server_session) if site.server_session else []


def _kill_in_turn(system: Cachefs) -> None:
    import os
    import signal

    for role in ("worker", "agent"):
        time.sleep(SURVIVAL_S / 4)
        os.kill(system.mounted.pid(role), signal.SIGKILL)
