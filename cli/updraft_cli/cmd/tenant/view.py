"""Tenants on a terminal."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Group, RenderableType

from updraft_cli import output
from updraft_cli.backends.drafts import Tenant, TenantList

_UNKNOWN = "The registry knew nothing of this tenant: check its name."


def rendered_list(tenants: TenantList, *, is_wide: bool) -> RenderableType:
    """Wide, with every version; otherwise ranges of them."""
    if not tenants.tenants:
        return f"No version of {tenants.speculator} has learned from a tenant, and none was forgotten."
    table = output.table("tenant", "forgotten (UTC)", "traces", "versions that may have learned from it")
    for tenant in tenants.tenants:
        numbers = [str(number) for number in tenant.versions]
        table.add_row(
            tenant.hash,
            output.timestamp(tenant.forgotten) if tenant.forgotten else "-",
            _traces(tenant),
            ", ".join(numbers if is_wide else ranges(tenant.versions)) or "-",
        )
    return Group(table, "", _incomplete(tenants)) if tenants.incomplete_versions else table


def question(tenants: TenantList, shown: str, *, is_known: bool) -> str:
    """Before an order to forget one tenant."""
    (tenant,) = tenants.tenants
    known = f"{_count(tenant)} may have learned from it." if is_known else _UNKNOWN
    return f"{known} Delete all traces of {shown} for {tenants.speculator}?"


def rendered_order(tenants: TenantList, *, is_wide: bool, is_known: bool) -> RenderableType:
    """The result of an order to forget one tenant; whether the registry knew of it before."""
    del is_wide
    (tenant,) = tenants.tenants
    done = f"Tenant {tenant.hash} of {tenants.speculator} is forgotten: its traces are deleted."
    waits = (
        f"Tenant {tenant.hash} of {tenants.speculator} will be forgotten: the order is kept, and the trainer has not"
        " carried it out yet. Repeat `updraft tenant list` to see when it has."
    )
    if not is_known:
        done = f"The order to forget tenant {tenant.hash} of {tenants.speculator} is carried out. {_UNKNOWN}"
        waits = f"{waits} {_UNKNOWN}"
    learned = (
        f"{_count(tenant)} may have learned from it: {', '.join(ranges(tenant.versions))}."
        if tenant.versions
        else "No version lists it among the tenants that it learned from."
    )
    lines = [done if tenant.deleted else waits, learned]
    return "\n".join([*lines, *([_incomplete(tenants)] if tenants.incomplete_versions else [])])


def ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Numbers that ascend, with each row of neighbours as one: `1`, `4-7`."""
    starts = [0, *(n for n, (one, other) in enumerate(pairwise(numbers), start=1) if other != one + 1), len(numbers)]
    for start, end in pairwise(starts):
        if start < end:
            first, last = numbers[start], numbers[end - 1]
            yield str(first) if first == last else f"{first}-{last}"


def _count(tenant: Tenant) -> str:
    num = len(tenant.versions)
    return f"{num or 'No'} version{'' if num == 1 else 's'}"


def _traces(tenant: Tenant) -> str:
    if tenant.forgotten is None:
        return "kept"
    return "deleted" if tenant.deleted else "to be deleted"


def _incomplete(tenants: TenantList) -> str:
    numbers = ", ".join(ranges(tenants.incomplete_versions))
    return f"Versions {numbers} may have learned from tenants that they do not list, so also from any of these."
