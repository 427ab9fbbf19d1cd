"""One directive per pod: a pure function of the versions' phases and of what the pods hold.

Every directive is a whole state and follows from pod reports, so a lost one is sent again. Two limits hold: a canary is
on at most its share of the pods, and at most `max_pods_swapping` pods change versions at the same time. A pod that has to
wait keeps the version that it holds.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from updraft_registry.rollout.speedup import Speedup
from updraft_registry.rollout.traffic import Traffic
from updraft_registry.rollout.version import (
    NO_DRAFT,
    Rollout,
    Speculator,
    Version,
    in_canary,
    name_of,
    stable,
    with_reason,
)
from updraft_rollouts.terms import Comparison, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """Facts from a pod's last report that decisions need. `refused` is the version that it refused; 0: none."""

    name: str
    boot: str = ""
    """Changes whenever the process of the pod starts."""
    loaded: int = NO_DRAFT
    tensors_digest: str = ""
    prefetched: frozenset[int] = frozenset()
    refused: int = NO_DRAFT
    refusal: str = ""
    is_draining: bool = False
    """It takes no new requests and will stop."""
    is_connected: bool = True
    """It has a stream. Without one it may have crashed."""
    trouble: str = ""
    """Why it cannot follow its directive yet, for example a full disk. This is not the fault of a version."""
    waits_for_restart: int = NO_DRAFT
    """The version that it cannot load before its server restarts, because of the version's shape; 0: none."""
    traffic: Mapping[int, Traffic] = field(default_factory=dict, compare=False)
    """By version. It grows with every report and triggers no decision."""
    domains: Mapping[int, Mapping[str, Traffic]] = field(default_factory=dict, compare=False)
    """By version and domain."""
    speedup: Speedup | None = field(default=None, compare=False)
    """Speedup with the draft that the pod holds; None while it is not known."""

    def holds(self, version: Version) -> bool:
        """Whether the engine reports this version, by number and by content."""
        return self.loaded == version.number and self.tensors_digest == version.tensors_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """The fleet as a decision sees it.

    `directed` is the version that each pod was last directed to serve, as far as this process remembers. `is_settled` is
    False after a start or when all pods were lost: pods may exist that have not reported yet.
    """

    pods: tuple[Pod, ...]
    directed: Mapping[str, int]
    is_settled: bool

    @property
    def num_staying(self) -> int:
        """Pods that are not draining. A canary gets its share of these."""
        return sum(not pod.is_draining for pod in self.pods)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switchback:
    """Serve two versions in turn, each for `slice_s`, counted from `start_ms`."""

    versions: tuple[int, int]
    digests: tuple[str, str]
    slice_s: int
    start_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """The version that a pod should serve (0: no draft), and the versions to keep ready.

    Equal directives have equal content, because pods acknowledge the content.
    """

    serve: int = NO_DRAFT
    digest: str = ""
    prefetch: tuple[int, ...] = ()
    phase: Phase | None = None
    reason: str = ""
    switchback: Switchback | None = None
    is_comparing: bool = False
    """A canary runs, on this pod or on others."""


def share(percent: int, num_pods: int, *, keeps_one: bool) -> int:
    """Number of pods that serve the candidate in a step, at least one. `keeps_one`: one keeps the stable version."""
    wanted = max(1, -(-num_pods * percent // 100))
    return max(0, min(wanted, num_pods - keeps_one))


def size(rollout: Rollout, view: FleetView) -> int:
    """Number of pods that a canary gets a share of: those that are not draining, and its own that may come back."""
    known = {pod.name for pod in view.pods}
    return view.num_staying + sum(name not in known and rollout.evidence.may_return(name) for name in rollout.pods)


def choose(rollout: Rollout, pods: Sequence[Pod], count: int, *, is_open: bool) -> tuple[str, ...]:
    """Up to `count` pods for the candidate: first its current ones, then others if the canary `is_open`.

    A pod that may come back keeps its place, so that a candidate that crashes pods is not given more of them. Other pods
    are chosen by a hash, so that different pods try different candidates.
    """
    known = {pod.name for pod in pods}
    placed = [name for name in rollout.pods if name in known or rollout.evidence.may_return(name)]
    kept = set(sorted(placed, key=lambda name: name not in known)[:count])  # absent pods lose their place first
    chosen = [name for name in placed if name in kept]
    if is_open and len(chosen) < count:
        others = [pod.name for pod in pods if pod.is_connected and not pod.is_draining and pod.name not in kept]
        others.sort(key=lambda name: lot(rollout.candidate, name))
        chosen += others[: count - len(chosen)]
    return tuple(chosen)


def directives(speculator: Speculator, view: FleetView, on_candidate: Iterable[str]) -> dict[str, Directive]:
    """One order a pod; `on_candidate` are the canary's pods."""
    serving, candidate = stable(speculator.versions), in_canary(speculator.versions)
    everyone = _everyone(speculator, serving, candidate)
    targets = {pod.name: everyone for pod in view.pods}
    if speculator.rollout is not None and candidate is not None:
        targets |= dict.fromkeys(on_candidate, _on_canary(speculator, speculator.rollout, serving, candidate))
    return _paced(speculator, view, targets)


def lot(candidate: int, pod: str) -> bytes:
    return hashlib.sha256(f"{candidate}/{pod}".encode()).digest()


def _everyone(speculator: Speculator, serving: Version | None, candidate: Version | None) -> Directive:
    """Directive for pods outside the canary."""
    desired, rollout = speculator.desired, speculator.rollout
    if serving is None:
        is_pinned = desired.pinned == NO_DRAFT
        return Directive(
            reason=with_reason("no draft is pinned", desired.pin_reason) if is_pinned else "no version serves yet",
            is_comparing=rollout is not None and candidate is not None,
        )
    # A candidate that passed its first step will probably become stable.
    is_near = rollout is not None and rollout.step > 0 and candidate is not None
    return Directive(
        serve=serving.number,
        digest=serving.digest,
        prefetch=(serving.number, candidate.number) if is_near and candidate is not None else (serving.number,),
        phase=serving.phase,
        reason=serving.reason,
        is_comparing=rollout is not None and candidate is not None,
    )


def _on_canary(speculator: Speculator, rollout: Rollout, serving: Version | None, candidate: Version) -> Directive:
    """The order of the canary's pods: both versions at hand, so that going back needs no network."""
    plan, served = None, candidate
    if rollout.comparison is Comparison.SWITCHBACK and serving is not None:
        served = serving
        plan = Switchback(
            versions=(serving.number, candidate.number),
            digests=(serving.digest, candidate.digest),
            slice_s=speculator.desired.policy.analysis.switchback_seconds,
            start_ms=rollout.started_ms,
        )
    return Directive(
        serve=served.number,
        digest=served.digest,
        prefetch=(serving.number, candidate.number) if serving is not None else (candidate.number,),
        phase=served.phase,
        reason=candidate.reason,
        switchback=plan,
        is_comparing=True,
    )


def _paced(speculator: Speculator, view: FleetView, targets: Mapping[str, Directive]) -> dict[str, Directive]:
    """The targets, except for pods that have to wait to swap.

    Pods that were directed already go first, because they may be swapping now. Pods in trouble go last, because they may
    stay so. A pod that holds no servable version, or refuses its target, does not count.
    """
    limit = speculator.desired.policy.max_pods_swapping
    if not limit:
        return dict(targets)
    turns = limit if view.is_settled else 0
    servable = {version.number: version for version in speculator.versions if not version.phase.is_condemned}
    paced = {}

    def place(pod: Pod) -> tuple[bool, bool, str]:
        return bool(pod.trouble), view.directed.get(pod.name) != targets[pod.name].serve, pod.name

    for pod in sorted(view.pods, key=place):
        target, held = targets[pod.name], servable.get(pod.loaded)
        if held is None or not pod.holds(held) or _is_there(pod, target) or pod.refused == target.serve != NO_DRAFT:
            paced[pod.name] = target
        elif turns > 0:
            paced[pod.name], turns = target, turns - 1
        else:
            paced[pod.name] = _stay(held, target)
    return paced


def _is_there(pod: Pod, target: Directive) -> bool:
    """Whether a pod with a servable version serves its target already."""
    return pod.loaded in (target.switchback.versions if target.switchback else (target.serve,))


def _stay(held: Version, target: Directive) -> Directive:
    return Directive(
        serve=held.number,
        digest=held.digest,
        prefetch=(held.number, target.serve) if target.serve else (held.number,),
        phase=held.phase,
        reason=f"{name_of(target.serve)} takes over on a few pods at a time",
        is_comparing=target.is_comparing,
    )
