"""`cachefs doctor`: checks this machine, and a bucket when one is named, and says for each problem what to do.

The checks of the machine are in `cachefs.cli.checks`; here are those of the store, and the output.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import click

import cachefs
from cachefs.cli import output
from cachefs.cli.checks import FAIL, OK, WARN, Check, check_sizes, run_host_checks
from cachefs.cli.load import Loaded, build, fitted
from cachefs.cli.options import CONFIG_PARAMETER, config_options
from cachefs.cli.peer_checks import check_agent, run_peer_checks
from cachefs.config import S3Config
from cachefs.errors import (
    AccessDenied,
    BucketNotFound,
    CachefsError,
    CredentialsError,
    StorageUnavailable,
    UsageError,
)

CLOCK_WARN_S, CLOCK_FAIL_S = 60.0, 900.0
"""S3 refuses signatures that are more than 15 minutes off."""


@click.command()
@click.argument("source", required=False)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@config_options()
def doctor(source: str | None, *, as_json: bool, **options: Any) -> int:
    """Check this machine and, with SOURCE or --endpoint-url, the store. Takes the options of `cachefs mount`.

    Exit code 1 if something will not work.
    """
    environment = dict(os.environ)
    loaded = fitted(build({**options, "source": source}, environment, options[CONFIG_PARAMETER]))
    found: list[Check] = []
    for check in _all_checks(loaded, environment):
        found.append(check)
        if not as_json:  # one by one: a store that does not answer takes its time
            click.echo("\n".join(render(check)))
    if as_json:
        click.echo(json.dumps(document(found), indent=2))
    else:
        counts = {outcome: sum(check.outcome == outcome for check in found) for outcome in (OK, WARN, FAIL)}
        click.echo(f"{counts[OK]} ok, {counts[WARN]} warnings, {counts[FAIL]} failed")
    return int(any(check.outcome == FAIL for check in found))


def document(found: list[Check]) -> dict[str, Any]:
    """Return the JSON document."""
    return {
        "version": cachefs.__version__,
        "ok": all(check.outcome != FAIL for check in found),
        "checks": [
            {"name": check.name, "outcome": check.outcome, "text": check.text, "remedy": check.remedy}
            for check in found
        ],
    }


def render(check: Check) -> list[str]:
    """Return the line of a check, and the line of its remedy."""
    lines = [f"{check.outcome:<5} {check.name:<18} {output.plain(check.text)}"]
    if check.remedy and check.outcome != OK:
        lines.append(f"{'':<5} {'':<18} -> {output.plain(check.remedy)}")
    return lines


def _all_checks(loaded: Loaded, environment: dict[str, str]) -> Iterator[Check]:
    yield from check_sizes(loaded)
    yield from run_host_checks(loaded.config, environment)
    yield from run_store_checks(loaded.config.s3, environment)
    yield from run_peer_checks(loaded.config.peer)
    yield from check_agent(loaded.config.cache)


# -- the store --------------------------------------------------------------------------------------


def run_store_checks(s3: S3Config, environment: Mapping[str, str]) -> Iterator[Check]:
    """Yield the checks of endpoint, clock and credentials, as far as the configuration names a store."""
    reachable = True
    if s3.source.startswith("s3://") or s3.endpoint_url:
        for check in check_endpoint(s3):
            reachable = reachable and check.outcome != FAIL
            yield check
    if s3.source and reachable:
        yield check_source(s3, environment)


def endpoint_of(s3: S3Config) -> str:
    """Return the address that requests go to."""
    return s3.endpoint_url or f"https://s3.{s3.region or 'us-east-1'}.amazonaws.com"


def check_endpoint(s3: S3Config) -> Iterator[Check]:
    """Ask the endpoint for anything: what matters is that an HTTP server answers, and what time it has."""
    endpoint = endpoint_of(s3)
    before = time.time()
    try:
        date = _ask_date(endpoint, s3)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        yield Check("endpoint", FAIL, f"{endpoint} does not answer as a store: {reason}", _endpoint_remedy(reason))
        return
    after = time.time()
    yield Check("endpoint", OK, f"{endpoint} answers in {(after - before) * 1000:.0f} ms")
    if date is not None:
        yield check_clock(date, before, after)


def _ask_date(endpoint: str, s3: S3Config) -> float | None:
    """Return the server's clock, to the second."""
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - http or https: `validate` looks at it
    tls = ssl.create_default_context(cafile=s3.ca_bundle or None) if endpoint.startswith("https:") else None
    try:
        with urllib.request.urlopen(request, timeout=s3.connect_timeout_s, context=tls) as answer:  # noqa: S310
            text = answer.headers.get("Date")
    except urllib.error.HTTPError as error:  # 403 is what a store says to strangers
        text = error.headers.get("Date")
        error.close()
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() if text else None
    except ValueError:
        return None


def _endpoint_remedy(reason: object) -> str:
    match reason:
        case ssl.SSLCertVerificationError():
            return "the certificate is not trusted: name the authority's file with --ca-bundle"
        case ssl.SSLError():
            return "is it https? try http:// in --endpoint-url"
        case socket.gaierror():
            return "the name cannot be resolved: check --endpoint-url (or --region) and DNS"
        case http.client.HTTPException():
            return "what listens there does not speak HTTP: check the port of --endpoint-url"
        case ConnectionRefusedError():
            return "nothing listens there: check host and port of --endpoint-url"
        case TimeoutError():
            return "a firewall or a proxy may be in the way: check routes and HTTPS_PROXY"
    return "check --endpoint-url"


def check_clock(date: float, before: float, after: float) -> Check:
    """Compare clocks; the header has whole seconds, and the answer took its time."""
    skew = 0.0
    if date + 1 < before:
        skew = before - date - 1
    elif date > after:
        skew = after - date
    text = f"this clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the store's"
    remedy = "set the clock: timedatectl set-ntp true"
    if abs(skew) >= CLOCK_FAIL_S:
        return Check("clock", FAIL, f"{text}: signatures are refused", remedy)
    if abs(skew) >= CLOCK_WARN_S:
        return Check("clock", WARN, f"{text}; from 15 minutes on signatures are refused", remedy)
    return Check("clock", OK, "agrees with the store's")


def check_source(s3: S3Config, environment: Mapping[str, str]) -> Check:
    """Make the request that a mount makes first."""
    from cachefs.store.open import open_store, parse_source

    try:
        source = parse_source(s3.source)
        store = open_store(s3, environment)
        try:
            store.check(source.prefix)
        finally:
            store.close()
    except CachefsError as error:
        return Check("source", FAIL, str(error), _source_remedy(error))
    return Check("source", OK, f"{s3.source} can be listed")


def _source_remedy(error: CachefsError) -> str:
    match error:
        case UsageError():
            return "name it as s3://BUCKET[/PREFIX] or file:///DIRECTORY"
        case BucketNotFound():
            return "check the bucket's name, --endpoint-url and --region"
        case CredentialsError():
            return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --profile, or --anonymous for a public bucket"
        case AccessDenied():
            return "the key needs s3:ListBucket and s3:GetObject on this bucket"
        case StorageUnavailable():
            return "check the store; `CACHEFS_DEBUG=1 cachefs doctor ...` shows more"
    return "see the message"
