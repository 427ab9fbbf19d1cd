"""Values come back as they were, of any nesting, dtype and layout; whatever is damaged is noticed."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.disk import file_size_limit

from updraft_chassis.errors import Corrupt
from updraft_trainer.states import saved_values
from updraft_trainer.states.saved_values import VALUES

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tensors = st.builds(
    lambda dtype, shape: (torch.arange(torch.Size(shape).numel()).reshape(shape) % 251).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
)
keys = st.integers(0, 9) | st.text(alphabet="abc.$", max_size=3)
nested = st.recursive(
    plain | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.lists(inner).map(tuple),
    max_leaves=12,
)


def shown(value: object) -> object:
    """Comparable: tensors with their dtype and shape."""
    match value:
        case torch.Tensor():
            return ("tensor", value.dtype, value.shape, value.tolist())
        case dict():
            return {key: shown(one) for key, one in value.items()}
        case list() | tuple():
            return type(value)(shown(one) for one in value)
        case _:
            return value


@settings(max_examples=60, deadline=None)
@given(value=nested)
def test_any_nested_value_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    folder = tmp_path_factory.mktemp("values")
    whole = {"first": torch.zeros(2), "value": value}
    digest = saved_values.write(folder, whole)
    saved_values.check(folder, digest)
    assert shown(saved_values.read(folder, digest)) == shown(whole)


def test_tensors_are_written_in_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_values, "FILE_BYTES", 1000)
    value = {f"w{n}": torch.full((size,), float(n)) for n, size in enumerate((100, 100, 500, 10, 240, 1))}
    digest = saved_values.write(tmp_path, value)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4, "400 + 400, 2000 alone, 40 + 960, 4"
    assert shown(saved_values.read(tmp_path, digest)) == shown(value)


def test_a_view_of_a_larger_tensor_takes_only_its_own_bytes(tmp_path: Path) -> None:
    base = torch.arange(100_000.0).reshape(1000, 100)
    value = {"row": base[3], "column": base[:, 7], "turned": base[:5].T}
    digest = saved_values.write(tmp_path, value)
    assert shown(saved_values.read(tmp_path, digest)) == shown(value)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000


def test_a_copy_shares_no_memory() -> None:
    first, second = torch.zeros(3), torch.ones(2)
    copy = saved_values.copied({"a": [first, (second, 4)]})
    first.fill_(5)
    second.fill_(5)
    assert shown(copy) == shown({"a": [torch.zeros(3), (torch.ones(2), 4)]})


def test_two_tensors_that_would_have_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors have the path a/b"):
        saved_values.write(tmp_path, {"a": {"b": torch.zeros(1)}, "a/b": torch.zeros(1)})


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    with file_size_limit(1000), pytest.raises(OSError, match="File too large"):
        saved_values.write(tmp_path, {"a": torch.zeros(1000)})


def test_no_file_is_run_when_it_is_read(tmp_path: Path) -> None:
    saved_values.write(tmp_path, {"a": torch.zeros(3)})
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[", b"\xff"])
def test_values_that_were_replaced_are_noticed(tmp_path: Path, content: bytes) -> None:
    digest = saved_values.write(tmp_path, {"a": torch.zeros(3)})
    (tmp_path / VALUES).write_bytes(content)
    for read in (saved_values.read, saved_values.read_plain, saved_values.check):
        with pytest.raises(Corrupt, match="does not match its digest"):
            read(tmp_path, digest)


def test_tensors_that_vanish_between_check_and_read_are_noticed(tmp_path: Path) -> None:
    digest = saved_values.write(tmp_path, {"a": torch.zeros(3)})
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert saved_values.read_plain(tmp_path, digest) == {"a": None}
    with pytest.raises(Corrupt, match="cannot be read"):
        saved_values.read(tmp_path, digest)
