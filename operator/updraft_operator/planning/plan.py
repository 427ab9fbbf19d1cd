"""What to do about one speculator, decided from one look at everything. Pure, and total: the same look gives the same
plan, and a look at a world that the plan was carried out on gives an empty one.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from updraft_operator.api import names
from updraft_operator.api.draft_version import DraftVersionStatus, Phase
from updraft_operator.api.schema import Model
from updraft_operator.api.speculator import DeletionPolicy
from updraft_operator.api.status import Condition, Status
from updraft_operator.manifests import importing, registry, serving, trainer
from updraft_operator.manifests.manifest import Manifest, manifest, marked
from updraft_operator.manifests.redis import has_redis, mark
from updraft_operator.planning import versions
from updraft_operator.planning.compare import is_current
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed, Refusal
from updraft_operator.planning.policy import is_followed, policy
from updraft_operator.planning.status import status, without_measurements
from updraft_operator.planning.times import moment

_POLL_S = 1.0

_OWN_ROLE = "operate"

_BAD_PHASES = versions.CONDEMNED

_ONCE = ("Job", "PersistentVolumeClaim")
"""Made once: what they ask for cannot be changed, and a claim that somebody grew stays grown."""


class RegistryVerb(StrEnum):
    """What a registry can be told."""

    SET_POLICY = "SetPolicy"
    PIN = "Pin"
    UNPIN = "Unpin"
    PAUSE = "Pause"
    RESUME = "Resume"
    PROMOTE = "Promote"
    RETAIN = "Retain"
    RELEASE = "Release"
    """No longer retain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryCall:
    """Something to tell the registry."""

    verb: RegistryVerb
    version: int = 0
    policy: str = ""
    """Digest of the policy that is to be set."""

    @property
    def ref(self) -> Ref:
        """What a refusal of it is kept under."""
        return Ref("Registry", f"{self.verb}-{self.version}")

    @property
    def digest(self) -> str:
        """What a refusal is of: another policy is tried."""
        return self.policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that a person may want to know happened."""

    kind: str
    name: str
    uid: str
    reason: str
    message: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Things to do, in this order."""

    apply: tuple[Manifest, ...] = ()
    delete: tuple[Ref, ...] = ()
    calls: tuple[RegistryCall, ...] = ()
    status: dict[str, Any] | None = None
    draft_statuses: tuple[tuple[str, dict[str, Any]], ...] = ()
    events: tuple[Event, ...] = ()
    finalizer: Literal["add", "remove", ""] = ""
    cleans_up: bool = False
    """Remove what is outside the cluster first."""
    again_s: float | None = None
    """Look again after this long, whatever happens."""

    @property
    def is_empty(self) -> bool:
        """Nothing differs from what is wished."""
        return self == Plan(again_s=self.again_s)


def make_plan(observed: Observed, *, now_unix_s: float, now_s: float) -> Plan:
    """Decide. `now_s` is on a clock that only runs forward."""
    now = moment(now_unix_s)
    metadata = observed.speculator.metadata
    if metadata.deletion_timestamp is not None:
        return _ending(observed, now_s)
    observed = replace(observed, refusals=_standing(observed))
    applied, deleted = _objects(observed)
    told, events, again_s = _told(observed, now, now_s)
    drafts = list(_drafts_told(observed, now))
    return Plan(
        apply=applied,
        delete=deleted,
        calls=tuple(each for each in _calls(observed) if (each.ref, each.digest) not in _refused(observed)),
        status=told,
        draft_statuses=tuple((name, written(new)) for name, new, _ in drafts),
        events=(*events, *(event for _, _, event in drafts if event is not None)),
        finalizer=_finalizer(observed),
        again_s=again_s,
    )


def written(part: Model) -> dict[str, Any]:
    """As it goes on the wire."""
    return part.model_dump(mode="json", by_alias=True, exclude_none=True)


def objects(observed: Observed) -> tuple[Manifest, ...]:
    """All objects that there should be, marked, in the order in which they are made."""
    owner, config = observed.speculator, replace(observed.config, redis_mark=_redis_mark(observed))
    deployment = observed.child("Deployment", names.SERVING)
    is_scaled = deployment is not None and deployment.is_scaled_by_others
    built = [
        _account(observed),
        *registry.objects(owner, config),
        *trainer.objects(owner, config),
        *serving.objects(owner, config, sets_replicas=not is_scaled),
    ]
    return tuple(marked(each) for each in built)


def _objects(observed: Observed) -> tuple[tuple[Manifest, ...], tuple[Ref, ...]]:
    desired = [*objects(observed), *(marked(each) for each in _jobs(observed))]
    refused = _refused(observed)
    apply = [each for each in desired if not _is_done(each, observed) and (ref(each), hash_of(each)) not in refused]
    secret = [each for each in _secret(observed) if (ref(each), "") not in refused]
    mirrors = [each for each in versions.mirrors(observed) if (ref(each), "") not in refused]
    keep = {ref(each) for each in desired}
    delete = [Ref("DraftVersion", name) for name in versions.outdated(observed)]
    delete += [each.ref for each in observed.children.values() if _is_left(each, keep, observed)]
    return (*secret, *apply, *mirrors), tuple(sorted(delete))


def _standing(observed: Observed) -> tuple[Refusal, ...]:
    """Refusals of what is still wished; one that is mended by another spec, or by the old one again, is over."""
    if not observed.refusals:
        return ()
    desired = [*objects(observed), *(marked(each) for each in _jobs(observed))]
    asked = {(ref(each), hash_of(each)) for each in desired if not _is_done(each, observed)}
    asked |= {(each.ref, each.digest) for each in _calls(observed)}
    return tuple(each for each in observed.refusals if not each.digest or (each.ref, each.digest) in asked)


def _refused(observed: Observed) -> set[tuple[Ref, str]]:
    """What is not asked for again; a Secret and a mirror have no mark."""
    return {(refusal.ref, refusal.digest) for refusal in observed.refusals}


def ref(content: Manifest) -> Ref:
    """Which object a manifest is of."""
    return Ref(content["kind"], content["metadata"]["name"])


def hash_of(content: Manifest) -> str:
    """The mark of a marked manifest."""
    return str(content["metadata"]["annotations"][names.APPLIED])


def _is_done(desired: Manifest, observed: Observed) -> bool:
    child = observed.children.get(ref(desired))
    if child is None:
        return False
    if child.is_ending:  # it is made again once it is gone
        return True
    if child.ref.kind in _ONCE and child.owner_uid:
        return True
    if observed.settled.get(child.ref) == (hash_of(desired), child.resource_version):
        return True
    return is_current(desired, child)


def _is_left(child: Child, keep: set[Ref], observed: Observed) -> bool:
    """Whether an object of ours is wished no longer; what is not ours ends in its own way, and data with its owner."""
    is_ours = child.owner_uid == observed.speculator.metadata.uid
    return is_ours and child.ref.kind not in _ONCE and child.ref not in keep and not child.is_ending


def _account(observed: Observed) -> Manifest:
    content = {"automountServiceAccountToken": False}
    return manifest(observed.speculator, "v1", "ServiceAccount", observed.name, "account", **content)


def _secret(observed: Observed) -> tuple[Manifest, ...]:
    """Once: who changes its entries has a reason, and who deletes one gets it anew."""
    access, redis_url = observed.access, observed.redis_url if _uses_own_redis(observed) else ""
    is_whole = all(access.tokens.get(role) for role in registry.ROLES)
    if access.exists and is_whole and access.redis_url == redis_url:
        return ()
    tokens = {role: access.tokens.get(role) or observed.fresh_tokens.get(role, "") for role in registry.ROLES}
    return (registry.access(observed.speculator, tokens, redis_url),)


def _redis_mark(observed: Observed) -> str:
    """Keyed with the token of the operator's own calls, which is in the Secret, or on its way there."""
    key = observed.access.tokens.get(_OWN_ROLE) or observed.fresh_tokens.get(_OWN_ROLE, "")
    return mark(observed.redis_url, key) if _uses_own_redis(observed) else ""


def _uses_own_redis(observed: Observed) -> bool:
    return has_redis(observed.speculator, observed.config) and observed.speculator.spec.traces.redis is None


def _jobs(observed: Observed) -> Iterator[Manifest]:
    if not observed.registry.is_connected:
        return
    for each in versions.imports(observed):
        if each.number is None and not each.failure and each.draft.metadata.deletion_timestamp is None:
            yield importing.job(
                observed.speculator,
                each.draft,
                versions.job_name(each.draft),
                observed.config,
                is_first=not observed.registry.versions,
            )


def _calls(observed: Observed) -> Iterator[RegistryCall]:
    state, view, rollout = observed.registry.state, observed.registry, observed.speculator.spec.rollout
    if state is None or not view.is_connected:
        return
    if not is_followed(policy(rollout), state.policy):
        said = policy(rollout).SerializeToString(deterministic=True)
        yield RegistryCall(verb=RegistryVerb.SET_POLICY, policy=hashlib.sha256(said).hexdigest())
    known = {version.version: versions.phase_name(version.phase) for version in view.versions}
    pinned = state.pinned if state.HasField("pinned") else None
    desired = rollout.pinned_version
    if desired is None and pinned is not None:
        yield RegistryCall(verb=RegistryVerb.UNPIN)
    elif desired is not None and desired != pinned and _can_pin(desired, known):
        yield RegistryCall(verb=RegistryVerb.PIN, version=desired)
    if rollout.paused != state.paused and known:
        yield RegistryCall(verb=RegistryVerb.PAUSE if rollout.paused else RegistryVerb.RESUME)
    waiting = (Phase.PENDING, Phase.HELD, Phase.CANARY)
    promoted = rollout.promoted_version
    if promoted is not None and desired is None and known.get(promoted) in waiting:
        yield RegistryCall(verb=RegistryVerb.PROMOTE, version=promoted)
    yield from _retentions(observed)


def _can_pin(desired: int, known: Mapping[int, Phase]) -> bool:
    if desired == 0:
        return bool(known)
    return desired in known and known[desired] not in _BAD_PHASES


def _retentions(observed: Observed) -> Iterator[RegistryCall]:
    """One object that says so is enough: an import and a mirror may be of the same version."""
    desired: dict[int, bool] = {}
    for draft in observed.drafts:
        number = versions.number_of(observed, draft)
        if number is not None:
            desired[number] = desired.get(number, False) or draft.spec.retain
    for version in observed.registry.versions:
        number, is_wished = version.version, desired.get(version.version, version.retain)
        if is_wished != version.retain:
            yield RegistryCall(verb=RegistryVerb.RETAIN if is_wished else RegistryVerb.RELEASE, version=number)


def _told(observed: Observed, now: datetime, now_s: float) -> tuple[dict[str, Any] | None, list[Event], float | None]:
    before, new = observed.speculator.status, status(observed, now)
    if new == before:
        return None, [], None
    if without_measurements(new) == without_measurements(before):
        wait_s = observed.status_due_s - now_s
        if wait_s > 0:
            return None, [], wait_s
    return written(new), list(_transitions(observed, before, new)), None


def _transitions(observed: Observed, before: Status, new: Status) -> Iterator[Event]:
    """Of conditions; the first ones of a resource are no news."""
    old = {condition.type: condition for condition in before.conditions}
    for condition in new.conditions:
        last = old.get(condition.type)
        if last is not None and (last.status, last.reason) != (condition.status, condition.reason):
            yield _event(observed, condition)


def _event(observed: Observed, condition: Condition) -> Event:
    metadata = observed.speculator.metadata
    is_bad = condition.status == "False" and condition.type in ("Accepted", "Ready", "ServingReady", "RegistryReady")
    return Event(
        kind="AdaptiveSpeculator",
        name=metadata.name,
        uid=metadata.uid,
        reason=condition.reason,
        message=f"{condition.type} is {condition.status}: {condition.message}"[:1000],
        is_warning=is_bad and condition.reason != "Suspended",
    )


def _drafts_told(observed: Observed, now: datetime) -> Iterator[tuple[str, DraftVersionStatus, Event | None]]:
    for draft, new in versions.statuses(observed, now):
        before = draft.status
        if new == before or _is_measurement(before, new, observed):
            continue
        event = None
        if new.phase != before.phase and new.phase is not None:
            event = Event(
                kind="DraftVersion",
                name=draft.metadata.name,
                uid=draft.metadata.uid,
                reason=new.phase.value,
                message=(new.reason or "")[:1000],
                is_warning=new.phase in _BAD_PHASES,
            )
        yield draft.metadata.name, new, event


def _is_measurement(before: DraftVersionStatus, new: DraftVersionStatus, observed: Observed) -> bool:
    """Only its acceptance is another: told together with the speculator's own, at its pace."""
    if before.model_copy(update={"acceptance": None}) != new.model_copy(update={"acceptance": None}):
        return False
    told = observed.speculator.status.acceptance
    length = new.acceptance.length if new.acceptance else None
    return told is None or length not in (told.stable, told.candidate)


def _finalizer(observed: Observed) -> Literal["add", "remove", ""]:
    has_it = names.FINALIZER in observed.speculator.metadata.finalizers
    wants_it = observed.speculator.spec.deletion_policy is DeletionPolicy.DELETE
    if has_it == wants_it:
        return ""
    return "add" if wants_it else "remove"


def _ending(observed: Observed, now_s: float) -> Plan:
    """The children go with their owner by Kubernetes' own hand; only what is outside waits for ours, and not long.

    Who writes traces goes first, or there would be new ones afterwards.
    """
    spec, metadata = observed.speculator.spec, observed.speculator.metadata
    if names.FINALIZER not in metadata.finalizers:
        return Plan()
    if spec.deletion_policy is DeletionPolicy.RETAIN:
        return Plan(finalizer="remove")
    writers = [observed.child("Deployment", part) for part in (names.SERVING, names.TRAINER)]
    left = tuple(each.ref for each in writers if each is not None and not each.is_ending)
    if left:
        return Plan(delete=left, again_s=_POLL_S)
    waited_s = now_s - (now_s if observed.ending_s is None else observed.ending_s)
    grace_s = spec.serving.termination_grace_period_seconds
    if waited_s > grace_s + observed.cleanup_s:
        event = Event(
            kind="AdaptiveSpeculator",
            name=metadata.name,
            uid=metadata.uid,
            reason="CleanupGivenUp",
            message=f"the traces could not be deleted within {waited_s:.0f} s and are left in Redis",
            is_warning=True,
        )
        return Plan(finalizer="remove", events=(event,))
    if waited_s < grace_s and any(pod.part in (names.SERVING, names.TRAINER) for pod in observed.pods):
        return Plan(again_s=_POLL_S)
    return Plan(finalizer="remove", cleans_up=True)
