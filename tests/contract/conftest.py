"""What the suites of the stores share: a server that speaks TLS, with a certificate of its own."""

from __future__ import annotations

import shlex
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from tests.support.fault_proxy import FaultProxy


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that nobody trusts yet, its key beside it."""
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        shlex.split(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key.pem "
            "-out cert.pem -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 "
            "-addext basicConstraints=critical,CA:FALSE"
        ),
        cwd=directory,
        check=True,
        capture_output=True,
    )
    return directory / "cert.pem"


@pytest.fixture
def secure_proxy(s3_server: S3Server, certificate: Path) -> Iterator[FaultProxy]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    with FaultProxy.before(s3_server.endpoint_url, tls=context) as made:
        yield made
