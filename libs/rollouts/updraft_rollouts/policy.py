"""How versions of one speculator roll out: fields, defaults and bounds of `RolloutPolicy` in registry.proto.

Field names are those of the proto messages. On the wire a field that is unset, or zero where zero means nothing else,
takes the registry's default.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar, get_type_hints

from google.protobuf.message import Message

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput
from updraft_rollouts.terms import Comparison, OnInconclusive, Strategy, Term

D = TypeVar("D")
T = TypeVar("T", bound=Term)

MAX_STEPS = 20
MAX_SECONDS = 30 * 24 * 3600
"""One month. A longer time is probably in the wrong unit."""
MIN_SWITCHBACK_SECONDS = 2
"""Pods serve shorter turns for this long."""
MIN_GATE_SAMPLES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStep:
    """One step of a canary: the share of the pods, and how long all of them serve the candidate before the next step."""

    pods_percent: int
    hold_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Requirements of the live gate for a canary."""

    interval_seconds: int = 30
    """Minimum length of a slice. One slice is one observation."""
    min_samples: int = 200
    """Requests that the candidate must serve before it can win."""
    failure_limit: int = 2
    """Errors and crashes with the candidate that are tolerated."""
    max_acceptance_regression_percent: int = 2
    """The candidate fails once it is worse than this with confidence."""
    max_latency_regression_percent: int = 5
    """The candidate fails once it is slower than this with confidence, and wins only while its estimate is below this."""
    max_domain_regression_percent: int = 5
    """The candidate fails once it is worse than this in one domain with confidence, and wins only while no domain's estimate
    is worse. It is larger than that for all traffic, because a domain has less evidence."""
    on_inconclusive: OnInconclusive = OnInconclusive.ROLLBACK
    dry_run: bool = False
    """Verdicts are reported but not acted on. The steps run by time and end in a promotion."""
    confidence: float = 0.95
    """In (0, 1). The rate of false promotions is at most one minus this, however often the evidence is read."""
    comparison: Comparison = Comparison.AUTO
    switchback_seconds: int = 20
    """Length of one turn of a switchback."""


USELESS_ACCEPTANCE_LENGTH = 1.05
"""Tokens per verify step below which a draft saves less than it costs: 1 is the value without a draft."""

ACCEPTANCE_IS_HIGHER = "acceptance is significantly higher"
"""The live gate's condition for a pass. Verdicts and `updraft rollout policy` use these words, and those of the functions
below."""


def acceptance_is_lower(percent: float, where: str = "") -> str:
    """When the live gate fails a candidate, by `max_acceptance_regression_percent` or `max_domain_regression_percent`."""
    return f"acceptance {where and where + ' '}is significantly lower by more than {percent:g} %"


def latency_is_higher(percent: float) -> str:
    """When the live gate fails a candidate, by `max_latency_regression_percent`."""
    return f"latency is significantly higher by more than {percent:g} %"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineGate:
    """Requirements of the offline gate for an evaluation. `confidence` is two-sided, in (0, 1)."""

    min_samples: int = 8
    min_gain_percent: float = 1.0
    confidence: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPolicy:
    """How versions of one speculator roll out. `problem` checks the bounds."""

    strategy: Strategy = Strategy.CANARY
    steps: tuple[RolloutStep, ...] = (
        RolloutStep(pods_percent=10, hold_seconds=120),
        RolloutStep(pods_percent=50, hold_seconds=120),
    )
    analysis: Analysis = Analysis()
    auto_rollback: bool = True
    """Without it, a canary that failed stays where it is until a person decides."""
    progress_deadline_seconds: int = 900
    """Time from the first step on, without pauses. See OnInconclusive."""
    max_pods_swapping: int = 0
    """Pods that may change versions at the same time; 0: all."""
    revision_history_limit: int = 10
    """Servable versions that are kept in addition to the live ones."""
    revision_history_megabytes: int = 0
    """Maximum of all kept weights in 10^6 bytes, but versions in use stay beyond it too; 0: no limit."""
    offline_gate: OfflineGate = OfflineGate()

    def to_proto(self) -> pb.RolloutPolicy:
        return pb.RolloutPolicy(**asdict(self, dict_factory=_to_numbers))

    @classmethod
    def from_proto(cls, message: pb.RolloutPolicy, defaults: "RolloutPolicy") -> "RolloutPolicy":
        """Fill unset fields from `defaults`; InvalidInput if the result breaks a bound."""
        merged = defaults.to_proto()
        if message.steps:
            merged.ClearField("steps")
        merged.MergeFrom(message)
        policy = _read(cls, merged)
        if reason := problem(policy):
            raise InvalidInput(reason)
        return policy


DEFAULT = RolloutPolicy()


def problem(policy: RolloutPolicy) -> str:
    """The first bound that a policy breaks, by its field on the wire; empty if it breaks none."""
    return next(_problems(policy), "")


def _problems(policy: RolloutPolicy) -> Iterator[str]:
    is_canary = policy.strategy is Strategy.CANARY
    if is_canary and not policy.steps:
        yield "steps is empty, but a canary needs at least one step"
    yield from _step_problems(policy.steps)
    total = sum(step.hold_seconds for step in policy.steps) if is_canary else 1
    if not total <= policy.progress_deadline_seconds <= MAX_SECONDS:
        bounds = f"expected at least {total}, which the steps hold in total, and at most {MAX_SECONDS}"
        yield f"progress_deadline_seconds is {policy.progress_deadline_seconds}, {bounds}"
    yield from _analysis_problems(policy.analysis)
    yield from _gate_problems(policy.offline_gate)


def _step_problems(steps: tuple[RolloutStep, ...]) -> Iterator[str]:
    if len(steps) > MAX_STEPS:
        yield f"steps has {len(steps)} entries, expected at most {MAX_STEPS}"
    for number, step in enumerate(steps, start=1):
        if not 1 <= step.pods_percent <= 100:
            yield f"pods_percent of step {number} is {step.pods_percent}, expected 1 to 100"
    for before, after in pairwise(steps):
        if after.pods_percent < before.pods_percent:
            yield f"pods_percent must not decrease from step to step, got {before.pods_percent} and then {after.pods_percent}"


def _analysis_problems(analysis: Analysis) -> Iterator[str]:
    if not 0.0 < analysis.confidence < 1.0:
        yield f"analysis.confidence is {analysis.confidence:g}, expected more than 0 and less than 1"
    for name, least, most in (
        ("max_acceptance_regression_percent", 0, 100),
        ("max_latency_regression_percent", 0, 100),
        ("max_domain_regression_percent", 0, 100),
        ("interval_seconds", 1, MAX_SECONDS),
        ("switchback_seconds", MIN_SWITCHBACK_SECONDS, MAX_SECONDS),
    ):
        value = getattr(analysis, name)
        if not least <= value <= most:
            yield f"analysis.{name} is {value}, expected {least} to {most}"
    if analysis.min_samples < 1:
        yield f"analysis.min_samples is {analysis.min_samples}, expected at least 1"


def _gate_problems(gate: OfflineGate) -> Iterator[str]:
    if gate.min_samples < MIN_GATE_SAMPLES:
        yield f"offline_gate.min_samples is {gate.min_samples}, expected at least {MIN_GATE_SAMPLES}"
    if not 0.0 < gate.confidence < 1.0:
        yield f"offline_gate.confidence is {gate.confidence:g}, expected more than 0 and less than 1"
    if not -100.0 < gate.min_gain_percent < 1000.0:
        yield f"offline_gate.min_gain_percent is {gate.min_gain_percent:g}, expected -100 to 1000"


def _read(kind: type[D], message: Message, prefix: str = "") -> D:
    """A dataclass from the message that has the same fields."""
    types = get_type_hints(kind)
    return kind(**{name: _value(types[name], getattr(message, name), prefix + name) for name in types})


def _value(kind: Any, value: Any, field: str) -> Any:
    if kind == tuple[RolloutStep, ...]:
        return tuple(_read(RolloutStep, step) for step in value)
    if issubclass(kind, Term):
        return _term(kind, value, field)
    return _read(kind, value, f"{field}.") if isinstance(value, Message) else value


def _term(kind: type[T], number: int, field: str) -> T:
    term = kind.from_proto(number)
    if term is None:
        raise InvalidInput(f"{field} is {number}, expected one of {', '.join(term.name for term in kind)}")
    return term


def _to_numbers(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.to_proto() if isinstance(value, Term) else value for name, value in fields}
