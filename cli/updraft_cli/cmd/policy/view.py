"""A rollout policy on a terminal, in words."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.policy import Analysis, Policy

_AT_DEADLINE = {
    "pause": "it waits for a person",
    "rollback": "it is rolled back",
    "promote": "it is promoted anyway",
    None: "the registry's default applies",
}


def rendered(policy: Policy, *, is_wide: bool) -> RenderableType:
    """In words; wide, with the rules for canaries even if the strategy has none."""
    return output.facts(_facts(policy, is_wide=is_wide))


def steps(policy: Policy) -> str:
    """Return `10 % of the pods for 2 min, then 50 % for 2 min`."""
    texts = [f"{step.pods_percent} % for {output.span(step.hold_seconds)}" for step in policy.steps or ()]
    if not texts:
        return "the registry's default"
    return ", then ".join((texts[0].replace(" %", " % of the pods", 1), *texts[1:]))


def at_deadline(policy: Policy) -> str:
    """Return what happens to a canary without a verdict at its deadline."""
    return _AT_DEADLINE[policy.analysis.on_inconclusive if policy.analysis else None]


def _facts(policy: Policy, *, is_wide: bool) -> Iterator[tuple[str, str | Text]]:
    strategy = policy.strategy or "the registry's default"
    yield "strategy", Text(strategy, "bold") + _MEANING.get(strategy, "")
    if is_wide or policy.strategy == "canary":
        yield from _canary(policy)
    swapping = output.count(policy.max_pods_swapping, "pod") if policy.max_pods_swapping else "all pods"
    yield "swaps", f"{swapping} at the same time"
    yield "keeps", f"{output.count(policy.revision_history_limit or 0, 'version')} in addition to those in use"
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


_MEANING = {
    "canary": ": a version that passes the offline gate is tried on some pods first",
    "immediate": ": a version that passes the offline gate serves on all pods at once",
    "manual": ": a version that passes the offline gate waits for `draft promote`",
}

_COMPARED = {
    "auto": "by pods; up to two pods, by switchback with turns of {turn}",
    "pods": "by pods: some serve the candidate, the others the stable version",
    "switchback": "by switchback: each pod alternates between both versions, in turns of {turn}",
}


def _analysis(analysis: Analysis) -> Iterator[tuple[str, str | Text]]:
    turn = output.span(analysis.switchback_seconds or 0)
    yield "compared", _COMPARED[analysis.comparison or "auto"].format(turn=turn)
    asked = f"{100 * (analysis.confidence or 0):g} % confidence, one observation every"
    yield (
        "promoted",
        (
            f"when acceptance is significantly higher ({asked} {output.span(analysis.interval_seconds or 0)}),"
            f" after {output.count(analysis.min_samples or 0, 'request')} or more"
        ),
    )
    yield (
        "rolled back",
        (
            f"when acceptance is significantly lower by more than {analysis.max_acceptance_regression_percent or 0} %,"
            f" latency significantly higher by more than {analysis.max_latency_regression_percent or 0} %,"
            f" or after more than {output.count(analysis.failure_limit or 0, 'failure')}"
        ),
    )
    if analysis.dry_run:
        yield "", Text("dry run: measured and reported only; the steps always end in a promotion", "yellow")
