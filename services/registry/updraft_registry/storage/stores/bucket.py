"""Blobs and documents in a bucket of S3, GCS or Azure, named as `folder.FolderStore` names them.

    blobs/sha256/<hex>                    whole and verified, or not there
    versions/<speculator>/<number>.json   what the catalogue can be rebuilt from

An object appears whole when its upload ends, so a crash leaves the old or the new state here too. Uploads are received
and checked on the local disk first, and blobs that are read stay there in a bounded cache. The catalogue never comes
here: SQLite needs a disk. One registry a prefix; a bucket has no lock that a crash would free.
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
from typing import BinaryIO

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, ObjectStore, S3Store, from_url

from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import Corrupt, InvalidInput, NotFound, Unavailable
from updraft_registry.storage.stores.cache import Cache
from updraft_registry.storage.stores.folder import begin_upload
from updraft_registry.storage.stores.port import Upload

logger = logging.getLogger(__name__)

_BLOBS = "blobs/sha256"
_VERSIONS = "versions"
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")

_PART_BYTES = 8 * 1024 * 1024
"""Of one request: small enough for its time limit on a slow link, large enough for 10,000 of them to hold any draft."""

_PARALLEL_PARTS = 4

_HINT = "; check UPDRAFT_REGISTRY_STORE_URL, and endpoint and credentials in the environment (such as AWS_...)"

_RETRY_AFTER_S = 15.0
"""After the bucket was away whatever the archive asks of it fails at once for this long: it asks on the one thread that
also decides, which has better things to do than to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A place in an object store. `url` names it in sentences; `quick` is the same place with short time limits."""

    url: str
    objects: ObjectStore
    quick: ObjectStore


def open_bucket(url: str) -> Bucket:
    """Find a bucket by its URL, with the credentials of the environment.

    InvalidInput for another kind of URL, Unavailable if it does not answer or lets nobody in.
    """
    scheme, separator, rest = url.partition("://")
    if scheme not in _SCHEMES or not separator or not rest:
        raise InvalidInput(f"{url!r} names no bucket: expected s3://, gs:// or az://, then bucket and prefix")
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

    `folder` is local scratch space. With `link_for`, readers are sent to the bucket with addresses that are good for
    that long.
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
        """Delete what interrupted uploads left here; return how many. The bucket's own rules end those that it knows of."""
        left = list(self._uploads.iterdir())
        for path in left:
            path.unlink()
        return len(left)

    def begin(self, size_bytes: int) -> Upload:
        """Start an upload; Exhausted when there is no room for it on the local disk."""
        return begin_upload(self._uploads, size_bytes)

    def prepare(self, upload: Upload, digest: str) -> None:
        """Put the blob into the bucket. Until it is committed or discarded it is not counted among `digests`."""
        self._uncommitted[upload.path] = digest
        with self._errors("write"):
            self._put(upload, digest)
        self._unavailable_until_s = 0.0  # it is back

    def commit(self, upload: Upload, digest: str) -> None:
        """Keep the local file: the pods will ask for it next.

        A sweep that had listed the blob of a version before may have deleted what was prepared meanwhile.
        """
        with self._fail_fast("write"):
            try:
                obstore.head(self._bucket.quick, _blob(digest))
            except FileNotFoundError:
                self._put(upload, digest)
        self._cache.adopt(_name(digest), upload.path)

    def open(self, digest: str) -> BinaryIO:
        """Open the local copy of a blob, which is fetched and verified if need be."""
        with self._download_locks.setdefault(digest, threading.Lock()):
            while (file := self._cache.open(_name(digest))) is None:
                self._download(digest)
            return file

    def link(self, digest: str) -> str | None:
        """A signed address of a blob; None if readers are not sent there, or the credentials cannot sign."""
        if self._link_for is None or not isinstance(self._bucket.objects, S3Store | GCSStore | AzureStore):
            return None
        try:
            with self._errors("sign an address in"):
                return obstore.sign(self._bucket.objects, "GET", _blob(digest), self._link_for)
        except Unavailable as error:
            logger.warning("Readers are not sent to the bucket", extra={"error": str(error)})
            return None

    def digests(self) -> frozenset[str]:
        """All blobs but those that are still on their way to a commit."""
        names = {path.rpartition("/")[2] for path in self._list(_BLOBS)}
        for path in list(self._uncommitted):  # looked at second: what was listed has been noted before
            if not path.exists():
                self._uncommitted.pop(path, None)
        arriving = {_name(digest) for digest in self._uncommitted.values()}
        return frozenset(f"sha256:{name}" for name in names - arriving)

    def delete(self, digest: str) -> None:
        """Delete a blob, here and there."""
        with self._fail_fast("delete in"), suppress(FileNotFoundError):
            obstore.delete(self._bucket.quick, _blob(digest))
        self._cache.delete(lambda name: name == _name(digest))

    def documents(self) -> Iterator[tuple[str, int]]:
        """All documents, by speculator and version."""
        for path in sorted(self._list(_VERSIONS)):
            match = re.fullmatch(rf"{_VERSIONS}/([^/]+)/([0-9]+)\.json", path)
            if match:
                yield match[1], int(match[2])

    def read_document(self, speculator: str, number: int) -> bytes:
        """Read one document; empty if there is none."""
        with self._errors("read"):
            try:
                return bytes(obstore.get(self._bucket.quick, _document(speculator, number)).bytes())
            except FileNotFoundError:
                return b""

    def write_document(self, speculator: str, number: int, content: bytes) -> None:
        """Write or replace one document."""
        with self._fail_fast("write"):
            obstore.put(self._bucket.quick, _document(speculator, number), content)

    def delete_document(self, speculator: str, number: int) -> None:
        """Delete one document."""
        with self._fail_fast("delete in"), suppress(FileNotFoundError):
            obstore.delete(self._bucket.quick, _document(speculator, number))

    def _put(self, upload: Upload, digest: str) -> None:
        obstore.put(
            self._bucket.objects, _blob(digest), upload.path, chunk_size=_PART_BYTES, max_concurrency=_PARALLEL_PARTS
        )

    def _download(self, digest: str) -> None:
        """Fetch a blob into the cache, in ranges: each of them has its own time limit."""
        found = hashlib.sha256()
        with self._cache.create(_name(digest)) as file, self._errors("read"):
            try:
                size = obstore.head(self._bucket.quick, _blob(digest))["size"]
            except FileNotFoundError:
                raise NotFound(f"no blob {digest} is stored") from None
            for start in range(0, size, _PART_BYTES):
                end = min(start + _PART_BYTES, size)
                part = bytes(obstore.get_range(self._bucket.objects, _blob(digest), start=start, end=end))
                found.update(part)
                file.write(part)
            if f"sha256:{found.hexdigest()}" != digest:
                raise Corrupt(f"the blob {digest} in {self._bucket.url} hashes to sha256:{found.hexdigest()}")

    def _list(self, prefix: str) -> Iterator[str]:
        with self._fail_fast("list"):
            for page in obstore.list(self._bucket.quick, prefix):
                yield from (entry["path"] for entry in page)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        with _errors(self._bucket.url, doing):
            yield

    @contextmanager
    def _fail_fast(self, doing: str) -> Iterator[None]:
        """Around what the archive's thread asks: not while the bucket rests, and a failure lets it rest."""
        if self._clock.monotonic() < self._unavailable_until_s:
            raise Unavailable(f"{self._bucket.url} was away a moment ago", retry_after_s=_RETRY_AFTER_S)
        try:
            with self._errors(doing):
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
    """Around calls of the bucket: whatever is wrong with it may be mended, and what we do is tried again then."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise Unavailable(f"cannot {doing} {url}: {_reason(error)}{hint}", retry_after_s=_RETRY_AFTER_S) from error


def _reason(error: Exception) -> str:
    """The first line of what may be a page, without the query of an address: it may hold a signature."""
    text = str(error)
    told = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL)
    if told:
        return f"{told[1]}, {told[2]}"
    return re.sub(r"\?\S+", "", text.partition("\n")[0])
