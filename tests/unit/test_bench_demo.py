"""The demo claims only what its figures show."""

import numpy as np
import pytest

from bench import demo
from bench.cachefs_cli import Counts
from bench.demo import DemoFailed, Epoch
from bench.demo_training import FEATURES, Network, features, pictures


def test_the_network_learns_right_labels_and_not_wrong_ones() -> None:
    rng = np.random.default_rng(3)
    files = list(pictures(rng, classes=4, per_class=60))
    rng.shuffle(files)
    batch = np.stack([features(file.content) for file in files])
    right, wrong = np.array([file.label for file in files]), rng.integers(0, 4, len(files))
    assert batch.shape == (240, FEATURES)
    finals = []
    for labels in (right, wrong):
        network = Network(np.random.default_rng(3), 4)
        finals.append([network.train(batch, labels)[0] for _ in range(60)][-1])
    assert finals[0] < 0.5 < 1.0 < finals[1]


def test_pictures_are_files_that_other_programs_read() -> None:
    for picture in pictures(np.random.default_rng(1), classes=2, per_class=3):
        head, _, raw = picture.content.partition(b"\n")
        kind, width, height, deepest = head.split()
        assert (kind, deepest) == (b"P6", b"255")
        assert len(raw) == int(width) * int(height) * 3


def epochs(second_gets: float = 0, losses: tuple[float, float] = (2.0, 0.5)) -> list[Epoch]:
    first = Epoch("first", losses=[losses[0]] * 10, requests={"get": 10, "list": 1, "head": 0})
    return [first, Epoch("second", losses=[losses[1]] * 10, requests={"get": second_gets, "list": 0, "head": 0})]


def test_a_good_run_passes() -> None:
    demo.verdict(epochs(), (10, 11))


@pytest.mark.parametrize(
    ("made", "killed", "message"),
    [
        (epochs(second_gets=1), (10, 11), "GET requests"),
        (epochs(losses=(1.0, 1.0)), (10, 11), "did not fall"),
        (epochs(), None, "not replaced"),
        (epochs(), (10, 10), "not replaced"),
    ],
)
def test_a_run_that_does_not_show_it_fails(made: list[Epoch], killed: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(DemoFailed, match=message):
        demo.verdict(made, killed)


def test_sources_are_counted_across_the_death_of_the_worker() -> None:
    epoch = Epoch("one", size=1000)
    spans = [
        (
            Counts({"shm_hit_bytes": 100}, {"origin_bytes": 50}),
            Counts({"shm_hit_bytes": 400}, {"origin_bytes": 150}),
        ),
        (
            Counts({}, {"origin_bytes": 150}),
            Counts({"shm_hit_bytes": 500}, {"origin_bytes": 150, "disk_hit_bytes": 200}),
        ),
    ]
    demo._count_sources(epoch, spans)
    assert epoch.sources == {"S3": 100, "disk": 200, "shm": 700, "page cache": 0}  # 800 hits, 100 of them read ahead


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "modprobe fuse" in demo.missing()[0]
