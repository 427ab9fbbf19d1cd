"""Serving pods of somebody else's workload, to which Updraft is attached: which pods they are, and what runs in them.

Everything else about these pods is in their own workload, so `rules` refuses the fields that describe pods of the operator.
"""

import re
from enum import StrEnum
from typing import Annotated

from pydantic import Field
from pydantic.alias_generators import to_camel

from updraft_chassis.errors import InvalidInput
from updraft_operator.api.schema import NAME, Model, Untyped

_NAME = Annotated[str, Field(min_length=1, max_length=253, pattern=NAME)]
_LABEL = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]

_KEY = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
"""Loose: only what a selector's text cannot have is refused here."""


class Mode(StrEnum):
    """Whose the inference pods are."""

    MANAGED = "Managed"
    ATTACHED = "Attached"


class PodSelector(Model):
    """Labels of pods in the same namespace."""

    match_labels: Annotated[dict[str, _LABEL], Field(min_length=1, max_length=16)]
    """Labels that all pods of the workload have, and that no pod of Updraft has."""

    @property
    def text(self) -> str:
        """As the API server takes it. Raises InvalidInput for a name that would be read as something else."""
        if bad := [name for name in self.match_labels if not _KEY.fullmatch(name)]:
            raise InvalidInput(f"serving.attached.selector: {bad[0]!r} is not the name of a label")
        return ",".join(f"{name}={value}" for name, value in sorted(self.match_labels.items()))


class Attached(Model):
    """The workload to attach to."""

    selector: PodSelector
    """Selects its pods."""
    container: _NAME | None = None
    """Container of the server. Defaults to the only one, or to main, vllm, sglang or engine."""
    service_account_name: _NAME = "default"
    """ServiceAccount of its pods, which the registry then lets report."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of the server, which agents of several SGLang ranks call. Defaults to 30000."""
    resources: Untyped = {}
    """Resources of each added container. Defaults to requests without limits, which some quotas refuse."""


_REFUSED = {
    "accelerator": "",
    "resources": "",
    "env": "",
    "pod_template": "",
    "replicas": "self.replicas == 1",
    "max_running_requests": "self.maxRunningRequests == 8",
    "max_context_tokens": "",
    "startup_seconds": "",
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
        (
            "!has(self.attached) || !has(self.tlsSecretRef)",
            "tlsSecretRef: with mode Attached, give the certificate to the server in your workload",
        ),
    )
