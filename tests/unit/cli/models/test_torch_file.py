"""Files of torch.save hold tensors only, or are refused, and nothing in them is ever run."""

import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from updraft_chassis.errors import InvalidInput
from updraft_cli.models import torch_file

RUN: list[str] = []


class Hostile:
    """Unpickling it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return RUN.append, ("was run",)


def saved(content: Any, folder: Path, **how: Any) -> Path:
    torch.save(content, folder / "pytorch_model.bin", **how)
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("wrapped", [dict, torch.nn.ParameterDict])
def test_every_tensor_is_found_where_its_bytes_are(tmp_path: Path, protocol: int, wrapped: Any) -> None:
    tensors = {
        "fc.weight": torch.randn(3, 5).bfloat16(),
        "norm.weight": torch.randn(4).half(),
        "rows": torch.randn(6, 2)[2:5],
        "d2t": torch.arange(9),
        "t2d": torch.tensor([True, False, True]),
        "one": torch.tensor(2.5),
    }
    content = tensors if wrapped is dict else torch.nn.Linear(2, 3).state_dict()
    path = saved(content, tmp_path, pickle_protocol=protocol)
    data, found = path.read_bytes(), torch_file.read(path)

    assert [span.name for span in found] == list(content)
    for span in found:
        tensor = content[span.name]
        assert span.shape == tuple(tensor.shape)
        assert data[span.begin : span.end] == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.attack(boundary="models", attack="a pickle that runs code", outcome="refused; nothing is run")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": Hostile()}, r"it calls .*append|instruction|attribute"),
        ({"a": torch.ones(3, 4).t()}, r"a tensor of shape \[4, 3\] is not contiguous"),
        ({"a": "text"}, "'a' is a str"),
        ({"a": {"b": torch.ones(1)}}, "'a' is a dict"),
        ({"a": [torch.ones(1)]}, "the instruction EMPTY_LIST"),
        ({3: torch.ones(1)}, "keys are not names"),
        (torch.ones(2), "a dictionary of tensors is expected"),
        (torch.nn.Linear(2, 2), "the instruction NEWOBJ"),
        ({"a": torch.ones(2).to_sparse()}, r"it calls torch\."),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "not a storage of BF16"),
    ],
)
def test_a_pickle_that_is_more_than_tensors_is_refused_and_not_run(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(InvalidInput, match=rf"pytorch_model.bin holds more than tensors: .*{reason}"):
        torch_file.read(saved(content, tmp_path))
    assert RUN == []


def test_a_file_of_before_the_archives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"is not a file of torch\.save from torch 1\.6 or later"):
        torch_file.read(saved({"a": torch.ones(1)}, tmp_path, _use_new_zipfile_serialization=False))


def rewritten(path: Path, **members: bytes) -> Path:
    """With other content of these members."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, members.get(name.partition("/")[2].replace(".", "_").replace("/", "_"), data))
    return path


def test_storages_and_byte_orders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(100)}, tmp_path)
    with pytest.raises(InvalidInput, match="its storage 0 has 8 bytes"):
        torch_file.read(rewritten(path, data_0=bytes(8)))
    with pytest.raises(InvalidInput, match="not little-endian"):
        torch_file.read(rewritten(path, byteorder=b"big"))


@pytest.mark.attack(
    boundary="models",
    attack="a pickle with any byte changed",
    outcome="refused, or other tensors within the file",
)
@given(at=st.integers(0, 600), value=st.integers(0, 255))
def test_any_damage_of_a_pickle_is_a_refusal_or_other_tensors(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = saved({"a": torch.ones(4), "b": torch.zeros(2, 3)}, tmp_path_factory.mktemp("damaged"))
    with zipfile.ZipFile(path) as archive:
        pickle = bytearray(archive.read("pytorch_model/data.pkl"))
    pickle[at % len(pickle)] = value
    size = path.stat().st_size

    try:
        found = torch_file.read(rewritten(path, data_pkl=bytes(pickle)))
    except InvalidInput:
        return
    assert all(0 <= span.begin <= span.end <= size for span in found)


@pytest.mark.attack(boundary="models", attack="an archive whose members reach beyond its end", outcome="refused")
def test_a_cut_off_file_and_a_member_beyond_its_end_are_refused(tmp_path: Path) -> None:
    path = saved({"a": torch.ones(100)}, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match=r"is not a file of torch\.save"):
        torch_file.read(path)
    directory = whole.rindex(b"PK\1\2")
    wrong = bytearray(whole)
    wrong[directory + 20 : directory + 28] = struct.pack("<II", 1 << 30, 1 << 30)  # sizes of the last member
    path.write_bytes(wrong)
    with pytest.raises(InvalidInput):
        torch_file.read(path)


def directory_entry(data: bytes, name: bytes) -> int:
    """Where the archive's directory describes a member."""
    return data.rindex(b"PK\1\2", 0, data.rindex(name))


@pytest.mark.attack(boundary="models", attack="a zip bomb", outcome="refused before it is unpacked")
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_member_is_refused_before_it_is_unpacked(tmp_path: Path, compression: int) -> None:
    path = saved({"a": torch.ones(1)}, tmp_path)
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            is_bomb = name.endswith("byteorder")
            archive.writestr(
                name, bytes(64 * 2**20) if is_bomb else data, compression if is_bomb else zipfile.ZIP_STORED
            )
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=r"is not a file of torch\.save"):
            torch_file.read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(6, 99, id="needs a later version of zip"),
        pytest.param(8, 1, id="is encrypted"),
        pytest.param(8, 0x20, id="is a patch"),
        pytest.param(10, 8, id="says that it is deflated"),
        pytest.param(10, 77, id="an unknown compression"),
    ],
)
@pytest.mark.parametrize("member", [b"data.pkl", b"byteorder", b"data/0"])
def test_an_archive_that_is_not_plain_is_refused_in_a_sentence(
    tmp_path: Path, member: bytes, offset: int, value: int
) -> None:
    path = saved({"a": torch.ones(100)}, tmp_path)
    data = bytearray(path.read_bytes())
    data[directory_entry(bytes(data), member) + offset] = value
    path.write_bytes(data)
    with pytest.raises(InvalidInput):
        torch_file.read(path)


@given(at=st.integers(0, 2_000), value=st.integers(0, 255))
def test_any_damage_of_an_archive_is_a_refusal_or_other_tensors(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = saved({"a": torch.ones(4)}, tmp_path_factory.mktemp("damaged"))
    data = bytearray(path.read_bytes())
    data[-1 - at % len(data)] = value
    path.write_bytes(data)
    try:
        found = torch_file.read(path)
    except InvalidInput:
        return
    assert all(0 <= span.begin <= span.end <= len(data) for span in found)
