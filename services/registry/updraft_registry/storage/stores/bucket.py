"""Blobs and documents in a bucket of S3, GCS or Azure, named as `folder.FolderStore` names them.

    blobs/sha256/<hex>                    whole and verified, or not there
    versions/<speculator>/<number>.json   what the catalogue can be rebuilt from

An object appears whole when its upload ends, so a crash leaves the old or the new state. Uploads are received and checked
on the local disk first, and blobs that are read stay there in a bounded cache. The catalogue stays local, because SQLite
needs a disk. Use one prefix per registry: a bucket has no lock that is released by a crash.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shutil import disk_usage
from typing import BinaryIO

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, ObjectStore, S3Store, from_url

from updraft_artifacts.in_order import map_in_order
from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import Corrupt, InvalidInput, NotFound, Unavailable
from updraft_registry.storage.stores.cache import Cache
from updraft_registry.storage.stores.folder import begin_upload, clean_uploads
from updraft_registry.storage.stores.port import Upload

logger = logging.getLogger(__name__)

_BLOBS = "blobs/sha256"
_VERSIONS = "versions"
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")

_PART_BYTES = 8 * 1024 * 1024
"""Size of one request: small enough for its timeout on a slow link, and large enough that 10,000 parts hold any draft."""

_PARALLEL_PARTS = 4

_HINT = "; check UPDRAFT_REGISTRY_STORE_URL, and endpoint and credentials in the environment (such as AWS_...)"

_RETRY_AFTER_S = 15.0
"""Calls of the archive fail at once for this long after the bucket was unavailable, so that the thread that also decides
rollouts does not wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A location in an object store. `url` is for messages; `quick` is the same location with short timeouts."""

    url: str
    objects: ObjectStore
    quick: ObjectStore


def open_bucket(url: str) -> Bucket:
    """Connect to a bucket, with credentials from the environment.

    InvalidInput for another kind of URL, Unavailable if the bucket does not answer or denies access.
    """
    scheme, separator, rest = url.partition("://")
    if scheme not in _SCHEMES or not separator or not rest:
        raise InvalidInput(f"{url!r} is not a bucket URL: expected s3://, gs:// or az://, then bucket and prefix")
    with _errors(url, "reach", _HINT):
        bucket = Bucket(url=url, objects=_connect(url, timeout_s=30), quick=_connect(url, timeout_s=5))
        obstore.list_with_delimiter(bucket.quick)
    return bucket


def _connect(url: str, *, timeout_s: int) -> ObjectStore:
    return from_url(
        url,
        # Plain http only where the environment names such an endpoint.
        client_options={"timeout": f"{timeout_s}s", "connect_timeout": "3s", "allow_http": True},
        retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=timeout_s)},
    )


class BucketStore:
    """A `Store` in a bucket; see `port.Store` for what each call promises.

    `folder` is local scratch space. With `link_for`, readers are redirected to signed URLs with that lifetime.
    """

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        *,
        cache_bytes: int,
        link_for: timedelta | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._bucket = bucket
        self._link_for = link_for
        self._clock = clock or SystemClock()
        self._uploads = folder / "uploads"
        self._uploads.mkdir(parents=True, exist_ok=True)
        self._cache = Cache(folder / "cache", max_bytes=cache_bytes)
        self._download_locks: dict[str, threading.Lock] = {}
        self._uncommitted: dict[Path, str] = {}
        self._unavailable_until_s = 0.0

    def clean(self) -> int:
        """Delete local files of interrupted uploads; return how many. Lifecycle rules of the bucket handle its own."""
        return clean_uploads(self._uploads)

    @property
    def shares_disk(self) -> bool:
        return False

    def free_bytes(self) -> int:
        return disk_usage(self._uploads).free

    def volume_bytes(self) -> int:
        return 0

    def begin(self, size_bytes: int) -> Upload:
        """Start an upload to the local disk, whose cache makes room for it if necessary."""
        if size_bytes > self.free_bytes():
            self._cache.delete(lambda _: True)
        return begin_upload(self._uploads, size_bytes, free_bytes=self.free_bytes())

    def prepare(self, upload: Upload, digest: str) -> None:
        """Upload the blob to the bucket. `digests` excludes it until it is committed."""
        self._uncommitted[upload.path] = digest
        with _errors(self._bucket.url, "write"):
            self._put(upload, digest)
        self._unavailable_until_s = 0.0  # the bucket is available

    def commit(self, upload: Upload, digest: str) -> None:
        """Keep the local file in the cache, because pods will fetch it next.

        Upload the blob again if a concurrent sweep deleted it.
        """
        with self._fail_fast("write"):
            try:
                obstore.head(self._bucket.quick, _blob(digest))
            except FileNotFoundError:
                self._put(upload, digest)
        self._cache.adopt(_name(digest), upload.path)

    def open(self, digest: str) -> BinaryIO:
        """Open the local copy of a blob, which is downloaded and verified if necessary."""
        with self._download_locks.setdefault(digest, threading.Lock()):
            while (file := self._cache.open(_name(digest))) is None:
                self._download(digest)
            return file

    def link(self, digest: str) -> str | None:
        """A signed URL of a blob; None if redirects are off or the credentials cannot sign."""
        if self._link_for is None or not isinstance(self._bucket.objects, S3Store | GCSStore | AzureStore):
            return None
        try:
            with _errors(self._bucket.url, "sign a URL of"):
                return obstore.sign(self._bucket.objects, "GET", _blob(digest), self._link_for)
        except Unavailable as error:
            logger.warning("Cannot redirect readers to the bucket", extra={"error": str(error)})
            return None

    def digests(self) -> frozenset[str]:
        names = {path.rpartition("/")[2] for path in self._list(_BLOBS)}
        for path in list(self._uncommitted):  # checked after the listing, so that every prepared blob in it is noted
            if not path.exists():
                self._uncommitted.pop(path, None)
        arriving = {_name(digest) for digest in self._uncommitted.values()}
        return frozenset(f"sha256:{name}" for name in names - arriving)

    def delete(self, digest: str) -> None:
        with self._fail_fast("delete in"), suppress(FileNotFoundError):
            obstore.delete(self._bucket.quick, _blob(digest))
        self._cache.delete(lambda name: name == _name(digest))

    def documents(self) -> Iterator[tuple[str, int]]:
        for path in sorted(self._list(_VERSIONS)):
            match = re.fullmatch(rf"{_VERSIONS}/([^/]+)/([0-9]+)\.json", path)
            if match:
                yield match[1], int(match[2])

    def read_document(self, speculator: str, number: int) -> bytes:
        with _errors(self._bucket.url, "read"):
            try:
                return bytes(obstore.get(self._bucket.quick, _document(speculator, number)).bytes())
            except FileNotFoundError:
                return b""

    def write_document(self, speculator: str, number: int, content: bytes) -> None:
        with self._fail_fast("write"):
            obstore.put(self._bucket.quick, _document(speculator, number), content)

    def delete_document(self, speculator: str, number: int) -> None:
        with self._fail_fast("delete in"), suppress(FileNotFoundError):
            obstore.delete(self._bucket.quick, _document(speculator, number))

    def _put(self, upload: Upload, digest: str) -> None:
        obstore.put(
            self._bucket.objects, _blob(digest), upload.path, chunk_size=_PART_BYTES, max_concurrency=_PARALLEL_PARTS
        )

    def _download(self, digest: str) -> None:
        """Download a blob into the cache, several ranges at a time, each with its own timeout."""
        sha256 = hashlib.sha256()

        def get(start: int) -> bytes:
            end = min(start + _PART_BYTES, size)
            return bytes(obstore.get_range(self._bucket.objects, _blob(digest), start=start, end=end))

        with self._cache.create(_name(digest)) as file, _errors(self._bucket.url, "read"):
            try:
                size = obstore.head(self._bucket.quick, _blob(digest))["size"]
            except FileNotFoundError:
                raise NotFound(f"no blob {digest} is stored") from None
            for part in map_in_order(get, range(0, size, _PART_BYTES), num_workers=_PARALLEL_PARTS):
                sha256.update(part)
                file.write(part)
            if f"sha256:{sha256.hexdigest()}" != digest:
                raise Corrupt(f"the blob {digest} in {self._bucket.url} hashes to sha256:{sha256.hexdigest()}")

    def _list(self, prefix: str) -> Iterator[str]:
        with self._fail_fast("list"):
            for page in obstore.list(self._bucket.quick, prefix):
                yield from (entry["path"] for entry in page)

    @contextmanager
    def _fail_fast(self, doing: str) -> Iterator[None]:
        """For calls of the archive's thread: after a failure, fail at once for a while."""
        if self._clock.monotonic() < self._unavailable_until_s:
            raise Unavailable(f"{self._bucket.url} was unavailable a moment ago", retry_after_s=_RETRY_AFTER_S)
        try:
            with _errors(self._bucket.url, doing):
                yield
        except Unavailable:
            self._unavailable_until_s = self._clock.monotonic() + _RETRY_AFTER_S
            raise


def _blob(digest: str) -> str:
    return f"{_BLOBS}/{_name(digest)}"


def _name(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _document(speculator: str, number: int) -> str:
    return f"{_VERSIONS}/{speculator}/{number}.json"


@contextmanager
def _errors(url: str, doing: str, hint: str = "") -> Iterator[None]:
    """Turn errors of the bucket into Unavailable, because they may be fixed and the call retried."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise Unavailable(f"cannot {doing} {url}: {_reason(error)}{hint}", retry_after_s=_RETRY_AFTER_S) from error


def _reason(error: Exception) -> str:
    """First line of an error, without the query of a URL, which may contain a signature."""
    text = str(error)
    code = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL)
    if code:
        return f"{code[1]}, {code[2]}"
    return re.sub(r"\?\S+", "", text.partition("\n")[0])
