"""The estimate of a gain: right on average, and no surer than it says."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from updraft_rollouts.evidence import (
    ALL_OLD,
    OUTLIERS,
    KindLoss,
    Paired,
    effective_size,
    gain,
    student_t,
    weighted,
    worse_kinds,
    worse_tenants,
)


def test_the_gain_is_the_ratio_of_summed_steps_so_that_long_requests_weigh_more() -> None:
    pairs = [
        Paired(tokens=90, candidate_steps=30, baseline_steps=45),
        Paired(tokens=10, candidate_steps=10, baseline_steps=5),
    ]
    estimate = gain(pairs, 0.8)
    assert (estimate.candidate, estimate.baseline) == (2.5, 2.0)
    assert estimate.percent == pytest.approx(25.0)
    assert estimate.low_percent < 25.0 < estimate.high_percent


def test_requests_that_agree_leave_no_doubt() -> None:
    estimate = gain([Paired(tokens=20, candidate_steps=5, baseline_steps=10)] * 8, 0.8)
    assert estimate.low_percent == pytest.approx(100.0)
    assert estimate.high_percent == pytest.approx(100.0)


def test_a_few_long_requests_among_many_short_ones_count_as_a_few() -> None:
    rng = random.Random(3)
    even = [_request(rng, 100) for _ in range(16)]
    uneven = [_request(rng, 1500) for _ in range(2)] + [_request(rng, 5) for _ in range(14)]
    assert _width(uneven) > 2 * _width(even)


@pytest.mark.parametrize(
    ("degrees", "quantiles"),
    [
        pytest.param(2, (1.886, 2.920), id="2"),
        pytest.param(5, (1.476, 2.015), id="5"),
        pytest.param(7, (1.415, 1.895), id="7"),
        pytest.param(30, (1.310, 1.697), id="30"),
    ],
)
def test_students_t_is_that_of_the_tables(degrees: int, quantiles: tuple[float, float]) -> None:
    found = [student_t(probability, degrees) for probability in (0.9, 0.95)]
    assert found == pytest.approx(quantiles, rel=0.005)


@pytest.mark.parametrize("num_requests", [8, 16, 64])
def test_equal_drafts_look_better_no_more_often_than_the_confidence_allows(num_requests: int) -> None:
    """An 80 % interval lies above a true gain of zero in a tenth of all cases; within sampling error and small bias."""
    rng = random.Random(7)
    rounds = 1500
    fooled = sum(gain(_equal_drafts(rng, num_requests), 0.8).low_percent > 0.0 for _ in range(rounds))
    assert 0.075 < fooled / rounds < 0.13


counts = st.integers(1, 100)
requests = st.builds(
    Paired,
    tokens=st.integers(100, 300),
    candidate_steps=counts,
    baseline_steps=counts,
    kind=st.sampled_from(["domain:a", "domain:b", "content:0"]),
    weight=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)


@given(samples=st.lists(requests, max_size=20), factor=st.sampled_from([0.25, 2.0, 64.0]))
def test_only_requests_of_todays_traffic_count_and_only_their_weights_relative_to_each_other(
    samples: list[Paired], factor: float
) -> None:
    todays = weighted(samples)
    assume(len(todays) > 1)
    estimate = gain(samples, 0.9)
    assert gain(todays, 0.9) == estimate
    scaled = gain([replace(one, weight=factor * one.weight) for one in todays], 0.9)
    assert scaled.percent == pytest.approx(estimate.percent)
    assert scaled.low_percent == pytest.approx(estimate.low_percent)


@given(samples=st.lists(requests, min_size=1, max_size=20))
def test_weights_count_as_requests_at_most_as_often_as_there_are_requests(samples: list[Paired]) -> None:
    assert 0.0 <= effective_size(samples) <= len(weighted(samples)) * (1 + 1e-9)
    assert effective_size([replace(one, weight=2.0) for one in samples]) == pytest.approx(len(samples))


def test_a_request_of_weight_two_counts_as_two_for_the_gain() -> None:
    one, other = (Paired(tokens=90, candidate_steps=c, baseline_steps=45) for c in (30, 40))
    assert gain([replace(one, weight=2.0), other], 0.8).percent == pytest.approx(gain([one, one, other], 0.8).percent)


@given(samples=st.lists(requests, max_size=30))
def test_a_draft_that_needs_no_more_steps_for_any_request_is_worse_in_no_kind(samples: list[Paired]) -> None:
    better = [replace(one, candidate_steps=min(one.candidate_steps, one.baseline_steps)) for one in samples]
    assert worse_kinds(better) == []


@pytest.mark.parametrize(
    ("num_requests", "loss", "weight", "is_worse"),
    [
        pytest.param(4, 10, 1.0, True, id="today's"),
        pytest.param(3, 10, 1.0, False, id="too few requests"),
        pytest.param(4, 2, 1.0, True, id="a small loss of today's"),
        pytest.param(4, 2, 0.0, False, id="a small loss of an old kind"),
        pytest.param(4, 10, 0.0, True, id="an old kind"),
    ],
)
def test_a_kind_is_worse_when_its_own_requests_say_so(
    num_requests: int, loss: int, weight: float, *, is_worse: bool
) -> None:
    good = [Paired(tokens=300, candidate_steps=50, baseline_steps=100, kind="domain:prose")] * 8
    bad = Paired(tokens=300, candidate_steps=100 + loss, baseline_steps=100, kind="domain:code", weight=weight)
    losses = worse_kinds([*good, *[bad] * num_requests])
    assert [loss.kind for loss in losses] == ["domain:code"] * is_worse


def test_old_kinds_with_few_requests_each_are_judged_together() -> None:
    old = [
        Paired(tokens=300, candidate_steps=110, baseline_steps=100, kind=f"domain:{n // 2}", weight=0.0)
        for n in range(8)
    ]
    (loss,) = worse_kinds(old)
    assert str(loss) == "surely worse for older traffic (-9.1 %, 8 requests)"


def test_outliers_have_no_verdict_of_their_own_and_old_ones_one_with_other_old_traffic() -> None:
    bad = Paired(tokens=300, candidate_steps=110, baseline_steps=100, kind=OUTLIERS)
    assert worse_kinds([bad] * 8) == []
    old = [replace(bad, weight=0.0)] * 4
    other = replace(bad, kind="domain:code", weight=0.0)
    (loss,) = worse_kinds([*old, other])
    assert (loss.kind, loss.num_samples) == (ALL_OLD, 5)


def test_a_name_that_a_caller_chose_is_quoted() -> None:
    loss = KindLoss(kind="domain:\x1b[2J" + 60 * "x", percent=-6.0, num_samples=12)
    assert str(loss) == "surely worse for '\\x1b[2J" + 36 * "x" + "' (-6.0 %, 12 requests)"


@pytest.mark.parametrize(("num_kinds", "num_requests"), [(1, 4), (4, 4), (16, 4), (1, 16), (8, 16)])
def test_many_kinds_block_an_equal_draft_no_more_often_than_one(num_kinds: int, num_requests: int) -> None:
    """At most one in twenty, whatever the number of kinds, also where a kind has the fewest requests."""
    rng, rounds = random.Random(11), 600
    blocked = sum(
        bool(worse_kinds([_request_of(rng, str(k)) for k in range(num_kinds) for _ in range(num_requests)]))
        for _ in range(rounds)
    )
    assert blocked / rounds < 0.06


def test_a_draft_that_is_equal_for_todays_mix_passes_no_more_often_when_its_requests_weigh_unevenly() -> None:
    rng, rounds = random.Random(12), 1500
    fooled = 0
    for _ in range(rounds):
        rare = [replace(one, weight=0.25 / 12) for one in _equal_drafts(rng, 12)]
        frequent = [replace(one, weight=0.75 / 4) for one in _equal_drafts(rng, 4)]
        fooled += gain([*rare, *frequent], 0.9).low_percent > 0.0
    assert 0.03 < fooled / rounds < 0.07


def test_a_draft_that_gains_in_one_kind_only_is_judged_by_how_requests_of_the_same_kind_differ() -> None:
    """The shares of kinds are known."""
    new = [Paired(tokens=20, candidate_steps=5, baseline_steps=10, kind="domain:new")] * 8
    old = [Paired(tokens=20, candidate_steps=10, baseline_steps=10, kind="domain:old")] * 8
    estimate = gain([*new, *old], 0.9)
    assert estimate.percent == pytest.approx(100 / 3)
    assert (estimate.low_percent, estimate.high_percent) == pytest.approx((100 / 3, 100 / 3))


@pytest.mark.parametrize("num_few", [1, 2, 4])
def test_kinds_of_a_few_requests_are_no_proof_that_these_agree(num_few: int) -> None:
    many = [Paired(tokens=20, candidate_steps=10, baseline_steps=10, kind="domain:many")] * 8
    few = [Paired(tokens=20, candidate_steps=5 + n, baseline_steps=10, kind=f"domain:{n}") for n in range(num_few)]
    estimate = gain([*many, *few], 0.9)
    assert estimate.high_percent - estimate.low_percent > 5.0


FOUR_OLD = (10, 9, 7, 4)


@pytest.mark.parametrize(
    ("num_new", "share", "old"),
    [(4, 0.5, FOUR_OLD), (10, 0.25, FOUR_OLD), (10, 0.5, FOUR_OLD), (8, 0.25, (3, 3, 3, 3))],
)
def test_a_draft_that_gains_in_one_kind_what_it_loses_in_others_passes_as_seldom_as_the_confidence_says(
    num_new: int, share: float, old: Sequence[int]
) -> None:
    """A 90 % interval lies above a true gain of zero in a twentieth of all cases, or in fewer where kinds have few requests."""
    rng, rounds = random.Random(13), 1000
    rate = 1 / 1.2  # of steps in the new kind; in the others as many more as it saves
    others = (1 - share * rate) / (1 - share)
    fooled = 0
    for _ in range(rounds):
        new = [_with_steps(_request_of(rng, "new"), rate, share / num_new) for _ in range(num_new)]
        rest = [
            _with_steps(_request_of(rng, f"old {n}"), others, (1 - share) / sum(old))
            for n, size in enumerate(old)
            for _ in range(size)
        ]
        fooled += gain([*new, *rest], 0.9).low_percent > 0.0
    assert 0.01 < fooled / rounds < 0.07


@pytest.mark.parametrize("num_requests", [4, 8])
def test_answers_from_a_template_that_agree_by_chance_let_no_equal_draft_pass_more_often(num_requests: int) -> None:
    rng, rounds, share = random.Random(15), 1000, 0.75
    fooled = 0
    for _ in range(rounds):
        alike = [
            Paired(
                tokens=20,
                candidate_steps=rng.choice((9, 10, 10, 10)),
                baseline_steps=rng.choice((9, 10, 10, 10)),
                kind="template",
                weight=share / num_requests,
            )
            for _ in range(num_requests)
        ]
        rest = [replace(_request_of(rng, f"old {n % 2}"), weight=(1 - share) / 8) for n in range(8)]
        fooled += gain([*alike, *rest], 0.9).low_percent > 0.0
    assert 0.01 < fooled / rounds < 0.065


def test_a_tenant_of_several_kinds_is_falsely_called_worse_off_no_more_often_than_one_of_a_single_kind() -> None:
    """How many of its requests are of each kind is chance."""
    rng, rounds = random.Random(14), 1000
    blocked = sum(bool(worse_tenants(_of_two_kinds(rng, 1.0, tenant=ACME))) for _ in range(rounds))
    assert blocked / rounds < 0.08  # about 0.06; with kinds as strata 0.11


def test_older_traffic_of_several_kinds_is_falsely_called_worse_no_more_often_than_a_single_kind() -> None:
    rng, rounds = random.Random(16), 1000
    found = (worse_kinds(_of_two_kinds(rng, 1 / 0.95, weight=0.0)) for _ in range(rounds))  # just what is tolerated
    assert sum(ALL_OLD in {loss.kind for loss in losses} for losses in found) / rounds < 0.06


def _of_two_kinds(rng: random.Random, rate: float, *, tenant: str = "", weight: float = 1.0) -> list[Paired]:
    """16 requests, of kinds by chance: the draft gains in one what it loses in the other. `rate` of the steps in the mean."""
    kinds = [rng.choice("ab") for _ in range(16)]
    rates = {"a": 0.6 * rate, "b": 1.4 * rate}
    return [replace(_with_steps(_request_of(rng, kind), rates[kind], weight), tenant=tenant) for kind in kinds]


def _with_steps(one: Paired, rate: float, weight: float) -> Paired:
    return replace(one, candidate_steps=max(1, round(rate * one.candidate_steps)), weight=weight)


def _request_of(rng: random.Random, kind: str) -> Paired:
    return replace(_request(rng, int(rng.lognormvariate(5.0, 0.8)) + 20), kind=kind)


def _equal_drafts(rng: random.Random, num_requests: int) -> list[Paired]:
    return [_request(rng, int(rng.lognormvariate(5.0, 0.8)) + 20) for _ in range(num_requests)]


def _request(rng: random.Random, tokens: int) -> Paired:
    """Both drafts equally good on average; how hard the request is, they share."""
    length = rng.uniform(1.5, 3.0)
    candidate, baseline = (min(tokens, max(1, round(tokens / length * rng.uniform(0.8, 1.2)))) for _ in range(2))
    return Paired(tokens=tokens, candidate_steps=candidate, baseline_steps=baseline)


def _width(pairs: Sequence[Paired]) -> float:
    estimate = gain(pairs, 0.8)
    return estimate.high_percent - estimate.low_percent


ACME, RIVAL = "ffffffffffffffff", "0000000000000007"


def of_tenant(tenant: str, count: int, *, loss: int, weight: float = 1.0) -> list[Paired]:
    return [
        Paired(
            tokens=300, candidate_steps=100 + loss, baseline_steps=100, kind="domain:chat", weight=weight, tenant=tenant
        )
    ] * count


@pytest.mark.parametrize(
    ("others", "samples", "is_worse"),
    [
        pytest.param(20, of_tenant(ACME, 6, loss=10), True, id="a large tenant"),
        pytest.param(80, of_tenant(ACME, 6, loss=10), False, id="too small a share"),
        pytest.param(8, of_tenant(ACME, 3, loss=10), False, id="too few requests"),
        pytest.param(20, of_tenant(ACME, 6, loss=10, weight=0.0), False, id="none of today's traffic"),
        pytest.param(20, of_tenant(ACME, 6, loss=1), False, id="a tolerated loss"),
        pytest.param(20, of_tenant("", 6, loss=10), False, id="nobody's"),
    ],
)
def test_a_tenant_with_a_share_of_the_traffic_has_a_verdict_of_its_own(
    others: int, samples: list[Paired], *, is_worse: bool
) -> None:
    """In the same kind of traffic others gain more than it loses."""
    every = [*of_tenant(RIVAL, others, loss=-30), *samples]
    assert worse_kinds(every) == []
    losses = [str(loss) for loss in worse_tenants(every)]
    assert losses == [f"surely worse for tenant {ACME} (-9.1 %, 6 requests)"] * is_worse


@given(shares=st.lists(st.integers(4, 40), max_size=60))
def test_so_few_tenants_have_a_verdict_that_chance_rejects_no_draft(shares: list[int]) -> None:
    every = [one for n, count in enumerate(shares) for one in of_tenant(f"{n:016x}", count, loss=10)]
    assert len(worse_tenants(every)) <= 10
