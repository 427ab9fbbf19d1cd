"""DraftVersion: one version of a draft, as an object to inspect, wait for and retain.

The operator creates one for every version whose weights the registry keeps. A DraftVersion with source Imported that a
user applies imports a draft: the operator pulls it into the registry, which assigns its number.
"""

from datetime import datetime
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from updraft_operator.api.schema import Model, Text, rules, same
from updraft_operator.api.speculator import Metadata, Name, SecretName
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
    """Identifies the draft. Only retain and secretRef can be changed later."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.speculatorRef == oldSelf.speculatorRef && self.source == oldSelf.source && "
                + " && ".join(same(field) for field in ("version", "uri", "digest", "parentVersion")),
                "a DraftVersion is immutable except for retain and secretRef",
            ),
            (
                "self.source == 'Imported' || has(self.version)",
                "version is required unless source is Imported: the registry numbers imports",
            ),
            (
                "self.source != 'Imported' || has(self.uri) || has(self.version)",
                "an import needs uri: the location of the draft",
            ),
        )
    )

    speculator_ref: SpeculatorName
    source: Source = Source.IMPORTED
    version: Annotated[int, Field(ge=1)] | None = None
    """Number of the version in the registry. Omit it to import a draft."""
    uri: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^(hf|s3|gs|az|pvc)://[^\s]+$")] | None = None
    """Imports only: folder of an EAGLE-3 draft in Hugging Face layout (config.json and model.safetensors)."""
    secret_ref: SecretName | None = None
    """Imports only: Secret whose entries become environment variables of the download."""
    digest: Annotated[str, Field(max_length=71, pattern=r"^sha256:[a-f0-9]{64}$")] | None = None
    """Digest of the weights file. An import whose weights have another digest fails."""
    parent_version: Annotated[int, Field(ge=1)] | None = None
    """Version that training started from."""
    training: Training | None = None
    retain: bool = False
    """Keep the weights regardless of revisionHistoryLimit."""


IMPORTING: Final = "Importing"
"""Phase of an import that has no number in the registry yet."""


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
    version: int | None = None
    """Number of the version in the registry, for imports too."""
    phase: Text | None = None
    """Importing, or a phase of the registry: Pending, Held, Canary, Stable, Superseded, Rejected, RolledBack, Failed."""
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
