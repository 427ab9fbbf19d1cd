import hashlib
from pathlib import Path

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts.digests import file_digest, tensors_digest, vocabulary_fingerprint


def spec(name: str, dtype: str, shape: tuple[int, ...], content: bytes) -> pb.TensorSpec:
    digest = hashlib.sha256(content).hexdigest()
    return pb.TensorSpec(name=name, dtype=dtype, shape=shape, digest=f"sha256:{digest}")


def test_the_digest_of_tensors_is_the_same_for_ever_in_whatever_order_they_come() -> None:
    specs = [spec("norm.weight", "F32", (8,), b"norm"), spec("d2t", "I64", (), b""), spec("fc", "BF16", (2, 3), b"fc")]
    # printf 'd2t\0I64\0\0%s\nfc\0BF16\0002,3\0%s\nnorm.weight\0F32\0008\0%s\n' <sha256 of each> | sha256sum
    expected = "sha256:1a0c65db0c41e7ee8471830b3e3ad3289f0e3c17fb78dd0dd14ce908f0369941"
    assert tensors_digest(specs) == tensors_digest(reversed(specs)) == expected


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    assert file_digest(tmp_path / "weights") == (
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_the_fingerprint_of_a_vocabulary_is_that_of_its_int64s() -> None:
    tokens = b"".join(token.to_bytes(8, "little") for token in (0, 3, 70_000))
    assert vocabulary_fingerprint([0, 3, 70_000]) == f"sha256:{hashlib.sha256(tokens).hexdigest()}"
