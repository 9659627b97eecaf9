"""Many objects at once against the real server, and through a proxy that breaks answers."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.errors import CachefsError
from cachefs.store.open import open_store
from cachefs.types import ObjectVersion, Tier
from tests.support.fault_proxy import Fault, FaultProxy


class Orders:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.bodies: dict[int, bytes] = {}
        self.errors: dict[int, CachefsError] = {}
        self.lock = threading.Lock()

    def begin(self, number: int) -> bool:
        return True

    def postponed(self, number: int) -> bool:
        return True

    def arrived(self, number: int, body: bytes | memoryview, source: Tier) -> None:
        with self.lock:
            self.bodies[number] = bytes(body)

    def failed(self, number: int, error: CachefsError) -> None:
        with self.lock:
            self.errors[number] = error


def test_many_objects_of_a_real_server(s3_server: S3Server, s3_bucket: str) -> None:
    draw = random.Random(7)
    bodies = {f"dir/{number:04d}": draw.randbytes(draw.randrange(1, 60_000)) for number in range(150)}
    bodies["odd name\n"] = b"obstore refuses its key: it goes the signed way"
    s3_server.put_many(s3_bucket, bodies.items())
    config = S3Config(source=f"s3://{s3_bucket}", endpoint_url=s3_server.endpoint_url)
    store = open_store(config, s3_server.environment)
    try:
        versions = [store.head(key).version for key in bodies]
        s3_server.client().put_object(Bucket=s3_bucket, Key="dir/0003", Body=b"another version")
        s3_server.client().delete_object(Bucket=s3_bucket, Key="dir/0005")
        versions.append(ObjectVersion("never", "etag", 5))
        orders = Orders()
        store.get_many(versions, orders)
        expected = dict(enumerate(bodies.values()))
        assert orders.bodies == {number: body for number, body in expected.items() if number not in (3, 5)}
        assert {number: type(error).__name__ for number, error in orders.errors.items()} == dict.fromkeys(
            (3, 5, 151), "StaleObject"
        )
        assert store.limiter.in_flight == 0
    finally:
        store.close()


def test_over_tls(s3_server: S3Server, s3_bucket: str, secure_proxy: FaultProxy, certificate: Path) -> None:
    draw = random.Random(8)
    bodies = {f"dir/{number:03d}": draw.randbytes(draw.randrange(1, 200_000)) for number in range(60)}
    s3_server.put_many(s3_bucket, bodies.items())
    config = S3Config(
        source=f"s3://{s3_bucket}", endpoint_url=secure_proxy.endpoint_url, ca_bundle=str(certificate), max_requests=8
    )
    store = open_store(config, s3_server.environment)
    try:
        versions = [store.head(key).version for key in bodies]
        secure_proxy.add(Fault(truncate_after=1000, times=2))
        for _ in range(2):
            orders = Orders()
            store.get_many(versions, orders)
            assert orders.errors == {}
            assert orders.bodies == dict(enumerate(bodies.values()))
    finally:
        store.close()


@pytest.mark.expect_warnings("its certificate is not trusted")
def test_a_certificate_that_is_not_trusted(s3_server: S3Server, s3_bucket: str, secure_proxy: FaultProxy) -> None:
    config = S3Config(source=f"s3://{s3_bucket}", endpoint_url=secure_proxy.endpoint_url, io_timeout_s=1)
    store = open_store(config, s3_server.environment)
    try:
        orders = Orders()
        store.get_many([ObjectVersion(f"dir/{number}", "tag", 5) for number in range(20)], orders)
        assert orders.bodies == {}
        assert len(orders.errors) == 20
        assert "--ca-bundle" in str(orders.errors[0])
    finally:
        store.close()


def test_throttling_and_broken_answers_in_the_middle(s3_server: S3Server, s3_bucket: str) -> None:
    bodies = {f"dir/{number:03d}": random.Random(number).randbytes(20_000) for number in range(80)}
    s3_server.put_many(s3_bucket, bodies.items())
    with FaultProxy.before(s3_server.endpoint_url) as proxy:
        config = S3Config(source=f"s3://{s3_bucket}", endpoint_url=proxy.endpoint_url, io_timeout_s=10)
        store = open_store(config, s3_server.environment)
        try:
            versions = [store.head(key).version for key in bodies]
            proxy.add(Fault(status=503, times=6))
            proxy.add(Fault(truncate_after=1000, times=3))
            proxy.add(Fault(reset=True, times=3))
            orders = Orders()
            store.get_many(versions, orders)
            assert orders.errors == {}
            assert orders.bodies == dict(enumerate(bodies.values()))
            counted = store.counters.snapshot()
            assert counted["origin_throttled"] == 6
            assert counted["origin_retries"] == 12
            assert store.limiter.limit < config.max_requests
        finally:
            store.close()


def test_a_far_store_is_asked_for_many_at_once(s3_server: S3Server, s3_bucket: str) -> None:
    bodies = {f"dir/{number:03d}": b"%d" % number for number in range(192)}
    s3_server.put_many(s3_bucket, bodies.items())
    with FaultProxy.before(s3_server.endpoint_url) as proxy:
        store = open_store(S3Config(source=f"s3://{s3_bucket}", endpoint_url=proxy.endpoint_url), s3_server.environment)
        try:
            versions = [store.head(key).version for key in bodies]
            proxy.add(Fault(delay_s=0.05))
            store.get_many(versions[:16], Orders())  # learns how far it is
            orders = Orders()
            began = time.monotonic()
            store.get_many(versions, orders)
            took = time.monotonic() - began
            assert len(orders.bodies) == 192
            assert took < 192 * 0.05 / 10, "at least ten at once"
        finally:
            store.close()
