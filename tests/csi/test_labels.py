"""Labels of a node for the datasets that it holds, against a server that plays the Kubernetes API."""

from __future__ import annotations

import time
from typing import Any

import pytest

from csi.labels import LABEL_PREFIX, MOST_LABELS, NodeLabels, label_value, wanted_labels
from tests.csi.fake_kube import FakeApi

GIB = 1 << 30


@pytest.mark.parametrize(("gib", "value"), [(0, "0"), (0.99, "0"), (1, "1"), (3.9, "2"), (64, "64"), (1000, "512")])
def test_values_of_labels(gib: float, value: str) -> None:
    assert label_value(int(gib * GIB)) == value


def test_labels_are_few() -> None:
    held = {f"{number:016x}": number * GIB for number in range(100)}
    labels = wanted_labels(held)
    assert len(labels) == MOST_LABELS
    assert labels[f"{LABEL_PREFIX}{99:016x}"] == "64"
    assert f"{LABEL_PREFIX}{0:016x}" not in labels


def until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_node_gets_labels_and_loses_those_of_an_earlier_life(api: FakeApi) -> None:
    api.labels[f"{LABEL_PREFIX}{1:016x}"] = "4"
    held = {f"{2:016x}": 5 * GIB}
    unknown: list[bool] = []
    labels = NodeLabels(api.client(), "node-a", lambda: None if unknown else dict(held), period_s=0.02)
    labels.start()
    until(lambda: api.labels == {"zone": "a", f"{LABEL_PREFIX}{2:016x}": "4"})
    asked = len(api.calls)
    time.sleep(0.2)
    assert len(api.calls) == asked, "nothing has changed, so nothing is said"
    held[f"{2:016x}"] = 9 * GIB
    until(lambda: api.labels[f"{LABEL_PREFIX}{2:016x}"] == "8")
    unknown.append(True)
    held.clear()
    time.sleep(0.1)
    assert api.labels[f"{LABEL_PREFIX}{2:016x}"] == "8", "an agent that begins does not say yet"
    labels.close()
    assert api.labels == {"zone": "a"}


@pytest.mark.expect_warnings("cannot label node")
def test_labels_come_when_the_api_comes_back(api: FakeApi) -> None:
    api.status = 503
    labels = NodeLabels(api.client(), "node-a", lambda: {f"{2:016x}": GIB}, period_s=0.02)
    labels.start()
    until(lambda: len(api.calls) > 3)
    api.status = 0
    until(lambda: api.labels.get(f"{LABEL_PREFIX}{2:016x}") == "1")
    labels.close()
    assert api.labels == {"zone": "a"}
