"""The plan for one speculator, decided from one observation. Pure and total: the same observation gives the same plan,
and an observation made after the plan was applied gives an empty one.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.api.draft_version import DraftVersion, DraftVersionStatus
from updraft_operator.api.schema import Model
from updraft_operator.api.speculator import AdaptiveSpeculator, DeletionPolicy, Spec
from updraft_operator.api.status import PENDING, Condition, Status
from updraft_operator.manifests import api_keys, gpus, trainer
from updraft_operator.manifests.manifest import Manifest, marked
from updraft_operator.manifests.redis import Place
from updraft_operator.manifests.redis_users import RedisUser, Role
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import CertificateOrder
from updraft_operator.planning import imports, lineage, trainers, versions
from updraft_operator.planning.compare import is_current
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed, Refusal, moment
from updraft_operator.planning.registry_calls import RegistryCall, registry_calls
from updraft_operator.planning.runtime.certificates import is_held
from updraft_operator.planning.runtime.records import Settled, settle
from updraft_operator.planning.runtime.upgrade import APPLYING, Upgrade, assess, new_turn
from updraft_operator.planning.serving.tls_port import secret_problem
from updraft_operator.planning.status import status, without_measurements
from updraft_operator.planning.traces import access
from updraft_operator.planning.traces.places import left_server, places, tls_servers
from updraft_rollouts.terms import Phase

_CONDEMNED = frozenset(phase.value for phase in Phase if phase.is_condemned)

_SWAPPING = "DraftNotLoaded"
_POLL_S = 1.0

ATTACHED_S = 15.0
"""Period of looking at pods of other workloads. They are not watched, because a watch would report all pods of a cluster."""

_REQUIRED = ("Accepted", "Ready", "Available", "Attached", "RegistryReady")
"""Conditions whose failure is a warning."""

_ONCE = ("Job", "PersistentVolumeClaim")
"""Created once: their specs are immutable, and a claim that someone expanded stays expanded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A Kubernetes Event to create."""

    kind: str
    name: str
    uid: str
    reason: str
    message: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Steps, in this order."""

    certificates: tuple[CertificateOrder, ...] = ()
    apply: tuple[Manifest, ...] = ()
    delete: tuple[Ref, ...] = ()
    calls: tuple[RegistryCall, ...] = ()
    status: dict[str, Any] | None = None
    draft_statuses: tuple[tuple[Ref, dict[str, Any]], ...] = ()
    """Those of DraftVersions and DraftImports."""
    events: tuple[Event, ...] = ()
    finalizer: Literal["add", "remove", ""] = ""
    users: tuple[RedisUser, ...] | None = None
    """Users on the operator's Redis; None: leave them as they are."""
    dedicated_users: tuple[RedisUser, ...] = ()
    """Users on a Redis of its own."""
    is_moving: bool = False
    """Traces move to another Redis, or passwords are replaced: tell when users become right."""
    reads: Place | None = None
    """Where the trainer is pointed."""
    drains: Place | None = None
    """Count the traces that are left there."""
    leaves_shared: bool = False
    """Delete its streams on the operator's Redis before its users: its traces are elsewhere."""
    cleans_up: bool = False
    """Delete data outside the cluster first."""
    again_s: float | None = None
    """Reconcile again after this time."""
    needs_plan: bool = False
    """Whether another plan is due then, and not only statuses."""
    upgrade: Upgrade | None = None
    """None if nothing was decided about it."""


def make_plan(observed: Observed, *, now_unix_s: float, now_s: float) -> Plan:
    """Decide. `now_s` is on a monotonic clock."""
    now = moment(now_unix_s)
    metadata = observed.speculator.metadata
    if metadata.deletion_timestamp is not None:
        return _ending(observed, now_s)
    if observed.lacks_redis_key:
        return _statuses(observed, now, now_s, None)
    made, upgrade = _made(observed, now)
    observed = replace(observed, refusals=_refusals(observed, made.objects))
    orders = tls.orders(observed.speculator, observed.config, observed.certificates, tls_servers(observed), now_unix_s)
    applied, deleted, held = _objects(observed, made.objects, orders)
    decided = places(observed)
    pending = {*map(ref, applied), *held, *(refusal.ref for refusal in observed.refusals)}
    return replace(
        _statuses(observed, now, now_s, upgrade),
        certificates=tuple(order for order in orders if (Ref("Secret", order.secret), "") not in _refused(observed)),
        apply=applied,
        delete=deleted,
        calls=tuple(call for call in registry_calls(observed) if (call.ref, call.digest) not in _refused(observed)),
        finalizer=_finalizer(observed),
        users=tuple(access.users(observed, Place.SHARED, decided, pending)),
        dedicated_users=tuple(access.users(observed, Place.DEDICATED, decided, pending))
        if observed.dedicated_url
        else (),
        is_moving=bool(decided.waits) or _is_rotating(observed),
        reads=decided.targets.get(Role.READER),
        drains=decided.drains,
        leaves_shared=decided.wanted not in (None, Place.SHARED) and decided.is_settled,
        upgrade=upgrade,
    )


def make_refresh(observed: Observed, *, now_unix_s: float, now_s: float) -> Plan:
    """The statuses alone, after a change from which nothing else follows, such as a measurement."""
    if observed.speculator.metadata.deletion_timestamp is not None:
        return Plan()
    needs_objects = observed.refusals or problems(observed.speculator.spec)
    if needs_objects and not observed.lacks_redis_key:
        observed = replace(observed, refusals=_refusals(observed, objects(observed)))
    return _statuses(observed, moment(now_unix_s), now_s, None)


def _made(observed: Observed, now: datetime) -> tuple[Settled, Upgrade]:
    """The desired objects, and where they are with the runtime of this operator."""
    decided = places(observed)
    made = settle(observed, decided, None)
    own = _own_refusals(observed, tuple(map(marked, made.objects)))
    upgrade = assess(replace(observed, refusals=(*observed.refusals, *own)), made.held, now)
    if observed.has_turn and (upgrade.may_apply or upgrade.stage in APPLYING):
        made = settle(observed, decided, new_turn(observed, now))
    return replace(made, objects=tuple(map(marked, made.objects))), upgrade


def _statuses(observed: Observed, now: datetime, now_s: float, upgrade: Upgrade | None) -> Plan:
    """Without `upgrade`, the statuses say about it what they said."""
    new_status, events, again_s = _status(observed, now, now_s, upgrade)
    if observed.speculator.spec.serving.is_attached:  # nothing says when such pods change
        again_s = min(again_s or ATTACHED_S, ATTACHED_S)
    next_s = _next_plan_s(observed, now, upgrade)
    is_plan = next_s is not None and (again_s is None or next_s < again_s)
    drafts = [*_draft_statuses(observed, now), *_import_statuses(observed, now)]
    return Plan(
        status=new_status,
        draft_statuses=tuple((target, written(new)) for target, new, _ in drafts),
        events=(*events, *(event for _, _, event in drafts if event is not None)),
        again_s=next_s if is_plan else again_s,
        needs_plan=is_plan,
    )


def _next_plan_s(observed: Observed, now: datetime, upgrade: Upgrade | None) -> float | None:
    """Seconds until something follows from the time alone; None if nothing does."""
    renewal_s = _renewal_s(observed, now)
    due_s = None if upgrade is None or upgrade.due_s is None else max(1.0, upgrade.due_s - now.timestamp())
    return min((each for each in (renewal_s, due_s) if each is not None), default=None)


def _renewal_s(observed: Observed, now: datetime) -> float | None:
    """Seconds until a certificate is to be renewed; None if that is over, or not this operator's task."""
    if not observed.config.tls.can_sign:
        return None
    left_s = (certificate.renewed_s - now.timestamp() for certificate in observed.certificates.values())
    return min((left for left in left_s if left > 0), default=None)


def written(part: Model) -> dict[str, Any]:
    """The model as JSON on the wire."""
    return part.model_dump(mode="json", by_alias=True, exclude_none=True)


def objects(observed: Observed) -> tuple[Manifest, ...]:
    """All desired objects, marked, in the order of their creation."""
    return tuple(marked(content) for content in settle(observed, places(observed), None).objects)


def _is_rotating(observed: Observed) -> bool:
    asked = observed.speculator.metadata.rotation
    return bool(asked) and bool(access.rotation_waits(observed, places(observed)))


def _objects(
    observed: Observed, made: tuple[Manifest, ...], orders: Collection[CertificateOrder]
) -> tuple[tuple[Manifest, ...], tuple[Ref, ...], set[Ref]]:
    """Objects to apply, those to delete, and those that wait for a certificate."""
    desired, refused = [*made, *map(marked, imports.jobs(observed))], _refused(observed)
    changed = [new for new in desired if not _is_done(new, observed) and (ref(new), hash_of(new)) not in refused]
    held = {ref(new) for new in changed if is_held(new, observed, orders)}
    apply = [new for new in changed if ref(new) not in held]
    secrets = [new for new in access.secrets(observed, places(observed)) if (ref(new), "") not in refused]
    first = lineage.initial_import(observed)
    drafts = [*versions.mirrors(observed), *([] if first is None else [first])]
    mirrors = [new for new in drafts if (ref(new), "") not in refused]
    keep = {ref(content) for content in desired} | left_server(observed, places(observed))
    delete = [Ref("DraftVersion", name) for name in versions.outdated(observed)]
    delete += [child.ref for child in observed.children.values() if _is_obsolete(child, keep, observed)]
    delete += [*trainers.outdated(observed), *imports.outdated(observed)]
    return (*secrets, *apply, *mirrors), tuple(sorted(delete)), held


def _refusals(observed: Observed, made: tuple[Manifest, ...]) -> tuple[Refusal, ...]:
    return (*_standing(observed, made), *_own_refusals(observed, made))


def _standing(observed: Observed, made: tuple[Manifest, ...]) -> tuple[Refusal, ...]:
    """Refusals of writes that are still needed; a changed spec makes the others irrelevant."""
    if not observed.refusals:
        return ()
    desired = (*made, *map(marked, imports.jobs(observed)))
    needed = {(ref(content), hash_of(content)) for content in desired if not _is_done(content, observed)}
    needed |= {(call.ref, call.digest) for call in registry_calls(observed)}
    return tuple(refusal for refusal in observed.refusals if not refusal.digest or refusal.write in needed)


def problems(spec: Spec) -> dict[str, str]:
    """Why the operator itself refuses serving pods, by reason. Attached pods are judged as they are."""
    if spec.serving.is_attached:
        return {}
    found = {"GPUMismatch": gpus.mismatch(spec), "KeyInArguments": api_keys.in_arguments(spec.engine)}
    return {reason: problem for reason, problem in found.items() if problem}


def _own_refusals(observed: Observed, made: tuple[Manifest, ...]) -> Iterator[Refusal]:
    """The operator's own refusal of serving pods that would crash, leave GPUs idle or show keys. Those that exist stay as they
    are, with their settings and ports."""
    found = problems(observed.speculator.spec)
    if problem := secret_problem(observed):
        found["SecretNotFound"] = problem
    for reason, problem in found.items():
        for content in made:
            if content["metadata"]["name"] == names.child(observed.name, names.SERVING):
                yield Refusal(ref=ref(content), digest=hash_of(content), reason=reason, message=problem)


def _refused(observed: Observed) -> set[tuple[Ref, str]]:
    return {refusal.write for refusal in observed.refusals}


def ref(content: Manifest) -> Ref:
    return Ref(content["kind"], content["metadata"]["name"])


def hash_of(content: Manifest) -> str:
    return str(content["metadata"]["annotations"][names.APPLIED])


def _is_done(desired: Manifest, observed: Observed) -> bool:
    child = observed.children.get(ref(desired))
    if child is None:
        return False
    if child.is_ending:  # it is created again once it is gone
        return True
    if child.ref.kind in _ONCE and child.owner_uid:
        return True
    if observed.settled.get(child.ref) == (hash_of(desired), child.resource_version):
        return True
    return is_current(desired, child)


def _is_obsolete(child: Child, keep: set[Ref], observed: Observed) -> bool:
    """Whether an object that we own is no longer desired. Objects in `_ONCE` hold data and are deleted with their owner."""
    is_ours = child.owner_uid == observed.speculator.metadata.uid
    return is_ours and child.ref.kind not in _ONCE and child.ref not in keep and not child.is_ending


def _status(
    observed: Observed, now: datetime, now_s: float, upgrade: Upgrade | None
) -> tuple[dict[str, Any] | None, list[Event], float | None]:
    before, new = observed.speculator.status, status(observed, now, upgrade)
    if new == before:
        return None, [], None
    if without_measurements(new) == without_measurements(before):
        wait_s = observed.status_due_s - now_s
        if wait_s > 0:
            return None, [], wait_s
    return written(new), list(_transitions(observed, before, new)), None


def _transitions(observed: Observed, before: Status, new: Status) -> Iterator[Event]:
    """Events for conditions that changed, except the first ones of a resource."""
    old = {condition.type: condition for condition in before.conditions if condition.reason != PENDING}
    available = next(condition for condition in new.conditions if condition.type == "Available")
    for condition in new.conditions:
        last = old.get(condition.type)
        if condition.type == "FullyScaled" and condition.reason == available.reason:
            continue  # Available tells it
        if last is not None and _SWAPPING in (condition.reason, last.reason):
            continue  # as at each swap; the condition lasts if it is none
        if last is not None and (last.status, last.reason) != (condition.status, condition.reason):
            is_bad = condition.status == "False" and (condition.type in _REQUIRED or condition.reason == "UpdateFailed")
            message = f"{condition.type} is {condition.status}: {condition.message}"
            yield _event(observed.speculator, condition.reason, message, is_warning=is_bad)


def _event(
    about: AdaptiveSpeculator | DraftVersion | DraftImport, reason: str, message: str, *, is_warning: bool
) -> Event:
    return Event(
        kind=type(about).__name__,
        name=about.metadata.name,
        uid=about.metadata.uid,
        reason=reason,
        message=message[:1000],
        is_warning=is_warning,
    )


def _draft_statuses(observed: Observed, now: datetime) -> Iterator[tuple[Ref, Model, Event | None]]:
    for draft, new in versions.statuses(observed, now):
        before = draft.status
        if new == before or _is_measurement(before, new, observed):
            continue
        event = None
        if new.phase != before.phase and new.phase is not None:
            is_bad = new.phase in _CONDEMNED
            event = _event(draft, new.phase, new.reason or "", is_warning=is_bad)
        yield Ref("DraftVersion", draft.metadata.name), new, event


def _import_statuses(observed: Observed, now: datetime) -> Iterator[tuple[Ref, Model, Event | None]]:
    for draft_import, new in imports.statuses(observed, now):
        if new == draft_import.status:
            continue
        before, ready = _ready(draft_import.status.conditions), _ready(new.conditions)
        event = None
        if ready is not None and (before is None or ready.reason != before.reason):
            event = _event(draft_import, ready.reason, ready.message, is_warning=ready.reason == imports.FAILED)
        yield Ref("DraftImport", draft_import.metadata.name), new, event


def _ready(conditions: Iterable[Condition]) -> Condition | None:
    return next((condition for condition in conditions if condition.type == "Ready"), None)


def _is_measurement(before: DraftVersionStatus, new: DraftVersionStatus, observed: Observed) -> bool:
    """Whether only its acceptance changed: that is written together with the speculator's own, no more often."""
    if before.model_copy(update={"acceptance": None}) != new.model_copy(update={"acceptance": None}):
        return False
    written_acceptance = observed.speculator.status.acceptance
    length = new.acceptance.length if new.acceptance else None
    return written_acceptance is None or length not in (written_acceptance.stable, written_acceptance.candidate)


def _finalizer(observed: Observed) -> Literal["add", "remove", ""]:
    has_it = names.FINALIZER in observed.speculator.metadata.finalizers
    wants_it = observed.speculator.spec.deletion_policy is DeletionPolicy.DELETE
    if has_it == wants_it:
        return ""
    return "add" if wants_it else "remove"


def _ending(observed: Observed, now_s: float) -> Plan:
    """Kubernetes deletes the children; the operator deletes data outside the cluster, for a limited time.

    The pods that write traces are deleted first, or they would write new ones afterwards.
    """
    spec, metadata = observed.speculator.spec, observed.speculator.metadata
    if names.FINALIZER not in metadata.finalizers:
        return Plan()
    if spec.deletion_policy is DeletionPolicy.RETAIN:
        return Plan(finalizer="remove")
    writers = [observed.child("Deployment", names.SERVING), *trainers.workloads(observed)]
    left = tuple(writer.ref for writer in writers if writer is not None and not writer.is_ending)
    if left:
        return Plan(delete=left, again_s=_POLL_S, needs_plan=True)
    waited_s = now_s - (now_s if observed.ending_s is None else observed.ending_s)
    grace_s = max(spec.serving.termination_grace_period_seconds, trainer.GRACE_S)
    if waited_s > grace_s + observed.cleanup_s:
        problem = f"could not delete the traces within {waited_s:.0f} s; they remain in Redis"
        event = _event(observed.speculator, "CleanupGivenUp", problem, is_warning=True)
        return Plan(finalizer="remove", events=(event,))
    if waited_s < grace_s and any(pod.part in (names.SERVING, names.TRAINER) for pod in observed.pods):
        return Plan(again_s=_POLL_S, needs_plan=True)
    return Plan(finalizer="remove", cleans_up=True)
