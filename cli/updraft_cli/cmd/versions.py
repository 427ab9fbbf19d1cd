"""A draft version on the command line: a number, or a word for what it is now; completed from the registry."""

import asyncio
import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import UpdraftError
from updraft_cli.backends.drafts import phase
from updraft_cli.backends.registry import ROLES, Target
from updraft_cli.cmd import options
from updraft_cli.local.folders import data_folder

_COMPLETION_S = 0.7
"""Somebody has pressed a key and waits; nothing is better than late."""

_MAX_HELP = 60


class VersionType(click.ParamType[int | str]):
    """Converts to a number from `least` on, or to one of `registry.ROLES`."""

    name = "version"

    def __init__(self, *, least: int = 1) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Check what was typed."""
        if isinstance(value, int):
            return value
        word = str(value)
        if word in ROLES:
            return word
        number = word.removeprefix("v")
        if not number.isdecimal() or int(number) < self._least:
            self.fail(f"{value!r} is no version: expected a number from {self._least} on, or {', '.join(ROLES)}", param)
        return int(number)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the words, and the numbers that the registry knows; silent when it is away."""
        words = [CompletionItem(word) for word in ROLES]
        return [item for item in (*_numbers(ctx), *words) if str(item.value).startswith(incomplete)]


VERSION = VersionType()
VERSION_OR_NONE = VersionType(least=0)


def _numbers(ctx: click.Context) -> list[CompletionItem]:
    try:
        versions = asyncio.run(_listed(_target(ctx.params)))
    except (UpdraftError, TimeoutError, OSError):
        return []
    return [CompletionItem(str(version.version), help=_help(version)) for version in versions]


async def _listed(target: Target) -> list[pb.Version]:
    async with asyncio.timeout(_COMPLETION_S), target.connected() as stub:
        request = pb.ListRequest(speculator=target.speculator, page_size=100)
        return list((await stub.List(request, timeout=_COMPLETION_S)).versions)


def _target(given: dict[str, Any]) -> Target:
    """What the options typed so far name; a shell asks before the command itself is run."""
    data = given.get("data") or data_folder(os.environ)
    files = {name: given.get(name) for name in ("token_file", "ca_file", "cert_file", "key_file")}
    return Target(
        registry=options.registry_address(given.get("registry"), Path(data)),
        speculator=given.get("speculator") or "default",
        credentials=Credentials(**files),
    )


def _help(version: pb.Version) -> str:
    told = f"{phase(version.phase)}: {version.reason}"
    return told if len(told) <= _MAX_HELP else f"{told[: _MAX_HELP - 3]}..."
