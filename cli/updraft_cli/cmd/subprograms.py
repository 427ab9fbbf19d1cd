"""Commands that run another part's own program: the command line knows none of its code, and may be installed without it."""

import importlib.util
import subprocess
import sys
from typing import NoReturn

from updraft_chassis.errors import NotFound

FORMATS = {"table": "text", "json": "json", "yaml": "yaml"}
"""What the programs call our formats."""


def run(part: str, *arguments: str) -> NoReturn:
    """Run `python -m updraft_<part>`, and exit with its exit code."""
    if importlib.util.find_spec(f"updraft_{part}") is None:
        raise NotFound(f"the {part} is not installed here: run this where it runs, or `pip install updraft[{part}]`")
    command = [sys.executable, "-m", f"updraft_{part}", *arguments]
    raise SystemExit(subprocess.run(command, check=False).returncode)  # noqa: S603 - our own program
