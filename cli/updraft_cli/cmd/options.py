"""Options that commands of both programs share."""

from collections.abc import Callable
from typing import Any, get_args

import click

from updraft_cli.output import Format

Decorated = Callable[..., Any]
Decorator = Callable[[Decorated], Decorated]


def output(*forms: Format) -> Decorator:
    """Add -o with these formats, or with all; the command gets one as `form`."""
    return click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(forms or get_args(Format)),
        default="table",
        show_default=True,
        help="table and wide for a person; json and yaml for a program; name for the name or version alone."
        if not forms
        else "For a person or for a program.",
    )
