"""The status of an AdaptiveSpeculator: written only by the operator, from what it observes."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from updraft_operator.api.schema import Model, Text

MAX_DOMAINS = 17
"""As many as the registry tells of one version. A canary has two versions, whose callers may name other domains."""

MAX_PHASES = 32
"""As many as the registry takes."""


PENDING = "Pending"
"""Reason of Ready until the operator has written a status."""


class Condition(Model):
    """One aspect of the state, as in all Kubernetes APIs."""

    type: Annotated[str, Field(max_length=316)]
    status: Literal["True", "False", "Unknown"]
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    last_transition_time: datetime
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    message: Annotated[str, Field(max_length=32_768)]


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


class VersionsStatus(Model):
    """Versions by role. A role without a version is absent."""

    stable: int | None = None
    candidate: int | None = None
    previous: int | None = None
    latest: int | None = None


class RolloutStatus(Model):
    """The current rollout, and what it is waiting for."""

    phase: Text | None = None
    """Phase of the version: Pending, Held, Canary, Stable, Superseded, Rejected, RolledBack, Failed."""
    version: int | None = None
    baseline: int | None = None
    step: int | None = None
    """Current step, counted from 1."""
    steps: int | None = None
    start_time: datetime | None = None
    step_start_time: datetime | None = None
    message: Text | None = None


class ServingStatus(Model):
    """The inference pods."""

    replicas: int | None = None
    desired_replicas: int | None = None
    """Pods that should run now: 0 while suspended; with mode Attached, as many as have our agent."""
    ready_replicas: int | None = None
    updated_replicas: int | None = None
    """Pods whose engines report the stable version."""
    failed_replicas: int | None = None
    reached_replicas: int | None = None
    """Most pods that were ready together, at most those desired now."""
    selector: Text | None = None
    """Label selector of the pods, for the scale subresource."""
    url: Text | None = None
    """Address for clients in the cluster. Absent with mode Attached: they have your own."""


class DomainStatus(Model):
    """A domain as callers name it; "other": all but the largest."""

    domain: Text
    stable: Text | None = None
    candidate: Text | None = None


class AcceptanceStatus(Model):
    """Tokens per verify step and what they are worth, as decimal strings."""

    stable: Text | None = None
    candidate: Text | None = None
    verify_steps: int | None = None
    """Verify steps behind the stable version's value, rounded down to thousands."""
    speedup: Text | None = None
    """Speed of decoding over that without speculation, measured by the pods on their traffic."""
    speedup_low: Text | None = None
    """Lower bound of its 90 % interval."""
    speedup_high: Text | None = None
    """Upper bound of its 90 % interval."""
    domains: Annotated[list[DomainStatus], Field(max_length=MAX_DOMAINS)] | None = None
    """Those of the stable version, then the candidate's others; largest first, "other" last."""


class PhaseStatus(Model):
    """A phase of training, and its share of the last minute."""

    phase: Text
    percent: int


class ProgressStatus(Model):
    """How training goes, as the trainer last reported it."""

    device: Text | None = None
    """Device that training actually uses: a GPU's name, or "cpu (2 threads)"."""
    ranks: int | None = None
    """Processes that train together."""
    tokens_per_second: int | None = None
    """Tokens trained on per second of the last minute."""
    flops_utilization_percent: int | None = None
    """Model FLOPs utilization. Absent on a CPU."""
    phases: Annotated[list[PhaseStatus], Field(max_length=MAX_PHASES)] | None = None
    """Where the time goes, the largest share first; what is missing to 100 passed between phases."""
    steps_to_estimate: int | None = None
    """Optimizer steps until the next estimate."""
    estimate_time: datetime | None = None
    """When the next estimate is due if weights or held-out requests have changed."""
    last_save_time: datetime | None = None


class TrainerStatus(Model):
    """The trainer."""

    state: Text | None = None
    """One of Training, Starting, Suspended, Disabled, Failing."""
    last_publish_time: datetime | None = None
    message: Text | None = None
    """The last publication, or the reason why nothing is published."""
    progress: ProgressStatus | None = None
    """Absent while no trainer reports."""


class LastFailure(Model):
    """The version that most recently failed."""

    version: int
    reason: Text
    message: Text
    time: datetime


class RuntimeStatus(Model):
    """The runtime of pods."""

    current: Text | None = None
    available: Text | None = None
    last_update_time: datetime | None = None


class Status(Model):
    """Observed state."""

    observed_generation: int | None = None
    versions: VersionsStatus | None = None
    rollout: RolloutStatus | None = None
    serving: ServingStatus | None = None
    acceptance: AcceptanceStatus | None = None
    trainer: TrainerStatus | None = None
    last_failure: LastFailure | None = None
    runtime: RuntimeStatus | None = None
    conditions: Conditions = []
