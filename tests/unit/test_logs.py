"""Log lines: one per record, in UTC, without secrets, and never an error for who logs."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import logs
from cachefs.config import LogConfig, LogFormat
from cachefs.errors import ConfigError


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """`configure` takes over the root logger; give it back to pytest."""
    root = logging.getLogger()
    handlers, level, raising = list(root.handlers), root.level, logging.raiseExceptions
    for handler in handlers:  # so that `configure` does not close those of pytest
        root.removeHandler(handler)
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = raising
    logging.captureWarnings(capture=False)


def written(text: str, *arguments: object, config: LogConfig | None = None, **more: Any) -> str:
    stream = io.StringIO()
    logs.configure(config or LogConfig(), "worker", stream)
    logging.getLogger("cachefs.test").warning(text, *arguments, **more)
    return stream.getvalue()


def test_text() -> None:
    line = written("read %s of %d", "key", 7)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING worker\["
        + str(os.getpid())
        + r"\] cachefs\.test: read key of 7\n",
        line,
    )


def test_json() -> None:
    line = json.loads(written("read %s", "ké\ny", config=LogConfig(log_format=LogFormat.JSON)))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "role": "worker",
        "pid": os.getpid(),
        "logger": "cachefs.test",
        "message": "read ké\ny",
    }


def test_a_record_is_one_line() -> None:
    """A key may contain a newline, and could forge a line of the log."""
    line = written("lost %s", "a\n2026-01-01T00:00:00.000Z ERROR agent[1] cachefs: all is lost\x1b[2J\u2028")
    assert line.count("\n") == 1
    assert "\\n2026" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("form", list(LogFormat))
def test_tracebacks(form: LogFormat) -> None:
    try:
        raise ValueError("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI")
    except ValueError as error:
        text = written("failed", exc_info=error, config=LogConfig(log_format=form))
    assert "ValueError" in text
    assert "wJalrXUtnFEMI" not in text
    if form is LogFormat.TEXT:
        assert all(line.startswith("    ") for line in text.splitlines()[1:])
    else:
        assert text.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "GET https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4&X-Amz-Signature=SECRETSECRET&x=1",
        "https://b/k?X-Amz-Security-Token=SECRETSECRET",
        "https://b/k?X-Amz-Credential=SECRETSECRET%2F20260101&x",
        "Authorization: AWS4-HMAC-SHA256 Credential=SECRETSECRET/20260101/us-east-1/s3/aws4_request",
        "{'Authorization': 'Bearer SECRETSECRET'}",
        "Authorization: Basic SECRETSECRET",
        "aws_secret_access_key = SECRETSECRET",
        "AWS_SECRET_ACCESS_KEY=SECRETSECRET",
        '{"SecretAccessKey": "SECRETSECRET", "x": 1}',
        "'aws_session_token': 'SECRETSECRET'",
        "SessionToken=SECRETSECRET",
        "x-amz-security-token: SECRETSECRET",
        "Signature=SECRETSECRET",
    ],
)
@pytest.mark.parametrize("form", list(LogFormat))
def test_secrets_are_not_written(text: str, form: LogFormat) -> None:
    line = written("failed: %s", text, config=LogConfig(log_format=form))
    assert "SECRET" not in line.replace("AWS_SECRET_ACCESS_KEY", "")
    assert "***" in line


def test_ordinary_text_is_left_alone() -> None:
    text = "reading token.bin, signature of key secret/access_key: 7 bytes, Authorization failed"
    assert logs.redact(text) == text


@given(st.text(max_size=60))
def test_redaction_and_escaping_never_fail(text: str) -> None:
    line = logs._one_line(text)
    assert "\n" not in line
    assert logs.redact(logs.redact(text)) == logs.redact(text)


def test_levels_and_noisy_libraries() -> None:
    stream = io.StringIO()
    logs.configure(LogConfig(log_level="debug"), "agent", stream)
    logging.getLogger("cachefs.x").debug("seen")
    logging.getLogger("botocore.auth").debug("signed with secret")
    assert stream.getvalue().count("\n") == 1
    logs.configure(LogConfig(log_level="error"), "agent", stream)
    logging.getLogger("cachefs.x").warning("not seen")
    assert stream.getvalue().count("\n") == 1


def test_a_file_that_is_rotated(tmp_path: Path) -> None:
    file = tmp_path / "agent.log"
    logs.configure(LogConfig(log_file=str(file)), "agent")
    logging.getLogger("cachefs.x").info("one")
    file.rename(tmp_path / "agent.log.1")
    logging.getLogger("cachefs.x").info("two")
    assert "one" in (tmp_path / "agent.log.1").read_text()
    assert "two" in file.read_text()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--log-file .*: Is a directory"):
        logs.configure(LogConfig(log_file=str(tmp_path)), "agent")


def test_a_full_disk_does_not_reach_who_logs() -> None:
    script = (
        "import logging, sys; from cachefs.config import LogConfig; from cachefs.logs import configure; "
        "configure(LogConfig(log_file='/dev/full'), 'agent'); "
        "[logging.getLogger('cachefs').warning('x' * 10000) for _ in range(3)]; print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for form in LogFormat:
        file = tmp_path / f"{form}.log"
        logs.configure(LogConfig(log_file=str(file), log_format=form), "agent")
        logging.getLogger("cachefs.x").info("read %s", "a\udcff")
        assert "udcff" in file.read_text()
