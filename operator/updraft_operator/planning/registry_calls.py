"""Calls that a registry needs, because its state differs from the spec."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed, phase_name
from updraft_operator.planning.policy import is_followed, policy
from updraft_rollouts.terms import Phase


class RegistryVerb(StrEnum):
    """Names of the registry's methods, except Release."""

    SET_POLICY = "SetPolicy"
    PIN = "Pin"
    UNPIN = "Unpin"
    PAUSE = "Pause"
    RESUME = "Resume"
    PROMOTE = "Promote"
    RETAIN = "Retain"
    RELEASE = "Release"
    """Stop retaining."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryCall:
    verb: RegistryVerb
    version: int = 0
    digest: str = ""
    """Digest of the policy to set: after a refusal, a different policy is tried."""

    @property
    def ref(self) -> Ref:
        return Ref("Registry", f"{self.verb}-{self.version}")


def registry_calls(observed: Observed) -> Iterator[RegistryCall]:
    """Those that a registry needs to follow the spec; none while its state is not known."""
    state, view, rollout = observed.registry.state, observed.registry, observed.speculator.spec.rollout
    if state is None or not view.is_connected:
        return
    if not is_followed(policy(rollout), state.policy):
        serialized = policy(rollout).SerializeToString(deterministic=True)
        yield RegistryCall(verb=RegistryVerb.SET_POLICY, digest=hashlib.sha256(serialized).hexdigest())
    known = {version.version: phase_name(version.phase) for version in view.versions}
    pinned = state.pinned if state.HasField("pinned") else None
    to_pin = rollout.pinned
    if to_pin is None and pinned is not None:
        yield RegistryCall(verb=RegistryVerb.UNPIN)
    elif to_pin is not None and to_pin != pinned and _can_pin(to_pin, known):
        yield RegistryCall(verb=RegistryVerb.PIN, version=to_pin)
    if rollout.paused != state.paused and known:
        yield RegistryCall(verb=RegistryVerb.PAUSE if rollout.paused else RegistryVerb.RESUME)
    promoted, waiting = rollout.promoted_version, (Phase.PENDING, Phase.HELD, Phase.CANARY)
    if promoted is not None and to_pin is None and known.get(promoted) in waiting:
        yield RegistryCall(verb=RegistryVerb.PROMOTE, version=promoted)
    yield from _retentions(observed)


def _can_pin(version: int, known: Mapping[int, Phase]) -> bool:
    return bool(known) if version == 0 else version in known and not known[version].is_condemned


def _retentions(observed: Observed) -> Iterator[RegistryCall]:
    desired = {draft.spec.version: draft.spec.retain for draft in observed.drafts}
    for version in observed.registry.versions:
        retain = desired.get(version.version, version.retain)
        if retain != version.retain:
            yield RegistryCall(verb=RegistryVerb.RETAIN if retain else RegistryVerb.RELEASE, version=version.version)
