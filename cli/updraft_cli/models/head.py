"""Downloads the parts of a model that are read by those who do not run it: config, tokenizer, embedding, head and final norm.

The three tensors are read by ranges and written to one new weights file, which grows in order, so that an interrupted download
continues where it stopped. `updraft-target.json` states the fingerprint of the whole model, from samples of all its files.
"""

import json
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from updraft_artifacts import model_files, safetensors_header
from updraft_artifacts.model_folder import PART_OF
from updraft_artifacts.target_description import TargetDescription
from updraft_chassis.durable import sync
from updraft_chassis.errors import Corrupt
from updraft_cli.models.source import PART, Address, File, Listing, RangeSource

OWN = ".updraft"
"""Folder for notes about a download, below that of the model."""

_WEIGHTS = "model.safetensors"
_RANGE_BYTES = 4 * 1024 * 1024
_PARALLEL_RANGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The files to write: the new weights file is `header`, then the ranges in order."""

    fingerprint: str
    header: bytes
    ranges: tuple[model_files.Range, ...]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(end - begin for _, begin, end in self.ranges)

    @property
    def statement(self) -> bytes:
        """The statement about the whole model that the folder holds."""
        return json.dumps({"fingerprint": self.fingerprint}).encode() + b"\n"

    def part(self, folder: Path) -> Path:
        """The file in which the weights grow: another one for other weights."""
        tag = sha256(self.header + self.statement).hexdigest()[:16]
        return folder / OWN / f"head-{tag}{PART}"

    def own_part(self, folder: Path) -> Path:
        """A file that no other process writes, and that no later one continues: `pull` removes that of a killed one."""
        return folder / OWN / f"head-{uuid.uuid4().hex}{PART}"

    def after(self, num_bytes: int) -> Iterator[model_files.Range]:
        """Yield the ranges that are missing after the first bytes of the file, in requests of a bounded size."""
        skipped = num_bytes - len(self.header)
        for name, begin, end in self.ranges:
            start = begin + min(max(0, skipped), end - begin)
            skipped -= end - begin
            for at in range(start, end, _RANGE_BYTES):
                yield name, at, min(at + _RANGE_BYTES, end)


def describe(source: RangeSource, address: Address) -> TargetDescription:
    """Describe the model at an address by a few ranges of its files. InvalidInput or Corrupt as `model_files.examine`."""
    listing = source.listing(address.revision)
    return model_files.examine(_RemoteFiles(source, listing, address.uri))[0]


class HeadSource:
    """A `Source` of the head of the model in another source."""

    def __init__(self, source: RangeSource, uri: str) -> None:
        self._source = source
        self._uri = uri
        self._whole = Listing(revision="", files=())
        self._plan: _Plan | None = None

    def listing(self, revision: str) -> Listing:
        """List the files as they will be in the folder. InvalidInput or Corrupt if the three tensors cannot be found."""
        whole = self._source.listing(revision)
        self._plan = plan = _plan(_RemoteFiles(self._source, whole, self._uri))
        beside = [f for f in whole.files if not f.name.endswith(".safetensors") and f.name != model_files.INDEX]
        made = (
            File(name=PART_OF, size_bytes=len(plan.statement), tag=plan.fingerprint),
            File(name=_WEIGHTS, size_bytes=plan.size_bytes, tag=plan.fingerprint),
        )
        self._whole = whole
        return Listing(revision=whole.revision, files=(*beside, *made))

    def arrived_bytes(self, folder: Path) -> int:
        """Return the size of the weights that an interrupted download left, if they are those of the last listing."""
        assert self._plan is not None
        part = self._plan.part(folder)
        return part.stat().st_size if part.exists() else 0

    def fetch(
        self,
        listing: Listing,
        files: Iterable[File],
        folder: Path,
        done: Callable[[File], None],
        *,
        is_alone: bool = True,
    ) -> None:
        """Fetch the small files, then the tensors. Corrupt if the weights do not have the planned size."""
        wanted = {file.name: file for file in files}
        made = [wanted.pop(name) for name in (PART_OF, _WEIGHTS) if name in wanted]
        self._source.fetch(self._whole, wanted.values(), folder, done, is_alone=is_alone)
        assert self._plan is not None
        for file in made:
            if file.name == PART_OF:
                (folder / PART_OF).write_bytes(self._plan.statement)
            else:
                self._assemble(self._plan, folder, is_alone=is_alone)
            done(file)

    def _assemble(self, plan: _Plan, folder: Path, *, is_alone: bool) -> None:
        if is_alone:
            self._grow(plan, plan.part(folder), folder)
            return
        part = plan.own_part(folder)
        try:
            self._grow(plan, part, folder)
        finally:
            part.unlink(missing_ok=True)

    def _grow(self, plan: _Plan, part: Path, folder: Path) -> None:
        remote = _RemoteFiles(self._source, self._whole, self._uri)
        with part.open("ab") as output:
            if output.tell() < len(plan.header):
                output.truncate(0)
                output.write(plan.header)
            for content in _in_order(remote, plan.after(output.tell())):
                output.write(content)
                output.flush()
                os.fdatasync(output.fileno())  # its length is what an interrupted download continues from
        sync(part)
        if part.stat().st_size != plan.size_bytes:
            has = part.stat().st_size
            part.unlink()
            raise Corrupt(f"{folder / _WEIGHTS} would have {has:,} bytes instead of {plan.size_bytes:,}: pull again")
        part.replace(folder / _WEIGHTS)


class _RemoteFiles:
    """The files of a source, as `model_files.ModelFiles`. Small ones are kept, because they are read more than once."""

    def __init__(self, source: RangeSource, listing: Listing, uri: str) -> None:
        self.place = uri
        self._files = {file.name: file for file in listing.files}
        self.sizes: Mapping[str, int] = {name: file.size_bytes for name, file in self._files.items()}
        self._source = source
        self._listing = listing
        self._kept: dict[model_files.Range, bytes] = {}

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return exactly these bytes of a file; Corrupt if the source sends another number of bytes."""
        if begin == end:
            return b""
        asked = (name, begin, end)
        content = self._kept.get(asked)
        if content is None:
            content = self._source.read(self._listing, self._files[name], begin, end)
            if len(content) != end - begin:
                raise Corrupt(
                    f"{name} of {self.place} is truncated: {len(content)} bytes arrived of {end - begin}; pull again"
                )
            if not name.endswith(".safetensors"):
                self._kept[asked] = content
        return content


def _plan(files: _RemoteFiles) -> _Plan:
    description, spans = model_files.examine(files)
    places = sorted(description.places.all, key=lambda place: place.name)
    tensors = [spans[place.name] for place in places]
    with ThreadPoolExecutor(_PARALLEL_RANGES) as pool:
        fingerprint = model_files.fingerprint(files, pool.map)
    return _Plan(
        fingerprint=fingerprint,
        header=safetensors_header.header((span.name, span.dtype, span.shape) for span in tensors),
        ranges=tuple((place.file, span.begin, span.end) for place, span in zip(places, tensors, strict=True)),
    )


def _in_order(files: _RemoteFiles, ranges: Iterable[model_files.Range]) -> Iterator[bytes]:
    """Read ranges in parallel and yield them in order, with a bounded number in memory."""
    with ThreadPoolExecutor(_PARALLEL_RANGES) as pool:
        running: deque[Future[bytes]] = deque()
        try:
            for one in ranges:
                running.append(pool.submit(files.read, *one))
                if len(running) >= _PARALLEL_RANGES:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
