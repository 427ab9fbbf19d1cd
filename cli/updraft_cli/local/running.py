"""A note for each `updraft up` that runs, in the user's state folder, so that other commands find it wherever its data is."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from updraft_chassis.errors import Conflict
from updraft_cli.local.data_folder import DataFolder, StackState
from updraft_cli.local.folders import data_folder, state_folder


@contextmanager
def noted(data: Path, environ: Mapping[str, str]) -> Iterator[None]:
    """Keep the note for the length of a block. A kill leaves it behind; readers then find that nothing runs there."""
    note = state_folder(environ) / "running" / str(os.getpid())
    with suppress(OSError):  # without the note, --data finds the stack
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = note.with_suffix(".new")
        unfinished.write_text(str(data.absolute()))
        unfinished.replace(note)
    try:
        yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)


def find_stack(data: Path | None, environ: Mapping[str, str], *, is_only: bool = False) -> StackState | None:
    """Return the stack on `data`; None: the one on the default data folder, else the one that started last.

    Conflict if it has to be the only one, and others run too.
    """
    folders = [data] if data is not None else [data_folder(environ), *_noted(environ)]
    stacks = {folder.resolve(): state for folder in folders if (state := DataFolder(folder).read_state())}
    if is_only and len(stacks) > 1:
        raise Conflict(
            f"{len(stacks)} stacks run on this machine; choose one with --data or --registry: {', '.join(map(str, stacks))}"
        )
    return next(iter(stacks.values()), None)


def _noted(environ: Mapping[str, str]) -> Iterator[Path]:
    """The folders that the notes name, newest first; only our own, because their registry gets our token."""
    folders: list[tuple[float, Path]] = []
    for note in (state_folder(environ) / "running").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # its stack has just ended, or the note is damaged
            folder = Path(note.read_text())
            if note.suffix == "" and folder.is_absolute() and folder.stat().st_uid == os.geteuid():
                folders.append((note.stat().st_mtime, folder))
    for _, folder in sorted(folders, reverse=True):
        yield folder
