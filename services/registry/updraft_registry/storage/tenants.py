"""Tenants in the catalogue: the salt of each speculator's hashes, and which tenants were ordered to be forgotten.

A salt is made when the first pod of a speculator connects, and never changes: with another one, no tenant could be found again
in older traces and versions. Orders are kept for good, because a trainer may return years later with an old volume.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from updraft_chassis.errors import Exhausted
from updraft_chassis.tenants import hashes
from updraft_registry.storage.database import Database

MAX_SALTS = 10_000
"""A pod chooses its speculator's name, so the number of those that only pods have named has a limit."""

MAX_FORGOTTEN = 50_000
"""Orders of a speculator. They fit into one message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRecord:
    """All of it for one speculator. `forgotten` has the time of the last order by tenant, in Unix milliseconds."""

    salt: bytes = b""
    forgotten: Mapping[int, int] = field(default_factory=dict)


class Tenants:
    """Tables of the catalogue's database. Hashes are texts there, because SQLite has no unsigned integers."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._salts: dict[str, bytes] = {}
        """Cache, because every decision reads one."""

    def salt(self, name: str) -> bytes:
        """The salt of a speculator, made if there is none.

        Exhausted if it cannot be written, or if there are too many speculators that only pods have named.
        """
        if name not in self._salts:
            row = self._database.row("SELECT salt FROM salts WHERE speculator = ?", name)
            self._salts[name] = row["salt"] if row else self._new_salt(name)
        return self._salts[name]

    def record(self, name: str) -> TenantRecord:
        salt = self._database.row("SELECT salt FROM salts WHERE speculator = ?", name)
        return TenantRecord(salt=salt["salt"] if salt else b"", forgotten=self._orders(name))

    def _orders(self, name: str) -> dict[int, int]:
        orders = self._database.rows("SELECT * FROM forgotten WHERE speculator = ? ORDER BY at_ms, tenant", name)
        return {hashes.parse(row["tenant"]): row["at_ms"] for row in orders}

    def last_ms(self, name: str) -> int:
        """When the last order was given; 0: none was."""
        row = self._database.row("SELECT max(at_ms) AS at_ms FROM forgotten WHERE speculator = ?", name)
        return int(row["at_ms"] or 0) if row else 0

    def forget(self, name: str, tenant: int, now_ms: int) -> int:
        """Add or renew an order, within a transaction; return its time, which is after all others.

        Exhausted if there are too many.
        """
        before = self._orders(name)
        if tenant not in before and len(before) >= MAX_FORGOTTEN:
            raise Exhausted(f"{name} has {MAX_FORGOTTEN} forgotten tenants, which is the limit")
        at_ms = max(now_ms, max(before.values(), default=0) + 1)
        self._write(name, {tenant: at_ms})
        return at_ms

    def restore(self, name: str, record: TenantRecord) -> None:
        """Within a transaction."""
        if record.salt:
            self._database.execute("INSERT OR REPLACE INTO salts VALUES (?, ?)", (name, record.salt))
            self._salts.pop(name, None)
        self._write(name, record.forgotten)

    def _write(self, name: str, forgotten: Mapping[int, int]) -> None:
        rows = [(name, hashes.text(tenant), at_ms) for tenant, at_ms in forgotten.items()]
        self._database.execute_many("INSERT OR REPLACE INTO forgotten VALUES (?, ?, ?)", rows)

    def _new_salt(self, name: str) -> bytes:
        others = "SELECT count(*) FROM salts WHERE speculator NOT IN (SELECT name FROM speculators)"
        (num_others,) = self._database.row(others) or (0,)
        if num_others >= MAX_SALTS and not self._database.row("SELECT 1 FROM speculators WHERE name = ?", name):
            raise Exhausted(
                f"{num_others} speculators without a version have a salt for tenants, which is the limit: {name} gets none"
            )
        salt = hashes.new_salt()
        with self._database.transaction():
            self._database.execute("INSERT INTO salts VALUES (?, ?)", (name, salt))
            # The document of a known speculator has the salt too.
            self._database.execute("INSERT OR IGNORE INTO due SELECT name, 0 FROM speculators WHERE name = ?", (name,))
        return salt
