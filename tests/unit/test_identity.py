"""`s3.identity` and `s3.manifest` in the names of volumes and blocks: without them everything is called as ever."""

from __future__ import annotations

from cachefs.agent.limits import owner_number
from cachefs.agent.peering import volume_name
from cachefs.agent.volumes import _volume_id
from cachefs.config import MetadataConfig, S3Config
from cachefs.store.retry import RetryingStore
from cachefs.store.s3 import S3Store
from cachefs.types import ObjectVersion, object_id

EXPECTED = (
    "http://127.0.0.1:1",
    "2b16e1288256375c",
    1851464439424520695,
    "19b1b919222a91f7",
    "e244e666f2fd562e2943b2673a1bf142",
)
"""What caches that exist have."""


def test_without_an_identity_nothing_is_different() -> None:
    """Ids and keys of all caches that exist: these values must never change."""

    def of(identity: str) -> tuple[object, ...]:
        config = S3Config(source="s3://bucket/p", endpoint_url="http://127.0.0.1:1", identity=identity)
        store = RetryingStore(S3Store(config, {}))
        version = ObjectVersion("k", "e", 3)
        return (
            store.endpoint,
            _volume_id(store, "p/", MetadataConfig()),
            owner_number(store.endpoint, store.bucket, "p/"),
            volume_name(store, "p/"),
            object_id(store.endpoint, store.bucket, version).hex(),
        )

    assert of("") == EXPECTED
    for before, with_identity in zip(EXPECTED, of("one"), strict=True):
        assert before != with_identity
    for one, two in zip(of("one"), of("two"), strict=True):
        assert one != two


def test_a_manifest_is_another_volume_with_the_same_blocks() -> None:
    def of(view: str) -> tuple[str, str, str, int]:
        store = RetryingStore(S3Store(S3Config(source="s3://bucket/p", endpoint_url="http://127.0.0.1:1"), {}))
        store.view = view
        named = volume_name(store, "p/", store.view)
        owner = owner_number(store.endpoint, store.bucket, "p/")
        return _volume_id(store, "p/", MetadataConfig()), named, store.endpoint, owner

    plain, first, second = of(""), of("key\0etag"), of("key\0other")
    assert len({plain[0], first[0], second[0]}) == 3
    assert len({plain[1], first[1], second[1]}) == 3
    assert plain[2:] == first[2:] == second[2:]
