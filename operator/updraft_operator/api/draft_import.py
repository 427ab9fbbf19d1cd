"""DraftImport: a draft from elsewhere that becomes a version of an AdaptiveSpeculator.

A user applies it, or the operator does for spec.draft.initial. A Job pulls the draft into the registry, which assigns its
number; the operator then shows it as a DraftVersion with source Imported.
"""

from typing import Annotated

from pydantic import ConfigDict, Field

from updraft_operator.api.draft_version import SpeculatorName
from updraft_operator.api.schema import NAMES_A_CLAIM, Model, rules, same
from updraft_operator.api.speculator import InitialDraft, Metadata
from updraft_operator.api.status import Conditions


class DraftImportSpec(InitialDraft):
    """Identifies the draft. Only secretRef can be changed later; an import that failed is then tried again."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            NAMES_A_CLAIM,
            (
                f"self.speculatorRef == oldSelf.speculatorRef && self.uri == oldSelf.uri && {same('digest')}",
                "a DraftImport is immutable except for secretRef: create another one for another draft",
            ),
        )
    )

    speculator_ref: SpeculatorName


class DraftImportStatus(Model):
    """Observed state."""

    observed_generation: int | None = None
    version: int | None = None
    """Number of the version in the registry, once it is imported."""
    digest: Annotated[str, Field(max_length=71)] | None = None
    """Digest of that version's weights, to detect a new registry."""
    job_name: Annotated[str, Field(max_length=63)] | None = None
    """The Job of the latest attempt."""
    conditions: Conditions = []


class DraftImport(Model):
    """A draft to import as a version of an AdaptiveSpeculator."""

    metadata: Metadata
    spec: DraftImportSpec
    status: DraftImportStatus = DraftImportStatus()
