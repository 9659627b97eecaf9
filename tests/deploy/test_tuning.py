"""The tune script, in root directories that tests make: what it finds, what it changes, and that it does so once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.deploy.chart import REPOSITORY

TUNING = REPOSITORY / "deploy/tuning"
TUNE = TUNING / "tune"
ANSIBLE = shutil.which("ansible-playbook")
STOCK = {
    "net/core/somaxconn": "4096",
    "net/core/netdev_max_backlog": "1000",
    "net/core/rmem_max": "212992",
    "net/core/wmem_max": "212992",
    "net/ipv4/tcp_slow_start_after_idle": "1",
    "net/ipv4/tcp_mtu_probing": "0",
    "vm/max_map_count": "1048576",
}
"""As a node comes; the first and the last are good already."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, value in STOCK.items():
        put(tmp_path, f"proc/sys/{name}", f"{value}\n")
    put(tmp_path, "proc/meminfo", "MemTotal:       65536000 kB\nMemFree: 1 kB\n")
    put(
        tmp_path,
        "proc/mounts",
        "/dev/nvme0n1p2 / ext4 rw,relatime 0 0\ntmpfs /dev/shm tmpfs rw,nosuid,size=8388608k 0 0\n",
    )
    put(tmp_path, "proc/net/route", "Iface\tDestination\tGateway\neth1\t0002000A\t0\neth0\t00000000\t0102000A\n")
    put(tmp_path, "sys/class/net/eth0/mtu", "1500\n")
    put(tmp_path, "sys/block/nvme0n1/queue/rotational", "0\n")
    put(tmp_path, "etc/fstab", "# disks\nUUID=1 / ext4 defaults 0 1\ntmpfs /dev/shm tmpfs size=8G 0 0\n")
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tune(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(TUNE), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def kinds(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        kind, _, text = line.partition(" ")
        found.setdefault(kind, []).append(text.strip())
    assert found.keys() <= {"ok", "set", "differs", "advice", "failed"}
    return found


def snapshot(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def test_check_lists_and_changes_nothing(root: Path) -> None:
    before = snapshot(root)
    done = tune(root, "--check", "--shm", "32GiB", "--users")
    assert done.returncode == 1
    assert done.stderr == ""
    names = [text.split()[0].rstrip(":") for text in kinds(done)["differs"]]
    assert names == [
        "net.core.netdev_max_backlog", "net.core.rmem_max", "net.core.wmem_max", "net.ipv4.tcp_slow_start_after_idle",
        "net.ipv4.tcp_mtu_probing", "/etc/sysctl.d/90-cachefs.conf", "/dev/shm", "/etc/fstab", "/etc/fuse.conf",
    ]  # fmt: skip
    assert snapshot(root) == before


def test_it_sets_once_and_then_agrees(root: Path) -> None:
    options = ("--shm", "32GiB", "--users")
    first = tune(root, *options)
    assert first.returncode == 0, first.stdout
    after = snapshot(root)
    assert after["proc/sys/net/core/rmem_max"] == "67108864\n"
    assert after["proc/sys/vm/max_map_count"] == "1048576\n"
    kept = dict(re.findall(r"^(\S+) = (\S+)$", after["etc/sysctl.d/90-cachefs.conf"], re.MULTILINE))
    assert kept.keys() == {name.replace("/", ".") for name in STOCK}
    assert kept["vm.max_map_count"] == "1048576", "what is larger stays, after a boot too"
    assert after["etc/fstab"].splitlines() == [
        "# disks", "UUID=1 / ext4 defaults 0 1", "tmpfs /dev/shm tmpfs rw,nosuid,nodev,size=33554432k 0 0",
    ]  # fmt: skip
    assert after["etc/fuse.conf"] == "user_allow_other\n"
    # the boot that the fake root cannot have
    put(root, "proc/mounts", after["proc/mounts"].replace("8388608k", "33554432k"))
    before = snapshot(root)
    again = tune(root, *options)
    assert (again.returncode, "set" in kinds(again)) == (0, False)
    assert tune(root, "--check", *options).returncode == 0
    assert snapshot(root) == before


def test_what_cannot_be_read_is_not_replaced(root: Path) -> None:
    for name in ("fstab", "fuse.conf"):
        (root / "etc" / name).unlink(missing_ok=True)
        (root / "etc" / name / "kept").mkdir(parents=True)
    done = tune(root, "--shm", "32GiB", "--users")
    assert done.returncode == 1
    assert [text.split(":")[0] for text in kinds(done)["failed"]] == ["/etc/fstab", "/etc/fuse.conf"]
    assert sorted(path.name for path in (root / "etc").iterdir()) == ["fstab", "fuse.conf", "sysctl.d"]


def test_what_others_wrote_stays(root: Path) -> None:
    put(root, "etc/fuse.conf", "# of others\nmount_max = 100\n")
    tune(root, "--users")
    assert (root / "etc/fuse.conf").read_text() == "# of others\nmount_max = 100\nuser_allow_other\n"


def test_without_wishes_only_the_kernel_is_tuned(root: Path) -> None:
    assert tune(root).returncode == 0
    assert (root / "etc/fstab").read_text().endswith("size=8G 0 0\n")
    assert not (root / "etc/fuse.conf").exists()


def test_advice_is_no_difference(root: Path) -> None:
    tune(root)
    done = tune(root, "--check", "--cache-size", "900TiB")
    assert done.returncode == 0
    advice = " ".join(kinds(done)["advice"])
    assert "MTU of eth0 is 1500" in advice
    assert "noatime" in advice
    assert "921600 GiB" in advice


@pytest.mark.parametrize(
    ("mounts", "rotational", "said"),
    [
        ("overlay / overlay rw 0 0\n", "0", "is on overlay"),
        ("nas:/x / ext4 rw 0 0\nnas:/x /var/cache nfs4 rw 0 0\n", "0", "is on nfs4"),
        ("/dev/sda1 / ext4 rw,noatime 0 0\n", "1", "/dev/sda1 turns"),
        ("", "0", "cannot be seen"),
    ],
)
def test_disks_that_are_no_good(root: Path, mounts: str, rotational: str, said: str) -> None:
    put(root, "proc/mounts", mounts)
    put(root, "sys/block/sda/queue/rotational", rotational)
    assert said in " ".join(kinds(tune(root, "--check")).get("advice", []))


def test_a_good_node_has_nothing_to_hear(root: Path) -> None:
    put(root, "sys/class/net/eth0/mtu", "9001\n")
    put(root, "proc/mounts", "/dev/nvme0n1p2 / ext4 rw,noatime 0 0\ntmpfs /dev/shm tmpfs rw,size=8388608k 0 0\n")
    tune(root)
    assert kinds(tune(root, "--check")).keys() == {"ok"}


def test_too_much_memory_is_said(root: Path) -> None:
    assert "three quarters" in " ".join(kinds(tune(root, "--shm", "60GiB"))["advice"])


@pytest.mark.parametrize(
    "wrong", [["--shm", "64G"], ["--shm"], ["--chek"], ["--cache-dir", "cache"], ["--cache-size", "-1GiB"]]
)
def test_wrong_options_end_with_two(root: Path, wrong: list[str]) -> None:
    before = snapshot(root)
    done = tune(root, *wrong)
    assert done.returncode == 2
    assert done.stderr.startswith("tune: ")
    assert done.stderr.count("\n") == 1
    assert snapshot(root) == before


def test_the_playbook_is_yaml_and_calls_the_script() -> None:
    [play] = yaml.safe_load((TUNING / "playbook.yml").read_text(encoding="utf-8"))
    scripts = [task["ansible.builtin.script"] for task in play["tasks"] if "ansible.builtin.script" in task]
    assert [text.split()[0] for text in scripts] == ["tune", "tune"]
    assert scripts[0].startswith("tune --check ")
    options = set(re.findall(r"--[a-z-]+", " ".join([*scripts, play["vars"]["cachefs_tune_options"]])))
    assert options <= set(re.findall(r"--[a-z-]+", TUNE.read_text(encoding="utf-8")))


def play(*arguments: str) -> tuple[dict[str, int], str]:
    """Run the playbook on this machine; return Ansible's recapitulation, and all that it printed."""
    if ANSIBLE is None:
        pytest.skip("there is no ansible-playbook in PATH")
    command = [ANSIBLE, "-i", "here,", "-c", "local", str(TUNING / "playbook.yml"), *arguments]
    done = subprocess.run(
        [*command, "-e", f"ansible_python_interpreter={sys.executable}", "-e", "ansible_become=false"],
        env={**os.environ, "LANG": "C.UTF-8"}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", done.stdout)}, done.stdout


def test_the_playbook_sets_once_and_then_agrees(root: Path) -> None:
    """By the real ansible-playbook, where there is one."""
    options = f"cachefs_tune_options='--root {root} --shm 32GiB --users'"
    before = snapshot(root)
    looked, told = play("--check", "-e", options)
    assert (looked["changed"], looked["skipped"]) == (1, 1)
    assert "differs  net.core.rmem_max" in told
    assert snapshot(root) == before
    assert play("-e", options)[0]["changed"] == 2  # what differs, and that it was set
    put(root, "proc/mounts", before["proc/mounts"].replace("8388608k", "33554432k"))
    after = snapshot(root)
    again, _ = play("-e", options)
    assert (again["changed"], again["skipped"]) == (0, 1)
    assert snapshot(root) == after


@pytest.mark.parametrize(("users", "said"), [("true", True), ("false", False)])
def test_the_variables_of_the_playbook_are_options(users: str, said: bool) -> None:
    """With --check, on this machine as it is."""
    _, told = play("--check", "-e", f"cachefs_users={users}", "-e", "cachefs_shm=1MiB", "-e", "cachefs_cache_dir=/x")
    assert ("/etc/fuse.conf" in told) is said
    assert "/etc/fstab" in told
    assert "/x is on " in told or "/x: " in told


def test_the_document_names_every_setting() -> None:
    text = (TUNING / "README.md").read_text(encoding="utf-8")
    for name in STOCK:
        assert f"`{name.replace('/', '.')}`" in text
