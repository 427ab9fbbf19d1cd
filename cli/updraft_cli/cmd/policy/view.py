"""A rollout policy on a terminal, in words."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.policy import Analysis, Policy
from updraft_rollouts.policy import ACCEPTANCE_IS_HIGHER, acceptance_is_lower, latency_is_higher
from updraft_rollouts.terms import Comparison, OnInconclusive, Strategy

_DEFAULT = "the registry's default"

_AT_DEADLINE = {
    OnInconclusive.PAUSE: "it waits for a person",
    OnInconclusive.ROLLBACK: "it is rolled back",
    OnInconclusive.PROMOTE: "it is promoted anyway",
    None: f"{_DEFAULT} applies",
}

_MEANING = {
    Strategy.CANARY: ": a version that passes the offline gate is tried on some pods first",
    Strategy.IMMEDIATE: ": a version that passes the offline gate serves on all pods at once",
    Strategy.MANUAL: ": a version that passes the offline gate waits for `draft promote`",
    None: "",
}

_COMPARED = {
    Comparison.AUTO: "by pods; up to two pods, by switchback with turns of {turn}",
    Comparison.PODS: "by pods: some serve the candidate, the others the stable version",
    Comparison.SWITCHBACK: "by switchback: each pod alternates between both versions, in turns of {turn}",
}


def rendered(policy: Policy, *, is_wide: bool) -> RenderableType:
    """In words; wide, with the rules for canaries even if the strategy has none."""
    return output.facts(_facts(policy, is_wide=is_wide))


def steps(policy: Policy) -> str:
    """Return `10 % of the pods for 2 min, then 50 % for 2 min`."""
    texts = [f"{step.pods_percent} % for {output.span(step.hold_seconds)}" for step in policy.steps or ()]
    if not texts:
        return _DEFAULT
    return ", then ".join((texts[0].replace(" %", " % of the pods", 1), *texts[1:]))


def at_deadline(policy: Policy) -> str:
    """Return what happens to a canary without a verdict at its deadline."""
    return _AT_DEADLINE[policy.analysis.on_inconclusive if policy.analysis else None]


def _facts(policy: Policy, *, is_wide: bool) -> Iterator[tuple[str, str | Text]]:
    strategy = policy.strategy
    yield "strategy", Text(strategy.lower() if strategy else _DEFAULT, "bold") + _MEANING[strategy]
    if is_wide or strategy is Strategy.CANARY:
        yield from _canary(policy)
    swapping = output.count(policy.max_pods_swapping, "pod") if policy.max_pods_swapping else "all pods"
    yield "swaps", f"{swapping} at the same time"
    most = f", {policy.revision_history_megabytes:,} MB in total" if policy.revision_history_megabytes else ""
    yield "keeps", f"{output.count(policy.revision_history_limit or 0, 'version')} in addition to those in use{most}"
    if (gate := policy.offline_gate) is not None:
        gain = f"a gain of {gate.min_gain_percent or 0:g} % at {100 * (gate.confidence or 0):g} % confidence"
        yield "offline gate", f"{gain}, over {output.count(gate.min_samples or 0, 'held-out request')}"


def _canary(policy: Policy) -> Iterator[tuple[str, str | Text]]:
    yield "steps", steps(policy)
    if policy.analysis:
        yield from _analysis(policy.analysis)
    if policy.auto_rollback is False:
        yield "", Text("automatic rollback is off: a canary that failed waits for a person", "yellow")
    if policy.progress_deadline_seconds:
        within = output.span(policy.progress_deadline_seconds)
        yield "deadline", f"without a verdict within {within}, {at_deadline(policy)}"


def _analysis(analysis: Analysis) -> Iterator[tuple[str, str | Text]]:
    turn = output.span(analysis.switchback_seconds or 0)
    yield "compared", _COMPARED[analysis.comparison or Comparison.AUTO].format(turn=turn)
    asked = f"{100 * (analysis.confidence or 0):g} % confidence, one observation every"
    yield (
        "promoted",
        (
            f"when {ACCEPTANCE_IS_HIGHER} ({asked} {output.span(analysis.interval_seconds or 0)}),"
            f" after {output.count(analysis.min_samples or 0, 'request')} or more"
        ),
    )
    yield (
        "rolled back",
        (
            f"when {acceptance_is_lower(analysis.max_acceptance_regression_percent or 0)},"
            f" {latency_is_higher(analysis.max_latency_regression_percent or 0)},"
            f" or after more than {output.count(analysis.failure_limit or 0, 'failure')}"
        ),
    )
    if analysis.dry_run:
        yield "", Text("dry run: measured and reported only; the steps always end in a promotion", "yellow")
