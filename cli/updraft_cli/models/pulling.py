"""Downloads a model or a draft into a folder, completely or not at all.

The folder keeps a record of its address. The record is written before the first file and marked complete after the last one.
A complete folder is left unchanged, an interrupted download continues with its first missing file, and a folder with
another address is refused. Several processes may pull into one folder: the second one waits. On a volume without locks
both download, each into files of its own that it renames when they are complete, and no interrupted file is continued. Those
of killed processes are removed when they were not written to for an hour.
"""

import errno
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import disk_usage, rmtree

from updraft_chassis.durable import sync
from updraft_chassis.errors import Conflict, Exhausted, InvalidInput, NotFound, full_disk_as_exhausted
from updraft_chassis.leftovers import remove_stale
from updraft_cli.models.head import OWN as _OWN
from updraft_cli.models.head import HeadSource
from updraft_cli.models.lock import locked
from updraft_cli.models.source import HUB, PART, Address, File, Listing, RangeSource, Source

_RECORD = "pull.json"
_LEFT_ALONE = (_OWN, ".cache", "lost+found")

Report = Callable[[str, int, int], None]
"""Called with the current activity, and the bytes that are here and in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of a pull: its address, revision and files."""

    uri: str
    asked: str
    """The requested revision; empty: the newest at the time."""
    is_head_only: bool = False
    revision: str = ""
    """The revision that it resolved to."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size and tag by name."""
    is_whole: bool = False

    def is_for(self, address: Address) -> bool:
        asked = (address.uri, address.revision, address.is_head_only)
        return (self.uri, self.asked, self.is_head_only) == asked

    def has(self, file: File, folder: Path) -> bool:
        path = folder / file.name
        is_same = self.files.get(file.name) == (file.size_bytes, file.tag)
        return is_same and path.is_file() and path.stat().st_size == file.size_bytes

    def is_kept(self, folder: Path) -> bool:
        """Whether the folder is complete, and no file was removed."""
        files = (File(name=name, size_bytes=size, tag=tag) for name, (size, tag) in self.files.items())
        return self.is_whole and all(self.has(file, folder) for file in files)


def open_source(address: Address) -> Source:
    """Return the source of an address, or of the head of what is there. Raises as `open_ranges`."""
    source = open_ranges(address)
    return HeadSource(source, address.uri) if address.is_head_only else source


def open_ranges(address: Address) -> RangeSource:
    """Return the source of an address; NotFound if the package that reads it is not installed."""
    # Each takes long to import.
    try:
        if address.scheme == HUB:
            from updraft_cli.models.hub import HubSource  # noqa: PLC0415

            return HubSource(address.place, is_draft=address.is_draft)
        from updraft_cli.models.bucket import BucketSource  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise NotFound(f"{address.uri} needs the package {error.name}: pip install '.[cli]' in a checkout") from error
    return BucketSource(address.uri, is_draft=address.is_draft)


def pull(
    address: Address,
    folder: Path,
    report: Report = lambda _what, _done, _total: None,
    opened: Callable[[Address], Source] = open_source,
) -> Record:
    """Download an address into a folder, and return its record.

    Conflict for a folder that holds something else, Exhausted for a full disk, and the errors of the source.
    """
    with writing(folder):
        record = _read(folder, address)
        if record.is_kept(folder):
            remove_stale(_parts(folder))
            return record
        (folder / _OWN).mkdir(parents=True, exist_ok=True)
        with _locked(folder, report) as is_alone:
            if not is_alone:
                remove_stale(_parts(folder))
            record = _read(folder, address)
            if not record.is_kept(folder):
                record = _bring(opened(address), record, folder, report, is_alone=is_alone)
            if is_alone:
                _clean(folder)
    return record


def _bring(source: Source, before: Record, folder: Path, report: Report, *, is_alone: bool) -> Record:
    report("listing", 0, 0)
    listing = source.listing(before.revision or before.asked)
    missing = [file for file in listing.files if not before.has(file, folder)]
    _check_room(folder, missing, source.arrived_bytes(folder) if is_alone else 0)
    record = Record(
        uri=before.uri,
        asked=before.asked,
        is_head_only=before.is_head_only,
        revision=listing.revision,
        files={file.name: (file.size_bytes, file.tag) for file in listing.files},
    )
    for name, was in before.files.items():
        if record.files.get(name) != was:
            (folder / name).unlink(missing_ok=True)  # from another state of the source
    _write(folder, record)
    _fetch(source, listing, missing, folder, report, is_alone=is_alone)
    whole = replace(record, is_whole=True)
    _write(folder, whole)
    return whole


def _fetch(
    source: Source, listing: Listing, missing: list[File], folder: Path, report: Report, *, is_alone: bool
) -> None:
    arrived = listing.size_bytes - sum(file.size_bytes for file in missing)

    def done(file: File) -> None:
        nonlocal arrived
        arrived += file.size_bytes
        sync(folder / file.name)
        report(file.name, arrived, listing.size_bytes)

    report("downloading", arrived, listing.size_bytes)
    source.fetch(listing, missing, folder, done, is_alone=is_alone)


def _clean(folder: Path) -> None:
    """Remove files of interrupted pulls, and the notes of the hub's library."""
    for left in _parts(folder):
        left.unlink(missing_ok=True)
    rmtree(folder / ".cache" / "huggingface", ignore_errors=True)
    with suppress(OSError):
        (folder / ".cache").rmdir()


def _parts(folder: Path) -> list[Path]:
    return [*folder.glob(f".*{PART}"), *(folder / _OWN).glob(f"*{PART}")]


def _check_room(folder: Path, missing: list[File], arrived: int) -> None:
    needed, free = sum(file.size_bytes for file in missing) - arrived, disk_usage(folder).free
    if needed > free:
        raise Exhausted(
            f"{folder} has {free:,} bytes left and needs {needed:,}: free some space, or name another folder"
        )


def _read(folder: Path, address: Address) -> Record:
    """Return the folder's record, or a new one for an empty folder. Conflict if it holds anything else."""
    # List the folder first: a process that pulls at the same time writes the record before any other file.
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    try:
        content = json.loads((folder / _OWN / _RECORD).read_text())
        files = {str(name): (int(size), str(tag)) for name, (size, tag) in content.pop("files").items()}
        record = Record(**content, files=files)
    except FileNotFoundError:
        if others := [name for name in entries if name not in _LEFT_ALONE]:
            raise Conflict(
                f"{folder} holds files that were not pulled, such as {others[0]}: name another folder, or empty it"
            ) from None
        return Record(uri=address.uri, asked=address.revision, is_head_only=address.is_head_only)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInput(f"{folder / _OWN / _RECORD} is damaged: remove {folder}, and pull again") from error
    if not record.is_for(address):
        part = "the head of " if record.is_head_only else ""
        other = f"{part}{record.uri}{f' at {record.asked}' if record.asked else ''}"
        raise Conflict(f"{folder} holds {other}: name another folder, or remove it")
    return record


def _write(folder: Path, record: Record) -> None:
    part = folder / _OWN / f"{uuid.uuid4().hex}{PART}"
    part.write_text(json.dumps(asdict(record), indent=1))
    sync(part)
    part.replace(folder / _OWN / _RECORD)
    sync(folder / _OWN)


@contextmanager
def _locked(folder: Path, report: Report) -> Iterator[bool]:
    """Hold the folder's lock; False where locks are not supported."""
    with ExitStack() as stack:
        try:
            stack.enter_context(
                locked(folder / _OWN / "lock", lambda: report("waiting for another process that downloads it", 0, 0))
            )
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            yield False
            return
        yield True


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Report errors of a folder's disk in one sentence."""
    full = f"the disk of {folder} is full: free some space and pull again; the download continues where it stopped"
    try:
        with full_disk_as_exhausted(full):
            yield
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror or error}") from error
