"""What is read of a model's files without reading all of them: its description, its fingerprint, and where its tensors are.

The files may be in a folder or at an address, so that a folder of the whole model and a process that reads a few ranges of the
same model agree.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

from updraft_artifacts import safetensors_header, target_tensors
from updraft_artifacts.safetensors_header import TensorSpan
from updraft_artifacts.target_description import TargetDescription
from updraft_artifacts.target_tensors import TensorPlace
from updraft_chassis.errors import Corrupt, InvalidInput

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"

_NUM_SAMPLES, _MIN_SAMPLES = 64, 4
"""Samples of a model, and of each of its files. A model that was fine-tuned in some projections differs in one of them."""

_SAMPLE_BYTES = 8 * 1024
_HEADER_BYTES = 128 * 1024
"""Most headers are shorter, and are read with one request."""

_Parsed = TypeVar("_Parsed")

Range = tuple[str, int, int]
"""A file, and begin and end in it."""

Each = Callable[[Callable[[Range], bytes], Iterable[Range]], Iterable[bytes]]
"""`map`, or that of a pool."""


class ModelFiles(Protocol):
    """The top-level files of a model. `place` names it in messages."""

    place: str
    sizes: Mapping[str, int]
    """In bytes, by name."""

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return exactly these bytes. An UpdraftError if that is impossible."""
        ...


def read_json(files: ModelFiles, name: str) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, InvalidInput if it holds anything else."""
    if name not in files.sizes:
        return None
    return parse_json(files.read(name, 0, files.sizes[name]), f"{files.place}/{name}")


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
        raise InvalidInput(
            f"{files.place} lacks {missing[0]}, which {INDEX} names, and {len(missing) - 1} more such files"
        )
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
    """ "sha256:..." of config.json, and of the name, size and some samples of every weight file.

    That distinguishes checkpoints, also fine-tuned ones; hashing gigabytes at every start would take minutes.
    """
    config = read_json(files, CONFIG)
    if config is None:
        raise InvalidInput(f"{files.place}/{CONFIG} does not exist")
    names = weight_names(files)
    count = max(_MIN_SAMPLES, _NUM_SAMPLES // len(names))
    ranges = [(name, *span) for name in names for span in _sample_ranges(files.sizes[name], count)]
    digest = hashlib.sha256(json.dumps(_identity(config), sort_keys=True).encode())
    digest.update("".join(f"{name}:{files.sizes[name]}:" for name in names).encode())
    for sample in each(lambda one: files.read(*one), ranges):
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the keys that change when a model is saved again."""
    return {key: value for key, value in config.items() if key not in {"transformers_version", "_name_or_path"}}


def _sample_ranges(size: int, count: int) -> list[tuple[int, int]]:
    """Evenly spaced ranges of a file, from its first to its last bytes."""
    length = min(_SAMPLE_BYTES, size)
    begins = sorted({(size - length) * i // (count - 1) for i in range(count)})
    return [(begin, begin + length) for begin in begins]


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
    size = files.sizes[name]
    try:
        prefix = files.read(name, 0, min(_HEADER_BYTES, size))
        length = safetensors_header.length(prefix, size)
        if length > len(prefix):
            prefix += files.read(name, len(prefix), length)
        return parse(prefix, size)
    except Corrupt as error:
        raise Corrupt(f"{name} of {files.place} is truncated or damaged: {error}; download it again") from None
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from None
