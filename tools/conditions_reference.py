"""The reference page of conditions, generated from the table that `kubectl updraft explain` uses."""

from collections.abc import Iterable, Iterator

from updraft_cli.cmd.explain.condition_help import CONDITION_HELP, PARTS, READY, RESTARTS, ConditionHelp

_INTRO = """\
`kubectl describe asp NAME` shows the conditions of a resource. `kubectl updraft explain NAME` explains them with the names of
that resource filled in. A condition is True, False or Unknown. Its reason is one of those below, and its message gives details.

`Ready` is True if `Accepted`, `ServingReady` and `RegistryReady` are True. Otherwise it has the reason of the first one that
is not. The other conditions do not affect `Ready`, because serving continues without them.
"""


def sections() -> Iterator[str]:

    yield "# Conditions\n"
    yield _INTRO
    for condition, reasons in CONDITION_HELP.items():
        yield f"## {condition}\n"
        if condition == "Ready":
            yield f"See {', '.join(f'[{part}](#{part.lower()})' for part in READY)}.\n"
        part = PARTS.get(condition, "serving")
        yield _table(part, reasons.items())
    yield "## What restarts pods\n"
    yield "A new draft never restarts pods. These fields are part of a pod template, so a change replaces the pods:\n"
    yield (
        "\n".join(f"- {part}: {', '.join(f'`{field}`' for field in fields)}" for part, fields in RESTARTS.items())
        + "\n"
    )


def _table(part: str, reasons: Iterable[tuple[str, ConditionHelp]]) -> str:
    rows = (_row(part, reason, advice) for reason, advice in reasons)
    return "\n".join(("| reason | what it means | what to do |", "| --- | --- | --- |", *rows)) + "\n"


def _row(part: str, reason: str, advice: ConditionHelp) -> str:
    words = {"name": "NAME", "namespace": "NAMESPACE", "part": part}
    return f"| {reason} | {advice.meaning.format(**words)} | {advice.action.format(**words)} |".replace("||", "\\|\\|")
