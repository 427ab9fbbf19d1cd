"""`updraft draft pin | unpin | promote | reject | retain`: a person decides. Each answers with what follows from it."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

import click

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.backends import registry
from updraft_cli.backends.drafts import phase
from updraft_cli.backends.registry import TIMEOUT_S, Target
from updraft_cli.cmd import options
from updraft_cli.cmd.versions import VERSION, VERSION_OR_NONE

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub


class Answer(Protocol):
    """What every decision is answered with."""

    @property
    def state(self) -> pb.SpeculatorState:
        """The state that follows from it."""


@click.command(cls=options.Command)
@click.argument("version", type=VERSION_OR_NONE)
@options.reason
@options.target
def pin(target: Target, version: int | str, reason: str) -> None:
    """Serve exactly this version, or none (0), now and without analysis.

    Newer ones are held until `updraft draft unpin`.
    """
    number = _number(target, version)
    request = pb.PinRequest(speculator=target.speculator, version=number, reason=reason)
    told = f"Version {number} is pinned" if number else "Pinned to no draft"
    decide(target, told, lambda stub: stub.Pin(request, timeout=TIMEOUT_S))


@click.command(cls=options.Command)
@options.reason
@options.target
def unpin(target: Target, reason: str) -> None:
    """Let the registry choose again: the version that won last serves."""
    request = pb.UnpinRequest(speculator=target.speculator, reason=reason)
    decide(target, "Nothing is pinned", lambda stub: stub.Unpin(request, timeout=TIMEOUT_S))


@click.command(cls=options.Command)
@click.argument("version", type=VERSION)
@options.reason
@options.target
def promote(target: Target, version: int | str, reason: str) -> None:
    """Make a waiting or tried version stable now, without further analysis.

    Unlike a pin it holds nothing: later versions are tried as usual.
    """
    number = _number(target, version)
    request = pb.PromoteRequest(speculator=target.speculator, version=number, reason=reason)
    decide(target, f"Version {number} is promoted", lambda stub: stub.Promote(request, timeout=TIMEOUT_S))


@click.command(cls=options.Command)
@click.argument("version", type=VERSION)
@click.option("-y", "--yes", is_flag=True, help="Do not ask. Away from a terminal nothing is asked anyway.")
@options.reason
@options.target
def reject(target: Target, version: int | str, reason: str, yes: bool) -> None:  # noqa: FBT001 - a flag of the command
    """Never serve this version again, nor its weights under another number.

    If it serves now, the version before takes over. This cannot be taken back.
    """
    number = _number(target, version)
    if not yes and sys.stdin.isatty():
        found = asyncio.run(_version(target, number))
        click.echo(f"Version {number} of {target.speculator} is {phase(found.phase)}: {found.reason}")
        click.confirm("Never serve it again?", abort=True)
    request = pb.RejectRequest(speculator=target.speculator, version=number, reason=reason)
    decide(target, f"Version {number} is rejected", lambda stub: stub.Reject(request, timeout=TIMEOUT_S))


@click.command(cls=options.Command)
@click.argument("version", type=VERSION)
@click.option("--off", is_flag=True, help="Retention may delete them again.")
@options.target
def retain(target: Target, version: int | str, off: bool) -> None:  # noqa: FBT001 - a flag of the command
    """Keep the weights of a version whatever retention says."""
    number = _number(target, version)
    request = pb.RetainRequest(speculator=target.speculator, version=number, retain=not off)
    asyncio.run(_retain(target, request))
    kept = "may be deleted once retention says so" if off else "are kept until `updraft draft retain --off`"
    click.echo(f"The weights of version {number} of {target.speculator} {kept}.")


DECISIONS = (pin, unpin, promote, reject, retain)


def decide(target: Target, told: str, ask: "Callable[[RegistryAsyncStub], Awaitable[Answer]]") -> None:
    """Ask the registry, and tell what it says follows."""

    async def asked() -> pb.SpeculatorState:
        async with target.connected() as stub:
            return (await ask(stub)).state

    click.echo(f"{told} for {target.speculator}: {asyncio.run(asked()).message}")


def _number(target: Target, said: int | str) -> int:
    """The number of a version that was named; no call for one that was said by number."""
    return said if isinstance(said, int) else asyncio.run(_resolved(target, said))


async def _resolved(target: Target, said: str) -> int:
    async with target.connected() as stub:
        return await registry.resolve(stub, target.speculator, said)


async def _version(target: Target, number: int) -> pb.Version:
    async with target.connected() as stub:
        return await registry.version(stub, target.speculator, number)


async def _retain(target: Target, request: pb.RetainRequest) -> None:
    async with target.connected() as stub:
        await stub.Retain(request, timeout=TIMEOUT_S)
