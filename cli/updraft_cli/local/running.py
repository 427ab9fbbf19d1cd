"""A note for each `updraft up` that runs, in the user's state folder, so that other commands find it wherever its data is."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from updraft_cli.local.data_folder import DataFolder, StackState
from updraft_cli.local.folders import data_folder, state_folder


@contextmanager
def noted(data: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Keep the note for the length of a block. A kill leaves it behind; readers then find that nothing runs there."""
    note = state_folder(environ) / "running" / str(os.getpid())
    with suppress(OSError):  # without the note, --data finds the stack
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(data.absolute()))
    try:
        yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)


def find_stack(data: Path | None, environ: Mapping[str, str]) -> StackState | None:
    """Return the stack on `data`; None: the one on the default data folder, else the one that started last."""
    folders = [data] if data is not None else [data_folder(environ), *_noted(environ)]
    return next(filter(None, (DataFolder(folder).read_state() for folder in folders)), None)


def _noted(environ: Mapping[str, str]) -> Iterator[Path]:
    notes = (state_folder(environ) / "running").glob("*")
    with suppress(OSError):  # a stack may end at any moment
        for note in sorted(notes, key=lambda note: note.stat().st_mtime, reverse=True):
            yield Path(note.read_text())
