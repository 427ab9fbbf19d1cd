"""The trainer's workload: its kind, whether one of another kind still runs, and which pods must go together."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from updraft_operator.api import names
from updraft_operator.api.speculator import TrainerWorkload
from updraft_operator.manifests import ranks
from updraft_operator.manifests.ranks import Kind
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed, learning_of
from updraft_operator.planning.pods import PodProblem, PodState

_OF_OTHERS: Mapping[str, re.Pattern[str]] = {
    "RendezvousFailed": re.compile(r"rendezvous"),
    "CommunicationFailed": re.compile(r"NCCL|gloo|lost another rank|cannot join the others"),
}
"""Reasons why a pod ended that may lie in another pod or between them, by its last words."""


def kind(observed: Observed) -> Kind:
    """The kind for this spec: what runs, if the cluster lacks the kind. Auto keeps what runs several ranks, and a StatefulSet's
    volumes, because each kind has volumes of its own."""
    trainer, wanted = observed.speculator.spec.trainer, observed.speculator.spec.trainer.workload
    if trainer.num_ranks == 1:
        return Kind.DEPLOYMENT
    running = [Kind(child.ref.kind) for child in workloads(observed) if not child.is_ending]
    if not is_served(observed):
        return next(iter(running), Kind.LEADER_WORKER_SET)
    if wanted is not TrainerWorkload.AUTO:
        return Kind(wanted)
    return next((each for each in running if each is not Kind.DEPLOYMENT), None) or _new_kind(observed)


def _new_kind(observed: Observed) -> Kind:
    """Auto's, for several ranks of which none runs."""
    second = names.claim(ranks.pods(observed.name, Kind.STATEFUL_SET, 2)[1])
    own = Ref(Kind.STATEFUL_SET, ranks.workload(observed.name, Kind.STATEFUL_SET)), Ref("PersistentVolumeClaim", second)
    is_new = not any(ref in observed.children for ref in own)
    takes_group = observed.speculator.spec.trainer.nodes > 1 and observed.config.has_leader_worker_sets and is_new
    return Kind.LEADER_WORKER_SET if takes_group else Kind.STATEFUL_SET


def is_served(observed: Observed) -> bool:
    """Whether the cluster has the kind that the spec names."""
    trainer = observed.speculator.spec.trainer
    names_group = trainer.num_ranks > 1 and trainer.workload is TrainerWorkload.LEADER_WORKER_SET
    return not names_group or observed.config.has_leader_worker_sets


def workloads(observed: Observed) -> tuple[Child, ...]:
    """The objects that run the trainer now, or still do."""
    refs = (Ref(each, ranks.workload(observed.name, each)) for each in Kind)
    return tuple(observed.children[ref] for ref in refs if ref in observed.children)


def former_pods(observed: Observed) -> list[str]:
    """Names of the pods of another kind that still run. The new ones wait for them: two trainers must not share a volume."""
    wanted = kind(observed)
    own = (pod.name for pod in observed.pods_of(names.TRAINER) if not pod.is_finished)
    return sorted(name for name in own if _kind_of(observed.name, name) is not wanted)


def outdated(observed: Observed) -> tuple[Ref, ...]:
    """Pods of an older template of a StatefulSet, which all go at once: a rank cannot train with ranks of another template."""
    ref = Ref(Kind.STATEFUL_SET, ranks.workload(observed.name, Kind.STATEFUL_SET))
    workload = observed.children.get(ref)
    if workload is None or workload.status.get("observedGeneration") != workload.generation:
        return ()  # the revision is that of an older template
    revision = workload.status.get("updateRevision", "")
    return tuple(
        Ref("Pod", pod.name)
        for pod in observed.pods_of(names.TRAINER)
        if revision and pod.revision not in ("", revision) and not pod.is_ending
        if _kind_of(observed.name, pod.name) is Kind.STATEFUL_SET
    )


def waiting_pods(observed: Observed) -> list[str]:
    """Names of the pods that are not ready; training needs all of them."""
    own = observed.pods_of(names.TRAINER)
    ready = {pod.name for pod in own if pod.is_ready and not pod.is_ending}
    nodes, wanted = observed.speculator.spec.trainer.nodes, kind(observed)
    if wanted is Kind.DEPLOYMENT:
        return [] if ready else [pod.name for pod in own] or [ranks.workload(observed.name, wanted)]
    return [name for name in ranks.pods(observed.name, wanted, nodes) if name not in ready]


def devices(observed: Observed) -> str:
    """The device that the trainer reports, which may not be what the spec asks for."""
    learning = learning_of(observed.registry.state)
    if learning is None or not learning.device:
        return "the trainer is running"
    ranks_of = "" if learning.world_size <= 1 else f" with {learning.world_size} ranks"
    return f"the trainer is running{ranks_of} on {learning.device}"


def is_on_cpu(observed: Observed) -> bool:
    """Whether it trains on a CPU although its pods have accelerators. That happens only if a variable in the spec says so."""
    learning = learning_of(observed.registry.state)
    has_accelerator = observed.speculator.spec.trainer.accelerator is not None
    return has_accelerator and learning is not None and learning.device.startswith("cpu")


def causes(pods: Iterable[PodState]) -> tuple[PodState, ...]:
    """The pods with the reasons of a trainer, without those that only lost another one, unless none says why."""
    named = tuple(replace(pod, problem=_named(pod.problem)) for pod in pods if pod.problem is not None)
    own = tuple(pod for pod in named if pod.problem is not None and pod.problem.reason not in _OF_OTHERS)
    return own if any(not pod.is_ending for pod in own) else named


def _named(problem: PodProblem | None) -> PodProblem | None:
    if problem is None or problem.reason != "CrashLoopBackOff":
        return problem
    reason = next((reason for reason, words in _OF_OTHERS.items() if words.search(problem.message)), problem.reason)
    return replace(problem, reason=reason)


def _kind_of(speculator: str, pod: str) -> Kind:
    """The kind that a pod belongs to, by its name."""
    patterns = {
        Kind.STATEFUL_SET: rf"{ranks.workload(speculator, Kind.STATEFUL_SET)}-\d+",
        Kind.LEADER_WORKER_SET: rf"{ranks.workload(speculator, Kind.LEADER_WORKER_SET)}-\d+(-\d+)?",
    }
    return next((kind for kind, pattern in patterns.items() if re.fullmatch(pattern, pod)), Kind.DEPLOYMENT)
