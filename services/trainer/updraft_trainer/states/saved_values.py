"""Nested values with tensors, in a folder: tensors as safetensors by torch.distributed.checkpoint, everything else in JSON.

The JSON has the size and digest of each file, so its own digest proves all of them: nothing damaged is ever read as if it were
whole. torch's own format is not used, because it pickles its metadata and reading it could run any code.

The planner and the storage are called in the order of `torch.distributed.checkpoint.save` and `load`, which cannot be used:
without a process group they warn, and with one they would wait for the other ranks.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from updraft_artifacts.digests import file_digest
from updraft_chassis.durable import sync
from updraft_chassis.errors import Corrupt

VALUES = "values.json"

FILE_BYTES = 128 * 1024**2
"""Tensors are written in files of about this size; a larger one is alone. Torch keeps two more copies of a file's tensors in
memory while it writes it."""


def write(folder: Path, value: object) -> str:
    """Write durably into an empty folder; return the digest that `read` checks. OSError if that is impossible.

    `value`: dicts, lists, tuples, tensors of any device, and what JSON has. Keys of dicts are strings or integers.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encoded(value, (), tensors)
    _write_tensors(folder, tensors)
    files = {path.name: _proof(path) for path in sorted(folder.iterdir())}
    for name in files:
        sync(folder / name)
    (folder / VALUES).write_text(json.dumps({"files": files, "values": encoded}))
    sync(folder / VALUES)
    sync(folder)
    return file_digest(folder / VALUES)


def read(folder: Path, digest: str) -> Any:
    """The value, its tensors on the CPU, after a check of everything but the content of tensors. Corrupt if it is damaged."""
    values = _values(folder, digest)["values"]
    try:
        return _decoded(values, _read_tensors(folder))
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise Corrupt(f"{folder} cannot be read: {error}") from error


def read_plain(folder: Path, digest: str) -> Any:
    """The value without its tensors, each of which is None. Corrupt if the JSON is damaged."""
    return _decoded(_values(folder, digest)["values"], None)


def check(folder: Path, digest: str) -> None:
    """Corrupt if anything in the folder is damaged or missing. Reads all of it."""
    for name, proof in _values(folder, digest)["files"].items():
        try:
            is_intact = _proof(folder / name) == proof
        except OSError as error:
            raise Corrupt(f"{folder / name} cannot be read: {error}") from error
        if not is_intact:
            raise Corrupt(f"the content of {folder / name} does not match its digest")


def copied(value: Any) -> Any:
    """A copy whose tensors are on the CPU and share no memory with those of the value."""
    return _with_tensors(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    match value:
        case Tensor():
            return change(value)
        case dict():
            return {key: _with_tensors(one, change) for key, one in value.items()}
        case list() | tuple():
            return type(value)(_with_tensors(one, change) for one in value)
        case _:
            return value


def _encoded(value: Any, path: tuple[Any, ...], tensors: dict[str, Tensor]) -> Any:
    """JSON for a value at a path in the whole. Adds its tensors to `tensors`, by their paths."""
    match value:
        case Tensor():
            name = "/".join(map(str, path))
            if name in tensors:
                raise ValueError(f"two tensors have the path {name}")
            tensors[name] = value.detach().contiguous()
            return {"tensor": name}
        case dict():
            return {"dict": [[key, _encoded(one, (*path, key), tensors)] for key, one in value.items()]}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [_encoded(one, (*path, index), tensors) for index, one in enumerate(value)]}
        case _:
            return value


def _decoded(encoded: Any, tensors: Mapping[str, Tensor] | None) -> Any:
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    match kind:
        case "tensor":
            return None if tensors is None else tensors[content]
        case "dict":
            return {key: _decoded(one, tensors) for key, one in content}
        case _:
            items = (_decoded(one, tensors) for one in content)
            return list(items) if kind == "list" else tuple(items)


def _values(folder: Path, digest: str) -> dict[str, Any]:
    path = folder / VALUES
    try:
        if file_digest(path) != digest:
            raise Corrupt(f"the content of {path} does not match its digest")
        values: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error}") from error
    return values


def _proof(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "digest": file_digest(path)}


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=dict(_file_numbers(tensors)))
    planner.set_up_planner(tensors, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [results])


def _file_numbers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Each tensor's name and the number of its file, from 1 on."""
    number, num_bytes = 1, 0
    for name, tensor in tensors.items():
        if num_bytes and num_bytes + tensor.nbytes > FILE_BYTES:
            number, num_bytes = number + 1, 0
        num_bytes += tensor.nbytes
        yield name, number


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    reader, planner = HuggingFaceStorageReader(str(folder)), DefaultLoadPlanner(flatten_state_dict=False)
    metadata = reader.read_metadata()
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in metadata.state_dict_metadata.items()
        if isinstance(one, TensorStorageMetadata)
    }
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    return tensors
