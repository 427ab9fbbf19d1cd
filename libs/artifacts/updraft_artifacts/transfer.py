"""Uploads and downloads of weights.

A download resumes where it stopped. The folder gets its final name only when it is complete and its digest matches, so a
folder with that name can be served while the registry is down.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts.digests import file_digest
from updraft_artifacts.fetch import deadline_s, fetch
from updraft_artifacts.partial_download import CONFIG, MANIFEST, WEIGHTS, open_partial
from updraft_chassis import rpc
from updraft_chassis.errors import Conflict, InvalidInput, NotFound

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

__all__ = ["CONFIG", "MANIFEST", "WEIGHTS", "download", "is_complete", "upload"]

_CALL_TIMEOUT_S = 10.0


async def upload(
    stub: "RegistryAsyncStub", manifest: pb.Manifest, path: Path, *, check: Callable[[], None] = lambda: None
) -> pb.PublishResponse:
    """Publish the weights file `path` under `manifest`, whose size and digest must match the file.

    `check` is called after the last byte, and may still prevent the publication by an exception. NotFound if there is no file,
    InvalidInput if its size differs, and any error from the registry.
    """
    size_bytes = _size(path)
    if size_bytes != manifest.size_bytes:
        raise InvalidInput(f"{path} has {size_bytes} bytes, its manifest says {manifest.size_bytes}")
    with rpc.errors():
        # Explicit writes, because grpc.aio swallows exceptions of a request iterator.
        call = stub.Publish(timeout=deadline_s(size_bytes))
        await call.write(pb.PublishRequest(manifest=manifest))
        with path.open("rb") as file:
            while data := await asyncio.to_thread(file.read, rpc.CHUNK_BYTES):
                chunk = pb.Chunk(offset=file.tell() - len(data), data=data)
                await call.write(pb.PublishRequest(chunk=chunk))
        try:
            check()
        except BaseException:
            call.cancel()
            raise
        await call.done_writing()
        return await call


async def download(  # noqa: PLR0913 - which version, where to, and two hints
    stub: "RegistryAsyncStub",
    speculator: str,
    version: int,
    folder: Path,
    *,
    digest: str | None = None,
    base: int | None = None,
    accept_redirect: bool = True,
) -> Path:
    """Return `folder/<version>` with verified weights, config.json and manifest.json.

    With `digest` (of the weights file) a complete folder is returned without a call, and Conflict is raised if the registry has
    another digest for the version. Versions in `folder` save traffic: the registry may send a delta to `base`, to the parent or
    to the newest one, in this order of preference. `accept_redirect` permits a download from the registry's bucket.
    After Unavailable the next attempt resumes; Corrupt discards the download; Exhausted means that the disk is full.
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
    request = pb.FetchRequest(speculator=speculator, version=version, accept_redirect=accept_redirect)
    with open_partial(folder, version, manifest, base) as partial:
        await fetch(stub, request, partial)
        await asyncio.to_thread(partial.finish, final)
    return final


def is_complete(folder: Path, digest: str) -> bool:
    """Whether `folder` holds a version whose weights file hashes to `digest`; reads the whole file."""
    has_all = all((folder / name).is_file() for name in (WEIGHTS, CONFIG, MANIFEST))
    return has_all and file_digest(folder / WEIGHTS) == digest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
