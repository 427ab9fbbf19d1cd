"""Recorded requests in a folder, one file each: the inference service writes traces, and the trainer reads them.

A file is the sha256 of the trace and the trace. It appears by a rename, so what is there is whole unless a disk damaged it.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import Conflict, InvalidInput, full_disk_as_exhausted
from updraft_chassis.leftovers import remove_stale

_DIGEST_BYTES = 32
_SUFFIX = ".trace"


def path(folder: Path, name: str) -> Path:
    return folder / f"{name}{_SUFFIX}"


def names(folder: Path) -> Iterator[str]:
    """The recordings of a folder, in no order; none if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name.removesuffix(_SUFFIX) for entry in entries if entry.name.endswith(_SUFFIX))
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(folder, error) from error


def write(folder: Path, name: str, trace: trace_pb2.Trace) -> None:
    """Keep a recording; of two runs that make the same one, the last keeps it.

    Exhausted if the disk is full, InvalidInput if the folder cannot be written to.
    """
    data, place = trace.SerializeToString(), path(folder, name)
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


def prepare(folder: Path, *, target_fingerprint: str) -> None:
    """Remove what killed runs left of recordings that they were writing. Conflict if the folder is of another target."""
    remove_stale(folder.glob(f"*{_SUFFIX}-*.part"))
    for name in names(folder):  # the first whole one stands for all: nothing else was ever added to them
        if read(folder, name, target_fingerprint=target_fingerprint) is not None:
            return


def read(folder: Path, name: str, *, target_fingerprint: str) -> bytes | None:
    """The bytes of a trace; None if there is none, or a damaged one. Conflict if it is of another target."""
    try:
        content = path(folder, name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(folder, error) from error
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        return None
    if trace_pb2.Trace.FromString(data).header.target_fingerprint != target_fingerprint:
        raise Conflict(f"{folder} holds recordings of another model: name another folder, or remove it")
    return data


def _unreadable(folder: Path, error: OSError) -> InvalidInput:
    return InvalidInput(f"cannot read the recordings in {folder}: {error.strerror or error}")
