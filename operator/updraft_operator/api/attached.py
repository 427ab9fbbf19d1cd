"""Serving pods of somebody else's workload, to which Updraft is attached: which pods they are, and what runs in them.

Everything else about these pods is in their own workload, so `rules` refuses the fields that describe pods of the operator.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field
from pydantic.alias_generators import to_camel

from updraft_operator.api.schema import NAME, Model

_NAME = Annotated[str, Field(min_length=1, max_length=253, pattern=NAME)]


class Mode(StrEnum):
    """Whose the inference pods are."""

    MANAGED = "Managed"
    ATTACHED = "Attached"


class PodSelector(Model):
    """Labels of pods in the same namespace."""

    match_labels: Annotated[
        dict[str, str], Field(min_length=1, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
    ]
    """Labels that all pods of the workload have."""

    @property
    def text(self) -> str:
        """As the API server takes it."""
        return ",".join(f"{name}={value}" for name, value in sorted(self.match_labels.items()))


class Attached(Model):
    """The workload to attach to."""

    selector: PodSelector
    """Selects its pods."""
    container: _NAME | None = None
    """Container of the server. Defaults to the only one, or to main, vllm, sglang or engine."""
    service_account_name: _NAME = "default"
    """ServiceAccount of its pods, which the registry then lets report."""


_REFUSED = {
    "image": "",
    "resources": "",
    "env": "",
    "pod_template": "",
    "args": "",
    "replicas": "self.replicas == 1",
    "max_running_requests": "self.maxRunningRequests == 8",
    "max_context_tokens": "",
    "termination_grace_period_seconds": "self.terminationGracePeriodSeconds == 60",
    "rolling_update": "",
}
"""Fields that belong into the workload, each with the expression that it is unset; empty: it has no default."""


def rules() -> tuple[tuple[str, str], ...]:
    """CEL rules of `spec.serving`, and their messages."""
    own = ((to_camel(field), unset) for field, unset in _REFUSED.items())
    return (
        (
            "has(self.attached) == (self.mode == 'Attached')",
            "attached describes the pods of mode Attached: set both, or neither",
        ),
        *(
            (
                f"!has(self.attached) || {unset or f'!has(self.{field})'}",
                f"{field}: with mode Attached, set it in your workload",
            )
            for field, unset in own
        ),
        (
            "!has(self.attached) || !has(self.apiKeysSecretRef)",
            "apiKeysSecretRef: with mode Attached, require keys in your workload, as a pod without the plugin would be open",
        ),
    )
