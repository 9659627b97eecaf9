"""A tier under kill -9, damage, foreign files, full file systems: misses and warnings, never wrong bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs import errors
from cachefs.block import codec, tier_files, tier_growth
from cachefs.block.lmdb_tier import TierWriter
from cachefs.metrics import Counters
from cachefs.types import Tier
from tests.support.blocks import BLOCK, KIB, MIB, contents, key, open_tier, payload, put
from tests.support.machine import wait_until
from tests.unit.test_block_tier import check_invariants

pytestmark = pytest.mark.expect_warnings("tier in", "bad block")

WRITER = """
import os, sys
from cachefs.types import Tier
from tests.support.blocks import key, open_tier, payload, put
tier = open_tier(sys.argv[1], Tier(sys.argv[2]))
number = int(sys.argv[3])
print(tier.stats()["blocks"], flush=True)
while True:
    put(tier, [(key(i % 150), payload(i % 150, 1000 + i % 150 * 400)) for i in range(number, number + 7)])
    number += 7
"""

CHECKER = """
import sys
from cachefs.types import Tier
from tests.support.blocks import key, open_tier, payload, contents, put
tier = open_tier(sys.argv[1], Tier(sys.argv[2]))
good = 0
for i in range(150):
    found = contents(tier, i)
    if found is not None:
        assert found == payload(i, 1000 + i * 400), i
        good += 1
print("good", good)
put(tier, [(key(1000 + i), payload(i)) for i in range(20)])
assert contents(tier, 1019) == payload(19)
tier.close()
"""


def python(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


@pytest.mark.parametrize("kind", [Tier.SHM, Tier.DISK])
def test_kill_9_in_a_loop_loses_nothing_and_gives_no_wrong_bytes(kind: Tier) -> None:
    generator = random.Random(11)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachefs-test-") as path:
        directory = Path(path, "tier")
        least = 0
        for life in range(5):
            with subprocess.Popen(
                python(WRITER, directory, kind, life * 40), stdout=subprocess.PIPE, text=True
            ) as writer:
                assert writer.stdout is not None
                assert int(writer.stdout.readline()) >= least
                time.sleep(generator.uniform(0.01, 0.12))
                os.kill(writer.pid, signal.SIGKILL)
            tier = open_tier(directory, kind)
            try:
                check_invariants(tier)
                least = min(tier.stats()["blocks"], 20)
                for number in range(150):
                    found = contents(tier, number)
                    assert found is None or found == payload(number, 1000 + number * 400)
            finally:
                tier.close()
        assert least == 20
        assert not list(Path(path).glob("*.aside-*"))


def filled(directory: Path, kind: Tier = Tier.DISK, count: int = 150) -> None:
    tier = open_tier(directory, kind, limit=16 * MIB)
    put(tier, [(key(i), payload(i, 1000 + i * 400)) for i in range(count)])
    tier.close()


@pytest.mark.parametrize("seed", range(6))
def test_bytes_changed_while_closed(tmp_path: Path, seed: int) -> None:
    """The process that opens it is not harmed either: its structure is checked when somebody else wrote to it."""
    directory, generator = tmp_path / "t", random.Random(seed)
    filled(directory)
    with Path(directory, "data.mdb").open("r+b") as file:
        size = tier_files.read_meta(str(directory)).last_page * 4096  # type: ignore[union-attr]
        for _ in range(4 ** (seed % 4)):
            file.seek(generator.randrange(size))
            file.write(generator.randbytes(generator.choice([1, 8, 300, 5000])))
    for _ in range(2):
        done = subprocess.run(python(CHECKER, directory, Tier.DISK), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_value_bytes_changed_while_open_are_a_miss(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t", limit=16 * MIB)
    put(tier, [(key(i), payload(i)) for i in range(20)])
    file = Path(tmp_path, "t", "data.mdb")
    content = file.read_bytes()
    for number in (3, 7):
        at = content.index(payload(number)[1000:1100])
        with file.open("r+b") as raw:
            raw.seek(at)
            raw.write(b"\xff\x00\xff")
    assert [number for number in range(20) if contents(tier, number) != payload(number)] == [3, 7]
    assert contents(tier, 3) is None
    assert key(3) not in tier, "a bad block is dropped"
    put(tier, [(key(3), payload(3))])
    assert contents(tier, 3) == payload(3)
    tier.close()


def test_one_warning_for_many_bad_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counters = Counters()
    tier = TierWriter(str(tmp_path / "t"), Tier.DISK, limit_bytes=16 * MIB, block_size=BLOCK, counters=counters)
    tier.put_values([(key(i), codec.encode(payload(i), key(i + 1))) for i in range(20)])
    assert [contents(tier, i) for i in range(20)] == [None] * 20
    assert counters.get("disk_corrupt") == 20
    assert len([record for record in caplog.records if "bad block" in record.message]) == 1
    assert tier.stats()["blocks"] == 0
    tier.close()


@pytest.mark.parametrize("cut", [0, 100, 4096, 8192, 5 * 4096, 1_000_000])
def test_truncated_while_closed(tmp_path: Path, cut: int) -> None:
    filled(tmp_path / "t")
    os.truncate(tmp_path / "t" / "data.mdb", cut)
    done = subprocess.run(python(CHECKER, tmp_path / "t", Tier.DISK), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "good 0" in done.stdout


def cut(directory: Path) -> None:
    os.truncate(directory / "data.mdb", 9000)


def use(tier: TierWriter) -> None:
    assert contents(tier, 1) is None


def refuses(tier: TierWriter) -> None:
    with pytest.raises(errors.TierUnavailable):
        put(tier, [(key(100), payload(100))])


@pytest.mark.parametrize(
    ("destroy", "notice"),
    [(cut, TierWriter.maintain), (cut, use), (cut, refuses), (shutil.rmtree, TierWriter.maintain)],
)
def test_cut_or_removed_while_open_begins_anew(
    tmp_path: Path, destroy: Callable[[Path], None], notice: Callable[[TierWriter], None]
) -> None:
    tier = open_tier(tmp_path / "t", limit=16 * MIB)
    put(tier, [(key(i), payload(i)) for i in range(20)])
    destroy(tmp_path / "t")
    notice(tier)
    assert tier.state == "off"
    assert contents(tier, 1) is None
    with pytest.raises(errors.TierUnavailable):
        put(tier, [(key(1), payload(1))])
    tier._retry_at = 0.0  # do not wait for it
    tier.maintain()
    assert tier.state == "on"
    assert tier.stats()["blocks"] == 0
    put(tier, [(key(1), payload(1))])
    assert contents(tier, 1) == payload(1)
    tier.close()


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "clean.json"])
@pytest.mark.parametrize("content", [b"", b"hello", bytes(20_000), os.urandom(300_000)])
def test_foreign_files(tmp_path: Path, name: str, content: bytes) -> None:
    filled(tmp_path / "t")
    (tmp_path / "t" / name).write_bytes(content)
    done = subprocess.run(python(CHECKER, tmp_path / "t", Tier.DISK), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_directory_in_the_place_of_the_data_file(tmp_path: Path) -> None:
    (tmp_path / "t" / "data.mdb").mkdir(parents=True)
    open_tier(tmp_path / "t").close()
    assert (tmp_path / "t.aside-1").is_dir()


def test_only_the_newest_is_kept_aside(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / "data.mdb").write_bytes(b"junk" * 5000)
        open_tier(tmp_path / "t").close()
    assert sorted(os.listdir(tmp_path)) == ["t", "t.aside-3"]


def test_another_format_of_ours_is_deleted(tmp_path: Path) -> None:
    filled(tmp_path / "t")
    open_tier(tmp_path / "t", limit=16 * MIB, block=128 * KIB).close()
    wait_until(lambda: os.listdir(tmp_path) == ["t"], 2, "it is deleted in the background")


def test_what_a_power_loss_left_is_deleted(tmp_path: Path) -> None:
    """A tier that is larger than half of its disk would never have room again."""
    filled(tmp_path / "t")
    stamp(tmp_path / "t", boot_id="another boot", txnid=None)
    open_tier(tmp_path / "t", limit=16 * MIB).close()
    wait_until(lambda: os.listdir(tmp_path) == ["t"], 2, "it is deleted in the background")


def test_leftovers_of_ours_are_deleted_and_foreign_ones_stay(tmp_path: Path) -> None:
    filled(tmp_path / "t")
    for name in ("t.aside-1", "t.aside-crash", "t.gone-17", "t.aside-2", "t.aside-3", "u.aside-1"):
        shutil.copytree(tmp_path / "t", tmp_path / name)
    (tmp_path / "t.aside-2" / "letters.txt").write_text("dear diary")
    (tmp_path / "t.aside-3" / "data.mdb").write_text("this is a shopping list")
    (tmp_path / "t.aside-4").symlink_to(tmp_path / "u.aside-1")
    open_tier(tmp_path / "t").close()
    left = ["t", "t.aside-2", "t.aside-3", "t.aside-4", "u.aside-1"]
    wait_until(lambda: sorted(os.listdir(tmp_path)) == left, 2, "they are deleted in the background")
    assert (tmp_path / "u.aside-1" / "data.mdb").exists()


def stamp(directory: Path, **changes: object) -> None:
    file = directory / "clean.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))


def test_after_a_reboot_only_what_was_synced_is_trusted(tmp_path: Path) -> None:
    filled(tmp_path / "t")
    stamp(tmp_path / "t", boot_id="another boot")
    tier = open_tier(tmp_path / "t", limit=16 * MIB)
    assert tier.stats()["blocks"] == 150, "closed well before the reboot"
    tier.sync_and_mark()
    put(tier, [(key(900), payload(1))])
    copy = tmp_path / "crashed"
    shutil.copytree(tmp_path / "t", copy)
    tier.close()
    stamp(copy, boot_id="another boot")
    tier = open_tier(copy, limit=16 * MIB)
    assert tier.stats()["blocks"] == 0, "written after the last sync, then the power went"
    tier.close()


def test_a_stamp_that_does_not_fit_the_file_is_not_believed(tmp_path: Path) -> None:
    filled(tmp_path / "t")
    stamp(tmp_path / "t", txnid=1)
    tier = open_tier(tmp_path / "t", limit=16 * MIB)
    assert tier.stats()["blocks"] == 0
    tier.close()


def test_a_leftover_of_making_it_smaller_is_removed(tmp_path: Path) -> None:
    (tmp_path / "t.former").mkdir()
    open_tier(tmp_path / "t").close()
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_directory_without_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(errors.TierUnavailable):
        open_tier(tmp_path / "t")


def test_a_read_only_place() -> None:
    with pytest.raises(errors.TierUnavailable):
        open_tier("/proc/self/tier")


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 MiB."""
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "cachefs-test", str(mountpoint)]
    if os.getuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield mountpoint
    subprocess.run(["umount", "-l", str(mountpoint)], check=True)


def fill_up(place: Path, leave: int) -> Path:
    """Take the file system's room but for `leave` bytes."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        room = os.statvfs(place)
        file.write(bytes(max(0, room.f_bavail * room.f_bsize - leave)))
    return ballast


@pytest.mark.parametrize("leave", [0, 100 * KIB, 3 * MIB])
def test_a_full_tmpfs_is_no_end(
    small_tmpfs: Path, leave: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A page that cannot be backed would be SIGBUS: this test would end the whole run."""
    monkeypatch.setattr(tier_growth, "STEP", MIB)
    tier = open_tier(small_tmpfs / "tier", Tier.SHM, limit=20 * MIB)
    sizes = [BLOCK, 20 * KIB, 3000, BLOCK, 50 * KIB]
    put(tier, [(key(i), payload(i, sizes[i % 5])) for i in range(100)])
    ballast = fill_up(small_tmpfs, leave)
    for number in range(100, 900):
        put(tier, [(key(number), payload(number, sizes[number % 5]))])
        assert contents(tier, number) == payload(number, sizes[number % 5])
    assert tier.state == "full"
    check_invariants(tier)
    assert len([record for record in caplog.records if "not usable" in record.message]) == 1
    ballast.unlink()
    tier._growth._retry_at = 0.0
    put(tier, [(key(number), payload(number)) for number in range(1000, 1200)])
    assert tier.state == "on"
    assert tier.stats()["used_bytes"] > 12 * MIB
    check_invariants(tier)
    tier.close()


def test_a_tmpfs_that_is_full_from_the_start(small_tmpfs: Path) -> None:
    ballast = fill_up(small_tmpfs, 200 * KIB)
    tier = open_tier(small_tmpfs / "tier", Tier.SHM, limit=20 * MIB)
    for number in range(10):
        with pytest.raises(errors.TierUnavailable):
            put(tier, [(key(number), payload(number))])
    ballast.unlink()
    tier._growth._retry_at = 0.0
    put(tier, [(key(1), payload(1))])
    assert contents(tier, 1) == payload(1)
    tier.close()


def test_a_tmpfs_without_any_room(small_tmpfs: Path) -> None:
    fill_up(small_tmpfs, 0)
    with pytest.raises(errors.TierUnavailable):
        open_tier(small_tmpfs / "tier", Tier.SHM, limit=20 * MIB)
