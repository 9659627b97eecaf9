"""Tenants who want what is not theirs, and what unlucky nodes leave behind, against the node service."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from csi.credentials import CREDENTIALS_FILE, STAGE_FILE, CredentialFiles, Credentials, from_request
from csi.node_requests import EPHEMERAL_KEY
from csi.parameter_table import AuthSource
from csi.parameters import MANIFEST_KEY, parse
from csi.status import Refused
from tests.csi.node_fixtures import FakeNode, fake
from tests.csi.node_rig import KEYS, code, refusal

__all__ = ["fake"]

INLINE = {EPHEMERAL_KEY: "true"}
KEY_FILE = {CREDENTIALS_FILE: b"[default]\n"}


@pytest.fixture
def strict(fake: FakeNode) -> FakeNode:
    """A node where inline volumes bring keys of their own."""
    fake.settings = replace(fake.settings, inline_auth=frozenset({AuthSource.SECRET, AuthSource.POD}))
    fake.restart_plugin()
    return fake


# -- inline volumes ---------------------------------------------------------------------------------------------------


def test_inline_volumes_may_be_kept_from_the_keys_of_the_node(strict: FakeNode) -> None:
    for parameters in ({}, {"authSource": "anonymous"}):
        volume = strict.volume(parameters=parameters)
        status, text = refusal(volume.publish, context=INLINE, staging_target_path="")
        assert status == "INVALID_ARGUMENT"
        assert "not offered to inline volumes of this cluster; offered: pod, secret" in text
    assert strict.keeper.mounts == {}
    strict.volume(parameters={"authSource": "secret"}, secrets=KEYS).publish(context=INLINE, staging_target_path="")
    static = strict.volume("static")
    static.stage()
    static.publish("pod-2")


def test_an_inline_volume_names_no_manifest(fake: FakeNode) -> None:
    volume = fake.volume(parameters={MANIFEST_KEY: "huge"})
    status, text = refusal(volume.publish, context=INLINE, staging_target_path="")
    assert (status, text.partition(":")[0]) == ("INVALID_ARGUMENT", f"volume_context.{MANIFEST_KEY}")


def test_who_has_no_keys_shares_nothing_with_the_node(fake: FakeNode) -> None:
    fake.volume("of-the-node").publish("pod-1", context=INLINE, staging_target_path="")
    fake.volume("public", {"authSource": "anonymous"}).publish("pod-2", context=INLINE, staging_target_path="")
    identities = {plan["config"]["s3"]["identity"] for plan in fake.keeper.plans.values()}
    assert len(identities) == 2


@pytest.mark.parametrize(
    "region", ["x@203.0.113.1:9/", "evil.example/#", "evil.example/?", "a\r\nX-Evil: 1", "../", "a b", "x" * 64]
)
def test_a_region_that_is_another_server_is_refused(region: str) -> None:
    with pytest.raises(Refused, match=r"volume_context\.region: must be the name of a region"):
        parse({"bucket": "bucket-1", "region": region})


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "169.254.170.2:80", "2852039166", "0xa9fea9fe", "169.16689662", "[fe80::1]",
        "[::ffff:169.254.169.254]", "[fd00:ec2::254]",
    ],
)  # fmt: skip
def test_the_credentials_of_a_machine_are_no_bucket(host: str) -> None:
    for name in ("endpoint", "stsEndpoint"):
        with pytest.raises(Refused, match=f"volume_context.{name}: is where machines get their own credentials"):
            parse({"bucket": "bucket-1", "authSource": "pod", "roleArn": "r", name: f"http://{host}/latest"})


# -- files of credentials ---------------------------------------------------------------------------------------------


def secret() -> Credentials:
    found = from_request(parse({"bucket": "bucket-1", "authSource": "secret"}), KEYS, {}, at_publish=True)
    assert found is not None
    return found


def test_a_plugin_that_was_killed_before_it_opened_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "credentials"
    directory.mkdir(mode=0o700)  # umask 077, and killed before chmod
    files = CredentialFiles(str(directory), os.geteuid())
    assert files.write("v-1", secret(), now=0.0)
    assert directory.stat().st_mode & 0o777 == 0o711


def test_half_a_file_of_a_plugin_that_was_killed_goes_with_the_keys(tmp_path: Path) -> None:
    files = CredentialFiles(str(tmp_path / "credentials"), os.geteuid())
    files.write("v-1", secret(), now=0.0)
    files.note_stage("v-1", "{}")
    left = Path(files.directory("v-1"), ".credentials.abcdefgh")
    left.write_bytes(b"[default]\naws_secret_access_key = half")
    files.remove_keys("v-1")
    assert os.listdir(files.directory("v-1")) == [STAGE_FILE]


@pytest.mark.timeout(20)
def test_a_pipe_in_the_directory_of_another_user_holds_nobody_up(tmp_path: Path) -> None:
    files = CredentialFiles(str(tmp_path / "credentials"), os.geteuid())
    files.write("v-1", secret(), now=0.0)
    path = Path(files.directory("v-1"), CREDENTIALS_FILE)
    path.unlink()
    os.mkfifo(path)
    assert files.write("v-1", secret(), now=0.0)
    assert path.is_file()


# -- unlucky nodes ----------------------------------------------------------------------------------------------------


def lose_target(node: FakeNode, volume_id: str, path: str) -> None:
    """Let a target vanish as with umount and rm by hand: the keeper finds out when it looks."""
    for mount in node.keeper.mounts.values():
        if mount["labels"].get("volume") == volume_id:
            node.keeper.lost.add((mount["key"], path))


def test_a_pod_whose_directory_was_removed_by_hand_does_not_hold_its_volume(fake: FakeNode) -> None:
    volume = fake.volume()
    volume.stage()
    target = volume.publish()
    assert code(volume.unstage) == "FAILED_PRECONDITION"
    lose_target(fake, "v1", str(target))
    volume.unstage()
    assert fake.keeper.mounts == {}


def test_nor_does_it_hold_a_volume_for_one_pod(fake: FakeNode) -> None:
    volume = fake.volume(mode="SINGLE_NODE_SINGLE_WRITER")
    volume.stage()
    target = volume.publish("pod-1")
    assert code(volume.publish, "pod-2") == "FAILED_PRECONDITION"
    lose_target(fake, "v1", str(target))
    volume.publish("pod-2")


@pytest.mark.timeout(60)
def test_figures_of_many_volumes_come_in_time_when_the_agent_is_silent(fake: FakeNode) -> None:
    volumes = [fake.volume(f"v{number}") for number in range(20)]
    targets = []
    for volume in volumes:
        volume.stage()
        targets.append(str(volume.publish()))
    fake.agent.silent.set()
    began = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda pair: pair[0].stats(pair[1]), zip(volumes, targets, strict=True)))
    assert time.monotonic() - began < 15  # three seconds for the agent, and not for each of them
    assert all("the agent of the node does not answer" in each.volume_condition.message for each in found)


def test_after_a_boot_everything_can_be_called_again(fake: FakeNode) -> None:
    volume = fake.volume(parameters={"authSource": "secret"}, secrets=KEYS)
    volume.stage()
    target = volume.publish()
    fake.keeper.mounts.clear()  # /run is empty, kubelet's directories are as they were
    for path in Path(fake.settings.credentials_dir).rglob("*"):
        if path.is_file():
            path.unlink()
    fake.restart_plugin()
    volume = fake.volume(parameters={"authSource": "secret"}, secrets=KEYS)
    assert target.is_dir()
    assert code(volume.publish) == "FAILED_PRECONDITION"
    volume.unpublish("pod-of-the-last-boot")
    volume.stage()
    assert volume.publish() == target
    volume.unpublish()
    volume.unstage()
    assert fake.keeper.mounts == {}
