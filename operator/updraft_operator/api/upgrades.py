"""When the pods of a resource get another runtime, which is what another operator makes of the same spec."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from updraft_operator.api.schema import Model

_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]"
_DAY = "(Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_WINDOW = rf"^({_DAY}(,{_DAY})* )?{_TIME}-{_TIME}( [A-Za-z0-9_+/-]+)?$"


class UpdateMode(StrEnum):
    """Which restarts for another runtime the operator may begin."""

    AUTOMATIC = "Automatic"
    ON_SPEC_CHANGE = "OnSpecChange"


class UpdatePolicy(Model):
    """When pods get another runtime."""

    mode: UpdateMode = UpdateMode.AUTOMATIC
    """Automatic: one resource after another; OnSpecChange: with other restarts."""
    windows: Annotated[list[Annotated[str, Field(max_length=96, pattern=_WINDOW)]], Field(max_length=8)] = []
    """Times for Automatic, as "Sat,Sun 22:30-04:00 Europe/Berlin"; days and zone are optional."""
