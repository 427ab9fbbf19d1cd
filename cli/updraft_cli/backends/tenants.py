"""Tenants as plain values."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    hash: str
    """In hexadecimal; nobody finds the name by it."""
    versions: tuple[int, ...]
    """Versions that may have learned from it, ascending."""
    forgotten: datetime | None
    """When it was ordered to be forgotten last."""
    deleted: bool
    """The trainer has deleted its traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantList:
    speculator: str
    tenants: tuple[Tenant, ...]
    incomplete_versions: tuple[int, ...] = ()
    """Versions that may have learned from tenants that they do not list."""
