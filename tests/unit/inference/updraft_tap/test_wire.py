import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from updraft_tap import wire

dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64])


def framed(header: dict[str, object], tensors: dict[str, torch.Tensor]) -> tuple[bytes, bytes]:
    data = b"".join(bytes(piece) for piece in wire.encode(header, tensors))
    head, body = wire.lengths(data[: wire.PREFIX_SIZE])
    assert len(data) == wire.PREFIX_SIZE + head + body
    return data[wire.PREFIX_SIZE :][:head], data[wire.PREFIX_SIZE + head :]


@given(each=st.lists(st.tuples(dtypes, st.integers(0, 3), st.integers(1, 4)), max_size=4))
def test_what_is_sent_arrives(each: list[tuple[torch.dtype, int, int]]) -> None:
    tensors = {f"t{i}": torch.randint(99, (rows, width)).to(dtype) for i, (dtype, rows, width) in enumerate(each)}

    header, decoded = wire.decode(*framed({"kind": "steps", "number": 3}, tensors))

    assert (header["kind"], header["number"]) == ("steps", 3)
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (decoded[name].dtype, decoded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(decoded[name], tensor)


def test_a_slice_of_a_larger_tensor_is_sent_alone() -> None:
    _, decoded = wire.decode(*framed({}, {"aux": torch.arange(12.0).view(3, 4)[1:, :2]}))

    assert decoded["aux"].tolist() == [[4, 5], [8, 9]]


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"tensors": [["aux", "f99", [1]]]},
        {"tensors": [["aux", "f32", [3]]]},
        {"tensors": [["aux", "f32", [-1]]]},
        {"tensors": [["aux", "f32"]]},
    ],
)
def test_a_header_that_does_not_fit_its_tensors_is_refused(header: object) -> None:
    with pytest.raises(wire.FrameError):
        wire.decode(json.dumps(header).encode(), bytes(8))


@pytest.mark.attack(
    boundary="plugin",
    attack="a message between plugin and agent that claims a terabyte",
    outcome="it is refused before memory is allocated",
)
def test_an_absurd_length_is_refused() -> None:
    with pytest.raises(wire.FrameError):
        wire.lengths(struct.pack("<IQ", 10, 1 << 40))
