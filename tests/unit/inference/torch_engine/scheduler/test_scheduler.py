"""Steps of the decoder itself, without a thread."""

from itertools import count
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import make_draft, make_tiny_target

from updraft_inference.engine import Delta, Drafter, GenerationRequest, SamplingParams
from updraft_inference.torch_engine.drafting import speculation
from updraft_inference.torch_engine.drafting.eagle import EagleProposer
from updraft_inference.torch_engine.drafting.lookahead.cost import ChainCost, CostTable
from updraft_inference.torch_engine.drafting.lookahead.probe import DraftModelGate
from updraft_inference.torch_engine.drafting.speculation import COMPARING, USUAL, EvidenceBudget
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.model.target import Target
from updraft_inference.torch_engine.scheduler.prefill import MIN_TOKENS, STEPS_PER_PAUSE
from updraft_inference.torch_engine.scheduler.scheduler import Scheduler
from updraft_inference.torch_engine.sequence import Sequence

_ids = count()


class Request:
    """One that is greedy and does not end by itself, and what it was given in each step."""

    def __init__(
        self,
        prompt: tuple[int, ...],
        *,
        max_tokens: int = 30,
        drafter: Drafter = Drafter.NONE,
        lookahead: int | None = None,
    ) -> None:
        self.gained: list[int] = []
        asked = GenerationRequest(
            request_id=f"r{next(_ids)}",
            prompt_ids=prompt,
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=0),
            ignore_eos=True,
            drafter=drafter,
            lookahead=lookahead,
        )
        self.sequence = Sequence(request=asked, emit=self._take, ids=list(prompt))

    def _take(self, delta: Delta) -> None:
        self.gained += delta.token_ids


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = make_tiny_target(tmp_path_factory.mktemp("models") / "target", seed=3)
    return Target.open(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def eagle(target: Target, tmp_path: Path) -> EagleProposer:
    network = make_draft(make_tiny_target(tmp_path / "target", seed=3))
    return EagleProposer(network, num_slots=6, num_positions=256)


@pytest.fixture
def scheduler(target: Target, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """On a machine on which a forward takes 10 ms and 1 ms a row, for ever."""
    made = Scheduler(target, Limits(num_slots=6, max_context=250, max_lookahead=5), default=Drafter.NONE)
    monkeypatch.setattr(made.planner, "cost", CostTable({1: 0.011, 256: 0.266}))
    monkeypatch.setattr(made.planner, "observe_step", lambda **_: None)
    return made


@pytest.fixture
def reads(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward."""
    num_rows: list[int] = []
    forward = target.forward

    def counted(ids_R: torch.Tensor, *rest: object) -> object:  # noqa: N803 - the target's own name
        num_rows.append(len(ids_R))
        return forward(ids_R, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(target, "forward", counted)
    return num_rows


def test_one_forward_reads_all_prompts_that_come_together(scheduler: Scheduler, reads: list[int]) -> None:
    requests = [Request(tuple(range(40 + n, 60 + 2 * n))) for n in range(6)]
    for request in requests:
        scheduler.add(request.sequence)
    scheduler.step()
    assert reads == [sum(20 + n for n in range(6))]
    assert [len(request.gained) for request in requests] == [1] * 6


def test_a_prompt_is_read_in_pieces_that_double_a_step_and_running_streams_gain_in_each(
    scheduler: Scheduler, reads: list[int]
) -> None:
    streams = [Request(tuple(range(50 + n, 70 + n)), max_tokens=100) for n in range(5)]
    for stream in streams:
        scheduler.add(stream.sequence)
    scheduler.step()
    newcomer = Request(tuple(range(10, 230)))
    scheduler.add(newcomer.sequence)
    reads.clear()
    while not newcomer.gained:
        before = [len(stream.gained) for stream in streams]
        scheduler.step()
        assert [len(stream.gained) for stream in streams] == [gained + 1 for gained in before]
    # 10 ms and 5 rows; 16 more are too many for twice that, and fewer are not worth a forward.
    assert reads == [5 + MIN_TOKENS] * (220 // MIN_TOKENS) + [5 + 220 % MIN_TOKENS]


def test_drafts_that_are_verified_count_among_the_rows_that_streams_wait_for(
    scheduler: Scheduler, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows are free up to 64, so that drafts are made; twice that is the cost of 130: beside one row 128 more, beside ten 112.
    free_up_to_64 = CostTable({1: 0.060, 64: 0.060, 130: 0.120, 256: 0.234})
    monkeypatch.setattr(scheduler.planner, "cost", free_up_to_64)
    scheduler.add(Request((7, 8, 9) * 8, max_tokens=200, drafter=Drafter.NGRAM).sequence)
    for _ in range(100):  # greedy output of a random model repeats itself before long
        scheduler.step()
        if scheduler.planner.last >= 5:
            break
    scheduler.add(Request(tuple(range(10, 230))).sequence)
    scheduler.step()
    assert scheduler.planner.last >= 2
    assert 1 + scheduler.planner.last < reads[-1] <= 130


def test_however_many_prompts_come_a_step_now_and_then_reads_none(scheduler: Scheduler, reads: list[int]) -> None:
    scheduler.add(Request(tuple(range(30, 60)), max_tokens=200).sequence)
    scheduler.step()
    for n in range(20):
        scheduler.add(Request(tuple(range(10 + n, 200)), max_tokens=1).sequence)
    reads.clear()
    for _ in range(3 * STEPS_PER_PAUSE):
        scheduler.step()
    assert [rows for rows in reads if rows < 1 + MIN_TOKENS / 2].count(1) == 3


def test_who_came_first_is_read_first(scheduler: Scheduler) -> None:
    first, second = Request(tuple(range(2, 232))), Request(tuple(range(232, 2, -1)))
    scheduler.add(first.sequence)
    scheduler.add(second.sequence)
    scheduler.step()
    assert len(first.gained) == 1
    assert second.sequence.num_computed_tokens == 256 - 230


def test_a_request_that_is_cancelled_in_mid_prompt_leaves_its_slot(scheduler: Scheduler) -> None:
    stream, long = Request(tuple(range(20, 40)), max_tokens=100), Request(tuple(range(10, 230)))
    scheduler.add(stream.sequence)
    scheduler.step()
    scheduler.add(long.sequence)
    scheduler.step()
    assert 0 < long.sequence.num_computed_tokens < 220
    scheduler.cancel(long.sequence.request.request_id)
    assert scheduler.load.running == 1
    before = len(stream.gained)
    scheduler.step()
    assert len(stream.gained) == before + 1
    scheduler.cancel_all()
    assert scheduler.is_idle


def test_a_few_words_in_common_do_not_cost_another_conversation_its_slot(scheduler: Scheduler) -> None:
    earlier = Request((5, 6, 7, *range(100, 140)), max_tokens=2)
    scheduler.add(earlier.sequence)
    while not scheduler.is_idle:
        scheduler.step()
    newcomer = Request((5, 6, 7, *range(50, 90)))
    scheduler.add(newcomer.sequence)
    scheduler.step()
    assert newcomer.sequence.slot != earlier.sequence.slot
    assert scheduler.load.cached_tokens == 0


def turn_off(scheduler: Scheduler) -> None:
    """The draft model was of no use."""
    for _ in range(DraftModelGate.MIN_STEPS):
        scheduler.planner.gate.observe(1, 0)


def answered(scheduler: Scheduler, request: Request) -> bool:
    """Let it come to its end; whether the draft model read it."""
    scheduler.add(request.sequence)
    scheduler.step()
    is_read = request.sequence.is_draftable
    while not scheduler.is_idle:
        scheduler.step()
    return is_read


def test_requests_are_left_to_lookup_while_the_draft_model_is_off_and_answers_stay_the_same(
    scheduler: Scheduler, eagle: EagleProposer
) -> None:
    prompt = tuple(range(40, 100))
    answered(scheduler, plain := Request(prompt))
    scheduler.install(eagle, 1)
    assert answered(scheduler, Request(prompt, drafter=Drafter.HYBRID))
    turn_off(scheduler)

    requests = [Request(prompt, drafter=Drafter.HYBRID) for _ in range(3)]
    assert not any(answered(scheduler, request) for request in requests)
    assert answered(scheduler, Request(prompt, drafter=Drafter.EAGLE3))
    assert answered(scheduler, Request(prompt, drafter=Drafter.HYBRID, lookahead=2))
    assert all(request.gained == plain.gained for request in requests)


def test_a_swap_turns_the_draft_model_on_again(scheduler: Scheduler, eagle: EagleProposer) -> None:
    scheduler.install(eagle, 1)
    turn_off(scheduler)
    scheduler.renew(2)
    assert answered(scheduler, Request(tuple(range(40, 60)), drafter=Drafter.HYBRID))


@pytest.mark.parametrize(("is_comparing", "budget"), [(False, USUAL), (True, COMPARING)])
@pytest.mark.parametrize("row_s", [0.0, 0.1, 10.0], ids=["free rows", "cheap rows", "expensive rows"])
def test_the_model_drafts_alone_for_every_hybrid_request_in_a_share_of_all_steps_that_takes_little_time(
    scheduler: Scheduler,
    eagle: EagleProposer,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_comparing: bool,
    budget: EvidenceBudget,
    row_s: float,
) -> None:
    hybrid = [Request(tuple(range(40 + n, 60)), drafter=Drafter.HYBRID).sequence for n in range(2)]
    others = [Request(tuple(range(42, 60)), drafter=drafter).sequence for drafter in (Drafter.NGRAM, Drafter.EAGLE3)]
    # Chains that a request cuts short are no evidence, nor do they cost what full ones do.
    prompt = tuple(range(43, 60))
    others += [Request(prompt, drafter=Drafter.HYBRID, lookahead=lookahead).sequence for lookahead in (0, 1)]
    scheduler.install(eagle, 1)
    scheduler.speculation.is_comparing = is_comparing
    for sequence in (*hybrid, *others):
        scheduler.add(sequence)
    scheduler.step()
    monkeypatch.setattr(scheduler.planner, "cost", CostTable({1: 100 + row_s, 256: 100 + 256 * row_s}))
    monkeypatch.setattr(scheduler.planner, "_chains", ChainCost(CostTable({1: 1e-6, 256: 1e-6})))
    drawn = [scheduler.speculation.draw_alone([*hybrid, *others]) for _ in range(20_000)]
    assert set(drawn) == {frozenset(), frozenset(hybrid)}
    share, longer = sum(map(bool, drawn)) / len(drawn), 10 * row_s / (100 + 6 * row_s)
    expected = min(budget.steps, budget.seconds / longer) if longer else budget.steps
    assert share == pytest.approx(expected, rel=0.25)


def test_what_the_model_drafts_alone_is_unmixed_and_as_long_as_may_be_whether_it_pays_or_not(
    scheduler: Scheduler, eagle: EagleProposer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "COMPARING", EvidenceBudget(1 / 4, 9.0))
    requests = [Request(tuple(range(40 + n, 60)), max_tokens=190, drafter=Drafter.HYBRID) for n in range(6)]
    scheduler.install(eagle, 1)
    scheduler.speculation.is_comparing = True
    for request in requests:
        scheduler.add(request.sequence)
    while not scheduler.is_idle:
        scheduler.step()
    steps = [step for request in requests for step in request.sequence.steps]
    alone = [step for step in steps if step.drafter is Drafter.EAGLE3]
    assert alone
    assert not any(step.looked_up for step in alone)
    longest = scheduler.limits.max_lookahead
    assert all(len(step.draft_ids) == min(longest, 189 - step.start) for step in alone)
    assert any(step.drafter is not Drafter.EAGLE3 for step in steps), "the planner thinks little of this draft"


def test_while_drafts_are_compared_the_draft_model_reads_requests_that_it_would_leave_to_lookup(
    scheduler: Scheduler, eagle: EagleProposer
) -> None:
    scheduler.install(eagle, 1)
    turn_off(scheduler)
    scheduler.speculation.is_comparing = True
    assert answered(scheduler, Request(tuple(range(40, 60)), drafter=Drafter.HYBRID))


def test_steps_in_which_the_model_has_to_draft_say_nothing_about_what_speculation_is_worth(
    scheduler: Scheduler, eagle: EagleProposer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "COMPARING", EvidenceBudget(1 / 4, 9.0))
    measured: list[int] = []
    monkeypatch.setattr(scheduler.speedup, "observe", lambda batch, *_, **__: measured.append(batch))
    monkeypatch.setattr(scheduler.speedup, "allows_drafts", lambda _: False)
    scheduler.install(eagle, 1)
    scheduler.speculation.is_comparing = True
    request = Request(tuple(range(40, 60)), max_tokens=150, drafter=Drafter.HYBRID)
    answered(scheduler, request)
    steps = request.sequence.steps
    assert len([step for step in steps if not step.draft_ids]) == len(measured), "speculation is off"
    assert any(step.draft_ids for step in steps), "and still the draft is compared"
