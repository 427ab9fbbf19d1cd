"""Help for each condition, by its reason, from condition_help.yaml: for `kubectl updraft explain` and the table in the docs.

A reason that is missing there comes from a newer operator; its message still explains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_CONTENT: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())

PARTS: Mapping[str, str] = {
    "Available": "serving",
    "FullyScaled": "serving",
    "RegistryReady": "registry",
    "TrainerReady": "trainer",
}
"""The part whose pods a condition describes."""

READY = ("Accepted", "Available")
"""The conditions that Ready combines; it has the reason of the first one that is not True."""

RESTARTS: Mapping[str, tuple[str, ...]] = {part: tuple(fields) for part, fields in _CONTENT["restarts"].items()}
"""Fields of the spec that are in a part's pod template; changing one replaces its pods."""

RESTARTS_EXCEPTION = (
    "spec.trainer.nodes and spec.trainer.accelerator replace serving pods only if they change the number of trace streams, of"
    " which every rank needs one."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionHelp:
    meaning: str
    action: str = "Nothing to do."

    def about(self, *, name: str, namespace: str, part: str) -> "ConditionHelp":
        """Fill in the names of a resource, and the part that the condition describes."""
        pods = f"-n {namespace} -l updraft.dev/speculator={name},app.kubernetes.io/component={part}"
        words = {"name": name, "namespace": namespace, "part": part, "pods": pods}
        return ConditionHelp(meaning=self.meaning.format(**words), action=self.action.format(**words))


def _table(condition: str, reasons: Mapping[str, Any]) -> dict[str, ConditionHelp]:
    part = PARTS.get(condition)
    of_pods = _CONTENT["pods"] if part else {}
    of_model = _CONTENT["model_pods"] if part in {"serving", "trainer"} else {}
    of_serving = _CONTENT["serving_pods"] if part == "serving" else {}
    return {
        reason: ConditionHelp(**texts) for reason, texts in {**reasons, **of_pods, **of_model, **of_serving}.items()
    }


CONDITION_HELP: Mapping[str, Mapping[str, ConditionHelp]] = {
    condition: _table(condition, reasons) for condition, reasons in _CONTENT["conditions"].items()
}
"""By condition, then by reason. Ready also has the reasons of the conditions in `READY`."""


def condition_help(condition: str, reason: str, *, name: str, namespace: str) -> ConditionHelp | None:
    """Return the help for a condition's reason; None for an unknown one."""
    sources = (condition, *READY) if condition == "Ready" else (condition,)
    for source in sources:
        known = CONDITION_HELP.get(source, {}).get(reason)
        if known is not None:
            return known.about(name=name, namespace=namespace, part=PARTS.get(source, "serving"))
    return None
