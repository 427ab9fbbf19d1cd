"""A length of time on the command line: `90`, `90s`, `15m`, `1h`, as whole seconds."""

import re
from typing import Any

import click

_PATTERN = re.compile(r"(\d+)\s*(s|m|min|h|d)?")
_UNITS_S = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_MAX_S = 2**32 - 1
"""The registry counts seconds in 32 bits."""


class DurationType(click.ParamType[int]):
    """Converts to seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _PATTERN.fullmatch(str(value).strip().lower())
        seconds = int(match[1]) * _UNITS_S[match[2]] if match else _MAX_S + 1
        if seconds > _MAX_S:
            self.fail(f"{value!r} is not a duration; expected something like 90s, 15m or 1h", param, ctx)
        return seconds


DURATION = DurationType()
