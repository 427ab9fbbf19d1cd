"""A report point: the same held-out prompts through every arm, one arm at a time.

Acceptance and speed are measured separately. Acceptance: every draft proposes the same number of tokens per step, and prompts
run in batches until the error is small enough. Speed: one request at a time, with the engine's own choice; the arms take turns
after every prompt, in rotating order, so that a slow moment of the machine affects all of them. Nothing is captured, so the
draft never learns from these prompts.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from updraft_cli.demo.chat import ChatServer, Question
from updraft_cli.demo.plan import (
    ENOUGH_ERROR_PERCENT,
    LOOKAHEAD,
    Arm,
    Plan,
    Segment,
    fixed_arms,
    is_last,
    probe_limit_s,
    timed_arms,
)
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import Answer, Measured, acceptance_error_percent
from updraft_cli.prompts import domain_prompts

Answers = dict[Arm, list[Answer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where requests of an arm go, and their `updraft` field."""

    server: ChatServer
    fixed: dict[str, Any]
    timed: dict[str, Any]


def ways(serving: ChatServer, frozen: ChatServer | None) -> dict[Arm, Way]:
    """Return the way of each arm. If no draft served at the shift, the frozen arm has no draft."""
    undrafted = Way(server=serving, fixed={"drafter": "none"}, timed={"drafter": "none"})
    alone = {"drafter": "eagle3"}
    draft = alone | {"lookahead": LOOKAHEAD}
    return {
        Arm.NONE: undrafted,
        Arm.NGRAM: Way(server=serving, fixed={"drafter": "ngram"}, timed={"drafter": "ngram"}),
        Arm.FROZEN: Way(server=frozen, fixed=draft, timed=alone) if frozen else undrafted,
        Arm.ADAPTIVE: Way(server=serving, fixed=draft, timed=alone),
        Arm.AUTO: Way(server=serving, fixed={}, timed={}),
    }


class Probe:
    """Measures report points into a recording."""

    def __init__(self, arms: Mapping[Arm, Way], recording: Recording) -> None:
        self._ways = arms
        self._recording = recording

    async def measure(self, segment: Segment, point: int) -> None:
        """Measure report point `point` (from 0) of a segment, while there is no live traffic."""
        plan, started_s = self._recording.plan, self._recording.now_s
        questions = probe_questions(plan, segment.domain)
        is_end = is_last(segment, point)
        until_s = started_s + probe_limit_s(plan, segment)

        def is_exact(answers: Answers) -> bool:
            drafts = [acceptance_error_percent(some) for arm, some in answers.items() if arm is not Arm.NGRAM]
            is_enough = all(error is not None and error <= ENOUGH_ERROR_PERCENT for error in drafts)
            return is_enough or self._recording.now_s >= until_s

        arms = fixed_arms(segment.name, is_end=is_end)
        fixed = await self._ask(arms, questions, lambda way: way.fixed, batch=plan.probing.batch, is_enough=is_exact)
        timed: dict[Arm, Measured] = {}
        if is_end:
            alone = questions[: plan.probing.num_timed]
            timed = await self._ask(timed_arms(segment.name), alone, lambda way: way.timed, batch=1)
        self._recording.add_point(fixed, timed, is_start=point == 0, is_end=is_end, started_s=started_s)

    async def _ask(
        self,
        arms: Sequence[Arm],
        questions: Sequence[Question],
        options: Callable[[Way], dict[str, Any]],
        *,
        batch: int,
        is_enough: Callable[[Answers], bool] = lambda _: False,
    ) -> dict[Arm, Measured]:
        """Ask batch by batch, all of a batch at once, until it is enough."""
        answers: Answers = {arm: [] for arm in arms}
        walls_s = dict.fromkeys(arms, 0.0)
        for start in range(0, len(questions), batch):
            for arm in rotated(arms, len(self._recording.points) + start // batch):
                way, start_s = self._ways[arm], self._recording.clock.monotonic()
                asked = [replace(question, options=options(way)) for question in questions[start : start + batch]]
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(way.server.ask(question)) for question in asked]
                answers[arm] += [task.result() for task in tasks]
                walls_s[arm] += self._recording.clock.monotonic() - start_s
            if is_enough(answers):
                break
        return {arm: Measured.of(answers[arm], walls_s[arm]) for arm in arms}


def probe_questions(plan: Plan, domain: str) -> list[Question]:
    """Return the held-out prompts of every report point of a domain."""
    prompts = domain_prompts(domain, plan.probing.num_prompts, plan.seed, held_out=True)
    return [
        Question(prompt=number, text=text, max_tokens=plan.probing.max_tokens, is_captured=False)
        for number, text in enumerate(prompts)
    ]


def rotated(arms: Sequence[Arm], turns: int) -> list[Arm]:
    """Return the arms, with another first one at every turn."""
    first = turns % len(arms)
    return [*arms[first:], *arms[:first]]
