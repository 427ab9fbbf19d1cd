"""An explanation on a terminal."""

from collections.abc import Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from updraft_cli.cmd.explain.condition_help import RESTARTS_EXCEPTION
from updraft_cli.cmd.explain.explanation import Explanation, Problem
from updraft_cli.cmd.status.view import CONDITION_STYLES
from updraft_cli.output import ago, sentence


def rendered(explanation: Explanation, now: datetime, *, is_wide: bool) -> RenderableType:
    """Sentences under headings; wide, also with the fields that restart trainer and registry."""
    parts: list[RenderableType] = [Text(f"{explanation.name} in namespace {explanation.namespace}", "bold")]
    parts += map(Text, explanation.does)
    for problem in explanation.problems:
        parts += ["", *_problem(problem, now)]
    if not explanation.problems and len(explanation.does) > 1:
        parts += ["", Text("Every condition is True.", "green")]
    if explanation.rollout:
        parts += ["", Text("Rollout", "bold"), *map(Text, explanation.rollout)]
    parts += ["", Text("Pod restarts", "bold"), Text("A new draft, a pin, a pause or a policy restarts nothing.")]
    for part, fields in explanation.restarts.items():
        if is_wide or part == "serving":
            parts.append(Text(f"A change of these fields replaces the {part} pods: {', '.join(fields)}."))
    parts.append(Text(RESTARTS_EXCEPTION))
    return Group(*parts)


def _problem(problem: Problem, now: datetime) -> Iterator[RenderableType]:
    since = f" for {ago(problem.since, now).removesuffix(' ago')}" if problem.since else ""
    title = f"{problem.condition} has been {problem.status}{since}: {problem.reason}"
    yield Text(title, CONDITION_STYLES.get(problem.status, ""))
    sentences = (sentence(problem.message), problem.meaning)
    yield Text(" ".join(filter(None, sentences)) or "There is no message.")
    if problem.action:
        yield Text("What to do: ", "bold") + Text(problem.action)
