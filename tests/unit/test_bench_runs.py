"""How a run goes through its systems, and that it takes everything away again."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import __main__ as command
from bench import dataset as datasets
from bench import machine, scenarios
from bench.memory import MemorySampler, Roles, cpu_seconds, resident, session_members
from bench.results import Pass, Results, SystemRecord
from bench.scenarios import ScenarioFailed, Visit
from bench.suite import SuiteOptions
from bench.systems.daemon import Daemon
from bench.systems.port import Absent, Site, Warmth, program
from bench.workdir import work_directory


class Copies:
    """A system without a mount: the files of the data set, and a log of what was done to it."""

    name = "copies"
    label = "copies"

    def __init__(self, root: Path, warmth: tuple[Warmth, ...]) -> None:
        self.root = root
        self.warmth = warmth
        self.log: list[str] = []
        self.requests: int | None = None

    def version(self) -> str:
        return "1"

    def prepare(self) -> str | None:
        return "bucket"

    def mount(self) -> Path:
        self.log.append("mount")
        return self.root

    def umount(self) -> None:
        self.log.append("umount")

    def reset(self) -> None:
        self.log.append("reset")

    def roles(self) -> Roles:
        return {"server": [os.getpid()]}

    def origin_requests(self) -> int | None:
        return self.requests


@pytest.fixture
def site(tmp_path: Path) -> Site:
    dataset = datasets.generate(tmp_path / "dataset", small_count=3, large_bytes=1 << 20, small_bytes=1000)
    return Site(
        work=tmp_path,
        dataset=dataset,
        endpoint_url="http://127.0.0.1:1",
        access_key="a",
        secret_key="b",
        region="r",
        environment={},
        bucket="bucket",
        filer_address="",
    )


def visit(
    site: Site, monkeypatch: pytest.MonkeyPatch, warmth: tuple[Warmth, ...], wanted: str = "", *, far: bool = False
) -> tuple[Copies, Results]:
    system = Copies(site.dataset.root, warmth)
    actual = scenarios.run_program

    def logged(module: str, spec: dict[str, Any], enter: tuple[str, ...] = ()) -> dict[str, Any]:
        system.log.append(spec["action"])
        if module == "bench.origin":
            return {}
        outcome = actual(module, spec | {"count": 10})
        return outcome | {"seconds": max(outcome["seconds"], 1e-6)}

    monkeypatch.setattr(scenarios, "run_program", logged)
    monkeypatch.setattr(machine, "drop_page_cache", lambda: system.log.append("drop"))
    results = Results({}, {})
    results.systems["copies"] = SystemRecord("copies")
    one = Visit(system, site, results, lambda name: not wanted or name == wanted)
    if far:
        one.far("bucket")
    else:
        one.run("bucket", (Pass.INSTALLED,))
    return system, results


def measured(results: Results) -> set[str]:
    return {scenario for _, _, scenario in results.samples}


NAMES = {"list-first", "list-second", "stat"}
COLD = {"small-cold", "large-cold"}
PAGE = {"small-page", "large-page"}


@pytest.mark.parametrize(
    ("warmth", "expected"),
    [
        ((Warmth.DISK,), NAMES | COLD | PAGE | {"small-disk", "large-disk", "random-disk"}),
        ((Warmth.SHM,), NAMES | COLD | PAGE | {"small-shm", "large-shm", "random-shm"}),
        (
            (Warmth.DISK, Warmth.SHM),
            NAMES | COLD | PAGE | {"small-disk", "large-disk", "small-shm", "large-shm", "random-shm"},
        ),
    ],
)
def test_each_kind_of_system_has_the_figures_of_its_tiers(
    site: Site, monkeypatch: pytest.MonkeyPatch, warmth: tuple[Warmth, ...], expected: set[str]
) -> None:
    _, results = visit(site, monkeypatch, warmth)
    assert measured(results) == expected
    assert results.systems["copies"].memory["anon.server"] > 0


def test_cold_is_a_fresh_mount_of_a_warm_server(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    system, _ = visit(site, monkeypatch, (Warmth.SHM,), "small-cold")
    assert system.log[:5] == ["umount", "reset", "warm", "mount", "small"]


def test_far_is_cold_with_the_names_listed_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    system, results = visit(site, monkeypatch, (Warmth.DISK, Warmth.SHM), far=True)
    assert system.log == ["umount", "reset", "warm", "mount", "list", "small", "large"]
    assert measured(results) == {"small-far", "large-far"}


def test_a_cold_large_file_says_whose_cpu_it_took(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as server:
        served = replace(site, server_session=server.pid)
        spent = {os.getpid(): iter((1.0, 1.25)), server.pid: iter((7.0, 7.5))}
        monkeypatch.setattr(scenarios, "cpu_seconds", lambda pid: next(spent[pid]))
        _, results = visit(served, monkeypatch, (Warmth.DISK,), "large-cold")
        server.kill()
    per_gib = (1 << 30) / site.dataset.large_bytes
    assert results.systems["copies"].cpu_s_per_gib == {"server": [0.5 * per_gib], "own": [0.25 * per_gib]}


def test_disk_warm_is_a_second_mount_with_nothing_in_memory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    system, results = visit(site, monkeypatch, (Warmth.DISK, Warmth.SHM), "small-disk")
    assert measured(results) == {"small-disk"}
    again = system.log.index("umount")
    assert "small" in system.log[:again]  # the disk cache was filled, unrecorded
    assert system.log[again:] == ["umount", "drop", "mount", "drop", "small", "drop"]


def test_shm_warm_drops_the_page_cache_and_does_not_unmount(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    system, results = visit(site, monkeypatch, (Warmth.SHM,), "small-shm")
    assert measured(results) == {"small-shm"}
    assert "umount" not in system.log
    assert system.log[-4:] == ["small", "drop", "small", "small"]


def test_a_slow_scenario_is_not_repeated(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results({}, {})
    results.systems["copies"] = SystemRecord("copies")
    one = Visit(Copies(site.dataset.root, ()), site, results, lambda name: True)
    one.record("small-cold", {"count": 3, "bytes": 3, "seconds": 20.0})
    one.record("small-cold", {"count": 3, "bytes": 3, "seconds": 10.0})
    assert results.count(Pass.INSTALLED, "copies", "small-cold") == 1
    assert "one sample only" in results.systems["copies"].notes[0]


def test_wrong_bytes_fail_the_visit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.dataset.root / "large.bin").write_bytes(b"x")
    with pytest.raises(ScenarioFailed, match="wrong bytes"):
        visit(site, monkeypatch, (Warmth.DISK,))


# -- what is taken away again ------------------------------------------------------------------------------------------


def test_a_directory_of_a_dead_run_is_removed_and_one_of_a_live_run_is_not(tmp_path: Path) -> None:
    dead, live = tmp_path / "run-dead", tmp_path / "run-live"
    for directory in (dead, live):
        (directory / "inside").mkdir(parents=True)
        (directory / "lock").touch()
    with (live / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with work_directory(tmp_path) as work:
            assert work.is_dir()
            assert not dead.exists()
            assert live.exists()
    assert not work.exists()


def test_processes_of_a_dead_run_are_ended_and_nobody_elses(tmp_path: Path) -> None:
    dead = tmp_path / "run-dead"
    (dead / "home").mkdir(parents=True)
    (dead / "lock").touch()
    homes = (dead / "home", tmp_path / "run-deadlier")
    theirs, others = (subprocess.Popen(["sleep", "60"], env={"HOME": str(home)}) for home in homes)
    try:
        with work_directory(tmp_path):
            assert theirs.wait(timeout=5) != 0
            assert others.poll() is None
    finally:
        others.kill()
        theirs.kill()
        others.wait()
        theirs.wait()


def test_the_directory_goes_when_the_run_fails(tmp_path: Path) -> None:
    def interrupted() -> None:
        with work_directory(tmp_path) as work:
            (work / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_that_does_not_mount_leaves_its_words_and_no_process(tmp_path: Path) -> None:
    daemon = Daemon("thing", tmp_path / "mnt", tmp_path / "log")
    with pytest.raises(RuntimeError, match="thing did not mount: no such bucket"):
        daemon.start(["sh", "-c", "echo no such bucket; exit 3"], dict(os.environ))
    assert daemon.roles() == {}
    daemon.stop()


def test_stopping_a_daemon_ends_its_children_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Daemon, "_answers", lambda self: True)
    monkeypatch.setattr("bench.systems.daemon._END_TIMEOUT_S", 0.3)
    daemon = Daemon("thing", tmp_path / "mnt", tmp_path / "log")
    daemon.start(["sh", "-c", "trap '' TERM; sleep 60 & wait; wait"], dict(os.environ))
    deadline = time.monotonic() + 5
    while len(members := daemon.roles()["thing"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(members) == 2
    daemon.stop()
    assert session_members(members[0]) == []  # the session's number is its first process


# -- the machine -------------------------------------------------------------------------------------------------------


def test_mounts_are_found_in_the_mount_table() -> None:
    assert machine.is_mounted(Path("/proc"))
    assert not machine.is_mounted(Path("/proc/self"))
    assert Path("/proc") in machine.mounts_below(Path("/")) or machine.mounts_below(Path("/")) == []
    assert machine.filesystem_of(Path("/proc/self")) == "proc"


def test_memory_and_cpu_of_a_process() -> None:
    block = bytearray(os.urandom(1 << 20) * 32)
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) - before < 0.05:
        sum(range(10_000))
    with MemorySampler(lambda: {"me": [os.getpid()], "gone": [2**22 + 1]}) as sampler:
        sampler.sample(with_pss=True)
    assert sampler.peaks["anon.me"] > len(block)
    assert sampler.peaks["anon.gone"] == 0
    assert sampler.peaks["rss"] >= sampler.peaks["anon"] > 0
    assert sampler.peaks["pss"] > len(block)
    assert resident(2**22 + 1)["RssAnon"] == 0


def test_a_missing_program_is_absence() -> None:
    with pytest.raises(Absent, match="`no-such-program` is not installed"):
        program("no-such-program")


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--only", "zfs"], ["--scenario", "warm"], ["--repeats", "0"]])
def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(machine, "missing_rights", list)
    outcome = CliRunner().invoke(command.main, arguments)
    assert outcome.exit_code == 2


def test_missing_rights_are_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    outcome = CliRunner().invoke(command.main, ["--quick"])
    assert outcome.exit_code == 1
    assert "needs root" in outcome.output


def test_quick_is_a_tenth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[SuiteOptions] = []
    monkeypatch.setattr(machine, "missing_rights", list)

    def measure(options: SuiteOptions, directory: Path) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr(command, "_measure", measure)
    outcome = CliRunner().invoke(command.main, ["--quick", "--scenario", "small,stat", "--only", "ext4,rclone"])
    assert outcome.exit_code == 0
    options = seen[0]
    assert (options.small_count, options.large_bytes, options.systems) == (500, 102 << 20, ("ext4", "rclone"))
    assert options.wants("small-page")
    assert options.wants("stat")
    assert not options.wants("large-cold")


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_a_daemon_ends_when_we_are_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from bench.systems.daemon import Daemon\n"
        "Daemon._answers = lambda self: True\n"
        "d = Daemon('x', Path(sys.argv[1]) / 'mnt', Path(sys.argv[1]) / 'log')\n"
        "d.start(['sleep', '60'], dict(os.environ))\n"
        "print(d.roles()['x'][0], flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    time.sleep(0.2)  # setpriv has to become sleep
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()
