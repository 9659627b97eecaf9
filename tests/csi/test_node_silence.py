"""An agent or a keeper that takes connections and says nothing, and what people are told of a store that refuses."""

from __future__ import annotations

import socket
import time

import pytest

from cachefs.config import S3Config
from cachefs.errors import CredentialsError
from cachefs.runtime import mount_id
from cachefs.store.credentials import CredentialSource
from csi import node_keeper, node_mounts
from csi.status import Refused
from tests.csi.node_fixtures import FakeNode, fake
from tests.csi.node_rig import KEYS, refusal

__all__ = ["fake"]

SECRET = {"authSource": "secret"}


def test_an_agent_that_is_silent_is_named_soon(fake: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    assert node_mounts.ALIVE_S < 10
    monkeypatch.setattr(node_mounts, "ALIVE_S", 0.5)
    volume = fake.volume(parameters=SECRET, secrets=KEYS)
    volume.stage()
    fake.agent.silent.set()
    began = time.monotonic()
    got, text = refusal(fake.volume("v2", SECRET, secrets=KEYS).stage)
    assert time.monotonic() - began < 3
    assert (got, "cachefs-node" in text) == ("UNAVAILABLE", True), text
    assert len(fake.keeper.mounts) == 1
    volume.publish("another pod needs no agent")


def test_a_keeper_that_is_silent_is_named_soon(fake: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    assert node_keeper.LOOK_S < 9  # --probe-timeout of the liveness probe in the chart
    monkeypatch.setattr(node_keeper, "LOOK_S", 0.5)
    volume = fake.volume()
    volume.stage()
    target = str(volume.publish())
    fake.keeper.stop()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(fake.keeper.path))
        silent.listen(100)  # the kernel takes connections, and nobody answers
        for call in (volume.stage, volume.publish, volume.unpublish, lambda: volume.stats(target)):
            began = time.monotonic()
            got, text = refusal(call)
            assert time.monotonic() - began < 3
            assert (got, "cachefs-keeper" in text) == ("UNAVAILABLE", True), text
        with pytest.raises(Refused, match="cachefs-keeper"):
            fake.plugin.service.check()
    fake.keeper.path.unlink()
    fake.keeper.start()
    volume.publish()


def test_what_a_store_advises_is_said_in_words_of_classes(fake: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi.node_stats.SHARED_S", -1.0)
    with pytest.raises(CredentialsError) as nobody:
        CredentialSource(S3Config(), {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/x",
                                      "AWS_SHARED_CREDENTIALS_FILE": "/x"}).current()  # fmt: skip
    fake.agent.refuse = ("CredentialsError", str(nobody.value))
    got, text = refusal(fake.volume().stage)
    assert got == "UNAUTHENTICATED"
    assert text.startswith("no credentials were found: with authSource 'node', which is the default, ")
    assert "--" not in text
    fake.agent.refuse = ("ConfigError", "bucket 'b' is in another region (301): use --region eu-west-1")
    assert refusal(fake.volume().stage)[1].endswith("use the parameter region eu-west-1")
    fake.agent.refuse = None
    volume = fake.volume()
    volume.stage()
    (mount,) = fake.keeper.mounts.values()
    fake.agent.mounts = {mount_id(mount["mountpoint"]): {"volume_id": "w"}}
    fake.agent.volumes = {"w": {"origin": {"failing": True, "last_error": str(nobody.value)}}}
    message = volume.stats(volume.staging).volume_condition.message
    assert "authSource 'node'" in message
    assert "--" not in message
