"""Files below a prefix in a bucket of S3, GCS or Azure; credentials and endpoint come from the environment, e.g. AWS_... .

An object is read in ranges, each with its own time limit, and only as long as it is the object that was listed.
"""

import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from os import pwrite
from pathlib import Path

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import ObjectStore, from_url

from updraft_chassis.errors import Conflict, Forbidden, NotFound, Unauthenticated, Unavailable, UpdraftError
from updraft_cli.models.source import PART, File, Listing, taken

_RANGE_BYTES = 16 * 1024 * 1024
"""Size of one request: small enough for its time limit on a slow link."""

_PARALLEL_RANGES = 8
_TIMEOUT_S = 60

_ADVICE = "check the address, and endpoint and credentials in the environment (such as AWS_...)"


class BucketSource:
    """A `Source` in a bucket."""

    def __init__(self, uri: str, *, is_draft: bool = False) -> None:
        self._uri = uri
        self._is_draft = is_draft
        with self._errors():
            self._objects: ObjectStore = from_url(
                uri.rstrip("/"),
                # Plain http is used only if the environment names such an endpoint.
                client_options={"timeout": f"{_TIMEOUT_S}s", "connect_timeout": "5s", "allow_http": True},
                retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=_TIMEOUT_S)},
            )

    def listing(self, revision: str) -> Listing:
        """List the objects below the prefix; a bucket has no revisions."""
        with self._errors():
            objects = obstore.list_with_delimiter(self._objects)["objects"]
        files = [File(name=meta["path"], size_bytes=meta["size"], tag=meta["e_tag"] or "") for meta in objects]
        return Listing(revision=revision, files=taken(self._uri, files, is_draft=self._is_draft))

    def arrived_bytes(self, folder: Path) -> int:
        """Return 0: an interrupted file is fetched again."""
        return 0

    def fetch(
        self,
        listing: Listing,
        files: Iterable[File],
        folder: Path,
        done: Callable[[File], None],
        *,
        is_alone: bool = True,
    ) -> None:
        """Fetch files one after another, each in several ranges at a time."""
        for file in files:
            part = folder / f".{uuid.uuid4().hex}{PART}"  # a name of its own: others may fetch the same file
            try:
                self._bring(file, part)
                part.replace(folder / file.name)
            finally:
                part.unlink(missing_ok=True)
            done(file)

    def read(self, listing: Listing, file: File, begin: int, end: int) -> bytes:
        """Return a range of an object, as long as it is the object that was listed."""
        with self._errors():
            return bytes(self._range(file, begin, end))

    def _range(self, file: File, begin: int, end: int) -> obstore.Bytes:
        return obstore.get(
            self._objects, file.name, options={"range": (begin, end), "if_match": file.tag or None}
        ).bytes()

    def _bring(self, file: File, part: Path) -> None:
        with part.open("xb") as output, ThreadPoolExecutor(_PARALLEL_RANGES) as pool, self._errors():
            copy = partial(self._copy, file, output.fileno())
            try:
                for _ in pool.map(copy, range(0, file.size_bytes, _RANGE_BYTES)):
                    pass
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _copy(self, file: File, output: int, start: int) -> None:
        data = memoryview(self._range(file, start, min(start + _RANGE_BYTES, file.size_bytes)))
        while data:
            written = pwrite(output, data, start)
            start, data = start + written, data[written:]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> UpdraftError:
        reason = _reason(error)
        match error:
            case PreconditionError():
                return Conflict(f"{self._uri} changed during the download; pull again")
            case FileNotFoundError():
                return NotFound(f"cannot read {self._uri}: {reason}; {_ADVICE}")
            case UnauthenticatedError():
                return Unauthenticated(f"cannot read {self._uri}: {reason}; {_ADVICE}")
            case PermissionDeniedError():
                return Forbidden(f"cannot read {self._uri}: {reason}; {_ADVICE}")
        return Unavailable(f"cannot read {self._uri}: {reason}; {_ADVICE}")


def _reason(error: Exception) -> str:
    """Return the first line of what may be a page, without the query of a URL, which may hold a signature."""
    text = str(error)
    match = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL)
    if match:
        return f"{match[1]}, {match[2]}".rstrip(".")
    return re.sub(r"\?\S+", "", text.partition("\n")[0]).rstrip(".")
