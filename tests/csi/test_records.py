"""One body of tests for both places of records: a directory, and a real etcd."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs.config import PeerConfig
from cachefs.errors import StorageUnavailable
from csi.etcd_records import EtcdRecords, settings_of
from csi.records import CorruptRecord, FileRecords, RecordsRefused, VolumeRecords
from tests.support.etcd_server import EtcdServer

Open = Callable[[], VolumeRecords]
KIND = "volumes"


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture(params=["file", "etcd"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same records again and again."""
    made: list[VolumeRecords] = []

    def make() -> VolumeRecords:
        if request.param == "file":
            made.append(FileRecords(tmp_path / "state"))
        else:
            server: EtcdServer = request.getfixturevalue("etcd")
            cluster = f"c{abs(hash(tmp_path))}"
            made.append(EtcdRecords(settings_of(PeerConfig(etcd=server.endpoint, cluster=cluster))))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_records_come_back_as_they_were(opened: Open) -> None:
    records = opened()
    value = {"name": 'ä\n"', "number": 1 << 60, "list": [{"a": "b"}], "flag": True, "empty": {}}
    assert records.get(KIND, "a-1.x") is None
    assert records.put_new(KIND, "a-1.x", value) is None
    assert records.get(KIND, "a-1.x") == value
    assert opened().get(KIND, "a-1.x") == value
    assert records.get("snapshots", "a-1.x") is None
    records.put(KIND, "a-1.x", {"name": "b"})
    assert records.get(KIND, "a-1.x") == {"name": "b"}
    assert records.delete(KIND, "a-1.x")
    assert not records.delete(KIND, "a-1.x")
    assert records.get(KIND, "a-1.x") is None
    records.check()


def test_one_of_many_wins(opened: Open) -> None:
    places = [opened() for _ in range(4)]
    found: list[object] = []
    barrier = threading.Barrier(16)

    def put(number: int) -> None:
        barrier.wait(20)
        found.append(places[number % 4].put_new(KIND, "same", {"by": number}))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    kept = places[0].get(KIND, "same")
    assert len(found) == 16
    assert found.count(None) == 1
    assert all(each in (None, kept) for each in found)


def test_pages(opened: Open) -> None:
    records = opened()
    ids = [f"id-{number:04d}" for number in range(25)]
    for record_id in reversed(ids):
        records.put_new(KIND, record_id, {"id": record_id})
    records.put_new("volumes-other", "x", {})
    assert records.page(KIND) == [(record_id, {"id": record_id}) for record_id in ids]
    assert [found for found, _ in records.page(KIND, "id-0009", 10)] == ids[10:20]
    assert [found for found, _ in records.page(KIND, "id-0009x", 3)] == ids[10:13], "an id that was deleted"
    assert records.page(KIND, "zzz") == []
    assert records.page("none") == []


@pytest.mark.parametrize("wrong", ["", "../x", "/etc/passwd", "A", "a/b", "x" * 129, ".hidden", "ä"])
def test_ids_that_no_record_has(opened: Open, wrong: str) -> None:
    records = opened()
    assert records.get(KIND, wrong) is None
    assert not records.delete(KIND, wrong)
    with pytest.raises(ValueError, match="cannot be a record"):
        records.put_new(KIND, wrong, {})


# -- a directory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1}', b'{"format": 1, "record": []}', b'{"format": 2, "record": {}}'],
)
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, raw: bytes) -> None:
    records = FileRecords(tmp_path)
    records.put_new(KIND, "a", {"x": 1})
    (tmp_path / KIND / "a.json").write_bytes(raw)
    for read in (lambda: records.get(KIND, "a"), lambda: records.page(KIND), lambda: records.put_new(KIND, "a", {})):
        with pytest.raises(CorruptRecord, match=r"a\.json"):
            read()
    assert (tmp_path / KIND / "a.json").read_bytes() == raw


def test_files_are_for_us_only_and_leftovers_are_no_records(tmp_path: Path) -> None:
    records = FileRecords(tmp_path / "state")
    records.put_new(KIND, "a", {})
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / KIND / "a.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "state" / KIND / ".x.new").write_text("{")
    (tmp_path / "state" / KIND / "b.json.tmp").write_text("{")
    assert [found for found, _ in records.page(KIND)] == ["a"]


def test_what_a_killed_controller_left_half_written_goes_after_a_while(tmp_path: Path) -> None:
    FileRecords(tmp_path).put(KIND, "a", {"x": 1})
    old, new = [tmp_path / KIND / name for name in (".abc.new", "b.json.tmp")], tmp_path / KIND / ".def.new"
    for path in [*old, new]:
        path.write_text("{", encoding="utf-8")
    for path in [*old, tmp_path / KIND / "a.json"]:
        os.utime(path, (0, 0))
    records = FileRecords(tmp_path)
    assert sorted(path.name for path in (tmp_path / KIND).iterdir()) == [".def.new", "a.json"]
    assert records.page(KIND) == [("a", {"x": 1})]


def test_a_directory_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    records = FileRecords(tmp_path / "state")
    (tmp_path / "state").rmdir()
    with pytest.raises(StorageUnavailable):
        records.put_new(KIND, "a", {})
    with pytest.raises(StorageUnavailable):
        records.check()


# -- etcd -------------------------------------------------------------------------------------------------------------


def test_a_store_that_is_away_is_unavailable_and_comes_back(tmp_path: Path) -> None:
    with EtcdServer() as server:
        records = EtcdRecords(settings_of(PeerConfig(etcd=server.endpoint)), timeout_s=1.0)
        records.put_new(KIND, "a", {"x": 1})
        server.kill()
        started = time.monotonic()
        with pytest.raises(StorageUnavailable, match="does not answer"):
            records.get(KIND, "a")
        assert time.monotonic() - started < 6
        server.restart()
        assert records.get(KIND, "a") == {"x": 1}
        server.pause()
        _wait_until_stopped(server.pid)
        with pytest.raises(StorageUnavailable):
            records.put_new(KIND, "b", {})
        server.resume()
        records.put_new(KIND, "b", {"y": 1})
        assert records.get(KIND, "b") in ({}, {"y": 1}), "the first try may have arrived"
        records.close()


def _wait_until_stopped(pid: int) -> None:
    """A thread that is not stopped yet could still answer."""
    deadline = time.monotonic() + 10
    while any(_state(path) not in "Tt" for path in Path(f"/proc/{pid}/task").glob("*/stat")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _state(path: Path) -> str:
    return path.read_text().rpartition(")")[2].split()[0]


def test_the_next_endpoint_is_asked(etcd: EtcdServer, free_port: int) -> None:
    endpoints = f"http://127.0.0.1:{free_port},{etcd.endpoint}"
    records = EtcdRecords(settings_of(PeerConfig(etcd=endpoints, cluster="next")), timeout_s=2.0)
    records.put_new(KIND, "a", {"x": 1})
    assert records.get(KIND, "a") == {"x": 1}
    records.close()


def test_users_and_tokens(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("right\n")
    with EtcdServer(arguments=("--auth-token=simple",)) as server:
        server.enable_users("csi", "right")

        def records(user: str = "csi") -> EtcdRecords:
            file = str(password) if user else ""
            config = PeerConfig(etcd=server.endpoint, etcd_user=user, etcd_password_file=file)
            return EtcdRecords(settings_of(config), timeout_s=2.0)

        first = records()
        first.put_new(KIND, "a", {"x": 1})
        server.restart()  # tokens are forgotten
        assert first.get(KIND, "a") == {"x": 1}
        first.close()
        password.write_text("hush-wrong")
        for other in (records(), records("")):
            with pytest.raises(RecordsRefused, match="refuses the controller") as error:
                other.get(KIND, "a")
            assert "hush" not in str(error.value)
            other.close()
