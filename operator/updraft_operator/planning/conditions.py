"""Conditions of an AdaptiveSpeculator: one per aspect, each with a reason and a message.

Ready combines Accepted and Available; clients lose nothing without the others. Reconciling and Stalled are there only while
they are True, which is how kstatus (Flux, Helm) reads them. Reasons are constants of the API and are documented in
docs/reference/conditions.md. A generator yields assessments by precedence: the first counts.
"""

from collections.abc import Iterator
from itertools import chain

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.speculator import Redis, RedisMode
from updraft_operator.manifests.redis import has_redis
from updraft_operator.planning import lineage, sizes, trainers
from updraft_operator.planning.assessment import Assessment, false, true, unknown
from updraft_operator.planning.observed import (
    ConnectionState,
    Observed,
    acceptance_length,
    is_trained,
    learning_of,
    moment_ms,
    phase_name,
)
from updraft_operator.planning.runtime.certificates import has_certificate, no_certificate, uncertified
from updraft_operator.planning.serving.accelerators import accelerators
from updraft_operator.planning.serving.attached import attachment_of
from updraft_operator.planning.serving.availability import available, failing, fully_scaled, over_quota, reconciling
from updraft_operator.planning.traces.access import rotation_waits
from updraft_operator.planning.traces.places import places, server_problem
from updraft_rollouts.policy import USELESS_ACCEPTANCE_LENGTH
from updraft_rollouts.terms import Strategy

_ENOUGH_STEPS = 200
"""Minimum number of verify steps for a meaningful acceptance length."""

_COLLAPSED_MESSAGE = "almost no token of the stable draft is accepted; wait for the trainer, or pin another version"

_EFFECTIVE_MESSAGE = "speculation saves decoding steps on this traffic"
"""True for all evidence, whether drafts or lookup save them, so that the condition does not change when evidence fades."""

_SLOWER_MESSAGE = "speculation would slow decoding down on this traffic, so the pods do without most of it"

ASKS_A_PERSON = "promote or reject it"
"""Part of the registry's message about a canary that waits for a person's decision."""

_NOT_ACCEPTED = ("NameConflict", "InvalidPodTemplate", "GPUMismatch", "KeyInArguments", "Forbidden", "InvalidRollout")
"""Reasons of refusals that make a spec not accepted."""

_MAY_COME = ("SecretNotFound",)
"""Reasons of Accepted that end without a change of the spec, such as a Secret that another tool is about to create."""

_OF_THE_REGISTRY = ("VersionNotFound", "VersionUnusable")
"""Reasons of Accepted that depend on the registry's versions."""

_OF_THE_SPEC = ("Suspended", "SpeculationDisabled")
"""Reasons that depend on the spec alone."""

_NO_KEY = (
    "the operator cannot read the key of dedicated Redis, so it leaves all objects of this resource as they are; "
    "the reason is in its log"
)

_WAITING = (pb.PHASE_PENDING, pb.PHASE_HELD)


def conditions(observed: Observed, runtime: Assessment | None = None) -> dict[str, Assessment]:
    """All conditions by type, the most important first. Without `runtime`, RuntimeUpToDate stays as it is."""
    accepted, serves = next(_accepted(observed)), next(available(observed))
    registry, trainer = next(_registry_ready(observed)), next(_trainer_ready(observed))
    sized, scaled = next(_sized(observed)), next(fully_scaled(observed))
    ready = _ready(accepted, serves)
    attached = next(attachment_of(observed), None)
    runtime = runtime or _before(observed, "RuntimeUpToDate")
    others = {
        "Reconciling": chain(reconciling(observed, ready, scaled), _moving(observed, ready)),
        "Stalled": _stalled(accepted),
        "AcceleratorInUse": accelerators(observed),
        "PasswordsRotated": _rotated(observed),
    }
    return {
        "Ready": ready,
        "Accepted": accepted,
        "Available": serves,
        "FullyScaled": scaled,
        **({} if attached is None else {"Attached": attached}),
        "RegistryReady": registry,
        "TrainerReady": trainer,
        "Sized": sized,
        "Adapting": next(_adapting(observed, trainer, registry, sized)),
        "SpeculationEffective": next(_speculation(observed)),
        "Progressing": next(_progressing(observed)),
        **({} if runtime is None else {"RuntimeUpToDate": runtime}),
        **{kind: found for kind, given in others.items() if (found := next(given, None)) is not None},
    }


def _ready(accepted: Assessment, serves: Assessment) -> Assessment:
    for part in (accepted, serves):
        if part.status != "True":
            return false(part.reason, part.message)
    return serves if serves.reason == "Suspended" else true("Ready", "serving requests")


def _moving(observed: Observed, ready: Assessment) -> Iterator[Assessment]:
    """True while traces move to another Redis, unless a person has to act first."""
    waits, spec = places(observed).waits, observed.speculator.spec
    if waits and ready.status == "True" and not (spec.suspend or spec.trainer.suspend):
        yield true("MovingTraces", f"traces move to another Redis: {waits}")


def _rotated(observed: Observed) -> Iterator[Assessment]:
    """How far a request for new passwords is; nothing without one."""
    asked, decided = observed.speculator.metadata.rotation, places(observed)
    if not asked and names.ROTATE in observed.speculator.metadata.annotations:
        yield false(
            "InvalidRequest", f"the annotation {names.ROTATE} needs 1 to 64 letters, digits and any of : . + _ -"
        )
    if not asked:
        return
    if not decided.in_use:
        yield true("NothingToRotate", f"request {asked}: this resource has no user on a Redis of the operator")
    if observed.lacks_redis_key:
        yield false("NoRedis", f"request {asked}: {_NO_KEY}")
    if problem := observed.users_problem:
        yield false(problem.reason, f"request {asked}: {problem.message}")
    if waits := rotation_waits(observed, decided):
        yield false("Rotating", f"request {asked}: {waits}")
    yield true(
        "Rotated", f"request {asked}: all pods use the new passwords, and the former ones are not valid any more"
    )


def _stalled(accepted: Assessment) -> Iterator[Assessment]:
    """Waiting does not help: somebody has to change the spec or the cluster."""
    if accepted.status == "False" and accepted.reason not in _MAY_COME:
        yield true(accepted.reason, accepted.message)


def _accepted(observed: Observed) -> Iterator[Assessment]:
    for refusal in observed.refusals:
        if refusal.reason in _NOT_ACCEPTED:
            yield false(refusal.reason, refusal.message)
    if observed.missing_secrets:
        listed = ", ".join(missing.text for missing in observed.missing_secrets)
        yield false(
            "SecretNotFound", f"the spec names Secrets that do not exist, lack an entry or are not valid: {listed}"
        )
    for field, number in _unknown_versions(observed):
        problem = f"spec.rollout.{field} is {number}, but the registry has no such version"
        yield false("VersionNotFound", f"{problem}: {_known_versions(observed)}")
    before, rollout = _before(observed, "Accepted"), observed.speculator.spec.rollout
    is_named = rollout.pinned or rollout.promoted_version
    if observed.registry.state is None and is_named and before is not None and before.reason in _OF_THE_REGISTRY:
        yield before
    for version in observed.registry.versions:
        if version.version == rollout.pinned and phase_name(version.phase).is_condemned:
            problem = f"spec.rollout.pinnedVersion is {version.version}, which can never serve again"
            yield false("VersionUnusable", f"{problem}: {version.reason}")
    yield true("SpecAccepted", "the spec is valid")


def _unknown_versions(observed: Observed) -> Iterator[tuple[str, int]]:
    """Versions that the spec names and that are missing in the registry's last known state."""
    if observed.registry.state is None:
        return
    rollout, known = observed.speculator.spec.rollout, {version.version for version in observed.registry.versions}
    if rollout.pinned and rollout.pinned not in known:
        yield "pinnedVersion", rollout.pinned
    # An older version that no longer exists was promoted long ago: the field has no effect any more.
    if rollout.promoted_version and rollout.promoted_version > observed.registry.state.latest:
        yield "promotedVersion", rollout.promoted_version


def _known_versions(observed: Observed) -> str:
    known = sorted(version.version for version in observed.registry.versions)
    return f"it has {', '.join(map(str, known))}" if known else "it has no versions yet"


def _registry_ready(observed: Observed) -> Iterator[Assessment]:
    view, pods = observed.registry, observed.pods_of(names.REGISTRY)
    connection, before = view.connection, _before(observed, "RegistryReady")
    if connection is ConnectionState.CONNECTED:
        yield true("Connected", "connected to the registry")
    if connection is ConnectionState.CONNECTING:
        if before is not None:
            yield before
        connection = ConnectionState.STARTING
    if not any(pod.is_ready for pod in pods):
        yield from failing(pods)
    yield from over_quota(observed, names.REGISTRY)
    if connection is not ConnectionState.DENIED and observed.config.tls.is_on and not has_certificate(observed):
        yield false("NoCertificate", no_certificate(observed))
    yield false(connection.value, view.problem or "the registry's pod is not ready yet")


def _trainer_ready(observed: Observed) -> Iterator[Assessment]:
    spec = observed.speculator.spec
    if not spec.traces.enabled:
        yield false("Disabled", "spec.traces.enabled is false, so there is no training data")
    if observed.lacks_redis_key:
        yield false("NoRedis", _NO_KEY)
    if not has_redis(observed.speculator, observed.config):
        yield false("NoRedis", _no_redis(spec.traces.redis))
    if spec.suspend or spec.trainer.suspend:
        waits = places(observed).waits
        later = f"; traces move to another Redis once it runs again: {waits}" if waits else ""
        yield false("Suspended", f"the trainer is suspended; serving continues with the current draft{later}")
    if problem := observed.users_problem:
        yield from uncertified(observed)
        yield false(problem.reason, f"{problem.message}{server_problem(observed)}")
    if reason := lineage.waits(observed):
        yield false("WaitingForDraft", reason)
    yield from _training(observed)


def _no_redis(redis: Redis | None) -> str:
    if redis is not None and redis.mode is RedisMode.DEDICATED:
        return "spec.traces.redis.mode is Dedicated, which this operator does not offer, so nothing is captured"
    return "the operator has no Redis and spec.traces.redis names none, so nothing is captured"


def _training(observed: Observed) -> Iterator[Assessment]:
    """A trainer that should run: all its pods are needed."""
    spec, pods = observed.speculator.spec.trainer, observed.pods_of(names.TRAINER)
    if not trainers.is_served(observed):
        problem = "spec.trainer.workload is LeaderWorkerSet, which the cluster did not serve; what runs stays"
        yield false("WorkloadNotServed", f"{problem}: install it and restart the operator, or choose StatefulSet")
    waiting = trainers.waiting_pods(observed)
    if not waiting:
        yield true("Training", trainers.devices(observed))
    if former := trainers.former_pods(observed):
        yield false("Starting", f"the trainer starts once {', '.join(former)} has ended, because they share a volume")
    yield from uncertified(observed)
    yield from failing(trainers.causes(pods))
    yield from over_quota(observed, names.TRAINER)
    if spec.nodes > 1:
        met = f"{spec.nodes - len(waiting)} of {spec.nodes} pods are ready"
        yield false("WaitingForRanks", f"{met}; training goes on once {', '.join(waiting)} have met the others")
    yield false("Starting", "the trainer's pod is not ready yet")


def _sized(observed: Observed) -> Iterator[Assessment]:
    """Whether everything is large enough for a draft to be published. Only the trainer knows how long requests are."""
    state, before = observed.registry.state, _before(observed, "Sized")
    if state is None and before is not None:
        yield before
    learning = learning_of(state)
    if problem := sizes.too_small(observed):
        yield false("TooSmall", problem)
    if state is not None and state.capture_too_small:
        yield false("TracesDropped", f"pod {state.capture_too_small}")
    if learning is None:
        yield unknown("NotReported", "the trainer has not reported yet how large requests and drafts are")
    yield true("LargeEnough", "volumes and replay are large enough to learn from this traffic")


def _adapting(observed: Observed, trainer: Assessment, registry: Assessment, sized: Assessment) -> Iterator[Assessment]:
    """Whether drafts follow the traffic, by what the trainer has done. That its pod is ready says nothing about it."""
    state, before = observed.registry.state, _before(observed, "Adapting")
    if observed.speculator.spec.suspend:
        yield false("Suspended", "spec.suspend is true")
    if trainer.status != "True":
        yield false("TrainerNotReady", trainer.message)
    if registry.status != "True":
        yield false("RegistryNotReady", registry.message)
    if state is None and before is not None:
        yield before
    yield from _learning(observed, state or pb.SpeculatorState(), sized)


def _learning(observed: Observed, state: pb.SpeculatorState, sized: Assessment) -> Iterator[Assessment]:
    learning, why = learning_of(state), state.trainer_message or "the trainer gives no reason"
    if state.capture_problem:
        yield false("CaptureUnavailable", f"capture has a problem on pod {state.capture_problem}")
    if sized.reason == "TooSmall":
        yield false("TooSmall", sized.message)
    if learning is None:
        yield unknown("NotReported", "the trainer has not reported yet what it has done")
        return
    if not learning.samples:
        yield false("NoSamples", f"no request to learn from is stored yet: {why}")
    if learning.samples < learning.samples_to_start:
        begins = f"{learning.samples_to_start:,} requests, and {learning.samples:,} are stored"
        yield false("FewSamples", f"a new draft starts from {begins}: {why}")
    if not learning.steps and not learning.estimates:
        yield false("NoSteps", f"{learning.samples:,} requests are stored, and none was trained on yet: {why}")
    yield _learned(observed, learning, why)


def _learned(observed: Observed, learning: pb.Learning, why: str) -> Assessment:
    done = (
        f"{learning.samples:,} requests to train on and {learning.held_out:,} held-out ones, {learning.steps:,} steps,"
        f" {learning.estimates:,} estimates since the trainer started"
    )
    if (at := moment_ms(learning.last_step_unix_ms)) is not None:
        done += f", the last step at {at:%Y-%m-%d %H:%M} UTC"
    last = max((version.version for version in observed.registry.versions if is_trained(version)), default=0)
    if last:
        return true("Adapting", f"version {last} is the last one that was published: {why}; {done}")
    return true("Learning", f"nothing was published yet: {why}; {done}")


def _speculation(observed: Observed) -> Iterator[Assessment]:
    state, spec = observed.registry.state, observed.speculator.spec
    if spec.suspend:
        yield unknown("Suspended", "spec.suspend is true")
    if not spec.draft.is_speculating:
        yield false("SpeculationDisabled", "spec.draft.speculation is Disabled")
    before = _before(observed, "SpeculationEffective")
    if state is None and before is not None and before.reason not in _OF_THE_SPEC:
        yield before
    if state is None or not state.stable:
        on_trial = f"; version {state.candidate} is in canary" if state is not None and state.candidate else ""
        yield unknown(
            "NoDraft", f"no draft serves yet: each step yields one token, or more with n-gram lookup{on_trial}"
        )
        return
    num_without = state.pods.connected - state.pods.serving_stable - state.pods.serving_candidate
    if num_without > 0:
        of_all = f"{num_without} of {state.pods.connected} pods"
        yield false("DraftNotLoaded", f"{of_all} have not loaded version {state.stable} yet")
    was_slower = before is not None and before.reason == "SlowerThanNone"
    is_slower = state.speedup.high < 1.0 if state.HasField("speedup") else was_slower
    yield false("SlowerThanNone", _SLOWER_MESSAGE) if is_slower else _accepted_drafts(state)


def _accepted_drafts(state: pb.SpeculatorState) -> Assessment:
    """Whether speculation is surely faster, with lookup and all, or enough tokens of the stable draft are accepted."""
    if state.speedup.low > 1.0:
        return true("Effective", _EFFECTIVE_MESSAGE)
    length, steps = acceptance_length(state, state.stable)
    if length is None or steps < _ENOUGH_STEPS:
        return unknown("TooFewSamples", "not enough traffic yet to measure acceptance")
    if length < USELESS_ACCEPTANCE_LENGTH:
        return false("AcceptanceCollapsed", _COLLAPSED_MESSAGE)
    return true("Effective", _EFFECTIVE_MESSAGE)


def _progressing(observed: Observed) -> Iterator[Assessment]:
    state, rollout = observed.registry.state, observed.speculator.spec.rollout
    before = _before(observed, "Progressing")
    if state is None and before is not None:
        yield before
    if state is None or not state.latest:
        yield unknown("NoVersion", "no draft has been published yet")
        return
    if rollout.pinned is not None and state.HasField("pinned") and state.pinned == rollout.pinned:
        which = f"version {rollout.pinned}" if rollout.pinned else "no draft"
        yield false("Pinned", f"{which} is pinned; newer versions are held")
    if rollout.paused:
        yield false("Paused", "spec.rollout.paused is true")
    if state.candidate:
        yield _of_canary(state)
    waiting = [version.version for version in observed.registry.versions if version.phase in _WAITING]
    if waiting and rollout.strategy is Strategy.MANUAL:
        yield false("Waiting", f"version {max(waiting)} is waiting for spec.rollout.promotedVersion")
    if waiting:
        yield true("Waiting", f"version {max(waiting)} is waiting for its rollout")
    yield true("Complete", f"version {state.stable} is serving" if state.stable else "no draft is serving")


def _of_canary(state: pb.SpeculatorState) -> Assessment:
    """A canary that continues after its deadline or its verdict waits for a person."""
    if ASKS_A_PERSON not in state.message:
        return true("Canary", f"version {state.candidate} is in canary")
    decide = f"promote version {state.candidate}, or pin another one"
    if "no verdict" in state.message:
        return false("Inconclusive", f"no verdict at the deadline; {decide}")
    return false("CanaryFailed", f"the canary failed, and spec.rollout.autoRollback is false; {decide}")


def _before(observed: Observed, kind: str) -> Assessment | None:
    """The previous assessment. It is kept until the registry has sent its state to this process."""
    for condition in observed.speculator.status.conditions:
        if condition.type == kind:
            return Assessment(condition.status, condition.reason, condition.message)
    return None
