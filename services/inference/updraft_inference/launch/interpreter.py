"""Finds the release of an engine in the environment of a Python interpreter, without importing the engine."""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from updraft_chassis.errors import InvalidInput
from updraft_inference.tap.server_kind import ServerKind

_LOOK_S = 60.0
_ASK = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A release, e.g. 0.32.0."""

    version: str
    is_for_cpu: bool


async def installed(kind: ServerKind, python: Path) -> Installed:
    """Ask the interpreter. Raises InvalidInput if it cannot be run, or if its engine is missing or too old."""
    found = await _versions(kind, python)
    chosen = next((name for name in kind.distributions if name in found), None)
    if chosen is None:
        raise InvalidInput(
            f"the environment of {python} has no {kind.engine}: install it there, or name another interpreter with"
            f" {kind.setting('PYTHON')}"
        )
    return judged(kind, chosen, found[chosen])


def judged(kind: ServerKind, distribution: str, version: str) -> Installed:
    """An installed release. Raises InvalidInput if it is too old."""
    if parts(version) < kind.oldest:
        oldest = ".".join(map(str, kind.oldest))
        raise InvalidInput(f"{kind.engine} {version} is too old: Updraft needs {oldest} or later")
    return Installed(version=version, is_for_cpu=distribution.endswith("-cpu") or version.endswith("+cpu"))


def parts(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, e.g. (0, 32, 0) of 0.32.0.dev1+cpu; empty without any."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()


async def _versions(kind: ServerKind, python: Path) -> Mapping[str, str]:
    wanted = f"{kind.setting('PYTHON')} must be the Python interpreter of an environment with {kind.engine}"
    try:
        process = await asyncio.create_subprocess_exec(
            *(str(python), "-c", _ASK, *kind.distributions),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise InvalidInput(f"cannot start {python} ({error.strerror}); {wanted}") from error
    try:
        async with asyncio.timeout(_LOOK_S):
            output, complaint = await process.communicate()
        answer: Mapping[str, str] = json.loads(output)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise InvalidInput(f"{python} did not answer within {_LOOK_S:.0f} s; {wanted}") from None
    except ValueError:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:]
        raise InvalidInput(f"{python} is not a Python interpreter{f' ({last[0]})' if last else ''}; {wanted}") from None
    return answer
