"""`updraft draft`: look at draft versions, choose one, copy one."""

import asyncio
from pathlib import Path

import click

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import transfer
from updraft_chassis.errors import InvalidInput
from updraft_cli import drafts, output, registry
from updraft_cli.commands import options
from updraft_cli.commands.options import Target
from updraft_cli.views import drafts as view

_VERSION = click.IntRange(1)


@click.group()
def draft() -> None:
    """Draft versions: look at them, serve a certain one, copy one."""


@draft.command("list")
@options.target
@options.output
def list_(target: Target, output: output.Format) -> None:
    """All versions, newest first: phase, live acceptance, reason."""
    view.show_list(asyncio.run(_listing(target)), output)


@draft.command()
@click.argument("version", type=_VERSION)
@options.target
@options.output
def show(target: Target, version: int, output: output.Format) -> None:
    """One version: origin, judgement, history, tensors."""
    view.show_details(asyncio.run(_details(target, version)), output)


@draft.command()
@click.argument("version", type=click.IntRange(0))
@click.option("--reason", default="", help="For the history.")
@options.target
def pin(target: Target, version: int, reason: str) -> None:
    """Serve exactly this version, or none (0).

    Newer ones are held until `updraft draft unpin`.
    """
    state = asyncio.run(_pin(target, version, reason))
    what = f"Version {version} is pinned" if version else "Pinned to no draft"
    click.echo(f"{what} for {target.speculator}: {state.message}")


@draft.command()
@click.option("--reason", default="", help="For the history.")
@options.target
def unpin(target: Target, reason: str) -> None:
    """Let the registry choose again."""
    state = asyncio.run(_unpin(target, reason))
    click.echo(f"Nothing is pinned for {target.speculator}: {state.message}")


@draft.command()
@click.argument("version", type=_VERSION)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@options.target
def pull(target: Target, version: int, folder: Path) -> None:
    """Copy a version to a folder.

    FOLDER/VERSION gets weights, config and manifest, as SGLang and vLLM load them. Every byte is checked. A copy
    that was interrupted goes on where it stopped.
    """
    click.echo(asyncio.run(_pull(target, version, folder)))


async def _listing(target: Target) -> drafts.Listing:
    async with registry.connected(target.registry) as stub:
        return drafts.listing(target.speculator, await registry.listing(stub, target.speculator))


async def _details(target: Target, version: int) -> drafts.Details:
    async with registry.connected(target.registry) as stub:
        request = pb.GetRequest(speculator=target.speculator, version=version)
        answer = await stub.Get(request, timeout=registry.TIMEOUT_S)
        state = (await registry.listing(stub, target.speculator)).speculators
        events = await registry.history(stub, target.speculator, version)
    return drafts.details(answer.version, state[0].traffic if state else (), events)


async def _pin(target: Target, version: int, reason: str) -> pb.SpeculatorState:
    async with registry.connected(target.registry) as stub:
        request = pb.PinRequest(speculator=target.speculator, version=version, reason=reason)
        return (await stub.Pin(request, timeout=registry.TIMEOUT_S)).state


async def _unpin(target: Target, reason: str) -> pb.SpeculatorState:
    async with registry.connected(target.registry) as stub:
        request = pb.UnpinRequest(speculator=target.speculator, reason=reason)
        return (await stub.Unpin(request, timeout=registry.TIMEOUT_S)).state


async def _pull(target: Target, version: int, folder: Path) -> Path:
    try:
        async with registry.connected(target.registry) as stub:
            return await transfer.download(stub, target.speculator, version, folder)
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror}") from error
