"""The input of a plan: the desired state, the observed objects, and the registry's state, with functions to read the latter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.redis import Place, wanted_place
from updraft_operator.manifests.redis_users import RedisUser, Role
from updraft_operator.manifests.tls.terms import Certificate
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.pods import PodState, Selection
from updraft_rollouts.terms import Phase


class ConnectionState(StrEnum):
    CONNECTED = "Connected"
    STARTING = "Starting"
    """Its pod is not ready, so the operator does not connect."""
    CONNECTING = "Connecting"
    """No answer yet: earlier conditions stay as they are."""
    UNREACHABLE = "Unreachable"
    DENIED = "Denied"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryView:
    """The registry's last known state. While it is not connected, nothing is deleted because of it."""

    connection: ConnectionState = ConnectionState.STARTING
    problem: str = ""
    state: pb.SpeculatorState | None = None
    versions: tuple[pb.Version, ...] = ()
    transitions: tuple[pb.Transition, ...] = ()
    """Oldest first."""
    pods: tuple[pb.PodState, ...] = ()
    """Last reports of the connected pods, if they are attached."""
    has_all_pods: bool = True
    """False shortly after the connection was made, while pods connect again, too."""

    @property
    def is_connected(self) -> bool:
        """Whether the state is current."""
        return self.connection is ConnectionState.CONNECTED and self.state is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A write that the API server or the registry refused, or that the operator itself refuses: it would take over someone
    else's object, or make pods with the wrong number of GPUs or with keys in their arguments."""

    ref: Ref
    digest: str
    """Digest of the refused manifest; a different manifest is tried."""
    reason: str
    """NameConflict, InvalidPodTemplate, GPUMismatch, KeyInArguments, QuotaExceeded, Forbidden, InvalidRollout."""
    message: str

    @property
    def write(self) -> tuple[Ref, str]:
        """The refused write: its object and digest."""
        return self.ref, self.digest


class MissingSecret(NamedTuple):
    """A Secret that the spec names and that pods could not use."""

    name: str
    problem: str = ""
    """Why it is not valid; empty if it does not exist or lacks an entry."""

    @property
    def text(self) -> str:
        return f"{self.name} ({self.problem})" if self.problem else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class UsersProblem:
    """Why the users of a speculator are not on the operator's Redis."""

    reason: str
    """RedisUsersRefused, RedisUnreachable."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything observed about one speculator at one moment."""

    speculator: AdaptiveSpeculator
    config: OperatorConfig
    children: Mapping[Ref, Child] = field(default_factory=dict)
    pods: tuple[PodState, ...] = ()
    attached: Selection = field(default_factory=Selection)
    """Selected pods of somebody else; the states of ours are in `pods`, too."""
    drafts: tuple[DraftVersion, ...] = ()
    imports: tuple[DraftImport, ...] = ()
    registry: RegistryView = field(default_factory=RegistryView)
    redis_url: str = ""
    """The operator's Redis with its administrator, who appears in no object; empty if there is none."""
    redis_urls: Mapping[Role, str] = field(default_factory=dict)
    """The addresses in the Secrets of the roles; none of a Secret that does not exist."""
    dedicated_url: str = ""
    """The Redis that the operator runs for this speculator, with its administrator; empty if there can be none."""
    dedicated_urls: Mapping[Role, str] = field(default_factory=dict)
    """The addresses in the Secrets of the roles for that Redis."""
    rotations: Mapping[Place, Mapping[Role, str]] = field(default_factory=dict)
    """By Redis of the operator and role, the request that the password in the Secret was made for; empty for none."""
    right_users: frozenset[RedisUser] = frozenset()
    """The users that every node of their Redis had when it last answered."""
    ready_places: frozenset[Place] = frozenset()
    """Redis of the operator that answer and have the users of this speculator."""
    unread: int | None = None
    """Traces in the Redis that is being left, counted after nobody wrote there any more; None: not counted yet."""
    fresh_passwords: Mapping[tuple[Place, Role], str] = field(default_factory=dict)
    """New random passwords, for Secrets without one."""
    certificates: Mapping[str, Certificate] = field(default_factory=dict)
    """Those in the Secrets of the registry, of a dedicated Redis and of the ports of metrics, by part; none of a Secret without
    a valid one."""
    is_preview: bool = False
    """Plan also what waits for a certificate, because nothing is signed in a dry run."""
    users_problem: UsersProblem | None = None
    redis_max_memory: int = 0
    """Bytes that the Redis of the operator that the trainer reads from may use; 0 without a limit, or if it did not say so."""
    has_turn: bool = False
    """Whether its pods may restart for another runtime now."""
    upgrades_stopped_by: str = ""
    """Another resource that does not come back from its update; empty if there is none."""
    missing_secrets: tuple[MissingSecret, ...] = ()
    """Secrets that the spec names and that do not exist, lack an entry or are not valid."""
    refusals: tuple[Refusal, ...] = ()
    settled: Mapping[Ref, tuple[str, str]] = field(default_factory=dict)
    """By object, the hash of the applied manifest and the resulting resource version: while both are unchanged, the object
    counts as current, even if the API server changed what was applied."""
    ending_s: float | None = None
    """When the deletion was first observed, on the clock of a plan's `now_s`."""
    cleanup_s: float = 60.0
    """How long a deletion may wait for data outside the cluster; after that the data are left there, with an Event."""
    status_due_s: float = float("-inf")
    """When a status with only new measurements may be written again, on the clock of a plan's `now_s`."""

    @property
    def name(self) -> str:
        return self.speculator.metadata.name

    @property
    def lacks_redis_key(self) -> bool:
        """Whether it has or wants a dedicated Redis whose administrator the operator does not know: its objects stay."""
        if self.dedicated_url or not self.config.has_dedicated_redis:
            return False
        is_wanted = wanted_place(self.speculator, self.config) is Place.DEDICATED
        return is_wanted or self.child("StatefulSet", names.REDIS) is not None

    def pods_of(self, part: str) -> tuple[PodState, ...]:
        return tuple(pod for pod in self.pods if pod.part == part)

    def urls_at(self, place: Place) -> Mapping[Role, str]:
        """The addresses in the Secrets of the roles for one Redis of the operator."""
        return self.dedicated_urls if place is Place.DEDICATED else self.redis_urls

    def identity(self, ref: Ref) -> tuple[str, str]:
        """UID and resource version of an object, the latter empty for a pod. KeyError if it was not observed, because only such
        objects are deleted."""
        if (child := self.children.get(ref)) is not None:
            return child.uid, child.resource_version
        pods = {Ref("Pod", pod.name): (pod.uid, "") for pod in self.pods}
        drafts = {Ref("DraftVersion", each.metadata.name): each.metadata for each in self.drafts}
        return pods[ref] if ref in pods else (drafts[ref].uid, drafts[ref].resource_version)

    def child(self, kind: str, part: str) -> Child | None:
        return self.children.get(Ref(kind, names.child(self.name, part)))


def phase_name(number: pb.Phase.ValueType) -> Phase:
    return Phase.from_proto(number) or Phase.PENDING


def acceptance_length(state: pb.SpeculatorState, version: int) -> tuple[float | None, int]:
    """Acceptance length and verify steps of a version over the traffic of all connected pods; None without traffic."""
    for traffic in state.traffic:
        if traffic.version == version and traffic.verify_steps:
            return traffic.tokens / traffic.verify_steps, traffic.verify_steps
    return None, 0


def learning_of(state: pb.SpeculatorState | None) -> pb.Learning | None:
    """The trainer's progress; None while no trainer reports."""
    return state.learning if state is not None and state.HasField("learning") else None


def is_trained(version: pb.Version) -> bool:
    return version.manifest.source == pb.SOURCE_TRAINER


def domain_lengths(state: pb.SpeculatorState, version: int) -> dict[str, float]:
    """Acceptance length of a version by domain, the largest domain first; empty for version 0."""
    of_version = (traffic for traffic in state.traffic if version and traffic.version == version)
    return {one.domain: one.tokens / one.verify_steps for t in of_version for one in t.domains if one.verify_steps}


def moment(unix_s: float) -> datetime:
    """A time as the API writes it, to the second."""
    return datetime.fromtimestamp(int(unix_s), UTC)


def moment_ms(unix_ms: int) -> datetime | None:
    """A time from the registry; None for 0, which means no time."""
    return moment(unix_ms / 1000) if unix_ms else None
