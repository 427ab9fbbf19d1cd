"""All that a plan is made from: what is wished, what is, and what the registry says. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.pods import PodState


class ConnectionState(StrEnum):
    """How it stands with the registry."""

    CONNECTED = "Connected"
    STARTING = "Starting"
    """Its pod is not ready, so it is not asked."""
    CONNECTING = "Connecting"
    """It was asked, and has not answered yet: what was said of it before stands."""
    UNREACHABLE = "Unreachable"
    DENIED = "Denied"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryView:
    """What the registry said last; while it is away, the last it said, which nothing is deleted by."""

    connection: ConnectionState = ConnectionState.STARTING
    problem: str = ""
    state: pb.SpeculatorState | None = None
    versions: tuple[pb.Version, ...] = ()
    transitions: tuple[pb.Transition, ...] = ()
    """Oldest first."""

    @property
    def is_connected(self) -> bool:
        """What it said is what is."""
        return self.connection is ConnectionState.CONNECTED and self.state is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An object that the API server did not take, or that is somebody else's."""

    ref: Ref
    digest: str
    """Of the manifest that was refused; another one is tried."""
    reason: str
    """NameConflict, InvalidPodTemplate, QuotaExceeded, Forbidden."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSecret:
    """The Secret with the registry's tokens, as far as it is known."""

    tokens: Mapping[str, str] = field(default_factory=dict)
    """By role; empty: there is no such Secret yet."""
    redis_url: str = ""
    exists: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One look at everything around one speculator."""

    speculator: AdaptiveSpeculator
    config: OperatorConfig
    children: Mapping[Ref, Child] = field(default_factory=dict)
    pods: tuple[PodState, ...] = ()
    drafts: tuple[DraftVersion, ...] = ()
    registry: RegistryView = field(default_factory=RegistryView)
    access: AccessSecret = field(default_factory=AccessSecret)
    redis_url: str = ""
    """The operator's own Redis, which goes into the Secret; empty: there is none."""
    fresh_tokens: Mapping[str, str] = field(default_factory=dict)
    """Random ones, for what the Secret does not have yet."""
    missing_secrets: tuple[str, ...] = ()
    """Secrets that the spec names and that are not there."""
    refusals: tuple[Refusal, ...] = ()
    settled: Mapping[Ref, tuple[str, str]] = field(default_factory=dict)
    """By object, the hash of what was applied and the resource version it came to: what the API server made of it is
    what it is, even where it looks different from what was said."""
    ending_s: float | None = None
    """When it was first seen to be deleted, on the clock of a plan's `now_s`."""
    cleanup_s: float = 60.0
    """How long a deletion may wait for what is outside the cluster; then it is left there, and said so."""
    status_due_s: float = float("-inf")
    """When a status may be written again in which only measurements changed, on the clock of a plan's `now_s`."""

    @property
    def name(self) -> str:
        """Of the speculator."""
        return self.speculator.metadata.name

    def pods_of(self, part: str) -> tuple[PodState, ...]:
        """Pods of a part."""
        return tuple(pod for pod in self.pods if pod.part == part)

    def child(self, kind: str, part: str) -> Child | None:
        """An object of a part."""
        return self.children.get(Ref(kind, names.child(self.name, part)))
