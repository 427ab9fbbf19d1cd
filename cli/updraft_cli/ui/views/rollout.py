"""The rollout: the canary live, its evidence against the stable version, and what it waits for."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from updraft_cli import output
from updraft_cli.backends.policy import Analysis, Policy
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import MetricChange, Speculator, Trial
from updraft_cli.ui.views import overview, parts
from updraft_cli.ui.views.parts import Cell, Fact, Interval, Notice, Table
from updraft_rollouts.terms import OnInconclusive, Strategy

_VERDICTS = {"hold": ("not yet known", "quiet"), "pass": ("significantly better", "good"), "fail": ("failed", "bad")}

_AT_DEADLINE = {
    OnInconclusive.PAUSE: "it waits for a person",
    OnInconclusive.ROLLBACK: "it is rolled back",
    OnInconclusive.PROMOTE: "it is promoted anyway",
    None: "the registry's default applies",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    text: str
    state: str
    """done, current, next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    headline: str
    steps: tuple[StepView, ...]
    serving: Table
    comparison: Table | None
    intervals: tuple[Interval, ...]
    domains: Table | None
    facts: tuple[Fact, ...]
    evidence: str
    policy: tuple[Fact, ...]
    notices: tuple[Notice, ...]


def rollout(one: SpeculatorSnapshot, now: datetime) -> Rollout:
    speculator, trial = one.speculator, one.speculator.trial
    return Rollout(
        headline=output.sentence(speculator.message or "nothing is known about the rollout"),
        steps=tuple(_steps(speculator.policy, trial)) if trial or speculator.policy.strategy is Strategy.CANARY else (),
        serving=_serving(one),
        comparison=_comparison(speculator, trial) if trial else None,
        intervals=tuple(_intervals(speculator.policy.analysis, trial)) if trial else (),
        domains=_compared_domains(trial) if trial and trial.domains else _domains(speculator),
        facts=tuple(_facts(speculator, trial, now) if trial else _rest(one, now)),
        evidence=output.sentence(trial.evidence) if trial else "",
        policy=tuple(_policy(speculator.policy)),
        notices=tuple(overview.notices(one)),
    )


def _steps(policy: Policy, trial: Trial | None) -> Iterator[StepView]:
    current = trial.step if trial else None
    for index, step in enumerate(policy.steps or (), 1):
        state = "next" if current is None or index > current else "current" if index == current else "done"
        yield StepView(text=f"{step.pods_percent} % of the pods for {output.span(step.hold_seconds)}", state=state)


def _serving(one: SpeculatorSnapshot) -> Table:
    """Return who serves what: the traffic by version, with the pods that hold it."""
    speculator = one.speculator
    pods = speculator.pods
    holders = {speculator.stable: pods.serving_stable}
    if speculator.candidate:
        holders[speculator.candidate] = pods.serving_candidate
    traffic = {served.version: served.acceptance for served in speculator.traffic}
    rows = []
    for version in dict.fromkeys(
        (speculator.stable, *([speculator.candidate] if speculator.candidate else []), *traffic)
    ):
        acceptance = traffic.get(version) or (speculator.acceptance if version == speculator.stable else None)
        rows.append(
            (
                Cell(text=parts.version_name(version), href=f"/s/{one.name}/versions/{version}" if version else ""),
                parts.phase(_role(speculator, version)),
                parts.count(holders.get(version)),
                Cell(text=parts.length(acceptance), css="num"),
                parts.count(acceptance.verify_steps if acceptance else None),
            )
        )
    return parts.table(
        ("version", "role", ">pods", ">tokens per step", ">verify steps"), rows, caption="Who serves what"
    )


def _role(speculator: Speculator, version: int) -> str:
    if version == speculator.candidate and version:
        return "canary"
    if version == speculator.stable:
        return "stable" if version else ""
    return "superseded" if version else ""


def _comparison(speculator: Speculator, trial: Trial) -> Table:
    rows = [_measured("tokens per step", trial.acceptance_length, 1.0, is_up_good=True)]
    if trial.baseline and (trial.comparison or trial.inter_token_latency_s):
        rows.append(_measured("ms between tokens", trial.inter_token_latency_s, 1000.0, is_up_good=False))
    columns = ("", f">version {trial.candidate}", f">{parts.version_name(trial.baseline)}", "change")
    return parts.table(columns, rows, caption="Candidate against stable")


def _measured(name: str, change: MetricChange | None, factor: float, *, is_up_good: bool) -> tuple[Cell, ...]:
    candidate, stable = (None, None) if change is None else (factor * change.candidate, factor * change.stable)
    kind = parts.change_kind(change, is_up_good=is_up_good)
    return Cell(text=name), parts.number(candidate), parts.number(stable), Cell(text=parts.change(change), tag=kind)


def _intervals(analysis: Analysis | None, trial: Trial) -> Iterator[Interval]:
    worse = analysis.max_acceptance_regression_percent if analysis else None
    slower = analysis.max_latency_regression_percent if analysis else None
    for title, change, limit, is_up_good in (
        ("acceptance length", trial.acceptance_length, None if worse is None else -float(worse), True),
        ("time between tokens", trial.inter_token_latency_s, None if slower is None else float(slower), False),
    ):
        if change is not None and (shown := parts.interval(title, change, limit, is_up_good=is_up_good)) is not None:
            yield shown


def _compared_domains(trial: Trial) -> Table:
    rows = [_measured(one.domain, one.acceptance_length, 1.0, is_up_good=True) for one in trial.domains]
    columns = ("domain", f">version {trial.candidate}", f">{parts.version_name(trial.baseline)}", "change")
    return parts.table(columns, rows, caption="Candidate against stable by domain, tokens per step")


def _domains(speculator: Speculator) -> Table | None:
    """Return what both versions had since the start of the pods, where no canary compares them."""
    if not speculator.domains:
        return None
    columns = ("domain", ">stable", ">candidate", ">change") if speculator.candidate else ("domain", ">stable")
    rows = []
    for one in speculator.domains:
        change = f"{100 * (one.candidate / one.stable - 1):+.1f} %" if one.candidate and one.stable else parts.NONE
        row = (
            Cell(text=one.domain),
            parts.number(one.stable),
            parts.number(one.candidate),
            Cell(text=change, css="num"),
        )
        rows.append(row[: len(columns)])
    return parts.table(columns, rows, caption="Tokens per verify step by domain")


def _facts(speculator: Speculator, trial: Trial, now: datetime) -> Iterator[Fact]:
    policy = speculator.policy
    if trial.step_since is not None:
        yield parts.fact("in this step", f"for {output.span((now - trial.step_since).total_seconds())}")
    if policy.progress_deadline_seconds and trial.started is not None:
        left = _time_left(speculator, trial, policy.progress_deadline_seconds, now - trial.started)
        yield parts.fact("time left", left)
    if trial.verdict:
        text, kind = _VERDICTS.get(trial.verdict, (trial.verdict, "quiet"))
        dry = ", dry run" if policy.analysis and policy.analysis.dry_run else ""
        yield parts.fact("verdict", f"{text}{dry}", tag=kind)
    if trial.requests is not None:
        by = f", by {trial.comparison}" if trial.comparison else ""
        yield parts.fact(
            "evidence from",
            f"{output.count(trial.requests, 'request')}, {output.count(trial.slices or 0, 'slice')}{by}",
        )
    if trial.failures is not None:
        limit = policy.analysis.failure_limit if policy.analysis else None
        tolerated = "" if limit is None else f" ({limit} tolerated)"
        yield parts.fact("failures", f"{trial.failures}{tolerated}", tag="bad" if trial.failures else "")


def _time_left(speculator: Speculator, trial: Trial, within_s: int, since: timedelta) -> str:
    """Return about how long; only the message has it exactly, because the clock stops now and then."""
    policy, limit = speculator.policy, output.span(within_s)
    choice = policy.analysis.on_inconclusive if policy.analysis else None
    if not trial.baseline and choice is not OnInconclusive.PROMOTE:
        return "counts only slices with traffic: a first version is not rolled back for a lack of it"
    if speculator.paused:
        return f"of {limit}: the clock stands still while the rollout is paused"
    if not speculator.pods.num:
        return f"of {limit}: the clock stands still while there are no pods"
    left_s = within_s - since.total_seconds() + trial.paused_s
    about = "about " if speculator.resource is not None else ""  # a resource does not tell how long it was paused
    return f"{about}{output.span(left_s)} of {limit}; then, without a verdict, {_AT_DEADLINE[choice]}"


def _rest(one: SpeculatorSnapshot, now: datetime) -> Iterator[Fact]:
    """Yield the facts while there is no canary."""
    speculator = one.speculator
    yield parts.fact("stable", parts.version_name(speculator.stable))
    if (newest := one.draft(speculator.latest)) is not None and newest.version != speculator.stable:
        since = f" {output.ago(newest.since, now)}" if newest.since else ""
        yield parts.fact("newest", f"version {newest.version}, {newest.phase}{since}: {newest.reason}")
    if speculator.previous and speculator.stable:
        yield parts.fact("previous", f"version {speculator.previous}: the fallback after a failure")
    yield parts.fact("pods", overview.pods(speculator))


def _policy(policy: Policy) -> Iterator[Fact]:
    yield parts.fact("strategy", (policy.strategy or "the registry's default").lower())
    analysis = policy.analysis
    if policy.strategy is not Strategy.CANARY or analysis is None:
        return
    if analysis.confidence:
        yield parts.fact("confidence", f"{100 * analysis.confidence:g} %")
    if analysis.min_samples is not None:
        yield parts.fact("promoted after", f"{output.count(analysis.min_samples, 'request')} or more")
    for name, value in (
        ("acceptance length", analysis.max_acceptance_regression_percent),
        ("time between tokens", analysis.max_latency_regression_percent),
        ("acceptance length in one domain", analysis.max_domain_regression_percent),
    ):
        if value is not None:
            yield parts.fact("rolled back", f"if {name} is confidently more than {value} % worse")
