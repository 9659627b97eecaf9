"""Where credentials come from, with the services that give them out played on loopback."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cachefs.config import S3Config
from cachefs.errors import ConfigError, CredentialsError, StorageUnavailable
from cachefs.store.credentials import CredentialSource

ALONE = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent/config",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
}


class Services(ThreadingHTTPServer):
    """STS, the container endpoint and the instance metadata, all at one address."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[dict[str, str]] = []
        self.lifetime_s = 3600.0
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def keys(self) -> tuple[str, str]:
        """Access key (numbered, to see refreshes) and expiry."""
        expiry = datetime.now(UTC) + timedelta(seconds=self.lifetime_s)
        return f"TEMPORARY{len(self.asked)}", expiry.strftime("%Y-%m-%dT%H:%M:%SZ")


class _Answers(BaseHTTPRequestHandler):
    server: Services

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        question = dict(urllib.parse.parse_qsl(body))
        self.server.asked.append(question)
        access_key, expiry = self.server.keys()
        action = question["Action"]
        self._answer(
            f"<{action}Response><{action}Result><Credentials><AccessKeyId>{access_key}</AccessKeyId>"
            f"<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>{expiry}</Expiration>"
            f"</Credentials><AssumedRoleUser><Arn>a</Arn><AssumedRoleId>i</AssumedRoleId></AssumedRoleUser>"
            f"</{action}Result></{action}Response>"
            if self.server.status == 200
            else "<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>"
        )

    def do_GET(self) -> None:
        self.server.asked.append({"path": self.path, "authorization": self.headers.get("Authorization", "")})
        access_key, expiry = self.server.keys()
        keys = {"AccessKeyId": access_key, "SecretAccessKey": "s", "Token": "t", "Expiration": expiry}
        self._answer(
            "role" if self.path.endswith("/security-credentials/") else json.dumps({**keys, "Code": "Success"})
        )

    def do_PUT(self) -> None:
        self._answer("imds-token")

    def _answer(self, text: str) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        pass


@pytest.fixture
def services() -> Iterator[Services]:
    server = Services()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def source(environment: dict[str, str], **settings: Any) -> CredentialSource:
    return CredentialSource(S3Config(source="s3://bucket", **settings), {**ALONE, **environment})


def write(directory: Path, text: str) -> dict[str, str]:
    (directory / "config").write_text(text)
    return {"AWS_CONFIG_FILE": str(directory / "config")}


def test_keys_of_the_environment() -> None:
    keys = source({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "c"}).current()
    assert (keys.access_key, keys.secret_key, keys.token) == ("a", "b", "c")


def test_the_environment_of_this_process_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-jwt")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "else",
        "AWS_PROFILE": "absent",
        "AWS_REGION": "eu-north-1",
        "AWS_DEFAULT_REGION": "eu-north-1",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_ROLE_ARN": "arn:aws:iam::1:role/r",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1/",
    }.items():
        monkeypatch.setenv(name, value)
    other = source({})
    assert other.region() == "us-east-1"
    with pytest.raises(CredentialsError, match="no credentials were found"):
        other.current()


def test_a_profile_of_the_files(tmp_path: Path) -> None:
    files = write(tmp_path, "[profile mine]\nregion=eu-central-1\naws_access_key_id=A\naws_secret_access_key=B\n")
    keys_of_shell = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    chosen = source({**files, **keys_of_shell}, profile="mine")
    assert chosen.current().access_key == "A"  # a profile that was asked for wins over keys that lie around
    assert chosen.region() == "eu-central-1"
    assert source({**files, "AWS_PROFILE": "mine"}).current().access_key == "A"
    assert source({**files, "AWS_PROFILE": "mine"}).region() == "eu-central-1"
    with pytest.raises(ConfigError, match="absent"):
        source(files, profile="absent").current()


def test_regions() -> None:
    assert source({"AWS_DEFAULT_REGION": "b"}).region() == "b"
    assert source({"AWS_REGION": "a", "AWS_DEFAULT_REGION": "b"}).region() == "a"
    assert source({"AWS_REGION": "a"}, region="c").region() == "c"


def test_web_identity(services: Services, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-jwt")
    chosen = source(
        {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/reader",
            "AWS_ROLE_SESSION_NAME": "mine",
            "AWS_ENDPOINT_URL_STS": services.url,
        }
    )
    keys = chosen.current()
    assert (keys.access_key, keys.token) == ("TEMPORARY1", "t")
    (question,) = services.asked
    assert question["Action"] == "AssumeRoleWithWebIdentity"
    assert (question["WebIdentityToken"], question["RoleSessionName"]) == ("a-jwt", "mine")
    assert chosen.current().access_key == "TEMPORARY1"
    assert len(services.asked) == 1


def test_assume_role_with_the_keys_of_the_environment(services: Services, tmp_path: Path) -> None:
    files = write(
        tmp_path, "[profile r]\nrole_arn=arn:aws:iam::123456789012:role/reader\ncredential_source=Environment\n"
    )
    environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_ENDPOINT_URL_STS": services.url}
    assert source({**files, **environment}, profile="r").current().access_key == "TEMPORARY1"
    assert services.asked[0]["Action"] == "AssumeRole"


def test_a_container(services: Services) -> None:
    chosen = source(
        {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{services.url}/get-credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": "let-me",
        }
    )
    assert chosen.current().access_key == "TEMPORARY1"
    assert services.asked == [{"path": "/get-credentials", "authorization": "let-me"}]


def test_an_instance(services: Services) -> None:
    chosen = source({"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": services.url})
    assert (chosen.current().access_key or "").startswith("TEMPORARY")


def test_a_credential_process(tmp_path: Path) -> None:
    keys = {"Version": 1, "AccessKeyId": "P", "SecretAccessKey": "Q"}
    (tmp_path / "answer.json").write_text(json.dumps(keys))
    files = write(tmp_path, f"[default]\ncredential_process=cat {tmp_path}/answer.json\n")
    assert source(files).current().access_key == "P"


def test_keys_are_renewed_before_they_expire(services: Services) -> None:
    services.lifetime_s = 60  # under the 10 minutes that botocore keeps as a reserve
    chosen = source({"AWS_CONTAINER_CREDENTIALS_FULL_URI": services.url})
    first = chosen.current().access_key
    services.lifetime_s = 3600
    second = chosen.current().access_key
    assert first != second
    assert chosen.current().access_key == second
    lease = chosen.for_obstore()
    assert lease["access_key_id"] == second
    expires = lease["expires_at"]
    assert expires is not None
    assert timedelta(minutes=9) < expires - datetime.now(UTC) <= timedelta(minutes=10)


def test_many_threads_ask_once(services: Services) -> None:
    chosen = source({"AWS_CONTAINER_CREDENTIALS_FULL_URI": services.url})
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(chosen.current().access_key)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["TEMPORARY1"] * 8
    assert len(services.asked) == 1


def test_a_role_that_is_refused(services: Services, tmp_path: Path) -> None:
    services.status = 403
    (tmp_path / "token").write_text("a-jwt")
    environment = {"AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"), "AWS_ENDPOINT_URL_STS": services.url}
    chosen = source({**environment, "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/reader"})
    with pytest.raises(CredentialsError, match=r"the role was refused.*AccessDenied"):
        chosen.current()
    with pytest.raises((CredentialsError, ConfigError), match="ARN"):
        source(environment).current()


def test_a_service_that_is_down(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-jwt")
    (tmp_path / "config").write_text("[default]\nmax_attempts=1\n")
    chosen = source(
        {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/reader",
            "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:1",
            "AWS_CONFIG_FILE": str(tmp_path / "config"),
        }
    )
    with pytest.raises(StorageUnavailable, match="does not answer"):
        chosen.current()


@pytest.mark.parametrize(
    "environment",
    [
        {"AWS_ACCESS_KEY_ID": "only"},
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nonexistent/token", "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/reader"},
    ],
    ids=["half of the keys", "no token"],
)
def test_what_cannot_be_read(environment: dict[str, str]) -> None:
    with pytest.raises(CredentialsError) as caught:
        source(environment).current()
    assert "\n" not in str(caught.value)


# -- keys that are replaced -------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write_keys(path: Path, access_key: str) -> None:
    path.write_text(f"[default]\naws_access_key_id={access_key}\naws_secret_access_key=s\naws_session_token=t\n")


@pytest.fixture
def rotating(tmp_path: Path) -> tuple[CredentialSource, Path, Clock]:
    """Credentials from a file, the file, and the clock that says when it is looked at."""
    path, clock = tmp_path / "credentials", Clock()
    write_keys(path, "OLD")
    found = CredentialSource(S3Config(source="s3://bucket"), {**ALONE, "AWS_SHARED_CREDENTIALS_FILE": str(path)}, clock)
    assert found.current().access_key == "OLD"
    return found, path, clock


@pytest.mark.parametrize("way", ["in place", "by rename"])
def test_a_file_that_changes_is_read_again(rotating: tuple[CredentialSource, Path, Clock], way: str) -> None:
    chosen, path, clock = rotating
    write_keys(path if way == "in place" else path.with_name("new"), "NEW")
    if way == "by rename":
        path.with_name("new").rename(path)
    assert (chosen.current().access_key, chosen.generation) == ("OLD", 0), "it is looked at once a second"
    clock.now += 1.1
    assert (chosen.current().access_key, chosen.generation) == ("NEW", 1)
    assert chosen.for_obstore()["access_key_id"] == "NEW"


def test_a_refusal_looks_at_once_and_not_again_for_a_while(
    rotating: tuple[CredentialSource, Path, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, path, clock = rotating
    finds: list[float] = []
    find = CredentialSource._find

    def counted(self: CredentialSource) -> object:
        finds.append(clock.now)
        return find(self)

    monkeypatch.setattr(CredentialSource, "_find", counted)
    assert [chosen.renewed(0) for _ in range(100)] == [False] * 100
    assert len(finds) == 1, "keys that stay bad are not looked for at every refusal"
    write_keys(path, "NEW")
    assert chosen.renewed(0), "a file that changed is, however short the time"
    assert chosen.renewed(0), "who was refused with the old keys tries the new ones without looking"
    assert not chosen.renewed(1)
    assert len(finds) == 2


@pytest.mark.expect_warnings("no new credentials can be found")
@pytest.mark.parametrize("text", ["", "[default]\naws_access_key_id=HALF\n", "[default\n", None])
def test_a_file_that_is_being_written_leaves_the_keys(
    rotating: tuple[CredentialSource, Path, Clock], text: str | None
) -> None:
    chosen, path, clock = rotating
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    clock.now += 1.1
    assert (chosen.current().access_key, chosen.generation) == ("OLD", 0)
    write_keys(path, "NEW")
    clock.now += 1.1
    assert chosen.current().access_key == "NEW"


def test_keys_of_a_container_are_asked_for_again_when_they_are_refused(services: Services) -> None:
    clock = Clock()
    environment = {**ALONE, "AWS_CONTAINER_CREDENTIALS_FULL_URI": services.url}
    chosen = CredentialSource(S3Config(source="s3://bucket"), environment, clock)
    assert chosen.current().access_key == "TEMPORARY1"
    assert chosen.renewed(0)
    assert chosen.current().access_key == "TEMPORARY2"
    assert not chosen.renewed(1), "the service is not asked at every refusal"
    clock.now += 6
    assert chosen.renewed(1)
    assert len(services.asked) == 3


def test_a_role_is_taken_again_when_the_token_file_changes(services: Services, tmp_path: Path) -> None:
    token, clock = tmp_path / "token", Clock()
    token.write_text("first")
    environment = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/reader",
        "AWS_ENDPOINT_URL_STS": services.url,
    }
    chosen = CredentialSource(S3Config(source="s3://bucket"), {**ALONE, **environment}, clock)
    chosen.current()
    token.write_text("second")
    clock.now += 1.1
    assert chosen.current().access_key == "TEMPORARY2"
    assert [question["WebIdentityToken"] for question in services.asked] == ["first", "second"]


def test_a_source_that_refuses_is_not_asked_by_every_reader(services: Services) -> None:
    services.status = 403
    clock = Clock()
    environment = {**ALONE, "AWS_CONTAINER_CREDENTIALS_FULL_URI": services.url}
    chosen = CredentialSource(S3Config(source="s3://bucket"), environment, clock)
    for _ in range(20):
        with pytest.raises(CredentialsError):
            chosen.current()
    asked = len(services.asked)
    assert asked <= 3, "botocore's own tries of one look-up"
    clock.now += 1.1
    services.status = 200
    assert (chosen.current().access_key or "").startswith("TEMPORARY")


def test_keys_of_the_environment_and_no_keys_are_never_renewed() -> None:
    assert not source({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}).renewed(0)
    assert not source({}, anonymous=True).renewed(0)
