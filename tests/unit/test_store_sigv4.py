"""Our signatures are those of botocore, and of the example in the documentation."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime
from unittest.mock import patch

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st

from cachefs.store.address import quote
from cachefs.store.sigv4 import EMPTY_SHA256, Signer

MOMENT = datetime(2026, 11, 23, 23, 59, 59, tzinfo=UTC)
keys = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=60)
words = st.text("abcABC012/+=", min_size=1, max_size=40)


def by_botocore(access: str, secret: str, token: str | None, region: str, host: str, path: str) -> str:
    request = AWSRequest("GET", f"http://{host}{path}", headers={"X-Amz-Content-SHA256": EMPTY_SHA256}, data=b"")
    with patch("botocore.auth.get_current_datetime", return_value=MOMENT.replace(tzinfo=None), create=True):
        S3SigV4Auth(ReadOnlyCredentials(access, secret, token), "s3", region).add_auth(request)
    return str(request.headers["Authorization"])


@given(keys, words, words, st.one_of(st.none(), words), st.sampled_from(["us-east-1", "eu-central-1"]))
def test_they_are_those_of_botocore(key: str, access: str, secret: str, token: str | None, region: str) -> None:
    host, path = "127.0.0.1:8333", f"/bucket/{quote(key, safe='/')}"
    ours = Signer(access, secret, token, region, host).headers(path, calendar.timegm(MOMENT.timetuple()))
    lines = dict(line.split(": ", 1) for line in ours.splitlines())
    assert lines["Authorization"] == by_botocore(access, secret, token, region, host, path)
    assert lines["x-amz-date"] == "20261123T235959Z"
    assert lines.get("x-amz-security-token") == token


def test_the_key_of_another_day_is_another_one() -> None:
    signer, path = Signer("AK", "SK", None, "us-east-1", "h"), "/b/k"
    moment = calendar.timegm(MOMENT.timetuple())
    first, next_day, again = (signer.headers(path, at) for at in (moment, moment + 1, moment))
    assert first == again
    assert "/20261124/us-east-1/s3/aws4_request" in next_day
    assert first == Signer("AK", "SK", None, "us-east-1", "h").headers(path, moment)
