"""DraftVersion: one version of a draft, as an object to inspect, wait for and retain.

The operator creates one for every version whose weights the registry keeps, and deletes it when they are gone. Users change
only `retain`.
"""

from datetime import datetime
from typing import Annotated

from pydantic import ConfigDict, Field

from updraft_operator.api.schema import Model, Text, rules, same
from updraft_operator.api.speculator import Metadata, Name
from updraft_operator.api.status import Conditions
from updraft_rollouts.terms import Source


class SpeculatorName(Model):
    """The AdaptiveSpeculator in the same namespace that the draft is for."""

    name: Annotated[Name, Field(max_length=40)]


class Training(Model):
    """The samples that the weights were trained on."""

    samples: Annotated[int, Field(ge=0)] | None = None
    first_trace_id: Text | None = None
    last_trace_id: Text | None = None


class DraftVersionSpec(Model):
    """Identifies the version. Only retain can be changed."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.speculatorRef == oldSelf.speculatorRef && "
                + " && ".join(same(field) for field in ("source", "version", "digest", "parentVersion")),
                "a DraftVersion is immutable except for retain",
            ),
        )
    )

    speculator_ref: SpeculatorName
    source: Source
    """Origin of the version. That of a DraftImport is Imported."""
    version: Annotated[int, Field(ge=1)]
    """Number of the version in the registry."""
    digest: Annotated[str, Field(max_length=71, pattern=r"^sha256:[a-f0-9]{64}$")] | None = None
    """Digest of the weights file."""
    parent_version: Annotated[int, Field(ge=1)] | None = None
    """Version that training started from."""
    training: Training | None = None
    retain: bool = False
    """Keep the weights regardless of revisionHistoryLimit."""


class PhaseChange(Model):
    """A change of phase."""

    time: datetime
    phase: Text
    actor: Text
    reason: Text


class PodsStatus(Model):
    """Number of pods, as reported by their engines."""

    loaded: int | None = None
    target: int | None = None
    """Pods that should serve this version now."""


class DraftAcceptance(Model):
    """Tokens per verify step on live traffic, as a decimal string."""

    length: Text | None = None


class DraftVersionStatus(Model):
    """Observed state."""

    observed_generation: int | None = None
    draft_import_name: Text | None = None
    """The DraftImport that it came from, if any."""
    phase: Text | None = None
    """Phase in the registry: Pending, Held, Canary, Stable, Superseded, Rejected, RolledBack, Failed."""
    reason: Text | None = None
    pods: PodsStatus | None = None
    acceptance: DraftAcceptance | None = None
    promoted_time: datetime | None = None
    history: Annotated[list[PhaseChange], Field(max_length=20)] = []
    """The latest changes of phase, oldest first."""
    conditions: Conditions = []


class DraftVersion(Model):
    """One draft version of an AdaptiveSpeculator."""

    metadata: Metadata
    spec: DraftVersionSpec
    status: DraftVersionStatus = DraftVersionStatus()
