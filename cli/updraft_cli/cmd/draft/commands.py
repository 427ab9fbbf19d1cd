"""`updraft draft`: look at draft versions, and copy them out and in."""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from updraft_artifacts.digests import file_digest
from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_cli import output
from updraft_cli.backends import drafts, registry
from updraft_cli.backends.registry import Target
from updraft_cli.cmd import options
from updraft_cli.cmd.draft import differences_view as difference_view
from updraft_cli.cmd.draft import view
from updraft_cli.cmd.draft.decisions import DECISIONS
from updraft_cli.cmd.draft.differences import Difference, difference
from updraft_cli.cmd.versions import VERSION
from updraft_cli.models import progress, pulling, source
from updraft_cli.output import Format

if TYPE_CHECKING:
    from updraft_cli.models.importing import Imported


@click.group(cls=options.Group)
def draft() -> None:
    """Draft versions: look at them, decide on them, copy them.

    VERSION is a number, or what a version is now: stable, candidate, previous, latest.
    """


@draft.command("list")
@options.output()
@options.target
def list_(target: Target, form: Format) -> None:
    """All versions, newest first.

    "accepted" is tokens a verify step in live traffic, counted by the pods that are connected now.
    """
    listing = asyncio.run(_listing(target))
    names = [draft.version for draft in listing.drafts]
    output.show(listing, form, names=names, rendered=partial(view.rendered_list, listing, datetime.now(UTC)))


@draft.command()
@click.argument("version", type=VERSION)
@options.output()
@options.target
def show(target: Target, version: int | str, form: Format) -> None:
    """One version: origin, judgement, history, tensors."""
    details = asyncio.run(_details(target, version))
    rendered = partial(view.rendered_details, details, datetime.now(UTC))
    output.show(details, form, names=[details.draft.version], rendered=rendered)


@draft.command()
@click.argument("old", metavar="VERSION", type=VERSION)
@click.argument("new", metavar="VERSION", type=VERSION)
@options.output()
@options.target
def diff(target: Target, old: int | str, new: int | str, form: Format) -> None:
    """What tells two versions apart: manifest, origin, evaluation, traffic, tensors.

    For example `updraft draft diff stable candidate`. wide and json tell what is equal too; name tells the names of
    what differs.
    """
    found = asyncio.run(_difference(target, old, new))
    fields = [field.name for field in found.fields if not field.is_equal]
    tensors = [pair.name for pair in found.tensors if not pair.is_equal]
    output.show(found, form, names=[*fields, *tensors], rendered=partial(difference_view.rendered, found))


@draft.command()
@click.argument("version", type=VERSION, required=False)
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Only the last so many.")
@options.output()
@options.target
def history(target: Target, version: int | str | None, limit: int, form: Format) -> None:
    """What happened to all versions or to one, and why; oldest first."""
    found = asyncio.run(_history(target, version, limit))
    names = dict.fromkeys(event.version for event in found.events)
    output.show(found, form, names=names, rendered=partial(view.rendered_history, found))


@draft.command()
@click.argument("version", type=VERSION)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@options.target
def pull(target: Target, version: int | str, folder: Path) -> None:
    """Copy a version to a folder, and print where it is.

    FOLDER/VERSION gets weights, config and manifest, as SGLang and vLLM load them. Every byte is checked. A copy
    that was interrupted goes on where it stopped, and beside other versions only what differs is fetched.
    """
    with output.waiting(f"Copying {target.speculator}'s version {version} ..."):
        copied = asyncio.run(_pull(target, version, folder))
    click.echo(copied)


@draft.command("import")
@click.argument("place", metavar="FOLDER|URI")
@click.option(
    "--target",
    "model",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The model that it drafts for, Hugging Face layout.  [default: that of the versions before it]",
)
@click.option("--digest", metavar="sha256:...", default="", help="Of the weights file; others are refused.")
@click.option(
    "--result",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help='Also write {"version": N} there: a Job tells the operator so.',
)
@options.output()
@options.target
def import_(target: Target, place: str, model: Path | None, digest: str, result: Path | None, form: Format) -> None:
    """Publish an EAGLE-3 draft from a folder, or from an address as `updraft model pull` takes it.

    The folder holds config.json and model.safetensors, of `updraft draft pull`, or as SpecForge and vLLM's speculators publish
    them; those take --target, and are rounded to bfloat16. It becomes the newest version: the first of a speculator serves at
    once, a later one waits for `updraft draft promote`.
    """
    with _draft_in(place) as folder:
        if digest:
            _check_digest(place, folder, digest)
        with output.waiting(f"Reading and publishing {folder} ..."):
            imported = asyncio.run(_import(target, folder, model))
    if result is not None:
        result.write_text(json.dumps({"version": imported.draft.version}), encoding="utf-8")
    rendered = partial(view.rendered_import, imported)
    output.show(imported, form, names=[imported.draft.version], rendered=rendered)


for decision in DECISIONS:
    draft.add_command(decision)


async def _listing(target: Target) -> drafts.Listing:
    async with target.connected() as stub:
        return drafts.listing(target.speculator, await registry.listing(stub, target.speculator))


async def _details(target: Target, version: int | str) -> drafts.Details:
    async with target.connected() as stub:
        number = await registry.resolve(stub, target.speculator, version)
        found = await registry.version(stub, target.speculator, number)
        state, _ = await registry.newest(stub, target.speculator)
        events = await registry.history(stub, target.speculator, number)
    return drafts.details(found, state.traffic, events)


async def _difference(target: Target, old: int | str, new: int | str) -> Difference:
    async with target.connected() as stub:
        state, _ = await registry.newest(stub, target.speculator)
        both = []
        for said in (old, new):
            number = await registry.resolve(stub, target.speculator, said)
            both.append(drafts.details(await registry.version(stub, target.speculator, number), state.traffic))
    return difference(*both)


async def _history(target: Target, version: int | str | None, limit: int) -> drafts.History:
    async with target.connected() as stub:
        number = 0 if version is None else await registry.resolve(stub, target.speculator, version)
        if number:
            await registry.version(stub, target.speculator, number)  # one that does not exist has no history either
        events = await registry.history(stub, target.speculator, number, limit=limit)
    return drafts.History(speculator=target.speculator, events=tuple(map(drafts.event, events)))


async def _pull(target: Target, version: int | str, folder: Path) -> Path:
    # Transfers need numpy, which takes a tenth of a second to import; no other command should pay for it.
    from updraft_artifacts import transfer  # noqa: PLC0415

    with _writing(folder):
        async with target.connected() as stub:
            number = await registry.resolve(stub, target.speculator, version)
            return await transfer.download(stub, target.speculator, number, folder)


async def _import(target: Target, folder: Path, model: Path | None) -> "Imported":
    from updraft_cli.models import importing  # noqa: PLC0415 - see _pull

    async with target.connected() as stub:
        return await importing.publish(stub, target.speculator, folder, model)


@contextmanager
def _draft_in(place: str) -> Iterator[Path]:
    """The folder itself, or one for as long as the block lasts with what an address names."""
    if source.is_uri(place):
        address = source.address(place)
        with (
            tempfile.TemporaryDirectory(prefix="updraft-") as folder,
            progress.shown(address.uri, Path(folder)) as told,
        ):
            pulling.pull(address, Path(folder), told)
            yield Path(folder)
        return
    if not Path(place).is_dir():
        raise click.BadParameter(f"there is no folder {place}", param_hint="FOLDER|URI")
    yield Path(place)


def _check_digest(place: str, folder: Path, expected: str) -> None:
    from updraft_artifacts.transfer import WEIGHTS  # noqa: PLC0415 - see _pull

    weights = folder / WEIGHTS
    found = file_digest(weights) if weights.is_file() else "no file"
    if found != expected:
        raise Corrupt(f"{weights.name} of {place} is {found}, expected {expected}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidInput(f"cannot write to {folder}: {error.strerror}") from error
