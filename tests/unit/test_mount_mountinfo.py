"""Reading /proc: mount tables, links, holders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.mount import mountinfo
from cachefs.mount.mountinfo import Answer, Mount, canonical, find_mount, holders, parse_mountinfo, probe
from cachefs.runtime import mount_id

LINE = b"93 27 0:52 / /mnt/a\\040b ro,nosuid,nodev shared:7 master:2 - fuse.cachefs s3://b/x\\054y ro,user_id=0\n"


def test_parses_a_line_with_optional_fields_and_escapes() -> None:
    (mount,) = parse_mountinfo(LINE)
    assert mount == Mount(93, 27, "0:52", "/", "/mnt/a b", "ro,nosuid,nodev", "fuse.cachefs", "s3://b/x,y")
    assert mount.connection == 52
    assert mount.is_cachefs


def test_skips_what_is_no_mount_line() -> None:
    assert len(parse_mountinfo(b"nonsense\n\n1 2 3 - x\nx y 0:1 / / rw - a b c\n" + LINE)) == 1


@given(st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name))
def test_every_name_survives_the_kernels_escaping(name: bytes) -> None:
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in b"/" + name)
    raw = b"1 2 0:3 / " + escaped + b" rw - fuse.cachefs s x\n"
    assert [os.fsencode(mount.mountpoint) for mount in parse_mountinfo(raw)] == [b"/" + name]


@given(st.binary(max_size=200))
def test_garbage_never_raises(raw: bytes) -> None:
    parse_mountinfo(raw)


def test_topmost_mount_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        b"1 1 0:1 / /m rw - tmpfs t rw",
        b"2 1 0:2 / /m rw - tmpfs t rw",
        b"3 1 0:3 / /m/below rw - tmpfs t rw",
        b"4 1 0:4 /m /other rw - tmpfs /m rw",  # as root and as source
        b"5 1 0:5 / /with\\040space rw - tmpfs t rw",
    ]
    monkeypatch.setattr(mountinfo, "_read", lambda: b"\n".join([*lines, b""]))
    second = Mount(2, 1, "0:2", "/", "/m", "rw", "tmpfs", "t")
    assert find_mount("/m") == second
    assert find_mount("/x") is None
    spaced = find_mount("/with space")
    assert spaced is not None
    assert spaced.device == "0:5"


def test_a_name_with_every_special_character_is_found_as_the_kernel_writes_it(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    place = tmp_path / "a b\tc\\d#e"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
    try:
        found = find_mount(str(place))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert found is not None
    assert found.mountpoint == str(place)


def test_canonical_resolves_links_at_every_level_and_names_what_does_not_exist(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "dir").mkdir(parents=True)
    (tmp_path / "parent").symlink_to("real")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to("parent/dir")
    assert canonical(str(tmp_path / "one")) == str(real / "dir")
    assert canonical(f"{tmp_path}/parent/../one/") == str(real / "dir")
    assert canonical(str(tmp_path / "parent" / "new")) == str(real / "new")
    assert mount_id(canonical(str(tmp_path / "one"))) == mount_id(str(real / "dir"))
    assert canonical("/") == "/"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        canonical(str(tmp_path / "loop"))


def test_probe_of_plain_directories(tmp_path: Path) -> None:
    assert probe(str(tmp_path), 10) is Answer.ALIVE
    assert probe(str(tmp_path / "missing"), 10) is Answer.FAILING
    assert probe(str(tmp_path), 0) is Answer.SILENT


def test_holders_are_found_by_directory_file_and_map(tmp_path: Path) -> None:
    code = (
        "import mmap, os, sys\nos.chdir(sys.argv[1])\nf = open('held name', 'r+b')\nm = mmap.mmap(f.fileno(), 0)\n"
        "print('ready', flush=True)\nsys.stdin.read()"
    )
    (tmp_path / "held name").write_bytes(b"x")
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        (holder,) = [holder for holder in holders(str(tmp_path)) if holder.pid == child.pid]
        assert holder.uses == (
            f"working directory {tmp_path}",
            f"file {tmp_path}/held name",
            f"map of {tmp_path}/held name",
        )
        assert str(holder).startswith(f"{holder.command} (pid {child.pid}): working directory")
        assert not [other for other in holders(f"{tmp_path}/held") if other.pid == child.pid]
    finally:
        child.communicate()


def test_mount_below_is_a_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountinfo, "mounts", lambda: [Mount(1, 1, "0:1", "/", "/m/x/y", "rw", "tmpfs", "none")])
    assert str(holders("/m/x")[0]) == "mount: none is mounted on /m/x/y"
