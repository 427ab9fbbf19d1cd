"""The page of conditions, from the one table that `kubectl updraft explain` speaks from."""

from collections.abc import Iterable, Iterator

from updraft_cli.cmd.explain.condition_help import ADVICE, PARTS, READY, RESTARTS, Advice

_INTRO = """\
`kubectl describe asp NAME` shows them, `kubectl updraft explain NAME` says the same with this resource's own names filled in.
A condition is True, False or Unknown; its reason is one of these, its message says more.

`Ready` is `Accepted` and `ServingReady` and `RegistryReady`, and has the reason of the first of them that is not True. The
others stand beside it: serving goes on without them.
"""


def sections() -> Iterator[str]:
    """The page below its head, as Markdown."""
    yield "# Conditions\n"
    yield _INTRO
    for condition, reasons in ADVICE.items():
        yield f"## {condition}\n"
        if condition == "Ready":
            yield f"See {', '.join(f'[{part}](#{part.lower()})' for part in READY)}.\n"
        part = PARTS.get(condition, "serving")
        yield _table(part, reasons.items())
    yield "## What restarts pods\n"
    yield "A new draft never does. Fields that are in a part's pod template, so that a change replaces its pods:\n"
    yield (
        "\n".join(f"- {part}: {', '.join(f'`{field}`' for field in fields)}" for part, fields in RESTARTS.items())
        + "\n"
    )


def _table(part: str, reasons: Iterable[tuple[str, Advice]]) -> str:
    rows = (_row(part, reason, said) for reason, said in reasons)
    return "\n".join(("| reason | what it means | what to do |", "| --- | --- | --- |", *rows)) + "\n"


def _row(part: str, reason: str, said: Advice) -> str:
    words = {"name": "NAME", "namespace": "NAMESPACE", "part": part}
    return f"| {reason} | {said.meaning.format(**words)} | {said.action.format(**words)} |".replace("||", "\\|\\|")
