"""Pods that wait until a volume is warm: what they are told, for how long, and what becomes of the job."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.s3_server import S3Server
from csi import node_warmup
from tests.csi.kube_node import KubeNode
from tests.csi.node_fixtures import FakeNode, fake
from tests.csi.node_rig import KubeletVolume, code, refusal
from tests.support.machine import wait_until
from tests.support.mounts import Bucket

__all__ = ["fake"]

WAIT = {"warmup": "train, /val/", "warmupWait": "true"}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_warmup, "FIRST_HOLD_S", 0.3)
    monkeypatch.setattr(node_warmup, "HOLD_S", 2.0)
    monkeypatch.setattr(node_warmup, "LOOK_S", 0.05)


def staged(fake: FakeNode, volume_id: str = "v1", **more: str) -> KubeletVolume:
    volume = fake.volume(volume_id, {**WAIT, **more})
    volume.stage()
    return volume


def job(fake: FakeNode) -> dict[str, object]:
    """The one job that there is."""
    (found,) = fake.agent.jobs.values()
    return found


def test_a_pod_waits_until_its_volume_is_warm(fake: FakeNode) -> None:
    volume = staged(fake)
    assert fake.agent.work == []  # nothing before the first pod
    got, text = refusal(volume.publish)
    assert got == "UNAVAILABLE"
    assert text == "warming up: 0 % (0 bytes of 1000 bytes in 10 files)"
    assert volume.target("pod-1") not in fake.keeper.targets("v1")
    assert fake.agent.paths == [[b"train", b"val"]]
    assert fake.agent.work[0].background
    job(fake).update(done_bytes=400, left_s=12.3)
    assert refusal(volume.publish, call_s=3)[1].endswith("40 % (400 bytes of 1000 bytes in 10 files), about 12 s left")
    job(fake)["state"] = "done"
    volume.publish()
    volume.publish("pod-2")
    assert len(fake.agent.work) == 1


def test_a_pod_starts_as_soon_as_the_job_is_done(fake: FakeNode) -> None:
    volume = staged(fake)
    assert code(volume.publish) == "UNAVAILABLE"
    with ThreadPoolExecutor(1) as threads:
        published = threads.submit(volume.publish)
        time.sleep(0.3)
        assert not published.done()
        job(fake)["state"] = "done"
        published.result(timeout=1)


def test_many_pods_wait_for_one_job(fake: FakeNode) -> None:
    volume = staged(fake)
    with ThreadPoolExecutor(30) as threads:
        codes = Counter(threads.map(lambda pod: code(volume.publish, f"pod-{pod}"), range(30)))
    assert codes == {"UNAVAILABLE": 30}
    assert len(fake.agent.work) == 1


@pytest.mark.expect_warnings("is not warm")
def test_after_the_limit_pods_start_anyway(fake: FakeNode) -> None:
    volume = staged(fake, warmupWait="1s")
    began = time.monotonic()
    assert code(volume.publish) == "UNAVAILABLE"
    volume.publish()
    assert 0.9 < time.monotonic() - began < 3
    assert job(fake)["state"] == "fetching"  # it goes on
    volume.publish("pod-2")


def test_the_limit_counts_from_the_first_call_also_for_the_next_plugin(fake: FakeNode) -> None:
    staged(fake, warmupWait="1h")
    assert code(fake.volume("v1", {**WAIT, "warmupWait": "1h"}).publish) == "UNAVAILABLE"
    (mount,) = fake.keeper.mounts.values()
    before = mount["labels"]["warm"]
    fake.restart_plugin()
    volume = fake.volume("v1", {**WAIT, "warmupWait": "1h"})
    assert code(volume.publish) == "UNAVAILABLE"
    assert mount["labels"]["warm"] == before
    assert len(fake.agent.work) == 1
    job(fake)["state"] = "done"
    volume.publish()


def test_what_cannot_be_loaded_is_named_and_tried_again(fake: FakeNode) -> None:
    fake.agent.starts_as = {
        "state": "incomplete", "done_bytes": 1000, "examples": [{"path": "val", "why": "no such file"}]
    }  # fmt: skip
    volume = staged(fake)
    for number in (1, 2):
        got, text = refusal(volume.publish)
        assert (got, "val: no such file" in text) == ("UNAVAILABLE", True)
        assert len(fake.agent.work) == number
    fake.agent.starts_as = {"state": "failed", "error": "it is larger than the tiers"}
    assert refusal(volume.publish) == ("UNAVAILABLE", "warming up: it is larger than the tiers")
    fake.agent.starts_as = {"state": "done"}
    volume.publish()


def test_an_agent_that_dies_has_the_job_begun_again(fake: FakeNode) -> None:
    volume = staged(fake)
    assert code(volume.publish) == "UNAVAILABLE"
    fake.agent.stop()
    got, text = refusal(volume.publish)
    assert got == "UNAVAILABLE"
    assert "no agent listens" in text
    fake.agent.start()
    assert code(volume.publish) == "UNAVAILABLE"
    assert len(fake.agent.work) == 2
    job(fake)["state"] = "done"
    volume.publish()


def test_an_answer_comes_before_the_callers_time_is_over(fake: FakeNode) -> None:
    volume = staged(fake)
    code(volume.publish)
    began = time.monotonic()
    assert refusal(volume.publish, call_s=2.5)[0] == "UNAVAILABLE"
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("wait", [{}, {"warmupWait": "false"}])
def test_without_warmup_wait_nobody_waits(fake: FakeNode, wait: dict[str, str]) -> None:
    volume = fake.volume(parameters={"warmup": "/", **wait})
    volume.stage()
    volume.publish()
    volume.publish("pod-2")
    assert fake.agent.paths == [[b""]]
    assert len(fake.agent.work) == 1


@pytest.mark.expect_warnings("the warm-up of")
def test_nobody_waits_for_an_agent_that_is_away_either(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"warmup": "/"})
    volume.stage()
    fake.agent.stop()
    volume.publish()
    fake.agent.start()
    volume.publish()  # kubelet calls again
    assert len(fake.agent.work) == 1


def test_a_group_of_nodes_loads_together(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"warmup": "/", "group": "job-7"})
    volume.stage()
    volume.publish()
    assert [(work.nodes, work.group) for work in fake.agent.work] == [(0, "job-7")]


def test_a_pod_that_goes_while_it_waits_leaves_nothing(fake: FakeNode) -> None:
    volume = fake.volume("csi-1", WAIT)
    context = {"csi.storage.k8s.io/ephemeral": "true"}
    assert code(volume.publish, context=context) == "UNAVAILABLE"
    assert len(fake.keeper.mounts) == 1
    volume.unpublish()
    assert fake.keeper.mounts == {}


# -- on a real node ---------------------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_a_real_pod_starts_when_everything_is_loaded(s3_server: S3Server) -> None:
    with Bucket.create(s3_server) as bucket, KubeNode(s3_server.environment) as node:
        bucket.fill({f"train/{number}": b"x" * 10_000 for number in range(50)})
        parameters = {
            "bucket": bucket.name, "endpoint": s3_server.endpoint_url, "warmup": "train", "warmupWait": "10m"
        }  # fmt: skip
        volume = node.volume("v-warm", parameters)
        volume.stage()
        place = volume.publish()
        done = node.run("warmup", "--check", str(place / "train"))
        assert done.returncode == 0, done.stdout + done.stderr
        misspelt = node.volume("v-misspelt", {**parameters, "warmup": "trian"}, flags=("negative-ttl=500ms",))
        misspelt.stage()
        got, text = refusal(misspelt.publish)
        assert got == "UNAVAILABLE"
        assert "trian" in text
        bucket.put("trian", b"there it is")
        wait_until(lambda: code(misspelt.publish) == "OK", 30, "what is there now is loaded")
        for each in (volume, misspelt):
            each.unpublish()
            each.unstage()
