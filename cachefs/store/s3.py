"""The object store on S3: obstore for bytes, signed requests for listings and for what obstore cannot express.

    get_range, head --+-- obstore (Rust; 0.2 ms of CPU)        keys that survive its path rules
                      +-- SignedRequests (botocore, urllib3)   other keys; while the server throttles; other regions
    read_into ------------ SignedRequests                      long ranges: half of obstore's CPU per byte, which hands
                                                               over a range in one piece and at its end
    list_page, check  ---- SignedRequests + expat

obstore shows an error as text only, so two things need the other way: Retry-After (after a 503, requests go the slower
way for a while, which costs nothing when the server wants fewer of them) and the region of a bucket that lives
elsewhere (learned from the first answer that names it, then used for everything).

Every answer is checked before it becomes data: the range, the length and the entity tag must be those asked for.
If-Match alone is not trusted, since some servers and proxies ignore it.

Proxies are taken from the environment (see `signed`). No redirect to another host is followed with credentials. All
methods may be called from any thread; they block.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from cachefs.config import S3Config
from cachefs.errors import BadBody, CachefsError, NotFound, StaleObject, StorageUnavailable
from cachefs.store import obstore_client
from cachefs.store.address import Address
from cachefs.store.credentials import CredentialSource
from cachefs.store.listing import MOST_BYTES, list_query, parse_etag, parse_page, quote_etag, whole_seconds_ns
from cachefs.store.port import ListPage, ObjectInfo, pieces_of
from cachefs.store.refusals import Refusal, error_of
from cachefs.store.signed import Answer, OpenAnswer, SignedRequests, proxies_of
from cachefs.store.source import parse_source
from cachefs.store.wire import Timeouts, Wire
from cachefs.types import ObjectVersion

if TYPE_CHECKING:
    import obstore.store

log = logging.getLogger(__name__)

_CAREFUL_S = 10.0
"""For how long after a throttled answer requests go the way that sees Retry-After."""
STREAMED_BYTES = 1 << 20
"""Ranges from this length on are read piece by piece."""
_STATUS = re.compile(r"status code: (\d{3})")
_META = "x-amz-meta-"


class S3Store:
    """One bucket. Makes no request and imports no SDK before the first call."""

    def __init__(
        self, config: S3Config, environment: Mapping[str, str], credentials: CredentialSource | None = None
    ) -> None:
        """Raises UsageError (ConfigError) for settings that cannot work."""
        self._config = config
        self._bucket = parse_source(config.source).bucket
        self._endpoint_url = config.endpoint_url or (
            environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
        )
        self._proxies = proxies_of(environment)
        self._certificates = obstore_client.read_certificates(config.ca_bundle)
        self._credentials = credentials or CredentialSource(config, environment)
        self._requests = SignedRequests(config, environment, self._credentials)
        # The region does not matter for the identity, except that it may need a profile to be read: later.
        self._identity = self._address_in(config.region or environment.get("AWS_REGION") or "").identity
        if config.identity:  # a fragment, which no endpoint has: what others may read is another object for these keys
            self._identity += f"#{config.identity}"
        self._lock = threading.Lock()
        self._address: Address | None = None
        self._obstore: obstore.store.S3Store | None = None
        self._obstore_generation = 0
        """Of the keys that obstore may keep to itself."""
        self._careful_until = 0.0
        self._closed = False
        self._wire: Wire | None = None

    @property
    def endpoint(self) -> str:
        """See `ObjectStore.endpoint`."""
        return self._identity

    @property
    def bucket(self) -> str:
        """See `ObjectStore.bucket`."""
        return self._bucket

    def check(self, prefix: str) -> None:
        """See `ObjectStore.check`."""
        self.list_page(prefix, limit=1)

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        _require_inside(version, start, length)
        if self._fast(version.key):
            try:
                return self._get_fast(version, start, length)
            except _SlowWay:
                pass
        return self._get_signed(version, start, length)

    def read_into(self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> Iterator[int]:
        """See `ObjectStore.read_into`."""
        length = sum(map(len, buffers))
        if length < STREAMED_BYTES:
            yield from pieces_of(self.get_range(version, start, length), buffers)
            return
        _require_inside(version, start, length)
        with self._opened_range(version, start, length) as answer:
            for count, buffer in enumerate(buffers, 1):
                answer.fill(buffer)
                if count == len(buffers):
                    answer.end()
                yield count

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore.head`."""
        if self._fast(key):
            try:
                return self._head_fast(key)
            except _SlowWay:
                pass
        answer = self._send("HEAD", key)
        if answer.status != 200:
            self._refuse(answer.refusal(), key)
        headers = answer.headers
        try:
            mtime_ns = whole_seconds_ns(parsedate_to_datetime(headers["last-modified"]))
            size, etag = int(headers["content-length"]), parse_etag(headers["etag"])
        except (KeyError, ValueError) as error:
            raise BadBody(f"the answer to HEAD of {key!r} lacks size, time or entity tag") from error
        named = {name[len(_META) :]: value for name, value in headers.items() if name.startswith(_META)}
        return ObjectInfo(key, size, etag, mtime_ns, named)

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`."""
        answer = self._send("GET", None, query=list_query(prefix, delimiter, token, limit), most_bytes=MOST_BYTES)
        if answer.status != 200:
            self._refuse(answer.refusal(), None)
        return parse_page(answer.body)

    def wire(self) -> Wire | None:
        """See `Wired.wire`: not while the server throttles, and not behind a proxy."""
        if time.monotonic() < self._careful_until:
            return None
        try:
            address = self._where()
            parts = urlsplit(address.bucket_host_url)
            if self._proxies.of(parts.scheme, parts.netloc):
                return None
            with self._lock:
                if self._closed:
                    return None
                if self._wire is None or self._wire.address != address:
                    self._wire = self._new_wire(address)
                return self._wire
        except (CachefsError, OSError) as error:
            log.debug("no wire to %s: %s", self._identity, error)
            return None

    def _new_wire(self, address: Address) -> Wire:
        if self._wire is not None:
            self._wire.close()
        config, anonymous = self._config, self._config.anonymous
        return Wire(
            address,
            lambda: None if anonymous else self._credentials.current(),
            Timeouts(config.connect_timeout_s, config.request_timeout_s),
            certificates=config.ca_bundle,
            on_throttled=self._be_careful,
        )

    def _be_careful(self) -> None:
        self._careful_until = time.monotonic() + _CAREFUL_S

    def close(self) -> None:
        """See `ObjectStore.close`."""
        with self._lock:
            self._closed = True
            self._obstore = None
            wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()
        self._requests.close()

    # -- where --------------------------------------------------------------------------------------------------------

    def _address_in(self, region: str) -> Address:
        return Address.parse(self._bucket, region, self._endpoint_url, self._config.addressing)

    def _where(self) -> Address:
        address = self._address
        if address is None:
            found = self._address_in(self._credentials.region())
            with self._lock:
                address = self._address = self._address or found
        return address

    def _move(self, region: str) -> None:
        """Use another region from now on: the bucket's own, as an answer said."""
        moved = self._where().in_region(region)
        with self._lock:
            self._address = moved
            self._obstore = None

    # -- the signed way -----------------------------------------------------------------------------------------------

    def _send(
        self,
        method: str,
        key: str | None,
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        most_bytes: int = 1 << 20,
    ) -> Answer:
        """Send a signed request; once more when the answer names another region, or there are other keys by now."""
        cures: set[str] = set()
        while True:
            address, generation = self._where(), self._credentials.generation
            url = address.url(key, query)
            answer = self._requests.send(method, url, address.region, headers, most_bytes=most_bytes)
            if answer.status < 300 or not self._cured(answer.refusal(), address, generation, cures):
                return answer

    def _cured(self, refusal: Refusal, address: Address, generation: int, cures: set[str]) -> bool:
        """Do what may make the same request succeed, each cure once; returns whether to send it again."""
        if refusal.elsewhere and refusal.region not in ("", address.region) and "region" not in cures:
            cures.add("region")
            self._move(refusal.region)
            return True
        if refusal.about_keys and "keys" not in cures and self._credentials.renewed(generation):
            cures.add("keys")
            return True
        return False

    def _get_signed(self, version: ObjectVersion, start: int, length: int) -> memoryview:
        body = memoryview(bytearray(length))
        with self._opened_range(version, start, length) as answer:
            answer.fill(body)
            answer.end()
        return body

    @contextlib.contextmanager
    def _opened_range(self, version: ObjectVersion, start: int, length: int) -> Iterator[OpenAnswer]:
        """Ask for a range; what is left to do is to read the bytes. Asks again as `_send` does."""
        end = start + length
        headers = {"Range": f"bytes={start}-{end - 1}", "If-Match": quote_etag(version.etag)}
        cures: set[str] = set()
        while True:
            address, generation = self._where(), self._credentials.generation
            with self._requests.open("GET", address.url(version.key, ""), address.region, headers) as answer:
                if answer.status == 206:
                    found = re.match(r"bytes (\d+)-(\d+)/", answer.headers.get("content-range", ""))
                    span = (int(found[1]), int(found[2]) + 1) if found else (-1, -1)
                    _verify(version, (start, end), span, answer.headers.get("etag"), end - start)
                    yield answer
                    return
                refusal = answer.whole(MOST_BYTES).refusal()
            if not self._cured(refusal, address, generation, cures):
                break
        if refusal.status == 416:
            self._gone_or_bad(version)
        self._refuse(refusal, version.key, version)

    # -- the fast way -------------------------------------------------------------------------------------------------

    def _fast(self, key: str) -> bool:
        return obstore_client.fits(key) and time.monotonic() >= self._careful_until

    def _get_fast(self, version: ObjectVersion, start: int, length: int) -> memoryview:
        import obstore

        end = start + length
        generation = self._credentials.generation
        store = self._opened()
        try:
            result = obstore.get(
                store, version.key, options={"range": (start, end), "if_match": quote_etag(version.etag)}
            )
            found, span = result.meta, result.range
            body = memoryview(result.bytes())
        except Exception as error:  # noqa: BLE001 - obstore raises builtin and own classes; all are translated
            self._fail_fast(error, generation, version.key, version)
        _verify(version, (start, end), span, found["e_tag"], len(body))
        return body

    def _head_fast(self, key: str) -> ObjectInfo:
        import obstore

        generation = self._credentials.generation
        store = self._opened()
        try:
            result = obstore.get(store, key, options={"head": True})
            found, attributes = result.meta, result.attributes
        except Exception as error:  # noqa: BLE001 - see _get_fast
            self._fail_fast(error, generation, key)
        etag = found["e_tag"]
        if not etag:
            raise BadBody(f"the answer to HEAD of {key!r} has no entity tag")
        # The attributes are user metadata in lower case, and standard headers like Content-Type with capitals.
        named = {str(name): value for name, value in attributes.items() if str(name).islower()}
        return ObjectInfo(key, found["size"], parse_etag(etag), whole_seconds_ns(found["last_modified"]), named)

    def _opened(self) -> obstore.store.S3Store:
        """Return obstore's client, and make sure that there are credentials: here their errors have a name."""
        if not self._config.anonymous:
            self._credentials.current()
        store, generation = self._obstore, self._credentials.generation
        if store is not None and self._obstore_generation == generation:
            return store
        address = self._where()
        with self._lock:
            if self._closed:
                raise StorageUnavailable("the store is closed", retryable=False)
            if self._obstore is None or self._obstore_generation != generation:
                self._obstore_generation = generation
                self._obstore = obstore_client.new_client(
                    self._config,
                    self._bucket,
                    self._address or address,
                    certificates=self._certificates,
                    proxies=self._proxies,
                    credentials=None if self._config.anonymous else self._credentials.for_obstore,
                )
            return self._obstore

    # -- errors -------------------------------------------------------------------------------------------------------

    def _fail_fast(self, error: Exception, generation: int, key: str, version: ObjectVersion | None = None) -> NoReturn:
        """Translate what obstore raised; it puts status and body of the answer into its message."""
        if isinstance(error, CachefsError):
            raise error
        text = str(error)
        status = _STATUS.search(text)
        if status is None and "redirect" in text.lower():
            raise _SlowWay from error
        if status is None:
            if isinstance(error, FileNotFoundError):
                self._refuse(Refusal(404, "NoSuchKey"), key, version, error)
            raise obstore_client.transport_error(self._where().service_url, key, text) from error
        refusal = Refusal.parse(int(status[1]), text)
        if refusal.elsewhere or (refusal.about_keys and self._credentials.renewed(generation)):
            raise _SlowWay from error
        if refusal.status == 416 and version is not None:
            self._gone_or_bad(version)
        self._refuse(refusal, key, version, error)

    def _refuse(
        self, refusal: Refusal, key: str | None, version: ObjectVersion | None = None, cause: Exception | None = None
    ) -> NoReturn:
        error = error_of(refusal, bucket=self._bucket, endpoint=self._where().service_url, key=key)
        if version is not None and (refusal.status == 412 or isinstance(error, NotFound)):
            how = "has changed" if refusal.status == 412 else "was deleted"
            error = StaleObject(f"{version.key!r} {how} in bucket {self._bucket!r} since it was looked up")
        if isinstance(error, StorageUnavailable) and error.throttled:
            self._be_careful()
        raise error from cause

    def _gone_or_bad(self, version: ObjectVersion) -> NoReturn:
        """After 416, which some servers say before they look at If-Match: was the object shortened, or do they lie?"""
        try:
            now = self.head(version.key).version
        except NotFound:
            now = None
        if now != version:
            raise StaleObject(f"{version.key!r} has changed in bucket {self._bucket!r} since it was looked up")
        raise BadBody(f"the range asked for of {version.key!r} was refused, though the object has it")


class _SlowWay(Exception):
    """obstore cannot do this request; the signed way can."""


def _require_inside(version: ObjectVersion, start: int, length: int) -> None:
    if start < 0 or length <= 0 or start + length > version.size:
        raise BadBody(f"{version.key!r} has {version.size} bytes, not {length} from {start}", retryable=False)
    if not version.etag:
        raise StorageUnavailable(f"{version.key!r} has no entity tag: it cannot be read safely", retryable=False)


def _verify(
    version: ObjectVersion, wanted: tuple[int, int], span: tuple[int, int], etag: str | None, received: int
) -> None:
    """Refuse a body that is not exactly the bytes that were asked for."""
    if parse_etag(etag or "") != version.etag:
        raise BadBody(f"the answer for {version.key!r} is of another version")
    if tuple(span) != wanted or received != wanted[1] - wanted[0]:
        raise BadBody(f"the answer for {version.key!r} is {received} bytes of {span}, not the range {wanted}")
