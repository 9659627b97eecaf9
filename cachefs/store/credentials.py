"""Who we are to the store: every credential source of the AWS SDK, looked up in the environment of ONE mount.

The agent serves several mounts, each started from another shell with its own AWS_* variables, and its own process
environment is that of whoever happened to start it. botocore reads os.environ in many places, so the chain of providers
is built here from botocore's parts, each given the mapping of the mount:

    environment's keys -> assume role -> web identity -> SSO, shared files, credential_process -> container -> instance

An explicit profile leaves the environment's keys out, as the SDK does. botocore's refreshable credentials renew
themselves 10 to 15 minutes before they expire, under their own lock, in the thread of whoever asks. botocore is
imported on first use.

Keys are also replaced from outside: a file is rewritten, a session is ended early. The chain is gone through anew when
a file that keys come from has changed (looked at once a second, when somebody asks), and when the store has refused the
keys (`renewed`, at most once in `RENEW_S`). Keys that were found stay in use until others are found.

INVARIANT: `generation` changes with every replacement, so whoever keeps keys of its own knows when they are old.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cachefs.config import S3Config
from cachefs.errors import CachefsError, ConfigError, CredentialsError, StorageUnavailable
from cachefs.logs import ThrottledWarning
from cachefs.store.watched_files import WatchedFiles

if TYPE_CHECKING:
    from botocore.credentials import Credentials, ReadOnlyCredentials
    from botocore.session import Session
    from obstore.store import S3Credential

log = logging.getLogger(__name__)

DEFAULT_REGION = "us-east-1"
LOOK_S = 1.0
"""How often files are looked at; for as long a failure to find keys stands, so that a thousand readers ask once."""
RENEW_S = 5.0
"""How often keys that the store refuses make us go through the chain, which may mean a request or a command."""
# Refreshable credentials stay valid for at least 10 minutes after they were given out, and obstore asks again 5 minutes
# before the end of a lease: under 5 minutes it would ask for every request.
_LEASE = timedelta(minutes=10)


class CredentialSource:
    """The credentials of one mount. Nothing is looked up before the first call. Thread-safe."""

    def __init__(
        self, config: S3Config, environment: Mapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._environment = dict(environment)
        self._clock = clock
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._credentials: Credentials | None = None
        self._given: ReadOnlyCredentials | None = None
        self._files = WatchedFiles()
        self._look_at = self._renew_at = 0.0
        self._failure: CachefsError | None = None
        """Why no keys were found, until `_look_at`."""
        self._warning = ThrottledWarning()
        self.generation = 0
        """How often the keys were replaced by others."""

    @property
    def anonymous(self) -> bool:
        """Whether requests go out unsigned."""
        return self._config.anonymous

    def region(self) -> str:
        """Return the region: configured, from the environment, from the profile, or us-east-1."""
        found = (
            self._config.region or self._environment.get("AWS_REGION") or self._environment.get("AWS_DEFAULT_REGION")
        )
        if found:
            return found
        with self._lock, _translated():
            return self._open_session().get_config_variable("region") or DEFAULT_REGION

    def current(self) -> ReadOnlyCredentials:
        """Return keys that are valid now. Raises CredentialsError; StorageUnavailable when their source is silent."""
        credentials = self._credentials
        if credentials is None or self._clock() >= self._look_at:
            credentials = self._look(credentials)
        try:
            with _translated():
                self._given = keys = credentials.get_frozen_credentials()
        except CachefsError:
            with self._lock:  # their source refuses to renew them: find out where keys come from now
                if self._credentials is credentials:
                    self._credentials = None
            raise
        return keys

    def renewed(self, generation: int) -> bool:
        """The store refuses the keys of this generation: return whether there are others to try."""
        if self.anonymous:
            return False
        with self._lock:
            if self.generation != generation:
                return True
            now = self._clock()
            if now < self._renew_at and not self._files.changed():
                return False
            self._renew_at = now + RENEW_S
            self._try_others(now)
            return self.generation != generation

    def _look(self, known: Credentials | None) -> Credentials:
        """Return the credentials after a look at the files. Whoever has some does not wait for who is looking."""
        if not self._lock.acquire(blocking=known is None) and known is not None:
            return known
        try:
            now = self._clock()
            if self._credentials is None:
                return self._find_first(now)
            if now >= self._look_at:
                self._look_at = now + LOOK_S
                if self._files.changed():
                    self._try_others(now)
            return self._credentials
        finally:
            self._lock.release()

    def _find_first(self, now: float) -> Credentials:
        if self._failure is not None and now < self._look_at:
            raise copy.copy(self._failure) from self._failure
        self._failure = None
        try:
            return self._replace()
        except CachefsError as error:
            self._failure = error
            raise
        finally:
            self._look_at = self._clock() + LOOK_S

    def _try_others(self, now: float) -> None:
        """Go through the chain; what cannot be read (a file that is being written) leaves the keys as they are."""
        before = self.generation
        try:
            self._replace()
        except CachefsError as error:
            more = self._warning.due(now)
            if more is not None:
                log.warning("no new credentials can be found for %s: %s%s", self._config.source, error, more)
        if self.generation != before:
            log.info("new credentials are in use for %s", self._config.source)

    def _replace(self) -> Credentials:
        """Go through the chain with fresh files (under the lock)."""
        with _translated():
            self._session = None
            found = self._find()
            keys = found.get_frozen_credentials()
        if self._given is not None and keys != self._given:
            self.generation += 1
        self._given, self._credentials = keys, found
        return found

    def _paths(self) -> Iterator[str]:
        """Yield the files that keys may come from."""
        session = self._open_session()
        for name in ("credentials_file", "config_file"):
            yield os.path.expanduser(session.get_config_variable(name))
        profile = session.get_config_variable("profile") or "default"
        token_file = session.full_config.get("profiles", {}).get(profile, {}).get("web_identity_token_file")
        names = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
        for path in (token_file, *map(self._environment.get, names)):
            if path:
                yield path

    def for_obstore(self) -> S3Credential:
        """Return keys in obstore's form; obstore calls this again before they expire."""
        keys = self.current()
        lease: S3Credential = {
            "access_key_id": keys.access_key or "",
            "secret_access_key": keys.secret_key or "",
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _LEASE,
        }
        return lease

    def _find(self) -> Credentials:
        from botocore.credentials import CredentialResolver, Credentials

        environment = self._environment
        access_key, secret_key = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
        if access_key and secret_key and not self._config.profile:
            return Credentials(access_key, secret_key, environment.get("AWS_SESSION_TOKEN") or None)
        self._files.note(self._paths())
        found = CredentialResolver(self._providers(self._open_session())).load_credentials()
        if found is None:
            raise CredentialsError(
                "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a --profile, "
                "or use --anonymous for a public bucket"
            )
        return found

    def _open_session(self) -> Session:
        """Return the session that keys are looked up with (under the lock)."""
        if self._session is None:
            self._session = self.new_session()
        return self._session

    def new_session(self) -> Session:
        """Return a botocore session that reads its settings from the mount's environment, without keys of its own."""
        from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES, ConfigChainFactory
        from botocore.session import Session

        session = Session()
        if self._config.profile:
            session.set_config_variable("profile", self._config.profile)
        chains = ConfigChainFactory(session, environ=self._environment)
        settings = session.get_component("config_store")
        for name, (properties, variables, default, convert) in BOTOCORE_DEFAUT_SESSION_VARIABLES.items():
            chain = chains.create_config_chain(
                instance_name=name,
                env_var_names=variables,
                config_property_names=properties,
                default=default,
                conversion_func=convert,
            )
            settings.set_config_provider(name, chain)
        return session

    def _providers(self, session: Session) -> list[Any]:
        from botocore.credentials import (
            AssumeRoleProvider,
            AssumeRoleWithWebIdentityProvider,
            CanonicalNameCredentialSourcer,
            ContainerProvider,
            EnvProvider,
            ProfileProviderBuilder,
        )

        profile = session.get_config_variable("profile") or "default"
        region = session.get_config_variable("region") or DEFAULT_REGION
        cache: dict[str, Any] = {}
        environment, container = EnvProvider(environ=self._environment), ContainerProvider(environ=self._environment)
        instance = self._instance_provider(session)
        shared = ProfileProviderBuilder(session, cache=cache, region_name=region)
        assume_role = AssumeRoleProvider(
            load_config=lambda: session.full_config,
            client_creator=self._client_creator(session, region),
            cache=cache,
            profile_name=profile,
            credential_sourcer=CanonicalNameCredentialSourcer([environment, container, instance]),
            profile_provider_builder=shared,
        )
        web_identity = AssumeRoleWithWebIdentityProvider(
            load_config=self._web_identity_profile,
            client_creator=self._client_creator(session, region),
            profile_name="environment",
            cache=cache,
            disable_env_vars=True,  # it would look into os.environ; the mount's variables are its "profile" instead
        )
        files = shared.providers(profile_name=profile, disable_env_vars=True)
        if self._config.profile:
            return [assume_role, *files, container, instance]
        return [environment, assume_role, web_identity, *files, container, instance]

    def _web_identity_profile(self) -> dict[str, Any]:
        names = {
            "web_identity_token_file": "AWS_WEB_IDENTITY_TOKEN_FILE",
            "role_arn": "AWS_ROLE_ARN",
            "role_session_name": "AWS_ROLE_SESSION_NAME",
        }
        found = {key: self._environment[name] for key, name in names.items() if self._environment.get(name)}
        return {"profiles": {"environment": found}}

    def _client_creator(self, session: Session, region: str) -> Any:
        """Return what makes the STS client, in our region and at the endpoint that the mount's environment names."""

        def create(service: str, **options: Any) -> Any:
            endpoint = self._environment.get(f"AWS_ENDPOINT_URL_{service.upper()}") or self._environment.get(
                "AWS_ENDPOINT_URL"
            )
            return session.create_client(service, **{"region_name": region, "endpoint_url": endpoint, **options})

        return create

    def _instance_provider(self, session: Session) -> Any:
        from botocore.credentials import InstanceMetadataProvider
        from botocore.utils import InstanceMetadataFetcher, resolve_imds_endpoint_mode

        settings = {
            "ec2_metadata_service_endpoint": session.get_config_variable("ec2_metadata_service_endpoint"),
            "ec2_metadata_service_endpoint_mode": resolve_imds_endpoint_mode(session),
            "ec2_metadata_v1_disabled": session.get_config_variable("ec2_metadata_v1_disabled"),
        }
        fetcher = InstanceMetadataFetcher(
            timeout=session.get_config_variable("metadata_service_timeout"),
            num_attempts=session.get_config_variable("metadata_service_num_attempts"),
            env=self._environment,
            user_agent=session.user_agent(),
            config=settings,
        )
        return InstanceMetadataProvider(iam_role_fetcher=fetcher)


class _translated:
    """Turn botocore's exceptions into ours. Its messages name profiles, files and roles, never secrets."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, CachefsError) or not isinstance(error, Exception):
            return
        raise _translate(error) from error


def _translate(error: Exception) -> CachefsError:
    import botocore.exceptions as foreign

    text = " ".join(str(error).split())
    if isinstance(error, (foreign.ProfileNotFound, foreign.InvalidConfigError, foreign.ConfigParseError)):
        return ConfigError(f"the AWS configuration cannot be used: {text}")
    if isinstance(error, foreign.ClientError):
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
            return StorageUnavailable(f"the service that gives out credentials failed: {text}")
        return CredentialsError(f"the role was refused: {text}")
    if isinstance(error, (foreign.HTTPClientError, foreign.ConnectionError)):
        return StorageUnavailable(f"the service that gives out credentials does not answer: {text}")
    return CredentialsError(f"the credentials cannot be read: {text}")
