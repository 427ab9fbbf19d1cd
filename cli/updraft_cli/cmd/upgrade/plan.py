"""Which resources an upgrade of the operator has yet to reach, as their conditions say."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Group, RenderableType

from updraft_cli import output
from updraft_cli.backends.objects import Json

_CONDITION = "RuntimeUpToDate"
_UNKNOWN = "the operator has not said yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceUpgrade:
    """One resource."""

    speculator: str
    namespace: str
    current: str
    """The runtime of its pods; empty if not known."""
    available: str
    is_current: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradePlan:
    """All resources in question: first those that are under way or failed, last those that are up to date."""

    resources: tuple[ResourceUpgrade, ...]


def plan_of(contents: Iterable[Json]) -> UpgradePlan:
    first = ("UpdateFailed", "Updating", "WaitingForTurn")
    rank = {reason: place for place, reason in enumerate(first)}
    resources = [_resource(content) for content in contents]
    resources.sort(key=lambda one: (one.is_current, rank.get(one.reason, len(rank)), one.namespace, one.speculator))
    return UpgradePlan(resources=tuple(resources))


def rendered(plan: UpgradePlan, *, is_wide: bool) -> RenderableType:
    del is_wide
    table = output.table("speculator", "runtime", "next", "state")
    for one in plan.resources:
        name = output.speculator_name(one.speculator, one.namespace)
        table.add_row(name, one.current or "-", "-" if one.is_current else one.available or "-", one.message)
    num_left = sum(not one.is_current for one in plan.resources)
    return Group(table, "", f"{output.count(num_left, 'resource')} of {len(plan.resources)} not up to date.")


def _resource(content: Json) -> ResourceUpgrade:
    status = content.get("status", {})
    runtime = status.get("runtime", {})
    found: Json = next((each for each in status.get("conditions", ()) if each["type"] == _CONDITION), {})
    return ResourceUpgrade(
        speculator=content["metadata"]["name"],
        namespace=content["metadata"]["namespace"],
        current=runtime.get("current", ""),
        available=runtime.get("available", ""),
        is_current=found.get("status") == "True",
        reason=found.get("reason", ""),
        message=found.get("message", _UNKNOWN),
    )
