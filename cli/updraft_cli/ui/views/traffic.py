"""The traffic: how much of what is drafted is accepted, by version, position and domain, and what capture drops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from updraft_cli import output
from updraft_cli.backends.drafts import Acceptance
from updraft_cli.backends.installation import Installation, Serving
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import Speculator
from updraft_cli.ui.views import overview, parts
from updraft_cli.ui.views.parts import Cell, Fact, Notice, Table

_MAX_ROWS = 12

_DRAFTERS = {"none": "no drafts", "ngram": "n-gram lookup", "eagle3": "draft model", "hybrid": "draft model and lookup"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Accepted share of the draft tokens by position, in percent."""

    title: str
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    versions: Table
    positions: tuple[Positions, ...]
    lookaheads: Table | None
    """How often the engines chose how many draft tokens, since the start of the pods."""
    domains: Table
    serving: tuple[Fact, ...]
    survival: Table | None
    """Expected by the engine: the lookahead follows it."""
    drops: Table | None
    is_by_pod: bool
    """Dropped traces and the last lookahead are on the pages of pods."""
    notices: tuple[Notice, ...]


def traffic(one: SpeculatorSnapshot, installation: Installation) -> Traffic:
    speculator, serving = one.speculator, installation.serving
    return Traffic(
        versions=_versions(speculator),
        positions=tuple(_positions(speculator)),
        lookaheads=_lookaheads(speculator),
        domains=_domains(speculator),
        serving=tuple(serving_facts(serving)) if serving else (),
        survival=_survival(serving) if serving and serving.expected_survival else None,
        drops=_drops(serving) if serving else None,
        is_by_pod=serving is None and bool(speculator.namespace),
        notices=tuple(overview.notices(one)),
    )


def serving_facts(serving: Serving) -> Iterator[Fact]:
    """Yield what an inference process tells about itself."""
    yield parts.fact("holds", parts.version_name(serving.draft_version))
    yield parts.fact("requests", f"{serving.running_requests:,} running, {serving.queued_requests:,} waiting")
    yield parts.fact("output", output.count(serving.output_tokens, "token"))
    yield parts.fact("swaps", f"{serving.swaps:,}")
    for drafter, length in serving.acceptance_length.items():
        name = _DRAFTERS.get(drafter, drafter)
        yield parts.fact(f"acceptance length, {name}", f"{length:.2f} tokens per step, mean over requests")
    if serving.lookahead is not None:
        yield parts.fact("lookahead", f"{serving.lookahead:g} draft tokens per step, chosen last")
    if serving.verify_ms:
        costs = ", ".join(f"{rows}: {ms:.1f} ms" for rows, ms in _by_number(serving.verify_ms)[:_MAX_ROWS])
        yield parts.fact("cost of a verify step by rows", costs)
    yield parts.fact("captured", output.count(serving.captured, "trace"))
    if serving.granted_tokens_per_s is not None:
        yield parts.fact("granted", f"{serving.granted_tokens_per_s:,.0f} captured tokens per second")


def _versions(speculator: Speculator) -> Table:
    rows = [
        (
            Cell(
                text=parts.served_name(served),
                href=f"/s/{speculator.name}/versions/{served.version}" if served.version else "",
            ),
            parts.phase(served.phase) if served.version else Cell(text=""),
            Cell(text=parts.length(served.acceptance), css="num"),
            parts.count(served.acceptance.verify_steps),
            parts.count(served.acceptance.tokens),
        )
        for served in speculator.traffic
    ]
    if not rows and speculator.acceptance is not None:
        acceptance = speculator.acceptance
        first = (Cell(text=parts.version_name(speculator.stable)), parts.phase("stable"))
        numbers = (parts.count(acceptance.verify_steps), parts.count(acceptance.tokens))
        rows = [(*first, Cell(text=parts.length(acceptance), css="num"), *numbers)]
    columns = ("version", "phase", ">tokens per step", ">verify steps", ">tokens")
    return parts.table(columns, rows, caption="Traffic by version", empty="No verify step counts yet.")


def _positions(speculator: Speculator) -> Iterator[Positions]:
    for served in speculator.traffic:
        if served.acceptance.by_position:
            shares = tuple(round(100 * share, 1) for share in served.acceptance.by_position)
            yield Positions(title=parts.served_name(served), shares=shares)


def _lookaheads(speculator: Speculator) -> Table | None:
    served = [one for one in speculator.traffic if one.acceptance.by_lookahead]
    if not served:
        return None
    most = max(len(one.acceptance.by_lookahead) for one in served)
    shares = {
        f"steps of {parts.version_name(one.version)}": [None, *one.acceptance.by_lookahead[1:]]
        for one in served
        if one.version
    }
    if len(served) == len(speculator.traffic):
        shares = {"all steps": _mean([one.acceptance for one in served], most)} | shares
    rows = [
        (Cell(text=name), *(_percent(share) for share in [*line, *[None] * (most - len(line))]))
        for name, line in shares.items()
    ]
    columns = ("draft tokens chosen", *(f">{number}" for number in range(most)))
    caption = "Lookahead: share of verify steps by draft tokens; those with drafts of lookup are only in the first row"
    return parts.table(columns, rows, caption=caption)


def _mean(of: Sequence[Acceptance], length: int) -> list[float | None]:
    """Shares of the steps of all versions together."""
    steps = sum(one.verify_steps or 0 for one in of)
    sums = [
        sum((one.verify_steps or 0) * share for one in of for share in one.by_lookahead[n : n + 1])
        for n in range(length)
    ]
    return [total / steps for total in sums] if steps else []


def _domains(speculator: Speculator) -> Table:
    rows = [
        (Cell(text=one.domain), parts.number(one.stable), parts.number(one.candidate)) for one in speculator.domains
    ]
    return parts.table(
        ("domain", ">stable", ">candidate"),
        rows,
        caption="Tokens per verify step by domain",
        empty="No domain is known: callers name it in a header of their requests.",
    )


def _survival(serving: Serving) -> Table:
    positions = [position for position, _ in _by_number(next(iter(serving.expected_survival.values())))]
    rows = [
        (Cell(text=_DRAFTERS.get(drafter, drafter)), *(_percent(known.get(position)) for position in positions))
        for drafter, known in serving.expected_survival.items()
    ]
    columns = ("drafter", *(f">{position}" for position in positions))
    return parts.table(
        columns, rows, caption="Expected share of steps in which all drafts up to a position are accepted"
    )


def _percent(share: float | None) -> Cell:
    return Cell(text=parts.NONE if share is None else f"{100 * share:.0f} %", css="num")


def _drops(serving: Serving) -> Table:
    rows = [(Cell(text=parts.words(reason)), parts.count(number)) for reason, number in serving.capture_dropped.items()]
    return parts.table(
        ("reason", ">traces"), rows, caption="Dropped traces since the pod's start", empty="No trace was dropped."
    )


def _by_number(values: dict[str, float]) -> list[tuple[str, float]]:
    """Sort by the number in the name."""
    return sorted(
        values.items(), key=lambda item: (not item[0].isdecimal(), int(item[0]) if item[0].isdecimal() else 0)
    )
