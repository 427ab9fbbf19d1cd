"""Draft versions and their history as plain values, whichever backend they come from. None: this backend does not know it."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    length: float
    """Tokens per verify step."""
    verify_steps: int | None = None
    tokens: int | None = None
    by_position: tuple[float, ...] = ()
    """Share of the draft tokens proposed as the 1st, 2nd, ... of a verify step that was accepted."""
    by_lookahead: tuple[float, ...] = ()
    """Share of the verify steps for which the engine chose 0, 1, 2, ... draft tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainAcceptance:
    """Tokens per verify step in the requests of one domain, None without traffic; "other": of all but the largest domains."""

    domain: str
    stable: float | None
    candidate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineEvaluation:
    """The trainer's comparison on held-out requests, in tokens per verify step."""

    requests: int
    lookahead: int
    baseline_version: int
    baseline_length: float
    candidate_length: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    speculator: str
    namespace: str = ""
    object: str = ""
    """Name of the DraftVersion."""
    version: int
    phase: str
    """In words: `stable`, `rolled back`."""
    since: datetime | None = None
    """Start of the phase."""
    reason: str
    source: str
    """Origin: trainer, imported, initial."""
    parent: int | None
    samples: int | None
    step: int | None = None
    size_bytes: int | None = None
    digest: str
    published: datetime | None
    pinned: bool
    retained: bool
    """Kept regardless of the retention policy."""
    pruned: bool = False
    """Its weights are gone, so it cannot serve."""
    acceptance: Acceptance | None
    pods_loaded: int | None = None
    pods_wanted: int | None = None
    """Pods that have it, and pods that should have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingImport:
    """A DraftImport that is no version yet."""

    namespace: str
    name: str
    speculator: str
    has_failed: bool
    reason: str
    """CamelCase, as in its condition Ready."""
    message: str

    @property
    def text(self) -> str:
        state = "failed" if self.has_failed else "has not finished"
        return f"The DraftImport {self.name} {state} ({self.reason}): {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftList:
    """Versions, newest first."""

    speculator: str
    """Empty: of all speculators."""
    namespace: str = ""
    """Empty: of all namespaces, or of a registry."""
    stable: int = 0
    """Served version; 0: none. Like `candidate`, 0 in a list of several speculators."""
    candidate: int = 0
    """Version in canary; 0: none."""
    pinned: int | None = None
    """0: pinned to no draft. None: not pinned, or several speculators."""
    message: str = ""
    """Condition that the rollout waits for."""
    drafts: tuple[Draft, ...]
    imports: tuple[WaitingImport, ...] = ()
    """Those of a cluster that are no version yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """A change of a version or of the speculator's rollout."""

    time: datetime
    version: int
    """0: it concerns no single version."""
    object: str = ""
    """Name of the DraftVersion."""
    before: str
    phase: str
    """Phase after the change; empty, like `before`, when the phase did not change."""
    reason: str
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesEvent:
    """A Kubernetes Event about a speculator or one of its versions."""

    time: datetime | None
    kind: str
    name: str
    type: str
    """Normal or Warning."""
    reason: str
    message: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Changes of a speculator's versions, oldest first."""

    speculator: str
    namespace: str = ""
    events: tuple[HistoryEntry, ...]
    kubernetes_events: tuple[KubernetesEvent, ...] | None = None
    """None: a registry has none, and a narrow table does not show them."""
    events_problem: str = ""
    """Why the Kubernetes Events could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Origin of the weights."""

    first_trace: str
    last_trace: str
    config_digest: str
    code_version: str
    origin: str = ""
    learning_rate: float = 0.0
    """AdamW's rate after warmup; 0 if unknown."""
    tenants: tuple[str, ...] = ()
    """Hashes of the tenants that it may have learned from."""
    has_more_tenants: bool = False
    """There were more of them than it lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftDetails:
    """All facts about one version; a cluster keeps no manifest."""

    draft: Draft
    speculator: str
    target_fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    draft_vocabulary_fingerprint: str = ""
    tensors_digest: str = ""
    provenance: Provenance | None = None
    config: str = ""
    """Text of config.json."""
    evaluation: OfflineEvaluation | None = None
    tensors: tuple[Tensor, ...] = ()
    history: tuple[HistoryEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    hash: str
    """In hexadecimal; nobody finds the name by it."""
    versions: tuple[int, ...]
    """Versions that may have learned from it, ascending."""
    forgotten: datetime | None
    """When it was ordered to be forgotten last."""
    deleted: bool
    """The trainer has deleted its traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantList:
    speculator: str
    tenants: tuple[Tenant, ...]
    incomplete_versions: tuple[int, ...] = ()
    """Versions that may have learned from tenants that they do not list."""
