"""Versions, evaluations and pods in one line each, for the registry's pure core."""

from updraft.registry.v1.registry_pb2 import Evaluation, EvaluationSample
from updraft_registry.rollout.placement import Pod
from updraft_registry.rollout.version import Version
from updraft_rollouts.terms import Phase, Source

NOW_MS = 1_700_000_000_000


def version(
    number: int,
    phase: Phase = Phase.PENDING,
    *,
    source: Source = Source.TRAINER,
    evaluation: Evaluation | None = None,
    proven_ms: int | None = None,
    is_retained: bool = False,
) -> Version:
    """A version; a stable or superseded one has won unless told otherwise, a higher number later."""
    return Version(
        number=number,
        digest=f"sha256:{number:064x}",
        tensors_digest=f"sha256:{number + 2**32:064x}",
        source=source,
        phase=phase,
        reason="a test made it so",
        published_ms=NOW_MS,
        since_ms=NOW_MS,
        evaluation=evaluation,
        proven_ms=NOW_MS + number
        if phase in (Phase.STABLE, Phase.SUPERSEDED) and proven_ms is None
        else proven_ms or 0,
        is_retained=is_retained,
    )


def evaluation(
    candidate: float, *, against: int, baseline: float = 2.0, num_samples: int = 12, lookahead: int = 0
) -> Evaluation:
    """An evaluation with these acceptance lengths in tokens per step, the same for every request up to rounding."""
    samples = []
    for i in range(num_samples):
        tokens = 100 + i
        samples.append(
            EvaluationSample(
                trace_id=f"trace-{i}",
                tokens=tokens,
                candidate_steps=round(tokens / candidate),
                baseline_steps=tokens if against == 0 else round(tokens / baseline),
            )
        )
    return Evaluation(baseline_version=against, samples=samples, lookahead=lookahead)


def holding(name: str, held: Version) -> Pod:
    """A pod whose engine says that it holds this version."""
    return Pod(name=name, loaded=held.number, tensors_digest=held.tensors_digest)


def refusing(name: str, number: int, *, loaded: Version | None = None) -> Pod:
    """A pod that nacked a version."""
    return Pod(
        name=name,
        loaded=loaded.number if loaded else 0,
        tensors_digest=loaded.tensors_digest if loaded else "",
        refused=number,
        refusal="fc.weight holds values that are not finite",
    )
