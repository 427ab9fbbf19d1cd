"""A running engine drafts when it pays, stops when it does not, and notices when that changes."""

import math

import pytest

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.lookahead.choice import Choice
from updraft_inference.torch_engine.drafting.lookahead.cost import CostTable
from updraft_inference.torch_engine.drafting.lookahead.kind import NOTHING, ProposalSource, chain_beside
from updraft_inference.torch_engine.drafting.lookahead.policy import UNKNOWN, Ask, Lookahead, Record
from updraft_inference.torch_engine.drafting.lookahead.rest import FIRST_GAP, LEAST_STEPS, LONGEST_GAP, MEMORY
from updraft_inference.torch_engine.drafting.lookahead.tries import FIRST_REST, LONGEST_REST, STEPS

CURVE = {1: 0.030, 4: 0.033, 16: 0.045, 64: 0.100}


def lookahead(*, is_fixed: bool = False) -> Lookahead:
    return Lookahead(CostTable(CURVE), is_fixed=is_fixed)


def run(policy: Lookahead, kept: int, *, steps: int, chain: int = 3) -> list[Choice]:
    """One sequence whose draft model is right for the first `kept` drafts of every chain."""
    record, choices = Record(), []
    for _ in range(steps):
        choice = policy.plan([Ask(record=record, chain=chain)])[0]
        if choice.length:
            right = min(kept, choice.length)
            policy.observe_verdict(record, right, is_refused=right < choice.length)
        choices.append(choice)
    return choices


def test_a_draft_model_that_is_right_makes_full_chains() -> None:
    assert run(lookahead(), 3, steps=100)[-40:] == [Choice(Drafter.EAGLE3, 3)] * 40


def test_a_draft_model_that_is_never_right_is_tried_ever_more_rarely() -> None:
    policy = lookahead()
    tries = [choice.length > 0 for choice in run(policy, 0, steps=30 * LONGEST_REST)]
    first = tries[: 4 * FIRST_REST]
    assert 2 * STEPS <= sum(first) <= 2 * STEPS + UNKNOWN + 2
    num_late = sum(tries[4 * LONGEST_REST :])
    assert 24 * STEPS <= num_late <= 26 * STEPS


READ_S = 0.001
"""Of each step of a sequence that the draft model reads: a thirtieth of a step."""


def begun(
    policy: Lookahead, kept: int, *, kind: ProposalSource = NOTHING, steps: int = 8 * MEMORY, read_s: float = READ_S
) -> list[bool]:
    """Whether requests that begin have the draft model; one a step, beside one that runs and that the model reads."""
    record, found = Record(), []
    for _ in range(steps):
        found.append(policy.admits_model(1))
        (choice,) = policy.plan([Ask(record=record, kind=kind, lookup=8 * (kind != NOTHING), chain=3)])
        policy.observe_reading(read_s)
        if choice.drafter is Drafter.EAGLE3:
            policy.observe_verdict(record, min(kept, choice.length), is_refused=kept < choice.length)
        if kind != NOTHING:
            policy.observe(record, kind, 8, is_refused=False)
    return found


def test_few_requests_begin_with_a_draft_model_that_does_not_pay_and_all_with_one_that_does() -> None:
    policy = lookahead()
    assert begun(policy, 0)[-4 * (LONGEST_GAP + 1) :].count(True) == 4
    assert begun(policy, 3)[-MEMORY:] == [True] * MEMORY
    begun(policy, 0)
    policy.reset_model()
    assert policy.admits_model(1)


def test_where_lookups_serve_all_a_draft_model_reads_in_vain() -> None:
    policy = lookahead()
    begun(policy, 3)
    assert begun(policy, 3, kind=ProposalSource(8))[-4 * (LONGEST_GAP + 1) :].count(True) == 4


def test_chains_that_save_less_than_the_model_reads_for_them_are_not_worth_it() -> None:
    policy, record, num_chosen = lookahead(), Record(), 0
    for step in range(8 * MEMORY):  # each fourth goes wrong
        (choice,) = policy.plan([Ask(record=record, kind=NOTHING, chain=1)])
        policy.observe_reading(20 * READ_S)
        if choice.drafter is Drafter.EAGLE3:
            num_chosen += 1
            policy.observe_verdict(record, int(step % 4 > 0), is_refused=step % 4 == 0)
    assert num_chosen > 4 * MEMORY
    assert [policy.admits_model(1) for _ in range(FIRST_GAP - 1)] == [False] * (FIRST_GAP - 1)


def test_what_counts_is_what_was_kept_of_chains_not_what_they_promised() -> None:
    policy, record = lookahead(), Record()

    def chained(kept: int) -> bool:
        (choice,) = policy.plan([Ask(record=record, kind=NOTHING, chain=3)])
        if choice.drafter is Drafter.EAGLE3:
            policy.observe_verdict(record, kept, is_refused=kept < 3)
        return record.promise is not None

    for _ in range(math.ceil(UNKNOWN) + 1):
        chained(3)
    assert [chained(0) for _ in range(2 * LEAST_STEPS)].count(True) > 3
    assert not policy.admits_model(1)


def test_a_rested_model_that_became_right_wakes_however_many_requests_run_at_once() -> None:
    policy, batch, length = lookahead(), 8, 50
    records = [(Record(), False)] * batch
    lately: list[bool] = []
    for step in range(400 * length):
        kept = 0 if step < 20 * length else 3
        if step % (length // batch) == 0:  # one ends, and another one begins
            lately.append(policy.admits_model(batch))
            records = [*records[1:], (Record(), lately[-1])]
        asks = [Ask(record=record, kind=NOTHING, chain=3 * is_read) for record, is_read in records]
        choices = policy.plan(asks)
        policy.observe_reading(READ_S * sum(is_read for _, is_read in records) / batch)
        for ask, choice in zip(asks, choices, strict=True):
            if choice.drafter is Drafter.EAGLE3:
                policy.observe_verdict(ask.record, min(kept, choice.length), is_refused=kept < choice.length)
    assert not all(lately)
    assert all(lately[-100:])


def test_only_what_chains_beside_lookups_cost_and_save_says_if_the_model_reads_beside_them() -> None:
    def served(*, has_lookups: bool) -> Lookahead:
        policy, record = lookahead(), Record()
        for _ in range(2 * LEAST_STEPS):
            policy.plan(
                [Ask(record=record, kind=NOTHING if has_lookups else None, chain=3), Ask(record=Record(), chain=3)]
            )
            policy.observe_verdict(record, 3, is_refused=False)
        return policy

    paying, alone = served(has_lookups=True), served(has_lookups=False)
    for policy in (paying, alone):
        for _ in range(LEAST_STEPS):
            policy.plan([Ask(record=Record(), kind=NOTHING, chain=3)])
        policy.observe_reading(READ_S)
    assert paying.admits_model(1)
    assert not alone.admits_model(1)


def test_the_chains_of_a_step_share_what_it_saves() -> None:
    policy, records = lookahead(), [Record(), Record()]
    for _ in range(40):
        choices = policy.plan([Ask(record=record, kind=NOTHING, chain=3) for record in records])
        for record in records:
            policy.observe_verdict(record, 3, is_refused=False)
    assert choices == [Choice(Drafter.EAGLE3, 3)] * 2
    promises = [record.promise for record in records if record.promise is not None]
    without_s = (2 + sum(each.kept for each in promises)) * promises[0].token_s
    step_s = policy.cost.seconds(2, 8) + 3 * 0.1 * policy.cost.alone(2)
    assert sum(each.saved_s for each in promises) == pytest.approx(without_s - step_s)


@pytest.mark.parametrize(("beside", "behind", "is_read"), [(1.0, 50, True), (0.0, 50, False), (1.0, 1, False)])
def test_what_the_model_reads_before_a_chain_beside_lookups_has_to_be_earned(
    beside: float, behind: int, *, is_read: bool
) -> None:
    policy = lookahead()
    begun(policy, 0, steps=2 * LEAST_STEPS, read_s=0.0)
    assert policy.admits_model(1)
    policy.observe_chains(sequences=1, length=3, behind=behind, seconds=0.02, beside=beside)
    assert policy.admits_model(1) is not is_read


def test_a_draft_model_that_does_not_pay_beside_lookups_may_pay_alone() -> None:
    policy, alone, beside = lookahead(), Record(), Record()
    for _ in range(200):
        for record, kind, kept in ((alone, None, 3), (beside, NOTHING, 0)):
            if policy.plan([Ask(record=record, kind=kind, chain=3)])[0].length:
                policy.observe_verdict(record, kept, is_refused=kept < 3)
    assert policy.plan([Ask(record=alone, chain=3)]) == [Choice(Drafter.EAGLE3, 3)]
    assert policy.plan([Ask(record=beside, kind=NOTHING, chain=3)]) == [Choice()]


def test_another_sequence_is_tried_each_time() -> None:
    policy, records = lookahead(), [Record() for _ in range(3)]
    tried = []
    for _ in range(8 * LONGEST_REST):
        for i, choice in enumerate(policy.plan([Ask(record=record, chain=3) for record in records])):
            if choice.length:
                policy.observe_verdict(records[i], 0, is_refused=True)
                tried.append(i)
    assert set(tried[-6 * STEPS :]) == {0, 1, 2}


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("bad_steps", [100, 8 * LONGEST_REST])
def test_a_draft_model_that_became_better_is_noticed_soon_after_the_first_try_that_shows_it(
    bad_steps: int, kept: int
) -> None:
    policy = lookahead()
    run(policy, 0, steps=bad_steps)
    assert run(policy, kept, steps=LONGEST_REST + 40 * FIRST_REST)[-1] == Choice(Drafter.EAGLE3, kept)


def test_a_try_is_of_one_sequence_and_is_not_taken_while_nobody_can() -> None:
    policy, records = lookahead(), [Record(), Record()]
    run(policy, 0, steps=2 * FIRST_REST)
    tried = []
    for step in range(4 * LONGEST_REST):
        chains = (3, 3) if step % 3 else (0, 0)
        asks = [Ask(record=record, chain=chain) for record, chain in zip(records, chains, strict=True)]
        for i, choice in enumerate(policy.plan(asks)):
            if choice.length:
                policy.observe_verdict(records[i], 0, is_refused=True)
                tried.append(i)
    assert len(tried) >= 2 * STEPS
    assert tried[0::2] == tried[1::2]


def test_a_new_draft_model_starts_from_full_chains() -> None:
    policy = lookahead()
    run(policy, 0, steps=100)
    policy.reset_model()
    assert run(policy, 0, steps=3) == [Choice(Drafter.EAGLE3, 3)] * 3


def test_a_lookup_is_verified_once_it_would_have_been_right() -> None:
    policy, record = lookahead(), Record()
    ask = Ask(record=record, lookup=8, kind=ProposalSource(3))
    for _ in range(20):  # nothing is verified: what came is all that is told
        policy.observe(record, ProposalSource(3), 8, is_refused=False)
    assert policy.plan([ask])[0].drafter is Drafter.NGRAM
    for _ in range(200):
        policy.observe(record, ProposalSource(3), 0, is_refused=True)
    assert policy.plan([ask]) == [Choice()]


def test_a_longer_match_is_another_kind() -> None:
    policy, record = lookahead(), Record()
    for _ in range(60):
        policy.observe(record, ProposalSource(2), 0, is_refused=True)
        policy.observe(record, ProposalSource(8), 8, is_refused=False)
    weak, strong = policy.plan(
        [Ask(record=record, lookup=8, kind=ProposalSource(2)), Ask(record=record, lookup=8, kind=ProposalSource(8))]
    )
    assert weak == Choice()
    assert strong == Choice(Drafter.NGRAM, 8)


def test_each_sequence_has_the_drafter_that_promises_more_to_it() -> None:
    policy, copies, invents = lookahead(), Record(), Record()
    for _ in range(60):
        for record, kept in ((copies, 8), (invents, 0)):
            policy.observe(record, ProposalSource(5), kept, is_refused=kept == 0)
            policy.observe(record, chain_beside(ProposalSource(5)), 3, is_refused=False)
        policy.observe_chains(sequences=1, length=3, behind=4, seconds=0.003)
    policy.plan([])  # not a step with a probe
    policy.plan([])
    both = [Ask(record=record, lookup=8, kind=ProposalSource(5), chain=3) for record in (copies, invents)]
    assert [choice.drafter for choice in policy.plan(both)] == [Drafter.NGRAM, Drafter.EAGLE3]


@pytest.mark.parametrize("forced", [0, 1, 3])
def test_a_request_that_says_how_many_gets_so_many(forced: int) -> None:
    policy = lookahead()
    asks = [
        Ask(record=Record(), lookup=5, kind=ProposalSource(5), forced=forced),
        Ask(record=Record(), chain=5, forced=forced),
    ]
    assert [choice.length for choice in policy.plan(asks)] == [forced, forced]


def test_a_fixed_lookahead_makes_the_longest_drafts() -> None:
    policy = lookahead(is_fixed=True)
    for _ in range(50):
        assert policy.plan([Ask(record=Record(), chain=3)]) == [Choice(Drafter.EAGLE3, 3)]


def test_catching_up_after_a_pause_does_not_make_drafting_look_dear() -> None:
    policy = lookahead()
    run(policy, 3, steps=40)
    for _ in range(10):
        policy.observe_chains(sequences=1, length=3, behind=2, seconds=0.006)
    policy.observe_chains(sequences=1, length=3, behind=64, seconds=5.0)
    assert policy.plan([Ask(record=Record(), chain=3)]) == [Choice(Drafter.EAGLE3, 3)]


def test_what_choices_go_by_is_told() -> None:
    policy = lookahead()
    policy.plan([Ask(record=Record(), lookup=2, kind=ProposalSource(2))])
    assert math.isnan(policy.survival(Drafter.EAGLE3, 1)), "no draft model was seen"
    policy = lookahead()
    run(policy, 2, steps=50)
    assert policy.survival(Drafter.EAGLE3, 2) > 0.8
    assert policy.survival(Drafter.EAGLE3, 3) < 0.2
    assert math.isnan(policy.survival(Drafter.NGRAM, 1))
    assert policy.step_seconds(16) == 0.045


@pytest.mark.parametrize("num_pinned", [1, 3, 15])
@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_requests_that_chose_for_themselves_count_in_what_others_cost_them(num_pinned: int, rate: float) -> None:
    """One that must not draft is, for its neighbours, one that cannot."""
    policy = Lookahead(CostTable({rows: 1 + 0.25 * rows for rows in (1, 64)}))
    for step in range(1000):
        is_refused = step % 10 >= 10 * rate
        policy.observe(Record(), ProposalSource(5), 0 if is_refused else 1, is_refused=is_refused)
    free = Ask(record=Record(), lookup=4, kind=ProposalSource(5))
    pinned = Ask(record=Record(), lookup=4, kind=ProposalSource(5), forced=0)
    unable = Ask(record=Record())

    chosen = policy.plan([free, *[pinned] * num_pinned])

    assert chosen == policy.plan([free, *[unable] * num_pinned])
