"""What every engine promises with Updraft inside it: the same text, and exactly the trace of that text.

Subclass `TracingContract` as `TestX`, or `AgentContract` for a server whose agent is another process, and give it the fixtures
`engine` (a Traced), `plain` (what the engine says to each of ASKS without Updraft), `target` (as transformers runs it) and
`drafts` (two, of which one is accepted more often). Targets run in float32.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.sglang.models import cycle
from tests.support.tap_agent import Seen
from tests.support.text_reference import Reference, check_step
from tests.support.wait import until
from transformers import LlamaForCausalLM

ServerT = TypeVar("ServerT")

LOOKAHEAD = 3
ATTEMPTS = 10
"""A swap is meant to come within a request, but nobody makes the engine wait for it."""

_WORDS = tuple(cycle())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A greedy request that only its limit ends."""

    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, kw_only=True)  # no slots: in Python 3.11 PluggedServer[S](...) would raise a TypeError
class PluggedServer(Generic[ServerT]):
    """A server with the plugin, and what one without it said to the same requests."""

    server: ServerT
    folder: Path
    socket: Path
    plain: Mapping[Ask, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the engine itself counts of a request: verify steps, proposed and accepted tokens."""

    steps: int
    proposed: int
    accepted: int

    @classmethod
    def of(cls, seen: Seen) -> "Counts":
        """Of the steps in which something was proposed."""
        steps = [step for step in seen.steps if step["drafts"]]
        proposed = sum(len(step["drafts"]) for step in steps)
        return cls(steps=len(steps), proposed=proposed, accepted=sum(step["accepted"] for step in steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`told` is everything that left the engine of a request's text and states; None if nothing did."""

    output: tuple[int, ...]
    counts: Counts
    told: Seen | None


class Traced(Protocol):
    """An engine with Updraft."""

    async def answers(self, asks: Sequence[Ask], *, is_captured: bool = True) -> list[Answer]:
        """To all of them at once. Without `is_captured` they opt out."""
        ...

    async def swap(self, folder: Path, version: int) -> str:
        """Why the draft is refused; "" if it is served."""
        ...


class WithAgent(Traced, Protocol):
    """A server whose agent is another process."""

    @property
    def num_dropped(self) -> int:
        """Messages that no agent got, as the last one says that came."""
        ...

    async def outputs(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """The answers alone, whatever the agent does."""
        ...

    def stall(self) -> None:
        """The agent reads nothing any more."""
        ...

    async def replace_agent(self) -> None:
        """The agent dies, and another one comes."""
        ...


ASKS = tuple(Ask(prompt=_WORDS[place : place + 3 + 4 * place], tokens=8 + 7 * place) for place in range(8))
LONG = Ask(prompt=_WORDS[:5], tokens=250)


class TracingContract:
    """Each test is a promise."""

    async def test_the_text_is_the_same_with_and_without_updraft(
        self, engine: Traced, plain: Mapping[Ask, tuple[int, ...]], drafts: Sequence[Path]
    ) -> None:
        for version, draft in enumerate(drafts, 1):
            assert await engine.swap(draft, version) == ""
            for is_captured in (True, False):
                answers = await engine.answers(ASKS, is_captured=is_captured)

                assert [answer.output for answer in answers] == [plain[ask] for ask in ASKS]
        assert sum(answer.counts.accepted for answer in answers) > 0

    async def test_a_trace_is_that_of_the_text(
        self, engine: Traced, target: LlamaForCausalLM, drafts: Sequence[Path]
    ) -> None:
        assert await engine.swap(drafts[0], 1) == ""

        answers = await engine.answers(ASKS)

        for ask, answer in zip(ASKS, answers, strict=True):
            assert answer.told is not None
            assert Counts.of(answer.told) == answer.counts
            check_trace(target, ask, answer.output, answer.told)
        accepted = {step["accepted"] for answer in answers if answer.told for step in answer.told.steps}
        assert accepted == set(range(LOOKAHEAD + 1)), "else this test is about less than it says"

    async def test_of_a_request_that_opts_out_nothing_is_left_but_counts(
        self, engine: Traced, drafts: Sequence[Path]
    ) -> None:
        assert await engine.swap(drafts[0], 1) == ""

        captured, out = await asyncio.gather(engine.answers(ASKS[:2]), engine.answers(ASKS[2:4], is_captured=False))

        assert all(answer.told is not None for answer in captured)
        assert [answer.told for answer in out] == [None, None]
        assert all(answer.counts.steps > 0 for answer in out)

    async def test_a_swap_in_mid_request_changes_no_token_and_steps_say_who_drafted(
        self, engine: Traced, plain: Mapping[Ask, tuple[int, ...]], drafts: Sequence[Path]
    ) -> None:
        versions: set[tuple[int, ...]] = set()
        for attempt in range(ATTEMPTS):
            assert await engine.swap(drafts[0], 1) == ""
            given = await _answers_while(engine, drafts[1], 2, share=(attempt + 1) / (ATTEMPTS + 1))

            assert {answer.output for answer in given} == {plain[LONG]}
            for answer in given:
                assert answer.told is not None
                told = [step["version"] for step in answer.told.steps if step["drafts"]]
                assert told == sorted(told)
                versions.add(tuple(sorted(set(told))))
            if (1, 2) in versions:
                return
        pytest.fail(f"no swap of {ATTEMPTS} came within a request")

    @pytest.mark.parametrize("fault", ["missing", "not finite", "cut off"])
    async def test_a_refused_draft_leaves_the_one_before(
        self, engine: Traced, drafts: Sequence[Path], tmp_path: Path, fault: str
    ) -> None:
        assert await engine.swap(drafts[0], 1) == ""
        (before,) = await engine.answers([LONG])

        refusal = await engine.swap(_spoilt(drafts[1], tmp_path / "bad", fault), 2)

        (after,) = await engine.answers([LONG])
        assert refusal != ""
        assert (after.output, after.counts) == (before.output, before.counts)
        assert before.told is not None
        assert after.told is not None
        assert _proposals(after.told) == _proposals(before.told)
        assert {version for version, _ in _proposals(after.told)} == {1}


class AgentContract(TracingContract):
    """What a server promises whose agent is another process."""

    async def test_an_agent_that_stalls_or_dies_leaves_serving_untouched(
        self, engine: WithAgent, plain: Mapping[Ask, tuple[int, ...]], drafts: Sequence[Path]
    ) -> None:
        assert await engine.swap(drafts[0], 1) == ""
        engine.stall()
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(engine.outputs(ASKS)) for _ in range(4)]
            stalled = await engine.outputs([LONG])
            await engine.replace_agent()
        (again,) = await engine.answers(ASKS[:1])

        assert stalled == [plain[LONG]]
        assert [one.result() for one in running] == [[plain[ask] for ask in ASKS]] * 4
        assert again.output == plain[ASKS[0]]
        assert again.told is not None, "the next agent gets what it asks for"
        assert engine.num_dropped > 0, "nobody read, so something must be lost"


def check_trace(target: LlamaForCausalLM, ask: Ask, output: Sequence[int], seen: Seen) -> None:
    """Steps cover the text and are what greedy verification gives; rows are those of a forward over it, without a gap."""
    text, first = [*ask.prompt, *output], len(ask.prompt) - 1
    known = text[: seen.steps[0]["position"] + 1]
    for step in seen.steps:
        assert step["position"] == len(known) - 1
        known += step["drafts"][: step["accepted"]]
        known += text[len(known) :][:1]
    assert known[: len(text)] == text

    reference = Reference(target, known)
    for step, rejected in zip(seen.steps, seen.rejected, strict=True):
        check_step(target, known, reference, step, rejected)
        assert step["accepted"] == _verified(reference, step["position"], step["drafts"])
    positions = [position for position, _ in seen.rows]
    assert positions == list(range(positions[0], positions[-1] + 1))
    assert positions[0] <= first
    assert positions[-1] >= len(text) - 2
    for position, aux in seen.rows:
        reference.check(position, aux, None)
    taught = [position for position, _ in seen.teachers]
    assert {*range(first, len(text) - 1)} <= set(taught)
    for position, teacher in seen.teachers:
        reference.check(position, None, teacher)


def _verified(reference: Reference, position: int, drafts: Sequence[int]) -> int:
    """How many drafts the target would have said itself. Those after the first that it would not are judged by nothing."""
    picks = reference.logits[position : position + len(drafts)].argmax(-1).tolist()
    return next(
        (place for place, draft in enumerate(drafts) if place >= len(picks) or draft != picks[place]), len(drafts)
    )


def _proposals(seen: Seen) -> list[tuple[int, list[int]]]:
    return [(step["version"], step["drafts"]) for step in seen.steps if step["drafts"]]


async def _answers_while(engine: Traced, draft: Path, version: int, *, share: float) -> list[Answer]:
    """The same request again and again, in two streams, until the draft is swapped in after this share of a request's time.

    Both streams end a request at about the same moment, where a swap would always come between two requests.
    """
    given: list[Answer] = []
    stop = asyncio.Event()

    async def stream() -> None:
        while not stop.is_set():
            given.extend(await engine.answers([LONG]))

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(stream())
        begun_s = time.monotonic()
        await until(lambda: bool(given), what="a first answer")
        await asyncio.sleep(share * (time.monotonic() - begun_s))
        assert await engine.swap(draft, version) == ""
        stop.set()
    return given


def _spoilt(draft: Path, folder: Path, fault: str) -> Path:
    if fault == "missing":
        return folder
    folder.mkdir()
    (folder / "config.json").write_text((draft / "config.json").read_text())
    weights = folder / "model.safetensors"
    if fault == "cut off":
        weights.write_bytes((draft / "model.safetensors").read_bytes()[:-1000])
    else:
        tensors = load_file(draft / "model.safetensors")
        save_file({**tensors, "norm.weight": tensors["norm.weight"] * torch.nan}, weights)
    return folder
