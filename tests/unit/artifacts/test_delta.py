"""A delta leads from one file to the other, exactly, or nowhere."""

import hashlib
import io
import random
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.checkpoints import checkpoint, draft

from updraft_artifacts import delta
from updraft_artifacts.delta import Header
from updraft_artifacts.in_order import num_cores
from updraft_chassis.errors import Corrupt


def encoded(base: bytes, result: bytes) -> tuple[bytes, Header]:
    out = io.BytesIO()
    header = delta.encode(io.BytesIO(base), io.BytesIO(result), out)
    return out.getvalue(), header


def decoded(data: bytes, base: bytes, expected: Header) -> bytes:
    result = io.BytesIO()
    delta.decode(io.BytesIO(data), io.BytesIO(base), result, expected)
    return result.getvalue()


def trained(seed: int, *, step: float = 0.0, shape: tuple[int, int] = (64, 512)) -> bytes:
    """Weights as training leaves them: bf16, normal; with `step`, moved by that share of their spread."""
    rng = np.random.default_rng(0)
    weights = rng.normal(scale=0.02, size=shape).astype(np.float32)
    weights += np.random.default_rng(seed).normal(scale=0.02 * step, size=shape).astype(np.float32)
    return checkpoint({"w": ("BF16", shape, _bf16(weights)), "frozen": ("BF16", shape, _bf16(weights[::-1]))}).data


def _bf16(weights: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bytes:
    return (np.ascontiguousarray(weights).view(np.uint32) >> 16).astype(np.uint16).tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> bytes:
    """A safetensors file of a few tensors, out of few names, so that two files share some; any bits, also NaN."""
    content = {}
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4)):
        dtype, width = draw(st.sampled_from([("BF16", 2), ("F16", 2), ("F32", 4), ("I64", 8), ("BOOL", 1)]))
        data = draw(st.binary(max_size=64))
        data = data[: len(data) // width * width]
        content[name] = (dtype, (len(data) // width,), data)
    return checkpoint(content).data


@settings(deadline=None)
@given(base=st.binary(max_size=300) | tensors(), result=st.binary(max_size=300) | tensors())
def test_what_was_encoded_comes_back_whatever_it_is(base: bytes, result: bytes) -> None:
    data, header = encoded(base, result)
    assert decoded(data, base, header) == result
    assert header.result_digest == f"sha256:{hashlib.sha256(result).hexdigest()}"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_kind_of_word_comes_back_over_several_blocks(dtype: str) -> None:
    width = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    rng = random.Random(dtype)
    num_words = (2 * delta.BLOCK_BYTES + 4096) // width
    base, result = (checkpoint({"w": (dtype, (num_words,), rng.randbytes(num_words * width))}).data for _ in range(2))
    data, header = encoded(base, result)
    assert decoded(data, base, header) == result


def test_small_steps_cost_a_fraction_and_frozen_tensors_nothing() -> None:
    base, result = trained(1), trained(1, step=0.01)
    data, header = encoded(base, result)
    assert decoded(data, base, header) == result
    assert len(data) < 0.6 * len(result)
    assert len(data) < 0.8 * len(zstandard.compress(result, 19))


def test_no_step_costs_nothing() -> None:
    data, _ = encoded(trained(1), trained(1))
    assert len(data) < 400


def test_a_delta_is_the_same_whenever_it_is_made() -> None:
    assert encoded(trained(1), trained(2, step=0.1)) == encoded(trained(1), trained(2, step=0.1))


def test_memory_is_a_few_blocks_per_thread_whatever_the_size(tmp_path: Path) -> None:
    old, new, packed, result = (tmp_path / name for name in ("old", "new", "packed", "result"))
    shape = (24 * delta.MAX_WORKERS * delta.BLOCK_BYTES // 2,)
    for path, seed in ((old, 1), (new, 2)):
        path.write_bytes(checkpoint({"w": ("BF16", shape, random.Random(seed).randbytes(2 * shape[0]))}).data)
    tracemalloc.start()
    with old.open("rb") as base, new.open("rb") as file, packed.open("wb") as out:
        header = delta.encode(base, file, out)
    with old.open("rb") as base, packed.open("rb") as file, result.open("wb") as out:
        delta.decode(file, base, out, header)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * delta.BLOCK_BYTES * min(delta.MAX_WORKERS, num_cores())
    assert result.read_bytes() == new.read_bytes()


BASE, RESULT = draft(1).data, draft(2).data
DATA, HEADER = encoded(BASE, RESULT)


@pytest.mark.attack(
    boundary="drafts",
    attack="a delta with any bit flipped",
    outcome="refused, or the result is the right one",
)
@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_corrupt_or_harmless(position: int, bit: int) -> None:
    damaged = bytearray(DATA)
    damaged[position] ^= 1 << bit
    with suppress(Corrupt):
        assert decoded(bytes(damaged), BASE, HEADER) == RESULT


@settings(deadline=None)
@given(st.integers(0, len(DATA) - 1))
def test_a_delta_that_is_cut_off_is_corrupt(length: int) -> None:
    with pytest.raises(Corrupt):
        decoded(DATA[:length], BASE, HEADER)


def test_a_delta_that_goes_on_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="data after its last block"):
        decoded(DATA + b"more", BASE, HEADER)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_anything_after_a_sound_header_is_corrupt(blocks: bytes) -> None:
    with pytest.raises(Corrupt):
        decoded(DATA[:88] + blocks, BASE, HEADER)


def test_another_base_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="produces sha256"):
        decoded(DATA, draft(3).data, HEADER)


def test_a_delta_of_other_files_is_corrupt_before_anything_is_written() -> None:
    other, _ = encoded(BASE, draft(3).data)
    result = io.BytesIO()
    with pytest.raises(Corrupt, match="expected"):
        delta.decode(io.BytesIO(other), io.BytesIO(BASE), result, HEADER)
    assert result.getvalue() == b""


ZEROS = zstandard.compress(bytes(64 * delta.BLOCK_BYTES))


@pytest.mark.attack(
    boundary="drafts",
    attack="a zstd bomb in a delta, or a block that claims gigabytes",
    outcome="refused without the memory",
)
@pytest.mark.parametrize(
    ("width", "length", "base_begin", "payload"),
    [
        pytest.param(0, delta.BLOCK_BYTES, 0, ZEROS, id="unpacks to more than it says"),
        pytest.param(0, 2**32 - 1, 0, ZEROS, id="a block of 4 GiB"),
        pytest.param(0, 1024, 0, b"", id="nothing of its own"),
        pytest.param(3, 1024, 0, b"", id="words of 3 bytes"),
        pytest.param(2, 1023, 0, b"", id="half a word"),
        pytest.param(2, 1024, 2**64 - 1, b"", id="a base beyond its end"),
        pytest.param(2, 1024, 0, zstandard.compress(bytes(1000)), id="unpacks to less than it says"),
    ],
)
def test_a_block_that_claims_too_much_is_corrupt_and_takes_no_memory(
    width: int, length: int, base_begin: int, payload: bytes
) -> None:
    block = struct.pack("<BxxxIQI", width, length, base_begin, len(payload)) + payload
    nothing = "sha256:" + "0" * 64
    header = Header(base_bytes=len(BASE), result_bytes=2**40, base_digest=nothing, result_digest=nothing)
    data = io.BytesIO()
    header.write(data)
    tracemalloc.start()
    with pytest.raises(Corrupt):
        decoded(data.getvalue() + block, BASE, header)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * delta.BLOCK_BYTES
