"""Weights over the wire: chunks up, chunks down, and nothing believed before its digest matches.

A download grows a `.part` folder, resumes where it stopped, and gets its final name only whole and verified: what
has that name can be served with the registry down. Neither deltas nor redirects are asked for.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.errors import Conflict, Corrupt, Exhausted, InvalidInput, NotFound, Unavailable

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "manifest.json"

_CALL_TIMEOUT_S = 10.0

# A transfer slower than this ends (and a download resumes): a stuck one must not last for hours.
_MIN_BYTES_PER_S = 256 * 1024


async def upload(stub: "RegistryAsyncStub", manifest: pb.Manifest, path: Path) -> pb.PublishResponse:
    """Publish the weights file `path` under `manifest` (whose size and digest must be the file's).

    NotFound without the file, InvalidInput when it has another size, and whatever the registry answers.
    """
    size_bytes = _size(path)
    if size_bytes != manifest.size_bytes:
        raise InvalidInput(f"{path} has {size_bytes} bytes, its manifest says {manifest.size_bytes}")
    with rpc.errors():
        # Written by hand: what goes wrong in a request iterator is swallowed by grpc.aio.
        call = stub.Publish(timeout=_deadline_s(size_bytes))
        await call.write(pb.PublishRequest(manifest=manifest))
        with path.open("rb") as file:
            while data := await asyncio.to_thread(file.read, rpc.CHUNK_BYTES):
                chunk = pb.Chunk(offset=file.tell() - len(data), data=data)
                await call.write(pb.PublishRequest(chunk=chunk))
        await call.done_writing()
        return await call


async def download(
    stub: "RegistryAsyncStub", speculator: str, version: int, folder: Path, *, digest: str | None = None
) -> Path:
    """Return `folder/<version>`, holding the weights, config.json and manifest.json, all verified.

    With `digest` (of the weights file), a complete folder is returned without a call, and a registry that knows the
    version by another digest is a Conflict. Unavailable leaves what arrived for the next attempt to resume; Corrupt
    throws it away; Exhausted when the disk is full.
    """
    final = folder / str(version)
    if digest is not None and await asyncio.to_thread(is_complete, final, digest):
        return final
    with rpc.errors():
        answer = await stub.Get(pb.GetRequest(speculator=speculator, version=version), timeout=_CALL_TIMEOUT_S)
    manifest = answer.version.manifest
    if digest is not None and manifest.digest != digest:
        raise Conflict(f"the registry has {manifest.digest} as version {version}, expected {digest}")
    if await asyncio.to_thread(is_complete, final, manifest.digest):
        return final
    part = folder / f"{version}-{manifest.digest.removeprefix('sha256:')[:12]}.part"
    with _disk_errors(part), _exclusive(part / WEIGHTS) as file:
        await _fetch(stub, pb.FetchRequest(speculator=speculator, version=version), manifest, file)
        await asyncio.to_thread(_finish, file, part, final, manifest)
    return final


def is_complete(folder: Path, digest: str) -> bool:
    """Whether `folder` holds a version whose weights file hashes to `digest`; reads the whole file."""
    has_all = all((folder / name).is_file() for name in (WEIGHTS, CONFIG, MANIFEST))
    return has_all and sha256(folder / WEIGHTS) == digest


def sha256(path: Path) -> str:
    """Return "sha256:<hex>" of a file."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


async def _fetch(stub: "RegistryAsyncStub", request: pb.FetchRequest, manifest: pb.Manifest, file: BinaryIO) -> None:
    """Append to `file` what it lacks of the manifest's size."""
    missing_bytes = manifest.size_bytes - file.tell()
    if missing_bytes <= 0:
        return
    request.offset = file.tell()
    with rpc.errors():
        call = stub.Fetch(request, timeout=_deadline_s(missing_bytes))
        try:
            async for response in call:
                await asyncio.to_thread(_append, file, response, manifest)
        finally:
            call.cancel()  # a reader that gives up must not leave the registry sending
    if file.tell() < manifest.size_bytes:
        raise Unavailable(f"the registry stopped after {file.tell()} of {manifest.size_bytes} bytes")


def _append(file: BinaryIO, response: pb.FetchResponse, manifest: pb.Manifest) -> None:
    if response.HasField("start"):
        start = response.start
        is_identity = start.encoding in {pb.ENCODING_UNSPECIFIED, pb.ENCODING_IDENTITY}
        if not is_identity or start.redirect_uri or start.digest != manifest.digest:
            raise Corrupt(f"the registry announces ({start}), expected {manifest.digest} as it is")
        return
    chunk = response.chunk
    if chunk.offset != file.tell() or chunk.offset + len(chunk.data) > manifest.size_bytes:
        raise Corrupt(
            f"the registry sent {len(chunk.data)} bytes at {chunk.offset},"
            f" expected {file.tell()} of {manifest.size_bytes}"
        )
    file.write(chunk.data)


def _finish(file: BinaryIO, part: Path, final: Path, manifest: pb.Manifest) -> None:
    """Verify, then let the folder appear: everything is on disk before its name is."""
    file.flush()
    os.fsync(file.fileno())
    found = sha256(part / WEIGHTS)
    if found != manifest.digest:
        shutil.rmtree(part)
        raise Corrupt(f"downloaded weights hash to {found}, the manifest says {manifest.digest}")
    _write(part / CONFIG, manifest.config_json)
    _write(part / MANIFEST, json_format.MessageToJson(manifest, preserving_proto_field_name=True))
    shutil.rmtree(final, ignore_errors=True)  # an incomplete or foreign one, else it had been returned
    part.rename(final)
    for stale in final.parent.glob(f"{final.name}-*.part"):
        shutil.rmtree(stale)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _exclusive(path: Path) -> Iterator[BinaryIO]:
    """Open `path` at its end for one process: two that append to one file would both have to start over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(f"{path} is being downloaded by another process") from error
        yield file


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise Exhausted(f"no space left for {path}: free some, what arrived is kept for the next attempt") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error


def _deadline_s(size_bytes: int) -> float:
    return _CALL_TIMEOUT_S + size_bytes / _MIN_BYTES_PER_S
