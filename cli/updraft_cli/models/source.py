"""Addresses of models and drafts, and which of the files there are downloaded.

Serving reads configuration, weights in safetensors, and the tokenizer. The same weights in other formats, and code, are not
downloaded. Of a draft that has no safetensors, `pytorch_model.bin` is.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from updraft_artifacts.model_folder import PART_OF
from updraft_chassis.errors import InvalidInput, NotFound

BUCKETS = ("s3", "gs", "az")
HUB = "hf"

PART = ".part"
"""Suffix of a file that is not complete yet."""

_MOUNTED = ("pvc", "oci", "file")

_WEIGHTS = "*.safetensors"
_PICKLED = "pytorch_model.bin"
_BESIDE = ("*.json", "tokenizer*", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*")
_NOT_TAKEN = ("*.bin.index.json", "consolidated*", PART_OF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address to download from. `revision` is empty for the newest, and for a bucket."""

    uri: str
    scheme: str
    place: str
    revision: str = ""
    is_head_only: bool = False
    """Only what is read by those who do not run the model, see `head`."""
    is_draft: bool = False
    """Also weights that only an import of a draft reads, if there are no others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a source; another tag means other content."""

    name: str
    size_bytes: int
    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files to download, all of one state of the source: its `revision`, if it has revisions."""

    revision: str
    files: tuple[File, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Source(Protocol):
    """A place that has files. Calls raise an UpdraftError for any problem of the place, and OSError for the disk."""

    def listing(self, revision: str) -> Listing:
        """Return the files to download, at a revision or (empty) at the newest."""
        ...

    def arrived_bytes(self, folder: Path) -> int:
        """Return how many bytes `fetch` does not fetch again, because an interrupted one of the last listing left them."""
        ...

    def fetch(
        self,
        listing: Listing,
        files: Iterable[File],
        folder: Path,
        done: Callable[[File], None],
        *,
        is_alone: bool = True,
    ) -> None:
        """Fetch files into a folder; each appears there complete, and is then reported to `done`.

        Unless `is_alone`, others may fetch into the folder at the same time: no file is shared with them before it is complete.
        """
        ...


class RangeSource(Source, Protocol):
    """A source of which parts of files can be read, also by several threads."""

    def read(self, listing: Listing, file: File, begin: int, end: int) -> bytes:
        """Return exactly these bytes of a file."""
        ...


def address(uri: str, revision: str = "") -> Address:
    """Parse a URI; the revision is `revision` or the one after its @. InvalidInput if it cannot be downloaded."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme in _MOUNTED:
        raise InvalidInput(
            f"{uri} is a mounted volume or a local path, which needs no download: use hf://ORG/NAME, s3://, gs:// or az://BUCKET/PREFIX"
        )
    if scheme in BUCKETS:
        if not rest.strip("/"):
            raise InvalidInput(f"{uri} names no bucket: expected {scheme}://BUCKET/PREFIX")
        if revision:
            raise InvalidInput(f"{uri} cannot have the revision {revision}: only hf:// has revisions")
        return Address(uri=uri, scheme=scheme, place=rest)
    if scheme != HUB:
        raise InvalidInput(f"{uri} cannot be downloaded: expected hf://ORG/NAME, s3://, gs:// or az://BUCKET/PREFIX")
    name, _, after = rest.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InvalidInput(f"{uri} names no repository: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    if revision and after and revision != after:
        raise InvalidInput(f"{uri} names the revision {after}, but {revision} was requested")
    return Address(uri=f"{HUB}://{name}", scheme=HUB, place=name, revision=revision or after)


def taken(where: str, files: Iterable[File], *, is_draft: bool = False) -> tuple[File, ...]:
    """Return the top-level files that serving reads, or an import of a draft; NotFound if they hold no model."""
    top = sorted((file for file in files if "/" not in file.name), key=lambda file: file.name)
    chosen = [file for file in top if _matches(file, _BESIDE) and not _matches(file, _NOT_TAKEN)]
    weights = [file for file in top if _matches(file, (_WEIGHTS,)) and not _matches(file, _NOT_TAKEN)]
    if is_draft and not weights:
        weights = [file for file in top if file.name == _PICKLED]
    if not weights or all(file.name != "config.json" for file in chosen):
        missing = "config.json" if weights else _WEIGHTS
        held = f"it holds {', '.join(file.name for file in top[:5])}" if top else "it holds no file"
        raise NotFound(f"{where} is not a model: it has no {missing} at its top level; {held}")
    return (*chosen, *weights)


def _matches(file: File, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(file.name, pattern) for pattern in patterns)
