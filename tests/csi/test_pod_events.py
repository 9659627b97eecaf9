"""Events of pods that wait for a warm-up: written through a real HTTPS server, seldom, never in the way of a call."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs.config import Config
from cachefs.errors import ConfigError
from csi import node_warmup, pod_events
from csi.driver import Driver, DriverSettings, Mode
from csi.kube import PodReference
from csi.pod_events import Listener, PodEvents
from tests.csi.fake_kube import FakeApi
from tests.csi.node_fixtures import FakeNode, fake
from tests.csi.node_rig import Plugin, code
from tests.support.machine import wait_until

__all__ = ["fake"]

POD = PodReference("team", "train-0", "uid-1")
CONTEXT = {
    "csi.storage.k8s.io/pod.name": "train-0", "csi.storage.k8s.io/pod.namespace": "team",
    "csi.storage.k8s.io/pod.uid": "uid-1",
}  # fmt: skip
WAIT = {"warmup": "/", "warmupWait": "true"}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events(api: FakeApi, clock: Clock) -> Iterator[PodEvents]:
    made = PodEvents(api.client(), now=clock)
    made.start()
    try:
        yield made
    finally:
        made.close()


def told(api: FakeApi, reason: str = "") -> list[tuple[str, int, str]]:
    """Reason, count and text of all events, as the API has them."""
    found = [(event["reason"], event["count"], event["message"]) for event in api.events.values()]
    return [each for each in found if reason in ("", each[0])]


def settled(events: PodEvents) -> None:
    """Wait until everything that was told is written."""
    done = threading.Event()
    events._later(done.set)
    assert done.wait(15)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_one_event_follows_the_progress_of_a_pod(api: FakeApi, events: PodEvents, clock: Clock) -> None:
    pod = events.listener(CONTEXT, "v1")
    for second in range(35):
        clock.now = 1000.0 + second
        pod.waiting(f"{second} %")
        settled(events)
    assert told(api) == [("WarmingUp", 4, "volume v1: 30 %")]
    assert [call[0] for call in api.calls] == ["POST", "PATCH", "PATCH", "PATCH"]
    [event] = api.events.values()
    assert event["involvedObject"]["uid"] == "uid-1"
    pod.over("loaded: 100 %")
    pod.over("loaded: 100 %")
    pod.too_long("late")
    settled(events)
    assert told(api, "WarmedUp") == [("WarmedUp", 1, "volume v1: loaded: 100 %")]
    assert len(api.events) == 2


def test_a_pod_has_one_event_in_ten_seconds_however_many_volumes_wait(
    api: FakeApi, events: PodEvents, clock: Clock
) -> None:
    for second in range(20):
        clock.now = 1000.0 + second
        for number in range(5):
            events.listener(CONTEXT, f"v{number}").waiting("1 %")
    events.listener({**CONTEXT, "csi.storage.k8s.io/pod.name": "train-1"}, "v1").waiting("1 %")
    settled(events)
    assert len([call for call in api.calls if call[4].get("involvedObject", {}).get("name") != "train-1"]) == 2
    assert len(api.calls) == 3


def test_the_limit_is_a_warning(api: FakeApi, events: PodEvents) -> None:
    pod = events.listener(CONTEXT, "v1")
    pod.waiting("5 %")
    pod.too_long("the limit of 600 s is over")
    settled(events)
    [event] = [event for event in api.events.values() if event["reason"] == "WarmUpTooLong"]
    assert (event["type"], event["message"]) == ("Warning", "volume v1: the limit of 600 s is over")


def test_a_pod_that_did_not_wait_is_told_nothing(api: FakeApi, events: PodEvents) -> None:
    pod = events.listener(CONTEXT, "v1")
    pod.over("loaded")
    pod.too_long("late")
    events.listener({}, "v1").waiting("no podInfoOnMount")
    Listener().waiting("no events are wanted")
    settled(events)
    assert api.calls == []


def test_an_event_that_is_gone_is_written_anew(
    api: FakeApi, events: PodEvents, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    pod = events.listener(CONTEXT, "v1")
    pod.waiting("1 %")
    settled(events)
    api.events.clear()  # an hour later
    clock.now += 10
    pod.waiting("2 %")
    settled(events)
    assert told(api) == [("WarmingUp", 1, "volume v1: 2 %")]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.expect_warnings("cannot write events")
def test_an_api_that_refuses_is_one_warning_and_is_left_alone_for_a_while(
    api: FakeApi, events: PodEvents, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    api.status = 403
    pod = events.listener(CONTEXT, "v1")
    for _ in range(10):
        clock.now += 10
        pod.waiting("1 %")
        settled(events)
    assert 1 <= len(api.calls) <= 2
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert "Bearer" not in caplog.text
    api.status = 0
    clock.now += pod_events.RESPITE_S
    pod.waiting("2 %")
    settled(events)
    assert told(api) == [("WarmingUp", 1, "volume v1: 2 %")]


@pytest.mark.parametrize("context", [{**CONTEXT, "csi.storage.k8s.io/pod.namespace": "../../nodes"}])
@pytest.mark.expect_warnings("is no name of an object")
def test_names_that_are_none_lead_nowhere(
    api: FakeApi, events: PodEvents, clock: Clock, context: dict[str, str]
) -> None:
    pod = events.listener(context, "v1")
    pod.waiting("1 %")
    pod.over("loaded")
    settled(events)
    assert api.calls == []


def test_what_is_remembered_is_bounded(api: FakeApi, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_events, "MOST_WAITS", 10)
    events = PodEvents(api.client(), now=clock)  # it does not write: everything stays pending
    for number in range(10 * pod_events.MOST_PENDING):
        events.waiting(PodReference("team", f"pod-{number}"), "v1", "1 %")
    assert len(events._waits) == len(events._told) == 10
    assert events._pending.qsize() == pod_events.MOST_PENDING


# -- in the driver -----------------------------------------------------------------------------------------------------


@pytest.fixture
def telling(fake: FakeNode, events: PodEvents, monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    """A node whose plugin tells pods; calls wait for a moment only."""
    monkeypatch.setattr(node_warmup, "FIRST_HOLD_S", 0.2)
    monkeypatch.setattr(node_warmup, "HOLD_S", 0.4)
    monkeypatch.setattr(node_warmup, "LOOK_S", 0.05)
    fake.plugin.__exit__()
    fake.plugin = Plugin(fake.settings, str(fake.keeper.path), fake.base / "csi.sock", events)
    fake.plugin.__enter__()
    return fake


def job(node: FakeNode) -> dict[str, Any]:
    (found,) = node.agent.jobs.values()
    return found


def test_a_pod_hears_of_its_warm_up(telling: FakeNode, api: FakeApi, events: PodEvents, clock: Clock) -> None:
    volume = telling.volume("v1", WAIT)
    volume.stage()
    context = {**WAIT, "bucket": "bucket-1", **CONTEXT}
    assert code(volume.publish, context=context) == "UNAVAILABLE"
    settled(events)
    assert told(api) == [("WarmingUp", 1, "volume v1: 0 % (0 bytes of 1000 bytes in 10 files)")]
    job(telling)["done_bytes"] = 500
    clock.now += 10
    assert code(volume.publish, context=context) == "UNAVAILABLE"
    settled(events)
    assert told(api) == [("WarmingUp", 2, "volume v1: 50 % (500 bytes of 1000 bytes in 10 files)")]
    job(telling).update(state="done", done_bytes=1000)
    volume.publish(context=context)
    volume.publish(context=context)  # kubelet repeats it for as long as the pod lives
    volume.publish("pod-2", context={**context, "csi.storage.k8s.io/pod.name": "train-1"})  # it never waited
    settled(events)
    assert told(api, "WarmedUp") == [("WarmedUp", 1, "volume v1: loaded: 100 % (1000 bytes of 1000 bytes in 10 files)")]
    assert len(api.events) == 2


@pytest.mark.expect_warnings("is not warm")
def test_a_pod_hears_that_its_limit_has_passed(telling: FakeNode, api: FakeApi, events: PodEvents) -> None:
    volume = telling.volume("v1", {**WAIT, "warmupWait": "1s"})
    volume.stage()
    context = {**WAIT, "warmupWait": "1s", "bucket": "bucket-1", **CONTEXT}
    wait_until(lambda: code(volume.publish, context=context) == "OK", 10, "the limit is over")
    settled(events)
    [(_, _, text)] = told(api, "WarmUpTooLong")
    assert text.startswith("volume v1: the limit of 1 s is over, the pod starts now: 0 %")


@pytest.mark.expect_warnings("cannot write events")
def test_an_api_that_hangs_holds_no_call(telling: FakeNode, api: FakeApi) -> None:
    api.delay_s, api.status = 1.5, 500
    volume = telling.volume("v1", WAIT)
    volume.stage()
    context = {**WAIT, "bucket": "bucket-1", **CONTEXT}
    began = time.monotonic()
    assert code(volume.publish, context=context) == "UNAVAILABLE"
    job(telling)["state"] = "done"
    volume.publish(context=context)
    assert time.monotonic() - began < 1.4


def test_the_end_writes_what_is_pending(api: FakeApi) -> None:
    events = PodEvents(api.client())
    events.start()
    events.listener(CONTEXT, "v1").waiting("1 %")
    events.close()
    assert len(api.events) == 1


def settings(base: Path, environment: dict[str, str]) -> DriverSettings:
    return DriverSettings(
        path=str(base / "csi.sock"), mode=Mode.NODE, config=Config(), node_id="node-a", has_events=True,
        keeper=str(base / "keeper.sock"), credentials_dir=str(base / "credentials"), environment=environment,
    )  # fmt: skip


@pytest.mark.parametrize("environment", [{}, {"KUBERNETES_SERVICE_HOST": "::1", "KUBERNETES_SERVICE_PORT": "tcp"}])
def test_outside_of_a_cluster_the_option_is_refused(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--events: KUBERNETES_SERVICE_HOST"):
        Driver(settings(tmp_path, environment))


@pytest.mark.expect_warnings("nothing was repaired")
def test_the_driver_ends_what_it_started(tmp_path: Path) -> None:
    def running() -> bool:
        return "pod-events" in [thread.name for thread in threading.enumerate()]

    driver = Driver(settings(tmp_path, {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}))
    assert running()
    driver.start()
    driver.stop(0.5)
    assert not running()


def test_the_command_hands_the_option_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "cachefs.cli.main", "csi", "--mode=node", f"--endpoint=unix://{tmp_path}/csi.sock",
        "--node-id=node-a", f"--keeper={tmp_path}/keeper.sock", "--shm-size=0", "--cache-size=0",
    ]  # fmt: skip
    done = subprocess.run([*command, "--events"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "--events: KUBERNETES_SERVICE_HOST" in done.stderr
