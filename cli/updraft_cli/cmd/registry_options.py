"""How `updraft` reaches a registry: an address, or the stack that `updraft up` runs on this machine."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import InvalidInput
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.registry import RegistryBackend
from updraft_cli.backends.registry_client import DEFAULT_ADDRESS
from updraft_cli.cmd.program import BackendOptions
from updraft_cli.cmd.status.gather import INFERENCE_URL, gather
from updraft_cli.local.running import find_stack

_FILES = {
    "token_file": "File that holds the access token.",
    "ca_file": "CAs of the registry's certificate, PEM; turns TLS on.",
    "cert_file": "Client certificate, PEM, for a registry that requires one.",
    "key_file": "Private key of the client certificate.",
}


def connect(given: Mapping[str, Any], speculator: str | None, *, is_change: bool = False) -> RegistryBackend:
    stack = find_stack(given.get("data"), os.environ, is_only=is_change and not given.get("registry"))
    address = given.get("registry") or (stack.registry_address if stack else DEFAULT_ADDRESS)
    files: dict[str, Any] = {name: given.get(name) for name in _FILES}
    if given.get("server_name") and not files["ca_file"]:
        raise InvalidInput("--server-name needs --ca-file, the CAs of the registry's certificate")
    return RegistryBackend(
        address=address,
        speculator=speculator or given.get("speculator") or "default",
        is_one=bool(speculator),
        credentials=Credentials(**files, server_name=given.get("server_name") or ""),
        reason=given.get("reason") or "",
        local=partial(_look, address, given.get("data"), given.get("inference")),
    )


def _look(address: str, data: Path | None, inference: str | None) -> Installation:
    """Find the stack again at each look, because its processes come and go; those of another registry tell nothing here."""
    stack = find_stack(data, os.environ)
    if address == (stack.registry_address if stack else DEFAULT_ADDRESS):
        return gather(stack, inference)
    return gather(None, inference) if inference else Installation(processes=(), speculators=None)


REGISTRY = BackendOptions(
    title="Registry",
    connect=connect,
    by_need={
        "connection": (
            click.Option(
                ["--speculator"],
                metavar="NAME",
                envvar="UPDRAFT_SPECULATOR",
                show_envvar=True,
                help="The speculator, where NAME is not given.  [default: default]",
            ),
            click.Option(
                ["--registry"],
                metavar="HOST:PORT",
                envvar="UPDRAFT_REGISTRY",
                show_envvar=True,
                help=f"Address of the registry.  [default: that of `updraft up`, else {DEFAULT_ADDRESS}]",
            ),
            *(
                click.Option(
                    [f"--{name.replace('_', '-')}"],
                    type=click.Path(path_type=Path, dir_okay=False),
                    metavar="FILE",
                    envvar=f"UPDRAFT_{name.upper()}",
                    show_envvar=True,
                    help=meaning,
                )
                for name, meaning in _FILES.items()
            ),
            click.Option(
                ["--server-name"],
                metavar="NAME",
                envvar="UPDRAFT_SERVER_NAME",
                show_envvar=True,
                help="Name in the registry's certificate, for a port-forward.  [default: the host of --registry]",
            ),
            click.Option(
                ["--data"],
                type=click.Path(path_type=Path, file_okay=False),
                envvar="UPDRAFT_DATA",
                show_envvar=True,
                help="Data folder of `updraft up`.  [default: the one that runs; required for changes if several run]",
            ),
        ),
        "decision": (click.Option(["--reason"], metavar="TEXT", default="", help="Recorded in the history."),),
        "status": (
            click.Option(
                ["--inference"],
                metavar="URL",
                help=f"URL of the inference process.  [default: that of `updraft up`, else {INFERENCE_URL}]",
            ),
        ),
    },
)
