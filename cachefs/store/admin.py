"""What the controller does to a bucket: write, delete and copy objects, and list a whole prefix.

    check, objects ------- RetryingStore over S3Store: the way of all listings (signed requests, expat)
    put, get, open,
    delete, copy --------- boto3, as `cachefs.store.control` opens it; the same keys, certificates, proxies and timeouts

The port of the file system (`cachefs.store.port`) only reads, on purpose: no mount can write by mistake. All that
writes is here, and only the CSI controller opens it. Retries, the limit of requests in flight and the counters are
those of `cachefs.store.retry`; boto3's own retries are off. Refusals go through the one table (`refusals`).

Conditions are the server's: `put(only_new=True)` sends If-None-Match, `copy` pins its source to an entity tag.

All methods BLOCK, may be called from any thread, and raise only `cachefs.errors`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from cachefs.config import S3Config
from cachefs.errors import (
    AccessDenied,
    AlreadyExists,
    BadBody,
    CachefsError,
    CredentialsError,
    NotFound,
    StaleObject,
    StorageUnavailable,
    UsageError,
)
from cachefs.store.control import Body, Control, was_refused
from cachefs.store.credentials import CredentialSource
from cachefs.store.listing import parse_etag, quote_etag, whole_seconds_ns
from cachefs.store.port import ObjectInfo
from cachefs.store.refusals import Refusal, error_of
from cachefs.store.retry import RetryingStore, RetryPolicy
from cachefs.store.s3 import S3Store
from cachefs.store.source import parse_source

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

T = TypeVar("T")

DELETE_KEYS = 1000
"""What one request may delete."""
PAGE_KEYS = 1000
SINGLE_COPY_BYTES = 5 << 30
"""What one request may copy. Above, the object is copied in parts."""
PART_COPY_BYTES = 1 << 30
MOST_PUT_BYTES = 5 << 30
"""What one PUT may carry."""


class BucketAdmin:
    """One bucket, with the rights to change it. Makes no request before the first call."""

    def __init__(
        self,
        config: S3Config,
        environment: Mapping[str, str],
        *,
        single_copy_bytes: int = SINGLE_COPY_BYTES,
        part_copy_bytes: int = PART_COPY_BYTES,
    ) -> None:
        """`environment` holds the AWS_* (and proxy) variables.

        Raises UsageError for a source that is not s3:// and for settings that cannot work.
        """
        source = parse_source(config.source)
        if source.scheme != "s3":
            raise UsageError(f"{config.source!r}: only buckets (s3://) can be written to, copied and pinned")
        self.bucket = source.bucket
        self._single_copy_bytes = single_copy_bytes
        self._part_copy_bytes = part_copy_bytes
        self._credentials = CredentialSource(config, environment)
        self._control = Control(config, environment, self._credentials)
        store = S3Store(config, environment, self._credentials)
        self._store = RetryingStore(
            store, RetryPolicy(deadline_s=config.io_timeout_s), max_requests=config.max_requests
        )

    def __enter__(self) -> BucketAdmin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """The endpoint as it enters block keys, see `ObjectStore.endpoint`."""
        return self._store.endpoint

    # -- looking -------------------------------------------------------------------------------------------------------

    def check(self, prefix: str) -> None:
        """Make one cheap request that proves that the bucket exists and may be listed below `prefix`.

        Raises BucketNotFound, CredentialsError, AccessDenied, StorageUnavailable.
        """
        self._store.check(prefix)

    def objects(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield all objects below `prefix` in the store's order, those behind the key `start_after` only.

        Page by page: what changes meanwhile may or may not be seen. Raises as `ObjectStore.list_page`.
        """
        token: str | None = None
        if start_after:
            found, token = self._page_behind(prefix, start_after)
            yield from found
            if token is None:
                return
        while True:
            page = self._store.list_page(prefix, delimiter="", token=token, limit=PAGE_KEYS)
            yield from page.objects
            token = page.next_token
            if token is None:
                return

    def head(self, key: str) -> ObjectInfo:
        """Return size, etag and time of an object. Raises NotFound, AccessDenied, StorageUnavailable."""
        return self._store.head(key)

    def get(self, key: str) -> bytes:
        """Return a whole object; for small ones. Raises NotFound, AccessDenied, StorageUnavailable."""

        def request(client: S3Client) -> bytes:
            with Body.of(client.get_object(Bucket=self.bucket, Key=key)) as body:
                return body.read()

        return self._call("get", key, request)

    def open(self, key: str) -> BinaryIO:
        """Open an object to be read from its beginning, as a stream that must be closed.

        Raises NotFound, AccessDenied, StorageUnavailable; reading raises BadBody when the body breaks off.
        """
        return self._call("get", key, lambda client: Body.of(client.get_object(Bucket=self.bucket, Key=key)))

    # -- changing ------------------------------------------------------------------------------------------------------

    def put(self, key: str, body: bytes | BinaryIO, *, only_new: bool = False) -> str:
        """Write an object in one request and return its etag. A file is sent from where it stands to its end.

        With `only_new` AlreadyExists is raised when there is one; it may be our own, if an answer was lost and the
        request had to be sent again. Raises UsageError for more than 5 GiB, AccessDenied, StorageUnavailable.
        """
        begin = 0 if isinstance(body, bytes) else body.tell()
        if _length(body) - begin > MOST_PUT_BYTES:
            raise UsageError(f"{key!r} cannot be written: it is longer than the 5 GiB that one request may carry")
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if only_new else {}

        def request(client: S3Client) -> str:
            if not isinstance(body, bytes):
                body.seek(begin)
            return parse_etag(client.put_object(Bucket=self.bucket, Key=key, Body=body, **condition)["ETag"])

        return self._call("put", key, request)

    def delete(self, keys: Iterable[str]) -> int:
        """Delete objects, up to 1,000 in a request; returns how many keys are gone, those that were not there included.

        Raises AccessDenied or StorageUnavailable for the first that stays; what came before it is deleted.
        """
        deleted = 0
        stream = iter(keys)
        while batch := list(itertools.islice(stream, DELETE_KEYS)):
            plain = [key for key in batch if _fits_xml(key)]
            if plain:
                self._delete_batch(plain)
            for key in batch:
                if not _fits_xml(key):
                    self._delete_one(key)
            deleted += len(batch)
        return deleted

    def copy(self, source_key: str, etag: str, key: str, *, size: int | None = None) -> str:
        """Copy exactly this version of an object to `key` within the bucket, by the server; returns the copy's etag.

        `size` in bytes, if it is known, saves a request. Above 5 GiB the copy is made in parts, which gives it another
        etag; times are new in any case. Raises StaleObject when the source changed or is gone.
        """
        if size is None:
            size = self._pinned(source_key, etag).size
        if size > self._single_copy_bytes:
            return self._copy_in_parts(source_key, etag, key, size)

        def request(client: S3Client) -> str:
            answer = client.copy_object(
                Bucket=self.bucket,
                Key=key,
                CopySource={"Bucket": self.bucket, "Key": source_key},
                CopySourceIfMatch=quote_etag(etag),
            )
            return parse_etag(answer["CopyObjectResult"]["ETag"])

        return self._of_version(source_key, lambda: self._call("copy", source_key, request))

    def close(self) -> None:
        """Release connections and end all waits. Further calls raise StorageUnavailable."""
        self._store.close()
        self._control.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _call(self, operation: str, key: str | None, request: Callable[[S3Client], T]) -> T:
        """Send a request, again as the retry policy says, and once more with other keys when these are refused."""
        store = self._store
        attempts = store.attempts(operation, key or "")
        cured = False
        while True:
            generation = self._credentials.generation
            try:
                permit = store.limiter.acquire(attempts.begin())
                with store.using(permit, operation), self._control.translated(self.bucket, key, operation):
                    return request(self._control.client())
            except (CredentialsError, AccessDenied) as error:
                if cured or not was_refused(error) or not self._credentials.renewed(generation):
                    raise
                cured = True
            except StorageUnavailable as error:
                attempts.wait_after(error)

    def _page_behind(self, prefix: str, start_after: str) -> tuple[list[ObjectInfo], str | None]:
        """Return the first page behind a key, which the port cannot ask for, and the token of the next one."""

        def request(client: S3Client) -> tuple[list[ObjectInfo], str | None]:
            page = client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, StartAfter=start_after, MaxKeys=PAGE_KEYS)
            found = [
                ObjectInfo(
                    entry["Key"], entry["Size"], parse_etag(entry["ETag"]), whole_seconds_ns(entry["LastModified"])
                )
                for entry in page.get("Contents", ())
            ]
            if page["IsTruncated"] and not page.get("NextContinuationToken"):
                raise BadBody("the listing is cut off and has no token for the rest")
            return found, page.get("NextContinuationToken") if page["IsTruncated"] else None

        return self._call("list", None, request)

    def _delete_batch(self, keys: list[str]) -> None:
        """Delete up to 1,000 keys; those that the store could not delete this time are tried again."""
        left = list(keys)

        def request(client: S3Client) -> None:
            nonlocal left
            answer = client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in left], "Quiet": True}
            )
            failed = [found for found in answer.get("Errors", ()) if found.get("Code") != "NoSuchKey"]
            left = [found["Key"] for found in failed if "Key" in found]
            if failed:
                raise self._refused(failed[0].get("Code", ""), failed[0].get("Key"))

        self._call("delete", None, request)

    def _delete_one(self, key: str) -> None:
        self._call("delete", key, lambda client: client.delete_object(Bucket=self.bucket, Key=key))

    def _refused(self, code: str, key: str | None) -> CachefsError:
        """Return the error of one entry of an answer that is well as a whole."""
        status = {"AccessDenied": 403, "SlowDown": 503, "ServiceUnavailable": 503, "InternalError": 500}.get(code, 400)
        return error_of(
            Refusal(status, code), bucket=self.bucket, endpoint=self._control.endpoint, key=key, verb="delete"
        )

    def _pinned(self, source_key: str, etag: str) -> ObjectInfo:
        found = self._of_version(source_key, lambda: self._store.head(source_key))
        if found.etag != etag:
            raise StaleObject(f"{source_key!r} has changed in bucket {self.bucket!r} since it was listed")
        return found

    def _of_version(self, source_key: str, call: Callable[[], T]) -> T:
        """Say of a source that is gone or another one that it is stale."""
        try:
            return call()
        except NotFound as error:
            raise StaleObject(f"{source_key!r} was deleted in bucket {self.bucket!r} since it was listed") from error
        except AlreadyExists as error:  # 412: the condition of a copy is its source's etag
            raise StaleObject(f"{source_key!r} has changed in bucket {self.bucket!r} since it was listed") from error

    def _copy_in_parts(self, source_key: str, etag: str, key: str, size: int) -> str:
        described = self._of_version(
            source_key,
            lambda: self._call(
                "head",
                source_key,
                lambda client: client.head_object(Bucket=self.bucket, Key=source_key, IfMatch=quote_etag(etag)),
            ),
        )
        names = ("ContentType", "CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "Metadata")
        kept: dict[str, Any] = {name: described[name] for name in names if name in described}  # type: ignore[literal-required]
        began = self._call(
            "put", key, lambda client: client.create_multipart_upload(Bucket=self.bucket, Key=key, **kept)
        )
        upload: dict[str, Any] = {"Bucket": self.bucket, "Key": key, "UploadId": began["UploadId"]}
        try:
            parts = [
                self._copy_part(upload, source_key, etag, number, (start, min(start + self._part_copy_bytes, size)))
                for number, start in enumerate(range(0, size, self._part_copy_bytes), 1)
            ]
            ended = self._call(
                "put",
                key,
                lambda client: client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}),
            )
            return parse_etag(ended["ETag"])
        except BaseException:
            with contextlib.suppress(CachefsError):
                self._call("delete", key, lambda client: client.abort_multipart_upload(**upload))
            raise

    def _copy_part(
        self, upload: Mapping[str, Any], source_key: str, etag: str, number: int, span: tuple[int, int]
    ) -> Any:
        def request(client: S3Client) -> dict[str, object]:
            answer = client.upload_part_copy(
                **upload,
                PartNumber=number,
                CopySource={"Bucket": self.bucket, "Key": source_key},
                CopySourceRange=f"bytes={span[0]}-{span[1] - 1}",
                CopySourceIfMatch=quote_etag(etag),
            )
            return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        return self._of_version(source_key, lambda: self._call("copy", source_key, request))


def _length(body: bytes | BinaryIO) -> int:
    if isinstance(body, bytes):
        return len(body)
    here = body.tell()
    end = body.seek(0, 2)
    body.seek(here)
    return end


def _fits_xml(key: str) -> bool:
    """Whether XML 1.0 can carry a key: most control characters it cannot, and parsers turn a CR into a LF."""
    return all(character >= " " or character in "\t\n" for character in key) and not any(
        character in "\ufffe\uffff" for character in key
    )
