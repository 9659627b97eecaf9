"""What a store is told by people who are not to be trusted: regions that are host names, files that are none."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cachefs.config import Addressing
from cachefs.errors import ConfigError
from cachefs.store.address import Address
from cachefs.store.obstore_client import read_certificates


@pytest.mark.parametrize("region", ["x@203.0.113.1/", "evil.example", "evil.example/#", "a\r\nX-Evil: 1", "../", " "])
def test_a_region_never_leads_to_another_server_that_passes_for_aws(region: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(region))):
        Address.parse("bucket", region, "", Addressing.AUTO)
    with pytest.raises(ConfigError):
        Address.parse("bucket", "us-east-1", "", Addressing.AUTO).in_region(region)


@pytest.mark.parametrize(("region", "endpoint"), [("", ""), ("us-gov-west-1", ""), ("fr.par_1", "https://s3.example")])
def test_regions_that_are_some(region: str, endpoint: str) -> None:
    assert Address.parse("bucket", region, endpoint, Addressing.AUTO).region == region


@pytest.mark.timeout(20)
def test_certificates_come_from_a_plain_file_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (str(pipe), "/dev/zero", "/proc/self/environ"):
        with pytest.raises(ConfigError, match="holds no certificate"):
            read_certificates(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_certificates(str(tmp_path))
    pem = tmp_path / "ca.pem"
    pem.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    assert read_certificates(str(pem)) == pem.read_bytes()
