"""Where the keys of a volume come from, and the files by which agent and workers get them: `authSource`.

    secret    keys in the secrets of the stage or publish call          file `credentials` (as of the AWS tools)
    pod       token of the pod's service account, exchanged at an STS   file `token`
    node      whatever the node service finds in its own environment    no file

    <directory>/                    0711, ours
    <directory>/<name>/             0700, given to the user that agent and workers run as
    <directory>/<name>/credentials  0600; `token`, `token.of`: the same
    <directory>/<name>/stage        where a volume is staged that has no mount yet (no secret)

A file is written under another name and renamed, and only when its content changes: the agent looks at these files
once a second and uses what is new, so keys are rotated by writing them. No secret goes anywhere else: not to the
keeper, not into a log line, not into an error.

INVARIANTS: whoever reads a file finds it whole; every call BLOCKS; names are keys of mounts ([a-z0-9-]).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cachefs.errors import MountError
from csi.parameter_table import AuthSource
from csi.parameters import VolumeSpec
from csi.status import invalid

log = logging.getLogger(__name__)

TOKENS_KEY = "csi.storage.k8s.io/serviceAccount.tokens"
POD_NAME, POD_NAMESPACE, POD_UID = (f"csi.storage.k8s.io/pod.{word}" for word in ("name", "namespace", "uid"))
SERVICE_ACCOUNT = "csi.storage.k8s.io/serviceAccount.name"
CREDENTIALS_FILE, TOKEN_FILE, TOKEN_NOTE, STAGE_FILE = "credentials", "token", "token.of", "stage"
_SECRET_NAMES = {
    "accessKeyId": ("accessKeyId", "AWS_ACCESS_KEY_ID", "access_key_id", "awsAccessKeyId"),
    "secretAccessKey": ("secretAccessKey", "AWS_SECRET_ACCESS_KEY", "secret_access_key", "awsSecretAccessKey"),
    "sessionToken": ("sessionToken", "AWS_SESSION_TOKEN", "session_token", "awsSessionToken"),
}
_SECRET_FIELDS = {
    "accessKeyId": "aws_access_key_id",
    "secretAccessKey": "aws_secret_access_key",
    "sessionToken": "aws_session_token",
}
_NAME = re.compile(r"[a-z0-9-]{1,64}")
_SESSION_NAME_BYTES = 64
_PASSAGE = 0o711
"""Mode of the directory of all: the agent, another user, has to pass through it."""
_ROUNDS = 30_000
"""Of the key derivation: about 10 ms."""
_LATER_S = 300.0
"""Another pod's token takes the place of the one that is there if it is valid so much longer: each new token is a
question to the STS, and a hundred pods of one service account are renewed every minute.
"""
FRESH_S = 120.0
"""No call takes so long to make a mount for the files that it has written."""
ANONYMOUS_IDENTITY = "anonymous"
"""Who has no keys shares nothing with those that the node has keys for."""
_ALONE = {"AWS_CONFIG_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true"}
"""For volumes with keys of their own: when those fail, those of the node must not be used in their place."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one call brought: files to write, and who uses them."""

    source: AuthSource
    identity: str
    """Hash of whose they are; volumes of different identities share nothing. Empty: the node's own."""
    files: Mapping[str, bytes]
    role_arn: str = ""
    sts_endpoint: str = ""
    region: str = ""
    session: str = ""
    pod_uid: str = ""
    expires_at: float = 0.0
    """Of the token, in seconds since the epoch; 0: unknown."""

    def __repr__(self) -> str:
        return f"Credentials(source={self.source!r}, identity={self.identity!r})"  # files stay out of all logs

    @property
    def of_pod(self) -> bool:
        """Whether they are those of one pod, and others may not use what is read with them."""
        return self.source is AuthSource.POD

    def environment(self, directory: str) -> dict[str, str]:
        """Return the variables by which a mount finds its files in `directory`."""
        if self.source is AuthSource.SECRET:
            return {"AWS_SHARED_CREDENTIALS_FILE": f"{directory}/{CREDENTIALS_FILE}", **_ALONE}
        if self.source is not AuthSource.POD:
            return {}
        found = {
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_WEB_IDENTITY_TOKEN_FILE": f"{directory}/{TOKEN_FILE}",
            "AWS_ROLE_ARN": self.role_arn,
            "AWS_ROLE_SESSION_NAME": self.session,
            "AWS_ENDPOINT_URL_STS": self.sts_endpoint,
            "AWS_DEFAULT_REGION": self.region,
            **_ALONE,
        }
        return {name: value for name, value in found.items() if value}


def from_request(
    spec: VolumeSpec, secrets: Mapping[str, str], context: Mapping[str, str], *, at_publish: bool
) -> Credentials | None:
    """Return the credentials that a call brought, None when it brought none and may bring them later.

    `at_publish`: this call is the last that could. Raises Refused (INVALID_ARGUMENT) naming what is missing.
    """
    if spec.auth_source is AuthSource.NODE:
        return Credentials(spec.auth_source, "", {})
    if spec.auth_source is AuthSource.ANONYMOUS:
        return Credentials(spec.auth_source, ANONYMOUS_IDENTITY, {})
    if spec.auth_source is AuthSource.SECRET:
        if not secrets and not at_publish:
            return None
        return _of_secret(secrets)
    return _of_pod(spec, secrets, context) if at_publish else None


# -- secret -----------------------------------------------------------------------------------------------------------


def keys_of_secret(secrets: Mapping[str, str]) -> dict[str, str]:
    """Return accessKeyId, secretAccessKey and sessionToken ("": none) of the secrets of a call.

    Raises Refused (INVALID_ARGUMENT) naming what is missing.
    """
    keys = {}
    for name, spellings in _SECRET_NAMES.items():
        value = next((secrets[spelling] for spelling in spellings if secrets.get(spelling)), "").strip()
        if not value and name != "sessionToken":
            raise invalid("secrets", f"the key {name} is missing: the Secret must have accessKeyId and secretAccessKey")
        if not value.isprintable() or not value.isascii():
            raise invalid("secrets", f"the value of {name} has characters that no key has")
        keys[name] = value
    return keys


def _of_secret(secrets: Mapping[str, str]) -> Credentials:
    keys = keys_of_secret(secrets)
    lines = ["[default]", *(f"{_SECRET_FIELDS[name]} = {value}" for name, value in keys.items() if value), ""]
    return Credentials(AuthSource.SECRET, _identity_of_keys(keys), {CREDENTIALS_FILE: "\n".join(lines).encode("ascii")})


def _identity_of_keys(keys: Mapping[str, str]) -> str:
    """Return the identity of whoever has these keys: both of them, for a secret that knows only the first is not his.

    It is derived slowly, since it goes where keys do not, and some servers have short ones; and once for each pair.
    """
    return _derived(hashlib.sha256("\0".join((keys["accessKeyId"], keys["secretAccessKey"])).encode()).digest())


@functools.lru_cache(maxsize=4096)
def _derived(pair: bytes) -> str:
    return hashlib.pbkdf2_hmac("sha256", pair, b"cachefs volume identity", _ROUNDS).hex()[:24]


# -- pod --------------------------------------------------------------------------------------------------------------


def _of_pod(spec: VolumeSpec, secrets: Mapping[str, str], context: Mapping[str, str]) -> Credentials:
    namespace, account = (_needed(context, key) for key in (POD_NAMESPACE, SERVICE_ACCOUNT))
    token, expires_at = _token(secrets.get(TOKENS_KEY) or context.get(TOKENS_KEY, ""), spec.audience)
    identity = _hash("pod", namespace, account, spec.role_arn, spec.audience, spec.sts_endpoint)
    return Credentials(
        AuthSource.POD,
        identity,
        {TOKEN_FILE: token.encode("ascii")},
        role_arn=spec.role_arn,
        sts_endpoint=spec.sts_endpoint,
        region=spec.sts_region or spec.region,
        session=re.sub(r"[^\w+=,.@-]", "-", f"{namespace}.{account}", flags=re.ASCII)[:_SESSION_NAME_BYTES],
        pod_uid=context.get(POD_UID, ""),
        expires_at=expires_at,
    )


def _needed(context: Mapping[str, str], key: str) -> str:
    value = context.get(key, "")
    if not value:
        raise invalid(
            f"volume_context.{key}", "is missing: authSource pod needs podInfoOnMount: true in the CSIDriver object"
        )
    return value


def _token(raw: str, audience: str) -> tuple[str, float]:
    """Return the token for `audience` and when it ends. Its text appears in no message."""
    field = f"volume_context.{TOKENS_KEY}"
    if not raw:
        raise invalid(
            field, f"is missing: authSource pod needs tokenRequests with audience {audience} in the CSIDriver object"
        )
    try:
        tokens = json.loads(raw)
        entry = tokens.get(audience) if isinstance(tokens, dict) else None
    except ValueError:
        raise invalid(field, "is not JSON") from None  # the cause would quote it
    entry = entry if isinstance(entry, dict) else {}
    token = entry.get("token")
    if not isinstance(token, str) or not token:
        raise invalid(field, f"has no token for the audience {audience}: add it to tokenRequests of the CSIDriver")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise invalid(field, f"the token for the audience {audience} has characters that no token has")
    return token, _instant(entry.get("expirationTimestamp"))


def _instant(text: object) -> float:
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


# -- files ------------------------------------------------------------------------------------------------------------


class CredentialFiles:
    """The directory of credentials. Calls for one name do not run beside each other (the callers' locks)."""

    def __init__(self, directory: str, owner_uid: int) -> None:
        """`owner_uid`: the user that agent and workers run as. The directory is made when it is needed."""
        self.path = directory
        self._owner_uid = owner_uid

    def directory(self, name: str) -> str:
        """Return where the files of `name` are."""
        if _NAME.fullmatch(name) is None:
            raise MountError(f"'{name}' cannot be the name of a mount")
        return f"{self.path}/{name}"

    def write(self, name: str, credentials: Credentials, *, now: float) -> bool:
        """Write what changed; returns whether something did. `now` is the time since the epoch. Raises MountError."""
        directory = self.directory(name)
        files = dict(credentials.files)
        if TOKEN_FILE in files:
            if not self._takes(directory, credentials, now):
                return False
            files[TOKEN_NOTE] = json.dumps([credentials.pod_uid, credentials.expires_at]).encode()
        changed = {file: content for file, content in files.items() if _read(f"{directory}/{file}") != content}
        for file, content in changed.items():
            self._replace(name, file, content)
        return any(file != TOKEN_NOTE for file in changed)

    def _takes(self, directory: str, credentials: Credentials, now: float) -> bool:
        """Whether this token is to take the place of the one that is there (see `_LATER_S`)."""
        try:
            pod_uid, expires_at = json.loads(_read(f"{directory}/{TOKEN_NOTE}") or b"")
            left_s = float(expires_at) - now
        except (ValueError, TypeError):
            return True
        if _read(f"{directory}/{TOKEN_FILE}") is None or pod_uid == credentials.pod_uid or left_s < _LATER_S:
            return True
        return not credentials.expires_at or credentials.expires_at > float(expires_at) + _LATER_S

    def forget_writer(self, name: str) -> None:
        """The pod is gone that brought the token: the next pod that comes brings the one to use."""
        with suppress(FileNotFoundError):
            os.unlink(f"{self.directory(name)}/{TOKEN_NOTE}")

    def note_stage(self, name: str, text: str) -> None:
        """Remember how a volume is staged whose mount is only made when it is published."""
        if self.stage(name) != text:
            self._replace(name, STAGE_FILE, os.fsencode(text))

    def stage(self, name: str) -> str:
        """Return what was noted of the stage of a volume; empty: nothing."""
        return os.fsdecode(_read(f"{self.directory(name)}/{STAGE_FILE}") or b"")

    def remove(self, name: str) -> None:
        """Remove all files of `name`; none is fine. Raises MountError."""
        try:
            shutil.rmtree(self.directory(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise MountError(
                f"the credentials in {self.directory(name)} cannot be removed: {error.strerror}"
            ) from error

    def remove_keys(self, name: str) -> None:
        """Remove the keys of `name`, and nothing else: it is staged, and has no mount."""
        try:
            files = os.listdir(self.directory(name))
        except FileNotFoundError:
            return
        for file in files:
            if file != STAGE_FILE:  # also half a file of a plugin that was killed
                with suppress(FileNotFoundError):
                    os.unlink(f"{self.directory(name)}/{file}")

    def remove_orphans(self, used: Collection[str], *, now: float) -> list[str]:
        """Remove what belongs to no mount (`used`: their names) and to no staged volume; returns the names.

        What was written a moment ago stays: another plugin, which this one is to follow, may be making its mount.
        """
        try:
            names = sorted(entry.name for entry in os.scandir(self.path) if _NAME.fullmatch(entry.name))
        except FileNotFoundError:
            return []
        old = [name for name in names if name not in used and self._age(name, now) > FRESH_S]
        gone = [name for name in old if not self.stage(name)]
        for name in gone:
            self.remove(name)
        for name in set(old).difference(gone):
            self.remove_keys(name)
        return gone

    def _age(self, name: str, now: float) -> float:
        try:
            return now - os.lstat(self.directory(name)).st_mtime
        except FileNotFoundError:
            return 0.0

    def _replace(self, name: str, file: str, content: bytes) -> None:
        directory = self.directory(name)
        try:
            self._make(directory)
            # Its owner may be another user, who can put links there: a new file, never one that is there already.
            descriptor, temporary = tempfile.mkstemp(prefix=f".{file}.", dir=directory)  # 0600
            try:
                with open(descriptor, "wb") as written:
                    written.write(content)
                    written.flush()
                    self._give(descriptor)
                os.rename(temporary, f"{directory}/{file}")
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise MountError(f"the credentials in {directory} cannot be written: {error.strerror or error}") from error

    def _make(self, directory: str) -> None:
        os.makedirs(self.path, exist_ok=True)
        if stat.S_IMODE(os.stat(self.path).st_mode) != _PASSAGE:  # it is new; or its maker was killed before this
            os.chmod(self.path, _PASSAGE)
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_uid != self._owner_uid:  # also one that was made by a plugin that was killed
                self._give(descriptor)
        finally:
            os.close(descriptor)

    def _give(self, descriptor: int) -> None:
        if self._owner_uid != os.geteuid():
            os.fchown(descriptor, self._owner_uid, -1)


def _read(path: str) -> bytes | None:
    """Return the content of a file, None when there is none that can be read. Follows no links, waits for no pipes."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            return file.read(1 << 20) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        return None
