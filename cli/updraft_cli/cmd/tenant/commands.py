"""`tenant list | forget`, which only a registry can do."""

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.tenants import hashes
from updraft_cli import output
from updraft_cli.backends import wire
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.registry_client import TIMEOUT_S
from updraft_cli.backends.tenants import TenantList
from updraft_cli.cmd import options
from updraft_cli.cmd.program import Group
from updraft_cli.cmd.tenant import view
from updraft_cli.output import Format

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

_POLL_S = 1.0


@click.group(cls=Group)
def tenant() -> None:
    """Tenants: which versions learned from them, and orders to forget them.

    A tenant is the name before an API key, or in the header of a gateway. Traces and versions have only a keyed hash of it:
    16 hexadecimal digits, which these commands take and show. Both need a token with role operate.
    """


@tenant.command("list", needs=("connection",))
@click.argument("tenant", metavar="[NAME|HASH]", required=False)
@options.output()
def list_(backend: RegistryBackend, tenant: str | None, form: Format) -> None:  # noqa: A002, RUF100 - as in the help
    """List the tenants that versions learned from or that were forgotten, or show one of them."""
    tenants = backend.call(lambda stub: _listed(stub, backend.speculator, tenant))
    output.show(tenants, form, names=_names(tenants), rendered=partial(view.rendered_list, tenants))


@tenant.command(needs=("change", "connection"))
@click.argument("tenant", metavar="NAME|HASH")
@click.option("-y", "--yes", is_flag=True, help="Do not ask. Without a terminal, the command never asks.")
@click.option("--wait", "wait_s", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to wait.")
@options.output()
def forget(backend: RegistryBackend, tenant: str, yes: bool, wait_s: float, form: Format) -> None:  # noqa: FBT001 - a flag
    """Delete the traces of a tenant, and list the versions that may have learned from it.

    The trainer deletes its traces from the streams and from what is stored to train and to evaluate on. Traces of requests
    that ended before are refused. Later requests are captured as usual, unless the tenant's keys are removed or say `off`.
    Weights cannot be made to forget, and later versions go on from the same draft, so they stay listed: `updraft draft reject`
    takes a version out of service.

    The order is kept in the registry, so the command may be interrupted and repeated. Repeating it moves the order to now.
    """
    if not yes and sys.stdin.isatty():
        click.confirm(f"Delete all traces of {tenant} for {backend.speculator}?", abort=True)

    async def ask(stub: "RegistryAsyncStub") -> TenantList:
        request = pb.ForgetTenantRequest(speculator=backend.speculator, **_named(tenant))
        answer = await stub.ForgetTenant(request, timeout=TIMEOUT_S)
        tenants = wire.tenant_list(backend.speculator, [answer.tenant], answer.incomplete_versions)
        deadline_s = asyncio.get_running_loop().time() + wait_s
        while not tenants.tenants[0].deleted and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(min(_POLL_S, wait_s))
            tenants = await _listed(stub, backend.speculator, tenants.tenants[0].hash)
        return tenants

    with output.waiting("Waiting for the trainer ..."):
        tenants = backend.call(ask)
    output.show(tenants, form, names=_names(tenants), rendered=partial(view.rendered_order, tenants))


async def _listed(stub: "RegistryAsyncStub", speculator: str, tenant: str | None) -> TenantList:
    request = pb.ListTenantsRequest(speculator=speculator, **_named(tenant))
    answer = await stub.ListTenants(request, timeout=TIMEOUT_S)
    return wire.tenant_list(speculator, answer.tenants, answer.incomplete_versions)


def _named(tenant: str | None) -> dict[str, Any]:
    if tenant is None:
        return {}
    known = hashes.parse(tenant)
    return {"hash": known} if known else {"name": tenant}


def _names(tenants: TenantList) -> list[str]:
    return [tenant.hash for tenant in tenants.tenants]
