"""Files of a repository on the Hugging Face hub, or on the server in HF_ENDPOINT; private ones need HF_TOKEN.

The commit is resolved before the first file, so that all files are of one commit. The hub's own library does the transfer,
but not with `snapshot_download`, which considers a folder complete when the hub does not answer.
"""

import errno
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from updraft_chassis.errors import (
    Corrupt,
    Forbidden,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    UpdraftError,
)
from updraft_cli.models.source import HUB, File, Listing, taken

_PARALLEL_FILES = 4

_TIMEOUT_S = 30.0
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Between attempts to read a range."""

_BLOCK_BYTES = 64 * 1024

_PARTIAL_CONTENT, _TOO_MANY, _SERVER_ERROR = 206, 429, 500

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM)
"""Errors of the disk; the library's own errors are OSErrors too."""

_ERRORS = (
    OSError,
    errors.HFValidationError,
    errors.XetDownloadError,
    errors.HTTPError,  # type: ignore[attr-defined]  # of httpx or httpx2: that is the library's business
)


class HubSource:
    """A `Source` on the hub; `name` is ORG/NAME."""

    def __init__(self, name: str, *, is_draft: bool = False) -> None:
        self._name = name
        self._is_draft = is_draft
        self._uri = f"{HUB}://{name}"

    def listing(self, revision: str) -> Listing:
        """List the files of the commit that the revision names now."""
        with self._errors(revision):
            info = huggingface_hub.HfApi().model_info(self._name, revision=revision or None, files_metadata=True)
        files = [
            File(name=file.rfilename, size_bytes=file.size or 0, tag=file.blob_id or "") for file in info.siblings or []
        ]
        return Listing(revision=info.sha or revision, files=taken(self._uri, files, is_draft=self._is_draft))

    def arrived_bytes(self, folder: Path) -> int:
        """Return 0: the library keeps parts of files elsewhere, and decides itself whether it continues them."""
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
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]  # stderr has ours
        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            running = {pool.submit(self._fetch, listing, file, folder): file for file in files}
            try:
                for future in as_completed(running):
                    future.result()
                    done(running[future])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, listing: Listing, file: File, folder: Path) -> None:
        with self._errors(listing.revision):
            path = Path(
                huggingface_hub.hf_hub_download(self._name, file.name, revision=listing.revision, local_dir=folder)
            )
        if path.stat().st_size != file.size_bytes:
            path.unlink()
            raise Corrupt(
                f"{file.name} of {self._uri} does not have the expected size of {file.size_bytes} bytes; pull again"
            )

    def read(self, listing: Listing, file: File, begin: int, end: int) -> bytes:
        """Return a range of a file. After a lost connection or an overloaded hub it is requested again."""
        url = huggingface_hub.hf_hub_url(self._name, file.name, revision=listing.revision)
        with self._errors(listing.revision):
            for wait_s in _WAITS_S:
                try:
                    return self._range(url, file, begin, end)
                except _ERRORS as error:
                    if not _is_passing(error):
                        raise
                    time.sleep(wait_s)
            return self._range(url, file, begin, end)

    def _range(self, url: str, file: File, begin: int, end: int) -> bytes:
        headers: dict[str, str] = huggingface_hub.utils.build_hf_headers()  # type: ignore[attr-defined]
        # Identity: a compressed answer has no ranges of the file's bytes.
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        session = huggingface_hub.get_session()
        with session.stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
            huggingface_hub.utils.hf_raise_for_status(response)  # type: ignore[attr-defined]
            if response.status_code != _PARTIAL_CONTENT and (begin, end) != (0, file.size_bytes):
                raise Unavailable(f"the server of {self._uri} sends whole files only: it does not support ranges")
            content = bytearray()
            for block in response.iter_raw(_BLOCK_BYTES):
                content += block
                if len(content) > end - begin:
                    raise Corrupt(
                        f"the server of {self._uri} sends more of {file.name} than the requested {end - begin} bytes"
                    )
        if len(content) != end - begin:
            raise Corrupt(f"{file.name} of {self._uri} is truncated: {len(content)} bytes arrived of {end - begin}")
        return bytes(content)

    @contextmanager
    def _errors(self, revision: str) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            raise self._translated(error, revision) from error

    def _translated(self, error: Exception, revision: str) -> UpdraftError:
        reason = _first_line(error)
        match error:
            case errors.GatedRepoError():
                return Forbidden(
                    f"{self._uri} is gated: accept its terms with an account, and set HF_TOKEN to a token of that account"
                )
            case errors.RepositoryNotFoundError():
                return NotFound(f"{self._uri} does not exist or is private: check the name, and HF_TOKEN")
            case errors.RevisionNotFoundError():
                return NotFound(f"{self._uri} has no revision {revision}")
            case errors.HFValidationError():
                return InvalidInput(f"{self._uri} is not a valid repository name: {reason}")
            case errors.HfHubHTTPError() if error.response.status_code == 401:
                return Unauthenticated(f"{self._uri} refuses this HF_TOKEN; it may have expired")
        return Unavailable(f"cannot read {self._uri}: {reason}; check HF_ENDPOINT, and try again")


def _is_passing(error: Exception) -> bool:
    """Whether another attempt may succeed: the connection was lost, or the hub is overloaded."""
    if isinstance(error, errors.HfHubHTTPError):
        status = int(error.response.status_code)
        return status == _TOO_MANY or status >= _SERVER_ERROR
    return isinstance(error, errors.HTTPError)  # type: ignore[attr-defined]  # see _ERRORS


def _first_line(error: Exception) -> str:
    """Without the query of a URL, which may hold a signature."""
    return str(error).strip().partition("\n")[0].partition("?")[0].rstrip(".") or type(error).__name__
