"""A report point: the same held-out prompts through every arm, one arm at a time.

Acceptance and speed are measured separately. Acceptance: every draft proposes the same number of tokens per step, and prompts
run in batches until the error is small enough. Speed: one request at a time, with the engine's own choice; the arms take turns
after every prompt, in rotating order, so that a slow moment of the machine affects all of them. Nothing is captured, so the
draft never learns from these prompts.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where requests of an arm go, and their `updraft` field."""

    server: ChatServer
    fixed: Mapping[str, Any]
    timed: Mapping[str, Any]


def ways(serving: ChatServer, frozen: ChatServer | None) -> dict[Arm, Way]:
    """Return the way of each arm. If no draft served at the shift, the frozen arm has no draft."""
    none = {"drafter": "none"}
    draft = {"drafter": "eagle3", "lookahead": LOOKAHEAD}
    return {
        Arm.NONE: Way(server=serving, fixed=none, timed=none),
        Arm.NGRAM: Way(server=serving, fixed={"drafter": "ngram"}, timed={"drafter": "ngram"}),
        Arm.FROZEN: Way(server=frozen, fixed=draft, timed={})
        if frozen
        else Way(server=serving, fixed=none, timed=none),
        Arm.ADAPTIVE: Way(server=serving, fixed=draft, timed={}),
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
        fixed = await self._acceptance(fixed_arms(segment.name, is_end=is_end), questions, until_s)
        alone = questions[: plan.probing.num_timed]
        timed = await self._speed(timed_arms(segment.name), alone) if is_end else {}
        self._recording.add_point(fixed, timed, is_start=point == 0, is_end=is_end, started_s=started_s)

    async def _acceptance(
        self, arms: Sequence[Arm], questions: Sequence[Question], until_s: float
    ) -> dict[Arm, Measured]:
        """Ask batch by batch, until the error of every draft is small enough or the time is up."""
        answers: dict[Arm, list[Answer]] = {arm: [] for arm in arms}
        walls_s = dict.fromkeys(arms, 0.0)
        size = self._recording.plan.probing.batch
        for start in range(0, len(questions), size):
            for arm in rotated(arms, len(self._recording.points) + start // size):
                way = self._ways[arm]
                some, wall_s = await self._together(way.server, questions[start : start + size], way.fixed)
                answers[arm] += some
                walls_s[arm] += wall_s
            drafts = [acceptance_error_percent(answers[arm]) for arm in arms if arm is not Arm.NGRAM]
            is_enough = all(error is not None and error <= ENOUGH_ERROR_PERCENT for error in drafts)
            if is_enough or self._recording.now_s >= until_s:
                break
        return {arm: Measured.of(answers[arm], walls_s[arm]) for arm in arms}

    async def _speed(self, arms: Sequence[Arm], questions: Sequence[Question]) -> dict[Arm, Measured]:
        answers: dict[Arm, list[Answer]] = {arm: [] for arm in arms}
        walls_s = dict.fromkeys(arms, 0.0)
        for turn, question in enumerate(questions):
            for arm in rotated(arms, len(self._recording.points) + turn):
                way = self._ways[arm]
                some, wall_s = await self._together(way.server, [question], way.timed)
                answers[arm] += some
                walls_s[arm] += wall_s
        return {arm: Measured.of(answers[arm], walls_s[arm]) for arm in arms}

    async def _together(
        self, server: ChatServer, questions: Sequence[Question], options: Mapping[str, Any]
    ) -> tuple[list[Answer], float]:
        """Send all at once; return the answers and the time until the last one."""
        start_s = self._recording.clock.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(server.ask(_with(question, options))) for question in questions]
        return [task.result() for task in tasks], self._recording.clock.monotonic() - start_s


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


def _with(question: Question, options: Mapping[str, Any]) -> Question:
    return Question(
        prompt=question.prompt,
        text=question.text,
        max_tokens=question.max_tokens,
        options=dict(options),
        is_captured=question.is_captured,
    )
