"""The tap's own reader of safetensors, against the library's writer and against files that lie."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from updraft_tap.checkpoint import UnreadableError, read

TENSORS = {
    "f32": torch.randn(3, 5),
    "bf16": torch.randn(2, 3).bfloat16(),
    "f16": torch.randn(7).half(),
    "i64": torch.arange(4),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}


def written(folder: Path, header: Any, body: bytes = b"") -> Path:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    return folder


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')

    config, tensors = read(tmp_path)

    assert config == {"hidden_size": 8}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(tensors[name], tensor)


def test_a_file_of_several_pieces_is_read_whole_or_refused(tmp_path: Path) -> None:
    values = torch.arange(3 * 2**18 + 5, dtype=torch.int32)  # 3 MiB and some bytes
    save_file({"values": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    _, tensors = read(tmp_path)
    assert torch.equal(tensors["values"], values)

    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2**20 + 2**19)
    with pytest.raises(UnreadableError, match="does not fit"):
        read(tmp_path)


def test_a_tensor_at_an_odd_offset_is_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }

    _, tensors = read(written(tmp_path, header, b"\x07" + struct.pack("<f", 1.5)))

    assert (tensors["a"].tolist(), tensors["b"].tolist()) == ([7], [1.5])


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32"},
        7,
    ],
)
def test_an_entry_that_does_not_fit_the_file_is_refused(tmp_path: Path, entry: object) -> None:
    with pytest.raises(UnreadableError):
        read(written(tmp_path, {"a": entry}, b"\0" * 4))


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(UnreadableError):
        read(written(tmp_path, header))


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 1 << 63), struct.pack("<Q", 9) + b"{}"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, content: bytes) -> None:
    written(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(UnreadableError):
        read(tmp_path)


@pytest.mark.parametrize("config", ["", "[]", "7"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, config: str) -> None:
    written(tmp_path, {})
    (tmp_path / "config.json").write_text(config)

    with pytest.raises(UnreadableError):
        read(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="No such file"):
        read(tmp_path / "missing")


@pytest.mark.attack(boundary="drafts", attack="a draft of a terabyte, for the plugin", outcome="not read")
def test_a_file_larger_than_the_draft_can_be_is_not_read(tmp_path: Path) -> None:
    written(tmp_path, {})
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)

    with pytest.raises(UnreadableError, match="has 1099511627776 bytes, but at most 1048684 can belong to this draft"):
        read(tmp_path, 100)


def test_a_config_larger_than_any_draft_needs_is_not_read(tmp_path: Path) -> None:
    written(tmp_path, {})
    (tmp_path / "config.json").write_text("{" + " " * (1 << 20) + "}")

    with pytest.raises(UnreadableError, match=r"config\.json has 1048578 bytes"):
        read(tmp_path)


def test_a_config_nested_too_deep_is_refused(tmp_path: Path) -> None:
    written(tmp_path, {})
    (tmp_path / "config.json").write_text("[" * 100_000)

    with pytest.raises(UnreadableError, match="recursion"):
        read(tmp_path)


@pytest.mark.attack(boundary="drafts", attack="weights that are a link to a device", outcome="not read")
def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    written(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")

    with pytest.raises(UnreadableError, match="is no file"):
        read(tmp_path)
