"""`updraft-registry fsck` and `rebuild`, to run while the registry is stopped.

    0  no damage, or all of it repaired       1  the check failed (a registry is running, a full disk)
    3  damage is left                         2  wrong arguments or environment

Both lock the data folder. A rebuild writes a new catalogue and then replaces the old one, which is kept.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from updraft_chassis import settings
from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.durable import sync
from updraft_chassis.errors import InvalidInput, Unavailable, UpdraftError
from updraft_registry.settings import RegistrySettings
from updraft_registry.storage.archive import CATALOGUE, Archive
from updraft_registry.storage.catalogue import Catalogue
from updraft_registry.storage.fsck import (
    Finding,
    Progress,
    check_archive,
    check_catalogue,
    check_rows,
    find_flipped,
    repair,
    versions,
)
from updraft_registry.storage.lock import locked
from updraft_registry.storage.stores.choice import store_of
from updraft_registry.storage.stores.port import Store

SOUND, FAILED, DAMAGED = 0, 1, 3

_PROGRESS_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """Findings of a check, and those left after a repair."""

    found: tuple[Finding, ...]
    left: tuple[Finding, ...]
    versions: int = 0
    set_aside: str = ""
    """Path of the old catalogue, if it was replaced."""

    @property
    def is_sound(self) -> bool:
        return not any(finding.is_damage for finding in self.left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A data folder whose lock is held."""

    path: Path
    store: Store
    config: RegistrySettings
    clock: Clock

    @property
    def catalogue(self) -> Path:
        return self.path / CATALOGUE

    @contextmanager
    def archive(self, path: Path | None = None) -> Iterator[Archive]:
        """The archive on the catalogue at `path`."""
        with closing(Catalogue(path or self.catalogue, defaults=self.config.policy)) as catalogue:
            yield Archive(self.store, catalogue, max_draft_bytes=self.config.max_draft_bytes)

    def check(self, archive: Archive, flipped: Sequence[Finding] = ()) -> list[Finding]:
        return check_archive(archive, [self.path / "uploads", self.path / "bucket" / "uploads"], flipped)

    @contextmanager
    def originals(self) -> Iterator[Store]:
        """The store without the local cache of a bucket."""
        if not self.config.store_url:
            yield self.store
            return
        with TemporaryDirectory(dir=self.path) as scratch:
            yield store_of(self.config.model_copy(update={"store_cache_bytes": 0}))(Path(scratch))

    def now_ms(self) -> int:
        return int(self.clock.now() * 1000)


@contextmanager
def open_folder(config: RegistrySettings, clock: Clock) -> Iterator[Folder]:
    """The data folder of a registry that is stopped; Conflict while one runs, InvalidInput if there is none."""
    path = config.data_dir
    is_known = any((path / name).exists() for name in ("versions", CATALOGUE))
    if not is_known and not config.store_url:  # with a bucket, a new machine begins with nothing
        raise InvalidInput(f"{path} is not a data folder of a registry; set UPDRAFT_REGISTRY_DATA_DIR")
    with locked(path):
        yield Folder(path=path, store=store_of(config)(path), config=config, clock=clock)


def fsck(folder: Folder, *, is_repairing: bool, is_hashing: bool, progress: Progress) -> CheckResult:
    """Check everything, and repair if `is_repairing`."""
    damage, set_aside = _unreadable(folder, may_migrate=is_repairing), ""
    if damage and not is_repairing:
        return CheckResult(found=tuple(damage), left=tuple(damage))
    if damage:
        set_aside = rebuild(folder)
    with folder.archive() as archive:
        with folder.originals() as store:
            flipped = list(find_flipped(store, archive.catalogue, progress)) if is_hashing else []
        found = left = folder.check(archive, flipped)
        if is_repairing:
            repair(found, archive, folder.now_ms())
            stored = folder.store.digests()
            left = folder.check(archive, [finding for finding in flipped if finding.subject in stored])
        num_versions = sum(1 for _ in versions(archive.catalogue))
    return CheckResult(found=(*damage, *found), left=tuple(left), versions=num_versions, set_aside=set_aside)


def rebuild(folder: Folder) -> str:
    """Rebuild the catalogue from the documents; return the path of the old one, or nothing if there was none.

    If it is killed, the old catalogue, the new one or none is left. If none is, the next start rebuilds it.
    """
    if not _unreadable(folder, may_migrate=True):
        with folder.archive() as archive:  # facts that are missing in documents would be lost
            archive.check_documents()
            stale = archive.catalogue.stale_documents()
        if stale:
            raise Unavailable(
                f"{len(stale)} documents are older than the catalogue and cannot be written now; nothing was changed: "
                "free some space, or check that the bucket is available"
            )
    new = folder.path / f"{CATALOGUE}.new"
    for left in _files(new):
        left.unlink(missing_ok=True)
    with folder.archive(new) as archive:
        archive.recover(folder.now_ms())
    set_aside = ""
    if folder.catalogue.exists():
        stamp = datetime.fromtimestamp(folder.clock.now(), UTC).strftime("%Y%m%dT%H%M%S%fZ")
        set_aside = f"{folder.catalogue}.{stamp}"
        # The database first: SQLite discards a log without a database, but would replay it into another database.
        for old, aside in zip(_files(folder.catalogue), _files(Path(set_aside)), strict=True):
            with suppress(FileNotFoundError):
                old.replace(aside)
    new.replace(folder.catalogue)
    sync(folder.path)
    return set_aside


def main(arguments: Sequence[str]) -> int:
    """Run `fsck` or `rebuild`; return the exit status."""
    parsed = _parser().parse_args(arguments)
    environ = dict(os.environ)
    if parsed.data_dir:
        environ[settings.variable(RegistrySettings, "data_dir")] = parsed.data_dir
    config = settings.load(RegistrySettings, environ)
    try:
        with open_folder(config, SystemClock()) as folder:
            if parsed.command == "rebuild":
                result = _check_rebuilt(folder, rebuild(folder))
            else:
                progress = _progress(folder.clock)
                result = fsck(folder, is_repairing=parsed.repair, is_hashing=not parsed.no_hash, progress=progress)
            if parsed.output == "json":
                sys.stdout.write(json.dumps(_report(folder, result), indent=1) + "\n")
            else:
                sys.stdout.writelines(f"{sentence}\n" for sentence in _sentences(result, is_repairing=parsed.repair))
            return SOUND if result.is_sound else DAMAGED
    except UpdraftError as error:
        sys.stderr.write(f"updraft-registry {parsed.command}: {error}\n")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="updraft-registry", description="Without a command, serve as configured by the environment."
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data-dir", metavar="FOLDER", help="instead of UPDRAFT_REGISTRY_DATA_DIR")
    shared.add_argument("-o", "--output", choices=("text", "json"), default="text")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("fsck", parents=[shared], help="check the data folder of a stopped registry")
    check.add_argument("--repair", action="store_true", help="repair what can be repaired")
    check.add_argument("--no-hash", action="store_true", help="do not read the weights (they may be many gigabytes)")
    rebuilding = commands.add_parser("rebuild", parents=[shared], help="rebuild the catalogue from the documents")
    rebuilding.set_defaults(repair=True)
    return parser


def _check_rebuilt(folder: Folder, set_aside: str) -> CheckResult:
    with folder.archive() as archive:
        left = tuple(finding for finding in folder.check(archive) if finding.is_damage)
        num_versions = sum(1 for _ in versions(archive.catalogue))
    return CheckResult(found=left, left=left, versions=num_versions, set_aside=set_aside)


def _unreadable(folder: Folder, *, may_migrate: bool) -> list[Finding]:
    damage = check_catalogue(folder.catalogue, folder.store, may_migrate=may_migrate)
    if damage or not folder.catalogue.exists():
        return damage
    with folder.archive() as archive:
        return check_rows(archive.catalogue, folder.catalogue)


def _report(folder: Folder, result: CheckResult) -> Mapping[str, object]:
    return {
        "folder": str(folder.path),
        "is_sound": result.is_sound,
        "versions": result.versions,
        "set_aside": result.set_aside,
        "findings": [
            asdict(finding) | {"is_damage": finding.is_damage, "is_mended": finding not in result.left}
            for finding in result.found
        ],
    }


def _sentences(result: CheckResult, *, is_repairing: bool) -> Iterator[str]:
    for finding in result.found:
        mark = "note" if not finding.is_damage else "left" if finding in result.left else "repaired"
        yield f"{mark:8} {finding.kind:16} {finding.subject}: {finding.why}"
    if result.set_aside:
        yield f"The old catalogue is {result.set_aside}"
    known = "1 version" if result.versions == 1 else f"{result.versions} versions"
    if result.is_sound:
        yield f"{known}; no damage"
    elif is_repairing:
        yield f"{known}; the rest cannot be repaired automatically: see docs/operations.md"
    else:
        yield f"{known}; run `updraft registry fsck --repair` to repair"


def _progress(clock: Clock) -> Progress:
    """Show progress on a terminal, in one line that disappears at the end."""
    shown_s = clock.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown_s
        if not sys.stderr.isatty():
            return
        if done == total:
            sys.stderr.write("\r\x1b[K")
        elif clock.monotonic() - shown_s >= _PROGRESS_S:
            shown_s = clock.monotonic()
            sys.stderr.write(f"\rhashed {done / 1e9:.1f} of {total / 1e9:.1f} GB ")
            sys.stderr.flush()

    return progress


def _files(database: Path) -> tuple[Path, ...]:
    """A database with its log and index files."""
    return database, database.with_name(f"{database.name}-wal"), database.with_name(f"{database.name}-shm")
