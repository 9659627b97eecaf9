"""What StorageClasses, volumes and mount flags may say, and how it reaches a mount."""

from __future__ import annotations

import dataclasses
import math

import pytest

from cachefs import settings as writing
from cachefs.cli.load import validate
from cachefs.config import GIB, MIB, Addressing, CacheConfig, Config, FuseConfig, LimitsConfig, Prefetch, S3Config
from cachefs.types import Consistency
from csi import mount_flags, path_template
from csi.parameter_table import TABLE, AuthSource, markdown_table
from csi.parameters import MANIFEST_KEY, VolumeSpec, parse
from csi.status import Code, Refused
from tests.csi.rig import claim

EVERYTHING = {
    "bucket": "photos",
    "prefix": "/raw/2026/",
    "endpoint": "https://minio:9000",
    "region": "eu-central-1",
    "pathStyle": "true",
    "caBundle": "/etc/ssl/ours.pem",
    "authSource": "pod",
    "roleArn": "arn:aws:iam::1:role/x",
    "stsEndpoint": "https://sts:9000",
    "stsRegion": "eu-central-1",
    "audience": "minio",
    "mode": "immutable",
    "metadataTTL": "forever",
    "readOnly": "true",
    "shmQuota": "1GiB",
    "diskQuota": "20GiB",
    "diskTTL": "7d",
    "memoryLimit": "512MiB",
    "prefetch": "off",
    "warmup": "train, val/a.tar",
    "warmupWait": "10m",
    "group": "job-1",
    "useCache": "no",
    "uid": "1000",
    "gid": "2000",
    "fileMode": "0440",
    "dirMode": "0550",
    "mountOptions": "noatime,io-timeout=1m,no-cache",
}


def test_every_parameter_of_the_table_has_its_effect() -> None:
    assert set(EVERYTHING) == {row.name for row in TABLE} - {"pathTemplate"}
    spec = parse(EVERYTHING)
    assert spec.source == "s3://photos/raw/2026"
    assert (spec.auth_source, spec.audience, spec.gid) == (AuthSource.POD, "minio", 2000)
    assert (spec.warmup, spec.warmup_wait, spec.group) == (("train", "val/a.tar"), 600.0, "job-1")
    config = spec.config(Config())
    assert config.s3 == S3Config(
        source="s3://photos/raw/2026", endpoint_url="https://minio:9000", region="eu-central-1",
        addressing=Addressing.PATH, ca_bundle="/etc/ssl/ours.pem", io_timeout_s=60.0,
    )  # fmt: skip
    assert (config.metadata.consistency, config.metadata.metadata_ttl_s) == (Consistency.IMMUTABLE, math.inf)
    assert config.limits == LimitsConfig(shm_quota_bytes=GIB, disk_quota_bytes=20 * GIB, disk_ttl_s=7 * 86400)
    assert config.fuse == FuseConfig(
        uid=1000, gid=2000, file_mode=0o440, dir_mode=0o550, allow_other=True, cache=False, prefetch=Prefetch.OFF
    )
    assert spec.mount_options.flags == ("noatime",)


def test_what_is_not_said_is_that_of_the_node() -> None:
    node = Config(
        s3=S3Config(endpoint_url="http://store:1", io_timeout_s=5.0, max_requests=7),
        cache=CacheConfig(cache_dir="/var/x", cache_size_bytes=GIB),
    )
    config = parse({"bucket": "abc"}).config(node)
    assert config.s3 == dataclasses.replace(node.s3, source="s3://abc")
    assert config.cache == node.cache
    assert config.fuse.read_only
    assert config.fuse.allow_other


def test_what_a_volume_may_say_makes_a_configuration_that_is_accepted(tmp_path: object) -> None:
    more = {name: text for name, text in EVERYTHING.items() if name != "caBundle"}
    node = Config(cache=CacheConfig(cache_dir=f"{tmp_path}/c", runtime_dir=f"{tmp_path}/r", shm_size_bytes=0))
    validate(parse(more).config(node))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "ctx.bucket: must be given"),
        ({"bucket": ""}, "ctx.bucket: must be the name"),
        ({"bucket": "a/b"}, "ctx.bucket: must be the name of a bucket"),
        ({"bucket": "x"}, "ctx.bucket:"),
        ({"prefix": "a//b"}, "ctx.prefix:"),
        ({"prefix": "../x"}, "ctx.prefix:"),
        ({"endpoint": "https://key:hush@host"}, "ctx.endpoint: keys do not belong"),
        ({"endpoint": "minio:9000"}, "ctx.endpoint: must look like"),
        ({"endpoint": "http://"}, "ctx.endpoint: must look like"),
        ({"endpoint": "http://[::1"}, "ctx.endpoint: must look like"),
        ({"endpoint": "http://h:99999"}, "ctx.endpoint: must look like"),
        ({"endpoint": "http://h?x=1"}, "ctx.endpoint: must look like"),
        ({"pathStyle": "maybe"}, "ctx.pathStyle:"),
        ({"caBundle": "ours.pem"}, "ctx.caBundle: must be the absolute path"),
        ({"authSource": "magic"}, "ctx.authSource: 'magic' is not one of: node, secret, pod, anonymous"),
        ({"authSource": "pod"}, "ctx.roleArn: must be given"),
        ({"roleArn": "x"}, "ctx.roleArn: has a meaning only with authSource 'pod'"),
        ({"mode": "fast"}, "ctx.mode:"),
        ({"metadataTTL": "soon"}, "ctx.metadataTTL:"),
        ({"readOnly": "false"}, "ctx.readOnly: writing is not offered"),
        ({"shmQuota": "1"}, "ctx.shmQuota: must be at least"),
        ({"shmQuota": "1GiB", "shmSize": "1GiB"}, "ctx.shmSize: is the same as shmQuota"),
        ({"diskTTL": "forever"}, "ctx.diskTTL: must end"),
        ({"warmup": "../secrets"}, "ctx.warmup: '../secrets' leads out"),
        ({"warmupWait": "10m"}, "ctx.warmupWait: has a meaning only with 'warmup'"),
        ({"warmup": "/", "warmupWait": "long"}, "ctx.warmupWait: 'long' is neither"),
        ({"warmup": "/", "group": "two words"}, "ctx.group: must be the name of a group"),
        ({"warmup": "/", "group": "all"}, "ctx.group: must be the name of a group"),
        ({"authSource": "pod", "roleArn": "arn\nx"}, "ctx.roleArn: must be one line"),
        ({"uid": "-1"}, "ctx.uid:"),
        ({"gid": "4294967295"}, "ctx.gid:"),
        ({"fileMode": "7777"}, "ctx.fileMode:"),
        ({"mountOptions": "rw"}, "ctx.mountOptions: mount flag rw: writing is not offered"),
        ({"mountOptions": "cache-size=1GiB"}, "ctx.mountOptions: mount flag cache-size: belongs to the node"),
        ({"mountOptions": "io-timeout"}, "ctx.mountOptions: mount flag io-timeout: needs a value"),
        ({"pathTemplate": "${pv.name}"}, "ctx.pathTemplate: is for StorageClasses"),
        ({"accessKeyId": "hush"}, "ctx.accessKeyId: unknown parameter"),
        ({"Prefix": "x"}, "did you mean 'prefix'?"),
        ({"prefix": "x" * 5000}, "ctx.prefix: must have at most 4096 bytes"),
        ({"cachefs.csi.k8s.io/unknown": "x"}, "unknown parameter"),
        ({"cachefs.csi.k8s.io/capacity": "much"}, "must be a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(given: dict[str, str], text: str) -> None:
    whole = given if "bucket" in given or not given else {"bucket": "abc", **given}
    with pytest.raises(Refused) as refused:
        parse(whole, where="ctx")
    assert refused.value.code is Code.INVALID_ARGUMENT
    assert text in str(refused.value)
    assert "hush" not in str(refused.value)


def test_keys_of_kubernetes_pass_and_our_own_are_not_for_classes() -> None:
    extra = {
        **claim("a", "b"),
        "storage.kubernetes.io/csiProvisionerIdentity": "x",
        "csi.storage.k8s.io/ephemeral": "true",
    }
    assert parse({"bucket": "abc", **extra}) == parse({"bucket": "abc"})
    assert parse({"bucket": "abc", MANIFEST_KEY: "k"}).manifest == "k"
    with pytest.raises(Refused, match="unknown parameter"):
        parse({"bucket": "abc", MANIFEST_KEY: "k"}, of_class=True)


def test_the_flags_of_a_capability_win() -> None:
    spec = parse({"bucket": "abc", "metadataTTL": "1m", "mountOptions": "metadata-ttl=2m,noexec"})
    assert spec.config(Config()).metadata.metadata_ttl_s == 120.0
    more = spec.with_flags(mount_flags.parse(["metadata_ttl=3m", "ro", "noatime,uid=7"]))
    assert more.config(Config()).metadata.metadata_ttl_s == 180.0
    assert more.config(Config()).fuse.uid == 7
    assert more.mount_options.flags == ("noexec", "noatime")


def test_flags_never_show_their_values() -> None:
    for flag in (
        "io-timeout=hush",
        "password=hush",
        "uid=hush",
        "endpoint-url=http://hush",
        "profile=hush",
        "hush hush=1",
    ):
        with pytest.raises(ValueError, match="mount flag") as error:
            mount_flags.parse([flag])
        assert "hush" not in str(error.value)


def test_settings_that_a_flag_may_set_exist() -> None:
    for name in mount_flags.SETTINGS:
        found = writing.find_setting(name)
        assert found is not None
        assert found.field == name


def test_a_node_that_cannot_keep_to_it_refuses_the_volume() -> None:
    node = Config(cache=CacheConfig(memory_limit_bytes=512 * MIB, block_size_bytes=4 * MIB))
    with pytest.raises(Refused, match="memoryLimit 256MiB") as refused:
        parse({"bucket": "abc", "memoryLimit": "256MiB"}).config(node)
    assert refused.value.code is Code.FAILED_PRECONDITION
    with pytest.raises(Refused, match="at least 64MiB"):
        parse({"bucket": "abc", "diskQuota": "32MiB"}).config(node)
    parse({"bucket": "abc", "memoryLimit": "1GiB", "diskQuota": "64MiB"}).config(node)


def test_the_table_for_the_documentation_has_every_parameter() -> None:
    table = markdown_table()
    for row in TABLE:
        assert f"`{row.name}`" in table
        assert not row.also or f"`{row.also}`" in table
    fields = {field.name for field in dataclasses.fields(VolumeSpec)}
    assert {row.field for row in TABLE if row.field} - {"read_only"} <= fields


# -- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("${pvc.namespace}/${pvc.name}", "ns/c/"),
        ("/pvcs/${pv.name}/", "pvcs/pvc-ns-c/"),
        ("${volume.id}", "v1-abc/"),
        ("a-${pvc.name}-b/${pvc.name}", "a-c-b/c/"),
    ],
)
def test_templates(template: str, path: str) -> None:
    assert path_template.expanded(path_template.checked(template), claim("ns", "c"), "v1-abc") == path


@pytest.mark.parametrize(
    "template",
    ["", "/", "fixed", "${pvc.nam}", "${}", "$x/${pv.name}", "a//${pv.name}", "../${pv.name}", "${pv.name}/.",
     ".cachefs/${pv.name}", "x" * 600 + "${pv.name}", "${pv.name}/\nx"],
)  # fmt: skip
def test_templates_that_no_claim_could_use(template: str) -> None:
    with pytest.raises(Refused, match=r"parameters\.pathTemplate"):
        parse({"bucket": "abc", "pathTemplate": template}, where="parameters", of_class=True)


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "x" * 600, "a\x00b"])
def test_names_that_are_no_part_of_a_path(name: str) -> None:
    with pytest.raises(Refused) as refused:
        path_template.expanded("${pvc.name}", claim("ns", name), "v1-abc")
    assert refused.value.code is Code.INVALID_ARGUMENT
