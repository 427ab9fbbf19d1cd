"""All facts that a console shows, read at one time, as plain values."""

from dataclasses import dataclass
from datetime import datetime

from updraft_cli.backends.drafts import Draft, HistoryEntry, WaitingImport
from updraft_cli.backends.installation import Installation, Serving
from updraft_cli.backends.speculators import Condition, ServedVersion, Speculator, Speedup


@dataclass(frozen=True, slots=True, kw_only=True)
class PodState:
    """One inference pod. None: this backend does not know it."""

    name: str
    state: str
    """In words: ready, connected, disconnected, draining, waiting, failed, not ready."""
    problem: str = ""
    """Why it does not serve what it should; empty if it does."""
    version: int | None = None
    """Draft version that its engine holds; 0: no draft."""
    digest: str = ""
    """Digest of the tensors that its engine holds."""
    prefetched: tuple[int, ...] = ()
    engine: str = ""
    """Engine and version, or the image in a cluster."""
    device: str = ""
    """The device that its engine reports; empty where no registry is read."""
    requested_device: str = ""
    """The device that it requests from Kubernetes; empty for a registry."""
    node: str = ""
    restarts: int | None = None
    started: datetime | None = None
    last_report: datetime | None = None
    running_requests: int | None = None
    swaps: int | None = None
    refused_swaps: int | None = None
    swap_pause_s: float | None = None
    """Time that all its swaps paused decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodDetails:
    """One pod, and what it has served since its process started."""

    pod: PodState
    traffic: tuple[ServedVersion, ...] = ()
    speedup: Speedup | None = None
    capture_problem: str = ""
    """Why it captures nothing; empty if it can."""
    conditions: tuple[Condition, ...] = ()
    """Those of Kubernetes."""
    serving: Serving | None = None
    """Its own metrics, if they can be read."""
    serving_problem: str = ""
    """Why they cannot be read; empty if they can, or if nobody tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculatorSnapshot:
    """One speculator with its versions, changes and pods."""

    speculator: Speculator
    drafts: tuple[Draft, ...] = ()
    """Newest first."""
    imports: tuple[WaitingImport, ...] = ()
    """Those of a cluster that are no version yet."""
    history: tuple[HistoryEntry, ...] = ()
    """The last changes, oldest first."""
    pods: tuple[PodState, ...] = ()
    pods_problem: str = ""
    """Why the pods could not be read; empty if they could."""
    registry_problem: str = ""
    """Why the registry of a cluster cannot be asked; empty if it can, is about to be, or is the only source."""
    reported: datetime | None = None
    """When the registry of a cluster was read, if that was long before the rest."""

    @property
    def name(self) -> str:
        return self.speculator.name

    def draft(self, number: int) -> Draft | None:
        return next((draft for draft in self.drafts if draft.version == number), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    time: datetime
    installation: Installation
    speculators: tuple[SpeculatorSnapshot, ...]

    def speculator(self, name: str) -> SpeculatorSnapshot | None:
        return next((one for one in self.speculators if one.name == name), None)
