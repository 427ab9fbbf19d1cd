"""What a weights file may be: exactly its manifest's tensors, and finite."""

import json
import struct
from pathlib import Path

import pytest
from tests.support.checkpoints import BF16_NAN, Checkpoint, checkpoint, draft, safetensors, sha256

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry.storage import checkpoint as checks


def verify(tmp_path: Path, data: bytes, manifest: registry_pb2.Manifest) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    checks.verify(path, manifest)


def refusal(tmp_path: Path, data: bytes, manifest: registry_pb2.Manifest) -> str:
    with pytest.raises(InvalidInput) as refused:
        verify(tmp_path, data, manifest)
    return str(refused.value)


def one(dtype: str, data: bytes, *, shape: tuple[int, ...] | None = None) -> Checkpoint:
    width = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8}.get(dtype, 1)
    return checkpoint({"w": (dtype, shape if shape is not None else (len(data) // width,), data)})


def test_a_draft_that_is_what_its_manifest_says_is_sound(tmp_path: Path) -> None:
    verify(tmp_path, draft().data, draft().manifest())


def test_the_order_of_tensors_in_the_file_does_not_matter(tmp_path: Path) -> None:
    sound = draft()
    manifest = sound.manifest(tensors=tuple(reversed(sound.tensors)))
    verify(tmp_path, sound.data, manifest)


def test_an_empty_tensor_and_a_scalar_are_sound(tmp_path: Path) -> None:
    both = checkpoint({"empty": ("F32", (0, 4), b""), "scalar": ("F32", (), struct.pack("<f", 1.0))})
    verify(tmp_path, both.data, both.manifest())


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        pytest.param("BF16", BF16_NAN, id="bf16 nan"),
        pytest.param("BF16", b"\x80\xff", id="bf16 minus infinity"),
        pytest.param("F16", struct.pack("<e", float("inf")), id="f16 infinity"),
        pytest.param("F32", struct.pack("<f", float("nan")), id="f32 nan"),
        pytest.param("F64", struct.pack("<d", float("-inf")), id="f64 minus infinity"),
        pytest.param("F8_E4M3", b"\xff", id="fp8 nan"),
        pytest.param("F8_E5M2", b"\x7c", id="fp8 infinity"),
    ],
)
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(tmp_path: Path, dtype: str, data: bytes) -> None:
    bad = one(dtype, data + bytes(len(data) * 7))
    assert refusal(tmp_path, bad.data, bad.manifest()) == "tensor w holds 1 values that are not finite"


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        pytest.param("BF16", b"\x7f\x7f", id="largest bf16"),
        pytest.param("F8_E4M3", b"\x7e", id="largest fp8"),
        pytest.param("I64", struct.pack("<q", -1), id="all bits of an integer"),
        pytest.param("BOOL", b"\x01", id="bool"),
    ],
)
def test_large_values_and_other_types_are_finite(tmp_path: Path, dtype: str, data: bytes) -> None:
    sound = one(dtype, data)
    verify(tmp_path, sound.data, sound.manifest())


def test_a_bad_value_beyond_the_first_block_is_found(tmp_path: Path) -> None:
    bad = one("BF16", bytes(9 * 1024 * 1024) + BF16_NAN)
    assert "1 values" in refusal(tmp_path, bad.data, bad.manifest())


def test_a_manifest_with_other_tensors_is_refused_with_their_names(tmp_path: Path) -> None:
    sound = draft()
    manifest = sound.manifest()
    manifest.tensors[0].name = "lm_head.weight"
    reason = refusal(tmp_path, sound.data, manifest)
    assert "lacks the tensors ['lm_head.weight']" in reason
    assert "has ['d2t'] in addition" in reason


def test_a_manifest_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    sound = draft()
    manifest = sound.manifest(tensors=(*sound.tensors, sound.tensors[0]))
    assert refusal(tmp_path, sound.data, manifest) == "the manifest names a tensor twice"


def test_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    sound = draft()
    manifest = sound.manifest()
    manifest.tensors[1].shape[:] = [4, 64]
    reason = refusal(tmp_path, sound.data, manifest)
    assert reason == "tensor fc.weight is BF16 [8, 32] in the file, but BF16 [4, 64] in the manifest"


def test_another_digest_of_a_tensor_is_refused_with_both(tmp_path: Path) -> None:
    sound = draft()
    manifest = sound.manifest()
    manifest.tensors[1].digest = sha256(b"")
    reason = refusal(tmp_path, sound.data, manifest)
    assert reason == f"tensor fc.weight is {sound.tensors[1].digest}, but the manifest states {sha256(b'')}"


def test_another_digest_over_the_tensors_is_refused(tmp_path: Path) -> None:
    reason = refusal(tmp_path, draft().data, draft().manifest(tensors_digest=sha256(b"")))
    assert f"but the manifest states {sha256(b'')}" in reason


ENTRY = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}


@pytest.mark.attack(
    boundary="registry",
    attack="weights that are no sound safetensors",
    outcome="refused, and never unpickled",
)
@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"", "a file of 0 bytes", id="empty"),
        pytest.param(b"PK\x03\x04 zip", "no safetensors file", id="zip"),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", "a header of 9223372036854775808 bytes", id="huge header"),
        pytest.param(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", "is not JSON", id="no text"),
        pytest.param(struct.pack("<Q", 60_000) + b"[" * 60_000, "is not JSON", id="deep nesting"),
        pytest.param(struct.pack("<Q", 2) + b"[]", "not a JSON object", id="array"),
        pytest.param(struct.pack("<Q", 17) + b'{"a":{}, "a": {}}', "a name occurs twice", id="name twice"),
        pytest.param(safetensors({"w": 3}, b""), "describes tensor 'w' as 3", id="no object"),
        pytest.param(safetensors({"w": ENTRY | {"dtype": "F9"}}, bytes(8)), "describes tensor 'w'", id="dtype"),
        pytest.param(safetensors({"w": ENTRY | {"shape": [5]}}, bytes(8)), "describes tensor 'w'", id="size"),
        pytest.param(safetensors({"w": ENTRY | {"shape": [-4]}}, bytes(8)), "describes tensor 'w'", id="negative"),
        pytest.param(safetensors({"w": ENTRY | {"shape": [True]}}, b"\0\0"), "describes tensor 'w'", id="bool"),
        pytest.param(
            safetensors({"w": ENTRY | {"data_offsets": [8, 16]}}, bytes(16)), "starts at byte 8, expected 0", id="gap"
        ),
        pytest.param(safetensors({"v": ENTRY, "w": ENTRY}, bytes(16)), "expected 8", id="overlap"),
        pytest.param(safetensors({"w": ENTRY}, bytes(9)), "its header describes", id="trailing bytes"),
        pytest.param(safetensors({"w": ENTRY}, bytes(7)), "its header describes", id="short"),
    ],
)
def test_a_file_that_is_no_sound_safetensors_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    assert why in refusal(tmp_path, data, draft().manifest())


def test_metadata_of_the_file_is_no_tensor(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt", "note": "x"}, "w": ENTRY}
    weights = one("BF16", bytes(8))
    verify(tmp_path, safetensors(json.loads(json.dumps(header)), bytes(8)), weights.manifest())
