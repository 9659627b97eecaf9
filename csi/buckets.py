"""Opens the bucket of a volume for the controller, with the credentials that are meant for it.

`authSource: secret` needs the secrets of the call; with the other kinds the controller uses its own environment, unless
the call brings secrets all the same. For `pod` that means: what the controller itself does in the bucket (prefixes of
claims, snapshots) is done as the controller, what pods read is read as the pods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from cachefs.config import S3Config
from cachefs.store.admin import BucketAdmin
from csi.credentials import keys_of_secret
from csi.parameter_table import AuthSource
from csi.parameters import VolumeSpec
from csi.status import invalid

CALL_TIMEOUT_S = 8.0
"""How long a request to the store is tried within a call; the side-cars of Kubernetes wait for 10 to 15 seconds."""
REQUEST_TIMEOUT_S = 5.0
"""How long one of these tries waits for an answer."""
_AWS = "AWS_"
_PLACES = frozenset({"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE"})


@dataclass(frozen=True, slots=True)
class Buckets:
    """How the controller reaches buckets."""

    base: S3Config = field(default_factory=S3Config)
    """What the options of the controller say; volumes go over it."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of the controller."""

    def open(self, spec: VolumeSpec, secrets: Mapping[str, str], *, patient: bool = False) -> BucketAdmin:
        """Open a bucket; no request is made. Raises `Refused` when the secrets are missing or not usable.

        `patient`: for long work, with the timeouts of the options; else such that a call says in time what is wrong.
        """
        bucket = dataclasses.replace(spec, manifest="")  # all of it, whatever the volume shows
        config = bucket.s3(self.base)
        if not patient:
            config = dataclasses.replace(
                config,
                io_timeout_s=min(CALL_TIMEOUT_S, config.io_timeout_s),
                request_timeout_s=min(REQUEST_TIMEOUT_S, config.request_timeout_s),
            )
        if spec.auth_source is AuthSource.SECRET and not secrets:
            raise invalid(
                "secrets", "must be given with authSource 'secret': name them in the class (provisioner-secret-name)"
            )
        return BucketAdmin(config, self._environment(spec, secrets))

    def has_credentials(self, spec: VolumeSpec) -> bool:
        """Whether the controller could look at the bucket without secrets of a call."""
        return spec.auth_source in (AuthSource.NODE, AuthSource.ANONYMOUS)

    def _environment(self, spec: VolumeSpec, secrets: Mapping[str, str]) -> dict[str, str]:
        if not secrets or spec.auth_source is AuthSource.ANONYMOUS:
            return dict(self.environment)
        keys = keys_of_secret(secrets)
        kept = {name: text for name, text in self.environment.items() if not name.startswith(_AWS) or name in _PLACES}
        kept |= {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
        kept |= {"AWS_ACCESS_KEY_ID": keys["accessKeyId"], "AWS_SECRET_ACCESS_KEY": keys["secretAccessKey"]}
        return kept | ({"AWS_SESSION_TOKEN": keys["sessionToken"]} if keys.get("sessionToken") else {})
