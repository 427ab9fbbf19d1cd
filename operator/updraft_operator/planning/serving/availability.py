"""Whether the inference pods serve: Available is about clients, FullyScaled about capacity.

Available allows for as many missing pods as the disruption budget does, so that a node of a hundred that goes is no outage.
It counts from the pods that were ready once, because a scale-up in progress takes nothing away from clients.
"""

from collections.abc import Iterator
from typing import Any

from updraft_operator.api import names
from updraft_operator.api.attached import Attached
from updraft_operator.api.speculator import DisruptionBudget
from updraft_operator.manifests import ranks
from updraft_operator.planning.assessment import Assessment, false, true, unknown
from updraft_operator.planning.objects import Child
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.pods import PodState, worst

_NOBODY = ("NoPods", "NotInjected")
"""Reasons of Available while nothing is attached."""


def desired_pods(observed: Observed) -> int:
    """Number of inference pods that should run: the autoscaler's if one scales the Deployment; 0 if suspended.

    Of attached pods, those that have our agent: their workload knows how many it wants."""
    if observed.speculator.spec.serving.is_attached:
        return sum(not (pod.is_ending or pod.is_finished) for pod in observed.pods_of(names.SERVING))
    if observed.speculator.spec.suspend:
        return 0
    deployment = observed.child("Deployment", names.SERVING)
    if deployment is not None and deployment.is_scaled_by_others:
        return int(deployment.live()["spec"].get("replicas", 1))
    return observed.speculator.spec.serving.replicas


def tolerated(budget: DisruptionBudget, num_pods: int) -> int:
    """Pods that may be missing, rounded up as Kubernetes does for a budget; at least 1, because nodes fail."""
    share: Any = budget.max_unavailable
    count = -(-int(share.removesuffix("%")) * num_pods // 100) if isinstance(share, str) else share
    return max(1, int(count))


def needed_pods(observed: Observed) -> int:
    """Ready pods without which clients may notice."""
    desired, reached = desired_pods(observed), _reached(observed)
    base = desired if reached is None else min(desired, reached)
    return max(1, base - tolerated(observed.speculator.spec.serving.disruption_budget, base))


def available(observed: Observed) -> Iterator[Assessment]:
    if suspended := _suspended(observed):
        yield suspended
    if num_ready(observed) >= needed_pods(observed):
        yield true("PodsReady", _summary(observed))
    yield from _missing(observed, is_first=_reached(observed) is None)


def fully_scaled(observed: Observed) -> Iterator[Assessment]:
    if suspended := _suspended(observed):
        yield suspended
    yield from _rolling(observed)
    if num_ready(observed) < desired_pods(observed):
        yield from _missing(observed, is_first=_is_growing(observed))
    yield true("PodsReady", _summary(observed))


def reconciling(observed: Observed, ready: Assessment, scaled: Assessment) -> Iterator[Assessment]:
    """True while pods that serve are replaced, or are not as many yet as they should be for the first time.

    Later, a pod that fails is not progress of a change: `helm upgrade --wait` must not wait for it.
    """
    is_progress = scaled.reason == "RollingOut" or _is_growing(observed)
    if ready.status == "True" and scaled.status == "False" and is_progress:
        yield scaled._replace(status="True")


def reached_pods(observed: Observed, serves: Assessment) -> int | None:
    """See ServingStatus.reached_replicas. It begins when enough pods serve for the first time, and again after none."""
    before, num_now = _reached(observed), num_ready(observed)
    if serves.reason in ("Suspended", *_NOBODY) or (before is None and serves.status != "True"):
        return None
    if serves.status == "Unknown":
        return before
    return min(desired_pods(observed), max(before or 0, num_now))


def failing(pods: tuple[PodState, ...], summary: str = "") -> Iterator[Assessment]:
    found = worst(pods)
    if found is not None:
        pod, problem = found
        yield false(problem.reason, f"{summary}{pod.name}: {problem.message}")


def over_quota(observed: Observed, part: str) -> Iterator[Assessment]:
    """QuotaExceeded if a ResourceQuota refused an object of the part."""
    own = {names.child(observed.name, part)}
    if part == names.TRAINER:
        own.add(ranks.workload(observed.name, ranks.Kind.LEADER_WORKER_SET))
    of_part = own | ({observed.name} if part == names.SERVING else set())
    claims = tuple(names.claim(f"{name}-") for name in own)
    for refusal in observed.refusals:
        is_of_part = refusal.ref.name in of_part or refusal.ref.name.startswith(claims)
        if refusal.reason == "QuotaExceeded" and is_of_part:
            yield false(refusal.reason, f"{'/'.join(refusal.ref)}: {refusal.message}")


def _suspended(observed: Observed) -> Assessment | None:
    """True, as with a Job or a Deployment without replicas: the cluster is as the spec asks.

    Without attached pods it is Unknown, because nobody here knows whether there should be any, and nobody is woken."""
    if observed.speculator.spec.suspend:
        return true("Suspended", "spec.suspend is true, so no pod runs")
    attached = observed.speculator.spec.serving.attached
    if attached is not None and not desired_pods(observed):
        return next(_unattached(observed, attached))
    if desired_pods(observed) == 0:
        return true("Suspended", "spec.serving.replicas is 0, so no pod runs")
    return None


def _unattached(observed: Observed, attached: Attached) -> Iterator[Assessment]:
    """Why no pod is attached."""
    if observed.attached.problem:
        yield unknown("PodsNotListed", observed.attached.problem)
    if others := sum(not (pod.state.is_ending or pod.state.is_finished) for pod in observed.attached.pods):
        text = f"{others} pods have the labels {attached.selector.text}"
        yield unknown("NotInjected", f"{text}, and none has the agent of this AdaptiveSpeculator")
    yield unknown("NoPods", f"no pod of the namespace has the labels {attached.selector.text}")


def _reached(observed: Observed) -> int | None:
    serving = observed.speculator.status.serving
    return serving.reached_replicas if serving is not None else None


def _is_growing(observed: Observed) -> bool:
    """Whether so many pods were never ready together."""
    reached = _reached(observed)
    return reached is None or reached < desired_pods(observed)


def num_ready(observed: Observed) -> int:
    """Inference pods that are ready and do not end."""
    return sum(pod.is_ready and not pod.is_ending for pod in observed.pods_of(names.SERVING))


def _summary(observed: Observed) -> str:
    return f"{num_ready(observed)} of {desired_pods(observed)} pods are ready"


def _missing(observed: Observed, *, is_first: bool) -> Iterator[Assessment]:
    """Why pods are missing. On their first start nobody misses them yet."""
    pods, summary = observed.pods_of(names.SERVING), _summary(observed)
    deployment = observed.child("Deployment", names.SERVING)
    yield from over_quota(observed, names.SERVING)
    yield from failing(pods, f"{summary}; ")
    for condition in deployment.status.get("conditions", ()) if deployment is not None else ():
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            yield false("QuotaExceeded", f"{summary}; {condition.get('message', '')}")
    if not is_first:
        yield false("PodsMissing", f"{summary}; the others are starting again")
    yield false("ModelLoading", f"{summary}; the others are starting")


def _rolling(observed: Observed) -> Iterator[Assessment]:
    """Enough pods serve, but some have an older template: the new ones may be failing."""
    deployment = observed.child("Deployment", names.SERVING)
    if deployment is not None and is_rolling(deployment):
        found = worst(observed.pods_of(names.SERVING))
        why = f"; {found[0].name}: {found[1].reason}: {found[1].message}" if found is not None else ""
        yield false("RollingOut", f"{_summary(observed)}; rolling out the changed template{why}")


def is_rolling(deployment: Child) -> bool:
    status = deployment.status
    is_noticed = status.get("observedGeneration", deployment.generation) >= deployment.generation
    return not is_noticed or status.get("updatedReplicas", 0) < status.get("replicas", 0)
