"""DraftVersion: one draft, as an object to look at, wait for and retain.

The operator makes one for each version whose weights the registry keeps. A person who applies one with source Imported
brings a draft of their own: it is pulled into the registry, which numbers it.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from updraft_operator.api.schema import Model, Text, rules, same
from updraft_operator.api.speculator import Metadata, Name, SecretName
from updraft_operator.api.status import Conditions


class Source(StrEnum):
    """Where a version comes from."""

    INITIAL = "Initial"
    TRAINER = "Trainer"
    IMPORTED = "Imported"


class SpeculatorName(Model):
    """The AdaptiveSpeculator of the same namespace that it is for."""

    name: Annotated[Name, Field(max_length=40)]


class Training(Model):
    """Where the weights were learned."""

    samples: int | None = None
    first_trace_id: Text | None = None
    last_trace_id: Text | None = None


class DraftVersionSpec(Model):
    """Which draft it is. A person may change retain and secretRef later, nothing else."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.speculatorRef == oldSelf.speculatorRef && self.source == oldSelf.source && "
                + " && ".join(same(field) for field in ("version", "uri", "digest", "parentVersion")),
                "a DraftVersion is immutable except for retain and secretRef",
            ),
            (
                "self.source == 'Imported' || has(self.version)",
                "version is required unless source is Imported: the registry numbers what is imported",
            ),
            (
                "self.source != 'Imported' || has(self.uri) || has(self.version)",
                "an import needs uri: where the draft is",
            ),
        )
    )

    speculator_ref: SpeculatorName
    source: Source = Source.IMPORTED
    version: Annotated[int, Field(ge=1)] | None = None
    """Its number in the registry; leave it out of an import."""
    uri: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^(hf|s3|gs|az|pvc)://[^\s]+$")] | None = None
    """Of an import: the folder of an EAGLE-3 draft in Hugging Face layout, config.json and model.safetensors."""
    secret_ref: SecretName | None = None
    """Of an import: Secret whose entries are variables of the download."""
    digest: Annotated[str, Field(max_length=71, pattern=r"^sha256:[a-f0-9]{64}$")] | None = None
    """Of the weights file; an import of other bytes is refused."""
    parent_version: Annotated[int, Field(ge=1)] | None = None
    """The one that it was learned from."""
    training: Training | None = None
    retain: bool = False
    """Keep the weights whatever revisionHistoryLimit says."""


class Phase(StrEnum):
    """Where a version stands."""

    IMPORTING = "Importing"
    PENDING = "Pending"
    HELD = "Held"
    CANARY = "Canary"
    STABLE = "Stable"
    SUPERSEDED = "Superseded"
    REJECTED = "Rejected"
    ROLLED_BACK = "RolledBack"
    FAILED = "Failed"


class PhaseChange(Model):
    """A change of phase."""

    time: datetime
    phase: Phase
    actor: Text
    reason: Text


class PodsStatus(Model):
    """Pods by what their engines say."""

    loaded: int | None = None
    target: int | None = None
    """Pods that should serve it now."""


class DraftAcceptance(Model):
    """Tokens a verify step on live traffic, as a decimal in a string."""

    length: Text | None = None


class DraftVersionStatus(Model):
    """What became of it."""

    observed_generation: int | None = None
    version: int | None = None
    """Its number in the registry, also of an import."""
    phase: Phase | None = None
    reason: Text | None = None
    pods: PodsStatus | None = None
    acceptance: DraftAcceptance | None = None
    promoted_time: datetime | None = None
    history: Annotated[list[PhaseChange], Field(max_length=20)] = []
    """The last changes of phase, oldest first."""
    conditions: Conditions = []


class DraftVersion(Model):
    """One draft of an AdaptiveSpeculator."""

    metadata: Metadata
    spec: DraftVersionSpec
    status: DraftVersionStatus = DraftVersionStatus()
