"""The status of an AdaptiveSpeculator: written by the operator only, made anew from what it sees."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from updraft_operator.api.schema import Model, Text


class Condition(Model):
    """One aspect of the state, as everywhere in Kubernetes."""

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
    """Which version has which role; absent: none."""

    stable: int | None = None
    candidate: int | None = None
    previous: int | None = None
    latest: int | None = None


class RolloutStatus(Model):
    """What is tried, and what that waits for."""

    phase: Text | None = None
    """Of the version it is about: Pending, Held, Canary, Stable, Superseded, Rejected, RolledBack, Failed."""
    version: int | None = None
    baseline: int | None = None
    step: int | None = None
    """From 1."""
    steps: int | None = None
    start_time: datetime | None = None
    step_start_time: datetime | None = None
    message: Text | None = None


class ServingStatus(Model):
    """The inference pods."""

    replicas: int | None = None
    ready_replicas: int | None = None
    updated_replicas: int | None = None
    """Pods that serve the stable version, as their engines say."""
    failed_replicas: int | None = None
    selector: Text | None = None
    """Of the scale subresource."""
    url: Text | None = None
    """Where clients in the cluster find it."""


class AcceptanceStatus(Model):
    """Tokens a verify step, as decimals in strings."""

    stable: Text | None = None
    candidate: Text | None = None
    verify_steps: int | None = None
    """That the stable version's figure is over, in thousands rounded down."""


class TrainerStatus(Model):
    """The trainer."""

    state: Text | None = None
    """Training, Starting, Suspended, Failing."""
    last_publish_time: datetime | None = None


class LastFailure(Model):
    """The version that was last found to be no good."""

    version: int
    reason: Text
    message: Text
    time: datetime


class Status(Model):
    """What is."""

    observed_generation: int | None = None
    versions: VersionsStatus | None = None
    rollout: RolloutStatus | None = None
    serving: ServingStatus | None = None
    acceptance: AcceptanceStatus | None = None
    trainer: TrainerStatus | None = None
    last_failure: LastFailure | None = None
    conditions: Conditions = []
