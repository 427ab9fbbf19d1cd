"""Recorded requests in a folder, one file each: the inference service writes traces, and the trainer reads them.

A file is the sha256 of the trace and the trace. It appears by a rename, so what is there is whole unless a disk damaged it.
"""

import hashlib
import uuid
from pathlib import Path

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import Conflict, InvalidInput, full_disk_as_exhausted
from updraft_chassis.leftovers import remove_stale

_DIGEST_BYTES = 32


def path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.trace"


def write(folder: Path, number: int, trace: trace_pb2.Trace) -> None:
    """Keep a recording; of two runs that make the same one, the last keeps it.

    Exhausted if the disk is full, InvalidInput if the folder cannot be written to.
    """
    data, place = trace.SerializeToString(), path(folder, number)
    part = folder / f"{place.name}-{uuid.uuid4().hex}.part"
    full = f"the disk of {folder} is full: free some space; the same command goes on with what is recorded"
    try:
        with full_disk_as_exhausted(full):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(hashlib.sha256(data).digest() + data)
                part.replace(place)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot write recordings to {folder}: {error.strerror or error}") from error


def clean(folder: Path) -> None:
    """Remove what killed runs left of recordings that they were writing."""
    remove_stale(folder.glob("*.trace-*.part"))


def read(folder: Path, number: int, *, target_fingerprint: str) -> bytes | None:
    """The bytes of a trace; None if there is none, or a damaged one. Conflict if it is of another target."""
    try:
        content = path(folder, number).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidInput(f"cannot read the recordings in {folder}: {error.strerror or error}") from error
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        return None
    if trace_pb2.Trace.FromString(data).header.target_fingerprint != target_fingerprint:
        raise Conflict(f"{folder} holds recordings of another model: name another folder, or remove it")
    return data
