"""Reads a model's description, its fingerprint and the places of its tensors without reading all of its files.

The files may be in a folder or at an address, so that a folder of the whole model and a process that reads a few ranges of the
same model agree.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from updraft_artifacts import safetensors_header, target_tensors
from updraft_artifacts.safetensors_header import TensorSpan
from updraft_artifacts.target_description import TargetDescription
from updraft_artifacts.target_tensors import TensorPlace
from updraft_chassis.errors import Corrupt, InvalidInput

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"

_NUM_SAMPLES, _MIN_SAMPLES = 512, 4
"""Samples of a model, which its files get by their sizes, and the fewest of a file."""
_SAMPLE_BYTES = 1024

_HEADER_BYTES = 64 * 1024
"""Most headers are shorter, and are read with one request."""

_MAX_INDEX_BYTES, _MAX_JSON_BYTES = 100_000_000, 10_000_000
"""Files that are read into memory. The largest published index has about 10 MB; settings of each module of a quantised model
may make its config.json a few."""

_Parsed = TypeVar("_Parsed")
_Item = TypeVar("_Item")

Range = tuple[str, int, int]
"""A file, and begin and end in it."""


class Each(Protocol):
    """`map`, or that of a pool."""

    def __call__(self, read: Callable[[_Item], bytes], items: Iterable[_Item], /) -> Iterable[bytes]: ...


class ModelFiles(Protocol):
    """The top-level files of a model. `place` names it in messages."""

    place: str
    sizes: Mapping[str, int]
    """In bytes, by name."""

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return exactly these bytes. An UpdraftError if that is impossible."""
        ...


def read_json(files: ModelFiles, name: str) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, InvalidInput if it is too large or holds anything else."""
    if name not in files.sizes:
        return None
    check_json_size(files.sizes[name], f"{files.place}/{name}", _MAX_INDEX_BYTES if name == INDEX else _MAX_JSON_BYTES)
    return parse_json(files.read(name, 0, files.sizes[name]), f"{files.place}/{name}")


def check_json_size(size_bytes: int, path: str, most: int = _MAX_JSON_BYTES) -> None:
    """Raise InvalidInput if a JSON file is too large to be read into memory."""
    if size_bytes > most:
        raise InvalidInput(f"{path} has {size_bytes:,} bytes, supported are {most:,}")


def parse_json(content: bytes, path: str) -> dict[str, Any]:
    """The JSON object in a file's content; InvalidInput names the file."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidInput(f"{path} holds no JSON object")
    return parsed


def weight_names(files: ModelFiles) -> list[str]:
    """The safetensors files in order: those of the index, or else model*.safetensors. InvalidInput if one is missing."""
    index = read_json(files, INDEX)
    if index is None:
        names = sorted(name for name in files.sizes if name.startswith("model") and name.endswith(".safetensors"))
        if not names:
            raise InvalidInput(f"{files.place} holds no model*.safetensors")
        return names
    names = sorted(set(_weight_map(index, files.place).values()))
    missing = [name for name in names if name not in files.sizes]
    if missing:
        more = f", and {len(missing) - 1} more of its files" if missing[1:] else ""
        raise InvalidInput(f"{files.place} lacks {missing[0]}, which {INDEX} names{more}")
    return names


def examine(files: ModelFiles) -> tuple[TargetDescription, dict[str, TensorSpan]]:
    """Describe the target, and find its three tensors in their files.

    InvalidInput is one sentence for what is missing, absurd or does not fit, Corrupt for a file that is not whole.
    """
    config = read_json(files, CONFIG)
    if config is None:
        raise InvalidInput(f"{files.place}/{CONFIG} does not exist")
    try:
        description = TargetDescription.of(config, _tensor_files(files), read_json(files, GENERATION))
        spans = _spans(files, description.places.all)
        target_tensors.check(
            description.places, spans, vocab_size=description.vocab_size, hidden_size=description.hidden_size
        )
    except InvalidInput as error:
        raise InvalidInput(f"the model in {files.place} cannot be described: {error}") from None
    return description, spans


def fingerprint(files: ModelFiles, each: Each = map) -> str:
    """ "sha256:..." of config.json, and of the name, size, header and some samples of the tensors of every weight file.

    Hashing gigabytes at every start would take minutes. There is a sample of 1 KiB in each 512th part of the tensors, and at
    least 4 in each file. A checkpoint of the same sizes in which a share p of the bytes is different has the same fingerprint
    with a probability of at most (1 - p) ** 512: 0.6 % for p = 1 %, and less than 1e-11 for p = 5 %. Corrupt if a weight file
    is not whole.
    """
    config = read_json(files, CONFIG)
    if config is None:
        raise InvalidInput(f"{files.place}/{CONFIG} does not exist")
    names = weight_names(files)
    digest = hashlib.sha256(json.dumps(_identity(config), sort_keys=True).encode())
    digest.update("".join(f"{name}:{files.sizes[name]}:" for name in names).encode())
    begins = {}
    for name, header in zip(names, each(partial(_read_header, files), names), strict=True):
        digest.update(header)
        begins[name] = len(header)
    num_bytes = max(1, sum(files.sizes[name] - begin for name, begin in begins.items()))
    ranges = []
    for name, begin in begins.items():
        end = files.sizes[name]
        count = max(_MIN_SAMPLES, math.ceil(_NUM_SAMPLES * (end - begin) / num_bytes))
        ranges += _sample_ranges(name, begin, end, count)
    for sample in each(lambda one: files.read(*one), ranges):
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the keys that change when a model is saved again."""
    return {key: value for key, value in config.items() if key not in {"transformers_version", "_name_or_path"}}


def _sample_ranges(name: str, begin: int, end: int, count: int) -> list[Range]:
    """One sample in each of `count` equal parts of a file's tensors, and all of a part that is not longer.

    Within its part a sample is at a place that depends on the file's name and the part's number: at equal distances it could
    meet the same tensor in every layer.
    """
    bounds = [begin + (end - begin) * i // count for i in range(count + 1)]
    ranges = []
    for i, (first, last) in enumerate(pairwise(bounds)):
        seed = hashlib.sha256(f"{name}:{i}".encode()).digest()[:8]
        start = first + int.from_bytes(seed) % max(1, last - first - _SAMPLE_BYTES + 1)
        ranges.append((name, start, min(start + _SAMPLE_BYTES, last)))
    return ranges


def _weight_map(index: Mapping[str, Any], place: str) -> dict[str, str]:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise InvalidInput(f"{INDEX} of {place} has no weight_map from tensors to files")
    return files


def _tensor_files(files: ModelFiles) -> dict[str, str]:
    """The file of each tensor, by the index, or by the headers of all files."""
    names = weight_names(files)
    index = read_json(files, INDEX)
    if index is not None:
        return _weight_map(index, files.place)
    found: dict[str, str] = {}
    for file in names:
        found |= dict.fromkeys(_header(files, file, safetensors_header.names), file)
    return found


def _spans(files: ModelFiles, places: Collection[TensorPlace]) -> dict[str, TensorSpan]:
    """The places of tensors within their files. InvalidInput if a file does not hold what its index says."""
    spans: dict[str, TensorSpan] = {}
    for file in sorted({place.file for place in places}):
        wanted = [place.name for place in places if place.file == file]
        found = _header(files, file, partial(safetensors_header.find, wanted))
        missing = [name for name in wanted if name not in found]
        if missing:
            raise InvalidInput(f"{file} lacks {missing[0]}, which {INDEX} says it holds")
        spans |= found
    return spans


def _header(files: ModelFiles, name: str, parse: Callable[[bytes, int], _Parsed]) -> _Parsed:
    """Parse a weight file's header. Corrupt and InvalidInput name the file."""
    header = _read_header(files, name)
    with _naming(files, name):
        return parse(header, files.sizes[name])


def _read_header(files: ModelFiles, name: str) -> bytes:
    """Exactly the header of a weight file. Corrupt and InvalidInput name the file."""
    size = files.sizes[name]
    prefix = files.read(name, 0, min(_HEADER_BYTES, size))
    with _naming(files, name):
        length = safetensors_header.length(prefix, size)
    return prefix[:length] if length <= len(prefix) else prefix + files.read(name, len(prefix), length)


@contextmanager
def _naming(files: ModelFiles, name: str) -> Iterator[None]:
    try:
        yield
    except Corrupt as error:
        raise Corrupt(f"{name} of {files.place} is truncated or damaged: {error}; download it again") from None
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from None
