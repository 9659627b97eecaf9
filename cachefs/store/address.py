"""Where a bucket is: the URL of every request, and the rules for the host name.

Both clients (obstore for bytes, the signed requests for the rest) take their URLs from here, so they cannot disagree.
Immutable; another region (a bucket may live elsewhere than configured) is another `Address`.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass, replace
from typing import Self

from cachefs.config import Addressing
from cachefs.errors import ConfigError

# Names that work as one DNS label, so that the certificate *.s3.<region>.amazonaws.com covers them.
_HOST_LABEL = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[A-Za-z0-9_-]*")
_UNRESERVED = "-_.~"


@dataclass(frozen=True, slots=True)
class Address:
    """One bucket at one endpoint."""

    bucket: str
    region: str
    endpoint_url: str
    """As configured, without a slash at the end; empty: AWS."""
    virtual_host: bool

    @classmethod
    def parse(cls, bucket: str, region: str, endpoint_url: str, addressing: Addressing) -> Self:
        """Check the endpoint and decide how the bucket's name enters the URL. Raises ConfigError."""
        endpoint_url = endpoint_url.rstrip("/")
        _check_region(region, endpoint_url)
        if endpoint_url:
            parts = urllib.parse.urlsplit(endpoint_url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ConfigError(f"endpoint {endpoint_url!r} is not an address like https://s3.example.org")
            if parts.username is not None:
                raise ConfigError("the endpoint must not contain credentials: use AWS_ACCESS_KEY_ID or --profile")
            try:
                parts.port  # noqa: B018 - reading it is the check
            except ValueError as error:
                raise ConfigError(f"endpoint {endpoint_url!r} has a bad port") from error
        if addressing is Addressing.VIRTUAL and not _HOST_LABEL.fullmatch(bucket) and not endpoint_url:
            raise ConfigError(f"bucket {bucket!r} cannot be part of a host name: use --path-style")
        virtual = addressing is Addressing.VIRTUAL or (
            addressing is Addressing.AUTO and not endpoint_url and _HOST_LABEL.fullmatch(bucket) is not None
        )
        return cls(bucket, region, endpoint_url, virtual)

    def in_region(self, region: str) -> Self:
        """Return the same bucket in another region. Raises ConfigError."""
        _check_region(region, self.endpoint_url)
        return replace(self, region=region)

    @property
    def identity(self) -> str:
        """The endpoint as it enters block keys: the same for all regions of AWS, where a bucket's name is unique."""
        if self.endpoint_url:
            return self.endpoint_url
        return f"https://s3.amazonaws.com{self._suffix}"

    @property
    def service_url(self) -> str:
        """The endpoint without the bucket."""
        return self.endpoint_url or f"https://s3.{self.region}.amazonaws.com{self._suffix}"

    @property
    def bucket_host_url(self) -> str:
        """What obstore calls the endpoint: with the bucket in its host name, if that is the way."""
        if not self.virtual_host:
            return self.service_url
        scheme, _, rest = self.service_url.partition("://")
        return f"{scheme}://{self.bucket}.{rest}"

    @property
    def secure(self) -> bool:
        """Whether it is https."""
        return self.service_url.startswith("https:")

    def url(self, key: str | None, query: str = "") -> str:
        """Return the URL of an object, or of the bucket (`key` None), with an encoded query."""
        base = self.bucket_host_url if self.virtual_host else f"{self.service_url}/{self.bucket}"
        path = "" if key is None else "/" + quote(key, safe="/")
        if self.virtual_host and key is None:
            path = "/"
        return f"{base}{path}?{query}" if query else f"{base}{path}"

    @property
    def _suffix(self) -> str:
        return ".cn" if self.region.startswith("cn-") else ""


def _check_region(region: str, endpoint_url: str) -> None:
    """At AWS it is a part of the host name, and of no identity: with a slash in it, another server would pass for AWS.
    What other servers call their regions has dots, too.
    """
    if not _REGION.fullmatch(region.replace(".", "") if endpoint_url else region):
        raise ConfigError(f"region {region!r} is not the name of a region: letters, digits and hyphens")


def quote(text: str, *, safe: str = "") -> str:
    """Percent-encode as signatures want it."""
    return urllib.parse.quote(text, safe=safe + _UNRESERVED, errors="surrogateescape")


def encode_query(parameters: dict[str, str]) -> str:
    """Return an encoded query in the order that signatures want."""
    return "&".join(f"{quote(name)}={quote(value)}" for name, value in sorted(parameters.items()))
