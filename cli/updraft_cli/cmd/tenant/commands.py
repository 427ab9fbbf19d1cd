"""`tenant list | forget`, which only a registry can do."""

import asyncio
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.tenants import hashes
from updraft_cli import output
from updraft_cli.backends import wire
from updraft_cli.backends.drafts import TenantList
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.registry_client import TIMEOUT_S
from updraft_cli.cmd import options
from updraft_cli.cmd.program import Group
from updraft_cli.cmd.tenant import view
from updraft_cli.output import Format

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

_POLL_S = 1.0


class _Hash(click.ParamType[int]):
    name = "hash"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        tenant = value if isinstance(value, int) else hashes.parse(value)
        return tenant or self.fail("expected 16 hexadecimal digits that are not all 0", param, ctx)


_by_hash = click.option("--hash", "hash_", type=_Hash(), help="The tenant with this hash, instead of NAME.")


@click.group(cls=Group)
def tenant() -> None:
    """Tenants: which versions learned from them, and orders to forget them.

    A tenant is the name before an API key, or in the header of a gateway. Traces and versions have only a keyed hash of it:
    16 hexadecimal digits, which these commands show, and take with --hash. Both need a token with role operate.
    """


@tenant.command("list", needs=("connection",))
@click.argument("name", required=False)
@_by_hash
@options.output()
def list_(backend: RegistryBackend, name: str | None, hash_: int | None, form: Format) -> None:
    """List the tenants that versions learned from or that were forgotten, or show one of them."""
    which = _which(name, hash_)
    tenants = backend.call(lambda stub: _listed(stub, backend.speculator, which))
    output.show(tenants, form, names=_names(tenants), rendered=partial(view.rendered_list, tenants))


@tenant.command(needs=("change", "connection"))
@click.argument("name", required=False)
@_by_hash
@click.option("-y", "--yes", is_flag=True, help="Do not ask. Without a terminal, the command never asks.")
@click.option("--wait", "wait_s", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to wait.")
@options.output()
def forget(
    backend: RegistryBackend,
    name: str | None,
    hash_: int | None,
    yes: bool,  # noqa: FBT001 - a flag
    wait_s: float,
    form: Format,
) -> None:
    """Delete the traces of a tenant, by NAME or --hash, and list the versions that may have learned from it.

    The trainer deletes its traces from the streams and from what is stored to train and to evaluate on. Traces of requests
    that ended before are refused. Later requests are captured as usual, unless the tenant's keys are removed or say `off`.
    Weights cannot be made to forget, and later versions go on from the same draft, so they stay listed: `updraft draft reject`
    takes a version out of service.

    The order is kept in the registry, so the command may be interrupted and repeated. Repeating it moves the order to now.
    """
    which = _which(name, hash_)
    if not which:
        raise click.UsageError("name a tenant, or give its --hash")
    before = backend.call(lambda stub: _listed(stub, backend.speculator, which))
    is_known = any(tenant.versions or tenant.forgotten for tenant in before.tenants)
    if not yes and sys.stdin.isatty():
        click.confirm(view.question(before, name or hashes.text(hash_ or 0), is_known=is_known), abort=True)

    async def ask(stub: "RegistryAsyncStub") -> TenantList:
        request = pb.ForgetTenantRequest(speculator=backend.speculator, **which)
        answer = await stub.ForgetTenant(request, timeout=TIMEOUT_S)
        tenants = wire.tenant_list(backend.speculator, [answer.tenant], answer.incomplete_versions)
        deadline_s = asyncio.get_running_loop().time() + wait_s
        while not tenants.tenants[0].deleted and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(min(_POLL_S, wait_s))
            tenants = await _listed(stub, backend.speculator, {"hash": hashes.parse(tenants.tenants[0].hash)})
        return tenants

    with output.waiting("Waiting for the trainer ..."):
        tenants = backend.call(ask)
    output.show(tenants, form, names=_names(tenants), rendered=partial(view.rendered_order, tenants, is_known=is_known))


async def _listed(stub: "RegistryAsyncStub", speculator: str, which: Mapping[str, Any]) -> TenantList:
    tenants, after = list[pb.Tenant](), 0
    while True:
        request = pb.ListTenantsRequest(speculator=speculator, after=after, **which)
        answer = await stub.ListTenants(request, timeout=TIMEOUT_S)
        tenants += answer.tenants
        after = answer.next_after
        if not after:
            return wire.tenant_list(speculator, tenants, answer.incomplete_versions)


def _which(name: str | None, hash_: int | None) -> Mapping[str, Any]:
    """The fields of a request that name a tenant; empty for none."""
    if name is not None and hash_:
        raise click.UsageError("give a name or a --hash, not both")
    return {"hash": hash_} if hash_ else {} if name is None else {"name": name}


def _names(tenants: TenantList) -> list[str]:
    return [tenant.hash for tenant in tenants.tenants]
