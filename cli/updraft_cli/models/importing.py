"""Publishes an EAGLE-3 checkpoint folder as a version, without torch: the manifest is computed from the file's bytes.

The target of the draft is never guessed. It comes from a manifest in the folder, from a model that is named, or from earlier
versions. If several of these name it, they must agree.
"""

import asyncio
import hashlib
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import model_folder, safetensors_header, transfer
from updraft_artifacts.digests import tensors_digest, vocabulary_fingerprint
from updraft_artifacts.safetensors_header import TensorSpan
from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_cli.backends import registry_client as registry
from updraft_cli.backends.drafts import Draft
from updraft_cli.backends.wire import draft
from updraft_cli.models import bfloat16, published

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

_BLOCK_BYTES = 4 * 1024 * 1024
_VOCABULARY = "d2t"
_INTEGERS = {"I64": ("q", 8), "I32": ("i", 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    speculator: str
    existed: bool
    """The registry has these weights already, as this version."""
    message: str
    """Condition that the rollout waits for."""
    draft: Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One source's claim about the target of a draft; unknown fields are empty."""

    where: str
    target: str = ""
    tokenizer: str = ""


async def publish(
    stub: "RegistryAsyncStub", speculator: str, folder: Path, model: Path | None, *, origin: str
) -> Imported:
    """Publish a folder for the target in `model`, or (None) the one that its manifest or the registry knows.

    `origin` is where the folder came from. A draft in another layout is converted first. InvalidInput for a folder that is not
    a draft, or whose target is unknown or different; Corrupt if its manifest is of other weights.
    """
    state, newest = await registry.newest(stub, speculator)
    known = Claim(
        where=f"the versions of {speculator}",
        target=state.target_fingerprint,
        tokenizer=newest.manifest.tokenizer_fingerprint if newest else "",
    )
    claims = [known] if model is None else [await asyncio.to_thread(claim_of_model, model), known]
    with tempfile.TemporaryDirectory(prefix="updraft-") as scratch:
        folder = await asyncio.to_thread(published.ours, folder, model, Path(scratch))
        manifest = await asyncio.to_thread(read, folder, speculator, claims)
        manifest.provenance.origin = manifest.provenance.origin or origin
        answer = await transfer.upload(stub, manifest, folder / transfer.WEIGHTS)
    state, _ = await registry.newest(stub, speculator)
    return Imported(speculator=speculator, existed=answer.existed, message=state.message, draft=draft(answer.version))


def claim_of_model(folder: Path) -> Claim:
    return Claim(
        where=f"the model in {folder}",
        target=model_folder.target_fingerprint(folder),
        tokenizer=model_folder.tokenizer_fingerprint(folder),
    )


def read(folder: Path, speculator: str, claims: Iterable[Claim] = ()) -> pb.Manifest:
    """Return the manifest of a folder's weights; `claims` name their target, in addition to the folder's own manifest.

    Parent and evaluation of the manifest are dropped: their version numbers are those of another registry.
    """
    with _opened(folder) as file:
        tensors = safetensors_header.read(file)
        vocabulary = _vocabulary(folder, file, tensors)
        digest, specs = _digests(file, tensors)
        size_bytes = file.tell()
    kept = _kept(folder, digest)
    all_claims = (_claim_of_manifest(folder, kept), *claims)
    return pb.Manifest(
        speculator=speculator,
        digest=digest,
        size_bytes=size_bytes,
        tensors=specs,
        tensors_digest=tensors_digest(specs),
        config_json=_config(folder),
        target_fingerprint=_target(folder, speculator, all_claims),
        tokenizer_fingerprint=_agreed("tokenizer", {claim.where: claim.tokenizer for claim in all_claims}),
        draft_vocabulary_fingerprint=vocabulary,
        source=pb.SOURCE_IMPORTED,
        provenance=_provenance(kept),
    )


def _opened(folder: Path) -> BinaryIO:
    path = folder / transfer.WEIGHTS
    try:
        return path.open("rb")
    except FileNotFoundError:
        others = sorted(file.name for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")))
        holds = f"it holds {', '.join(others[:3])}" if others else "it holds no weights"
        raise InvalidInput(f"{folder} has no {transfer.WEIGHTS}, which holds a draft's weights; {holds}") from None
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error


def _config(folder: Path) -> str:
    """Return the text itself, because a manifest keeps it byte by byte."""
    model_folder.read_json(folder / transfer.CONFIG)
    return (folder / transfer.CONFIG).read_text()


def _digests(file: BinaryIO, tensors: list[TensorSpan]) -> tuple[str, list[pb.TensorSpec]]:
    """Hash the file and each of its tensors in one pass, and check their values; tensors follow each other up to its end."""
    file.seek(0)
    whole = hashlib.sha256(file.read(tensors[0].begin if tensors else -1))
    specs = []
    for tensor in tensors:
        part = hashlib.sha256()
        left = tensor.end - tensor.begin
        while left:
            block = file.read(min(left, _BLOCK_BYTES))
            if not block:
                raise InvalidInput("the file became shorter during the import")
            whole.update(block)
            part.update(block)
            left -= len(block)
            if tensor.dtype == "BF16" and not bfloat16.are_finite(np.frombuffer(block, "<u2")):
                raise InvalidInput(f"{tensor.name} of the draft holds values that are not finite")
        digest = f"sha256:{part.hexdigest()}"
        specs.append(pb.TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, digest=digest))
    return f"sha256:{whole.hexdigest()}", specs


def _vocabulary(folder: Path, file: BinaryIO, tensors: list[TensorSpan]) -> str:
    """Return the fingerprint of the target tokens that the draft proposes: d2t holds each one's distance from its own index."""
    place = next((tensor for tensor in tensors if tensor.name == _VOCABULARY), None)
    if place is None or place.dtype not in _INTEGERS or len(place.shape) != 1:
        state = "has no such tensor" if place is None else f"has it as {place.dtype} {list(place.shape)}"
        raise InvalidInput(
            f"{folder} is not an EAGLE-3 draft: it lacks its vocabulary, the integer tensor {_VOCABULARY} (the file {state})"
        )
    letter, num_bytes = _INTEGERS[place.dtype]
    file.seek(place.begin)
    count = (place.end - place.begin) // num_bytes
    offsets = struct.unpack(f"<{count}{letter}", file.read(place.end - place.begin))
    return vocabulary_fingerprint([index + offset for index, offset in enumerate(offsets)])


def _kept(folder: Path, digest: str) -> pb.Manifest:
    """Return the folder's own manifest, e.g. from `updraft draft pull`, or an empty one."""
    path = folder / transfer.MANIFEST
    if not path.exists():
        return pb.Manifest()
    try:
        kept = json_format.Parse(path.read_text(), pb.Manifest(), ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not a manifest of a draft: {' '.join(str(error).split())}") from None
    if kept.digest != digest:
        raise Corrupt(f"{path} belongs to other weights: it has {kept.digest or 'no digest'}, and the file {digest}")
    return kept


def _claim_of_manifest(folder: Path, kept: pb.Manifest) -> Claim:
    return Claim(
        where=f"{folder / transfer.MANIFEST}",
        target=kept.target_fingerprint,
        tokenizer=kept.tokenizer_fingerprint,
    )


def _target(folder: Path, speculator: str, claims: Iterable[Claim]) -> str:
    target = _agreed("target", {claim.where: claim.target for claim in claims})
    if not target:
        raise InvalidInput(
            f"the target model of {folder} is unknown: it has no {transfer.MANIFEST}, and {speculator} has no"
            " version yet; name the model's folder with --target"
        )
    return target


def _agreed(kind: str, claims: dict[str, str]) -> str:
    """Return the value that all claims agree on; empty if there is none."""
    named = {where: value for where, value in claims.items() if value}
    if len(set(named.values())) > 1:
        texts = ", ".join(f"{where} has {value[:19]}..." for where, value in named.items())
        raise InvalidInput(f"this draft is for another {kind}: {texts}")
    return next(iter(named.values()), "")


def _provenance(kept: pb.Manifest) -> pb.Provenance:
    if kept.HasField("provenance"):
        return kept.provenance
    return pb.Provenance(code_version=f"import by updraft/{installed_version('updraft')}")
