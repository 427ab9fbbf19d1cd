"""The SQLite database of the catalogue: WAL mode, migrations, transactions, and errors as UpdraftErrors.

Synchronous, for one thread at a time.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from updraft_chassis.errors import Conflict, Corrupt, Exhausted
from updraft_registry.storage.schema import MIGRATIONS, SCHEMA
from updraft_registry.storage.stores.folder import disk_full

_DISK_FULL = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")
"""SHMSIZE: no room for the index of the write-ahead log, which is created at every start."""


class Database:
    """The database at `path`, created or migrated when opened.

    Exhausted on a full disk, without a change. Corrupt if the file is damaged, Conflict if a newer registry wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        try:
            with self._errors():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def row(self, statement: str, *values: object) -> sqlite3.Row | None:
        """The first row; None without one."""
        return next(iter(self.rows(statement, *values)), None)

    def rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        with self._errors(), closing(self._db.execute(statement, values)) as cursor:
            return cursor.fetchall()

    def execute(self, statement: str, values: Any = ()) -> None:
        """Within a transaction."""
        self._db.execute(statement, values)

    def execute_many(self, statement: str, values: Iterable[Any]) -> None:
        """Within a transaction."""
        self._db.executemany(statement, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors, such as a full disk, roll back by themselves
                    self._db.execute("ROLLBACK")
                raise

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        # FULL: an answered transaction survives a power cut; NORMAL only survives a crash of the process.
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (schema,) = self._db.execute("PRAGMA user_version").fetchone()
        if schema > SCHEMA:
            raise Conflict(
                f"{self._path} has schema {schema}, this registry supports up to {SCHEMA}: use a newer registry"
            )
        for number, migration in enumerate(MIGRATIONS[schema:], start=schema + 1):
            self._db.executescript(f"BEGIN; {migration} PRAGMA user_version = {number}; COMMIT;")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname in _DISK_FULL:
                raise Exhausted(disk_full(self._path)) from error
            raise
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorname in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
                raise Corrupt(
                    f"{self._path} is damaged ({error}): stop the registry and run `updraft registry rebuild`, "
                    "which rebuilds it from the documents"
                ) from error
            raise
