"""`draft pull | import | reject | retain`, which only a registry can do."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import click

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts.digests import file_digest
from updraft_chassis.errors import Corrupt
from updraft_cli import output
from updraft_cli.backends import registry_client as client
from updraft_cli.backends.protocol import Version
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.registry_client import TIMEOUT_S
from updraft_cli.cmd import arguments, options
from updraft_cli.cmd.arguments import VERSION
from updraft_cli.cmd.draft import view
from updraft_cli.cmd.program import Command
from updraft_cli.models import progress, pulling, source
from updraft_cli.output import Format

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub
    from updraft_cli.models.importing import Imported


class _Expected(TypedDict):
    """Facts that an import checks before it publishes. `digest`: "" for any."""

    digest: str
    engine: Literal["torch", "sglang", "vllm"] | None


_changing = partial(click.command, cls=Command, needs=("change", "connection"))


@click.command(cls=Command, needs=("connection",))
@click.argument("version", type=VERSION)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def pull(backend: RegistryBackend, version: Version, folder: Path) -> None:
    """Copy a version to a folder, and print the path.

    FOLDER/VERSION gets weights, config and manifest, as SGLang and vLLM load them. Every byte is checked. An interrupted
    copy continues where it stopped. If FOLDER has other versions, only the difference is fetched.
    """
    # Transfers need numpy, which takes a tenth of a second to import; no other command should pay for it.
    from updraft_artifacts import transfer  # noqa: PLC0415

    async def download(stub: "RegistryAsyncStub") -> Path:
        number = await client.resolve(stub, backend.speculator, version)
        return await transfer.download(stub, backend.speculator, number, folder)

    with output.waiting(f"Copying version {version} of {backend.speculator} ..."), pulling.writing(folder):
        path = backend.call(download)
    click.echo(path)


@_changing("import")
@click.argument("place", metavar="FOLDER|URI")
@click.option(
    "--target",
    "model",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The target model of the draft, Hugging Face layout.  [default: that of earlier versions]",
)
@click.option("--digest", metavar="sha256:...", default="", help="Expected digest of the weights file.")
@click.option(
    "--engine",
    type=click.Choice(["torch", "sglang", "vllm"]),
    help="Engine of the pods: refuse a draft that it can never load.  [default: pods refuse it]",
)
@click.option(
    "--result",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help='Also write {"version": N, "digest": "..."} to FILE, where the operator reads it.',
)
@options.output()
def import_(
    backend: RegistryBackend,
    place: str,
    model: Path | None,
    result: Path | None,
    form: Format,
    **expected: Unpack[_Expected],
) -> None:
    """Publish an EAGLE-3 draft from a folder, or from a URI as `updraft model pull` takes it.

    The folder holds config.json and model.safetensors or pytorch_model.bin: from `updraft draft pull`, or as SpecForge, Aurora
    and vLLM's speculators publish them. The latter need --target, and are rounded to bfloat16. It becomes the newest version.
    The first version of a speculator is tried as the policy says; a later one waits for `updraft draft promote`.
    """
    from updraft_cli.models import importing  # noqa: PLC0415 - see pull

    async def publish(stub: "RegistryAsyncStub") -> "Imported":
        return await importing.publish(stub, backend.speculator, folder, model, origin=place)

    with _draft_in(place) as folder:
        _check(place, folder, **expected)
        with output.waiting(f"Reading and publishing {folder} ..."):
            imported = backend.call(publish)
    if result is not None:
        registered = {"version": imported.draft.version, "digest": imported.draft.digest}
        result.write_text(json.dumps(registered), encoding="utf-8")
    output.show(imported, form, names=[imported.draft.version], rendered=partial(view.rendered_import, imported))


@click.command(cls=Command, needs=("decision", "connection"))
@arguments.version()
@click.option("-y", "--yes", is_flag=True, help="Do not ask. Without a terminal, the command never asks.")
def reject(backend: RegistryBackend, version: Version, yes: bool) -> None:  # noqa: FBT001 - a flag
    """Never serve this version again, nor the same weights under another number.

    If it serves now, the previous version takes over. This cannot be undone.
    """

    async def ask(stub: "RegistryAsyncStub") -> pb.SpeculatorState:
        request = pb.RejectRequest(speculator=backend.speculator, version=number, reason=backend.reason)
        return (await stub.Reject(request, timeout=TIMEOUT_S)).state

    number = backend.call(lambda stub: client.resolve(stub, backend.speculator, version))
    if not yes and sys.stdin.isatty():
        draft = backend.draft(number).draft
        click.echo(f"Version {number} of {backend.speculator} is {draft.phase}: {draft.reason}")
        click.confirm("Never serve it again?", abort=True)
    click.echo(f"Version {number} is rejected for {backend.speculator}: {backend.call(ask).message}")


@_changing()
@arguments.version()
@click.option("--off", is_flag=True, help="Let the retention policy delete them again.")
def retain(backend: RegistryBackend, version: Version, off: bool) -> None:  # noqa: FBT001 - a flag
    """Keep the weights of a version regardless of the retention policy."""

    async def ask(stub: "RegistryAsyncStub") -> int:
        number = await client.resolve(stub, backend.speculator, version)
        request = pb.RetainRequest(speculator=backend.speculator, version=number, retain=not off)
        await stub.Retain(request, timeout=TIMEOUT_S)
        return number

    number = backend.call(ask)
    kept = "follow the retention policy again" if off else "are kept until `updraft draft retain --off`"
    click.echo(f"The weights of version {number} of {backend.speculator} {kept}.")


@contextmanager
def _draft_in(place: str) -> Iterator[Path]:
    """Yield the folder itself, or a temporary one with what a URI names."""
    if "://" in place:
        address = replace(source.address(place), is_draft=True)
        with (
            tempfile.TemporaryDirectory(prefix="updraft-") as folder,
            progress.shown(address.uri, Path(folder)) as report,
        ):
            pulling.pull(address, Path(folder), report)
            yield Path(folder)
        return
    if not Path(place).is_dir():
        raise click.BadParameter(f"there is no folder {place}", param_hint="FOLDER|URI")
    yield Path(place)


def _check(place: str, folder: Path, **expected: Unpack[_Expected]) -> None:
    from updraft_cli.models import published  # noqa: PLC0415 - see pull

    if expected["digest"]:
        _check_digest(place, folder, expected["digest"])
    if expected["engine"] is not None:
        published.check_engine(folder, expected["engine"])


def _check_digest(place: str, folder: Path, expected: str) -> None:
    from updraft_cli.models.published import weights_of  # noqa: PLC0415 - see pull

    weights = weights_of(folder)
    digest = "no file" if weights is None else file_digest(weights)
    if digest != expected:
        raise Corrupt(f"the weights of {place} are {digest}, expected {expected}")
