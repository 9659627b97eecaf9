"""Directories with names that can be guessed, in places that are open to all: only our own are used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.runtime import NotOurs, RuntimeDir, check_own, own_directory

STRANGER = 54321


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of ours that somebody wants us to write to (or to empty)."""
    place = tmp_path / "victim"
    (place / "precious").mkdir(parents=True)
    return place


def give_away(path: Path) -> None:
    """Let another user own it."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def test_what_is_not_there_is_made_for_us_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        own_directory(tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    own_directory(tmp_path / "new")


def test_what_others_may_read_is_ours_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    own_directory(tmp_path / "open")


def test_links_are_not_followed(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "planted").symlink_to(victim)
    with pytest.raises(NotOurs, match="is a link, not a directory"):
        own_directory(tmp_path / "planted")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not there")
    with pytest.raises(NotOurs, match="is a link"):
        own_directory(tmp_path / "nowhere")
    assert not (tmp_path / "not there").exists()


def test_a_link_of_somebody_else(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "planted").symlink_to(victim)
    give_away(tmp_path / "planted")
    with pytest.raises(NotOurs, match="belongs to somebody else"):
        own_directory(tmp_path / "planted")


def test_files_are_no_directories(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotOurs, match="is a file"):
        own_directory(tmp_path / "file")


def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    give_away(tmp_path / "theirs")
    with pytest.raises(NotOurs, match="belongs to somebody else"):
        own_directory(tmp_path / "theirs")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o720, 0o1777], ids=oct)
def test_a_directory_that_others_may_write_to(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(NotOurs, match="can be written by others"):
        own_directory(tmp_path / "open")


def test_what_is_not_there_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_own(tmp_path / "none")


@pytest.mark.parametrize("part", ["", "agents", "mounts"])
def test_a_runtime_directory_is_checked_with_its_parts(tmp_path: Path, victim: Path, part: str) -> None:
    RuntimeDir(str(tmp_path / "run"))
    planted = tmp_path / "run" / part
    planted.rename(tmp_path / "before")
    planted.symlink_to(victim)
    with pytest.raises(NotOurs, match="choose another --runtime-dir"):
        RuntimeDir(str(tmp_path / "run"))
    planted.unlink()
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(NotOurs, match="choose another --runtime-dir"):
        RuntimeDir(str(tmp_path / "run"))
    assert [path.name for path in victim.iterdir()] == ["precious"]


def test_a_tmpfs_as_runtime_directory(tmp_path: Path) -> None:
    """It is made with mode 1777: what is ours in it, nobody else can move away."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o1777)
    RuntimeDir(str(tmp_path / "run"))
    (tmp_path / "run" / "agents").chmod(0o1777)
    with pytest.raises(NotOurs):
        RuntimeDir(str(tmp_path / "run"))
