import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_rollouts.evidence import MIN_KIND_SAMPLES, OUTLIERS
from updraft_trainer.data.retention import CHUNK_MARK, MAX_KINDS, PRESENT, Pool, ReplayLimits, Retention, SampleEntry
from updraft_trainer.data.selection import (
    MAX_REHEARSALS,
    NUM_RECENT,
    NUM_REMEMBERED,
    RECENT,
    closed_form_batch,
    evaluation_batch,
    limited,
    outliers_together,
    remembered,
    tokens_by_tenant,
    traffic_mix,
    trained_batch,
    training_batch,
    untrained_batch,
    without_absent,
)


def kept(order: int, *, cluster: str = "a") -> SampleEntry:
    return SampleEntry(trace_id=str(order), order=order, cluster=cluster, pool=Pool.WINDOW, num_bytes=1, num_tokens=1)


@given(
    clusters=st.lists(st.sampled_from("abc"), max_size=30),
    uses=st.lists(st.integers(0, 4), min_size=30, max_size=30),
    count=st.integers(1, 10),
    seed=st.integers(0, 10),
)
def test_a_batch_is_distinct_bounded_and_empty_only_without_fresh_samples(
    clusters: list[str], uses: list[int], count: int, seed: int
) -> None:
    samples = [kept(n, cluster=cluster) for n, cluster in enumerate(clusters)]
    used = {str(n): uses[n] for n in range(30)}
    batch = training_batch(samples, used, num_tokens=count, max_uses=3, rng=random.Random(seed))
    assert len({one.trace_id for one in batch}) == len(batch) <= count
    assert bool(batch) == any(used[one.trace_id] < 3 for one in samples)
    assert not batch or used[batch[0].trace_id] < 3


def test_the_fresh_half_is_the_least_used_and_of_those_the_newest() -> None:
    samples = [kept(n) for n in range(10)]
    uses = {str(n): 1 for n in range(10) if n not in {3, 7}}
    batch = training_batch(samples, uses, num_tokens=4, max_uses=2, rng=random.Random(0))
    assert [one.order for one in batch[:2]] == [7, 3]


def test_every_sample_of_steady_traffic_is_used_about_equally_and_then_rests() -> None:
    samples = [kept(n) for n in range(40)]
    uses = Counter[str]()
    rng = random.Random(0)
    while batch := training_batch(samples, uses, num_tokens=4, max_uses=6, rng=rng):
        uses.update(one.trace_id for one in batch)
    assert min(uses.values()) == 6
    assert max(uses.values()) <= 8


def test_the_newest_samples_wait_while_others_are_fresh_and_are_used_in_the_end() -> None:
    samples = [kept(n) for n in range(20)]
    uses, rng = Counter[str](), random.Random(0)
    while len(uses) < 12:
        batch = training_batch(samples, uses, num_tokens=4, max_uses=2, rng=rng, num_waiting=8)
        assert max(one.order for one in batch) < 12
        uses.update(one.trace_id for one in batch)
    assert [one.order for one in untrained_batch(samples, uses, count=5)] == [19, 18, 17, 16, 15]
    while batch := training_batch(samples, uses, num_tokens=4, max_uses=2, rng=rng, num_waiting=8):
        uses.update(one.trace_id for one in batch)
    assert len(uses) == 20
    assert min(uses.values()) == 2
    assert not untrained_batch(samples, uses, count=5)


def test_old_traffic_is_rehearsed_while_new_traffic_is_learnt() -> None:
    old = [kept(n, cluster="old") for n in range(50)]
    uses = Counter({one.trace_id: 6 for one in old})
    new = [kept(100 + n, cluster="new") for n in range(200)]
    rng, drawn = random.Random(0), Counter[str]()
    for _ in range(100):
        batch = training_batch(old + new, uses, num_tokens=4, max_uses=6, rng=rng)
        uses.update(one.trace_id for one in batch)
        drawn.update(one.cluster for one in batch)
    assert drawn["old"] == 100
    assert drawn["new"] == 300


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=40), budget=st.integers(1, 300), seed=st.integers(0, 10)
)
def test_a_batch_has_its_tokens_but_for_one_sample(sizes: list[int], budget: int, seed: int) -> None:
    samples = [replace(kept(n), num_tokens=size) for n, size in enumerate(sizes)]
    batch = training_batch(samples, {}, num_tokens=budget, max_uses=1, rng=random.Random(seed))
    total, largest = sum(one.num_tokens for one in batch), max(sizes)
    assert len(batch) == 1 or total <= budget + largest
    assert len(batch) == len(samples) or total >= budget - largest / 2


def test_batches_have_their_tokens_on_average() -> None:
    rng = random.Random(0)
    samples = [replace(kept(n), num_tokens=rng.randint(50, 250)) for n in range(400)]
    uses, totals = Counter[str](), list[int]()
    for _ in range(200):
        batch = training_batch(samples, uses, num_tokens=768, max_uses=10, rng=rng)
        uses.update(one.trace_id for one in batch)
        totals.append(sum(one.num_tokens for one in batch))
    assert sum(totals) / len(totals) == pytest.approx(768, rel=0.02)


def test_a_fresh_request_that_is_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    samples = [*(kept(n) for n in range(20)), replace(kept(20), num_tokens=30_000)]
    assert [one.order for one in training_batch(samples, {}, num_tokens=8, max_uses=1, rng=random.Random(0))] == [20]


def test_a_kind_of_long_requests_is_rehearsed_too() -> None:
    samples = [kept(n) for n in range(20)]
    long = replace(kept(20, cluster="long"), num_tokens=30_000)
    uses, rng = {long.trace_id: 6}, random.Random(0)
    drawn = [training_batch([*samples, long], uses, num_tokens=8, max_uses=6, rng=rng) for _ in range(20)]
    assert any(long.trace_id == one.trace_id for batch in drawn for one in batch)


def test_a_batch_exceeds_its_tokens_by_one_long_request_at_most() -> None:
    fresh, long = replace(kept(1), num_tokens=1000), replace(kept(0), num_tokens=2000)
    used = {long.trace_id: 6}
    batch = training_batch([long, fresh], used, num_tokens=1024, max_uses=6, rng=random.Random(0))
    assert [one.num_tokens for one in batch] == [1000, 2000], "it is rehearsed, though 24 tokens are left"
    full = replace(fresh, num_tokens=1024)
    batch = training_batch([long, full], used, num_tokens=1024, max_uses=6, rng=random.Random(0))
    assert [one.num_tokens for one in batch] == [1024], "nothing is left"


def test_without_a_budget_a_batch_has_four_samples_on_average() -> None:
    rng = random.Random(0)
    samples = [replace(kept(n), num_tokens=rng.randint(50, 250)) for n in range(400)]
    uses, sizes = Counter[str](), list[int]()
    for _ in range(200):
        batch = training_batch(samples, uses, max_uses=10, rng=rng)
        uses.update(one.trace_id for one in batch)
        sizes.append(len(batch))
    assert sum(sizes) / len(sizes) == pytest.approx(4, rel=0.05)


def test_an_odd_batch_favours_no_cluster() -> None:
    samples = [kept(n, cluster="abc"[n % 3]) for n in range(300)]
    rng, drawn = random.Random(0), Counter[str]()
    for _ in range(300):
        batch = training_batch(samples, {}, num_tokens=2, max_uses=6, rng=rng)
        drawn.update(one.cluster for one in batch[1:])
    assert min(drawn.values()) > 60


def test_half_an_evaluation_is_the_newest_and_half_is_spread_over_clusters() -> None:
    old = [kept(n, cluster="old") for n in range(10)]
    new = [kept(n, cluster="new") for n in range(10, 30)]
    batch = evaluation_batch(old + new, count=16)
    assert [one.order for one in batch] == [29, 28, 27, 26, 25, 24, 23, 22, 21, 9, 20, 8, 19, 7, 18, 6]


def test_an_evaluation_has_enough_requests_of_every_kind_for_a_verdict_of_its_own() -> None:
    samples = [kept(n, cluster=f"old {n // 6}") for n in range(30)] + [kept(n, cluster="new") for n in range(30, 50)]
    batch = evaluation_batch(samples, count=8)
    assert Counter(one.cluster for one in batch) == {"new": 5} | {f"old {n}": MIN_KIND_SAMPLES for n in range(5)}
    assert len({one.trace_id for one in batch}) == len(batch)


def test_the_newest_samples_that_were_trained_on_show_what_was_learned_by_heart() -> None:
    samples = [kept(n) for n in range(10)]
    batch = trained_batch(samples, {"2": 1, "5": 3, "7": 1, "9": 0}, count=2)
    assert [one.order for one in batch] == [7, 5]


def test_a_kind_that_has_not_come_for_thousands_of_requests_is_forgotten() -> None:
    old, new = [kept(1, cluster="old"), kept(3, cluster="old")], kept(2 + NUM_REMEMBERED, cluster="new")
    assert remembered([*old, new]) == [*old, new]
    assert remembered([*old, new, kept(3 + NUM_REMEMBERED, cluster="new")])[0] == new
    assert remembered([]) == []


def test_requests_that_were_likelier_to_be_captured_count_less_in_todays_traffic() -> None:
    hard = [replace(kept(n, cluster="hard"), probability=0.4) for n in range(40)]
    easy = [replace(kept(100 + n, cluster="easy"), probability=0.2) for n in range(20)]
    assert traffic_mix(hard + easy).shares == pytest.approx({"hard": 0.5, "easy": 0.5})


@given(clusters=st.lists(st.sampled_from("abc"), min_size=1, max_size=150), num_judges=st.integers(1, 20))
def test_the_weights_of_a_kinds_requests_add_up_to_its_share_of_todays_traffic(
    clusters: list[str], num_judges: int
) -> None:
    samples = [kept(n, cluster=cluster) for n, cluster in enumerate(clusters)]
    mix = traffic_mix(random.Random(0).sample(samples, len(samples)))
    judges = [one.trace_id for one in samples[-num_judges:]]
    weights = mix.weights(judges)
    recent = Counter(clusters[-NUM_RECENT:])
    for cluster in {mix.kinds[id_] for id_ in judges}:
        of_cluster = sum(w for id_, w in zip(judges, weights, strict=True) if mix.kinds[id_] == cluster)
        assert of_cluster / len(judges) == pytest.approx(recent[cluster] / min(NUM_RECENT, len(clusters)))


def test_a_kind_that_is_not_among_the_newest_requests_has_no_weight() -> None:
    mix = traffic_mix(kept(n, cluster="old" if n < 10 else "new") for n in range(10 + NUM_RECENT))
    assert mix.weights(["0", "1", "10", "11"]) == [0.0, 0.0, 2.0, 2.0]
    assert mix.weights(["unknown"]) == [0.0]


def test_an_evaluation_of_few_samples_takes_them_all() -> None:
    samples = [kept(n, cluster="ab"[n % 2]) for n in range(5)]
    assert {one.order for one in evaluation_batch(samples, count=8)} == set(range(5))
    assert evaluation_batch([], count=8) == []


def test_outliers_share_a_turn_of_rehearsal() -> None:
    kinds = [kept(n, cluster="abc"[n % 3]) for n in range(60)]
    outliers = [kept(60 + n, cluster=f"outlier {n}") for n in range(12)]
    fresh = kept(100, cluster="a")
    uses, rng = {one.trace_id: 6 for one in [*kinds, *outliers]}, random.Random(0)
    batches = [training_batch([*kinds, *outliers, fresh], uses, num_tokens=3, max_uses=6, rng=rng) for _ in range(200)]
    rehearsed = [int(one.trace_id) for batch in batches for one in batch if one.trace_id != fresh.trace_id]
    assert 0.15 < sum(order >= 60 for order in rehearsed) / len(rehearsed) < 0.35


def test_outliers_are_one_share_of_todays_traffic_and_stand_for_each_other() -> None:
    kinds = [kept(n, cluster="ab"[n % 2]) for n in range(48)]
    outliers = [kept(48 + n, cluster=f"outlier {n}") for n in range(16)]
    mix = traffic_mix(outliers_together([*kinds, *outliers]))
    assert mix.shares == {"a": 0.375, "b": 0.375, OUTLIERS: 0.25}
    assert mix.weights(["0", "1", "48"]) == [1.125, 1.125, 0.75]


def test_any_number_of_clusters_makes_a_bounded_number_of_kinds() -> None:
    samples = [kept(n, cluster=f"{n % 200}") for n in range(200 * MIN_KIND_SAMPLES)]
    assert len({one.cluster for one in outliers_together(samples)}) == MAX_KINDS + 1


def test_a_closed_form_and_an_evaluation_take_outliers_in_one_turn() -> None:
    outliers = [kept(n, cluster=f"outlier {n}") for n in range(40)]
    samples = [*outliers, *(kept(40 + n, cluster="abc"[n % 3]) for n in range(60))]
    fitted, _ = closed_form_batch(samples, count=40, num_held_out=0)
    judges = evaluation_batch(outliers_together(samples), count=32)
    assert sum(one.order < 40 for one in fitted) == 10
    assert sum(one.order < 40 for one in judges) == 4


def test_a_closed_form_is_judged_by_the_newest_samples_and_fitted_to_all_clusters() -> None:
    samples = [kept(n, cluster="old" if n < 30 else "new") for n in range(40)]
    fitted, held_out = closed_form_batch(samples, count=8, num_held_out=4)
    assert [one.order for one in held_out] == [39, 38, 37, 36]
    assert sorted(one.order for one in fitted) == [26, 27, 28, 29, 32, 33, 34, 35]


def chunked(num_chunks: list[int], pool: Pool = Pool.WINDOW) -> list[SampleEntry]:
    """Requests in chunks, whose chunks come in turn as those of concurrent requests do."""
    names = [(number, chunk) for number, num in enumerate(num_chunks) for chunk in range(num)]
    return [
        SampleEntry(
            trace_id=f"r{number}{CHUNK_MARK}{chunk}" if chunk else f"r{number}",
            order=order,
            cluster="a" if number % 2 else "b",
            pool=pool,
            num_bytes=1,
            num_tokens=1,
        )
        for order, (number, chunk) in enumerate(sorted(names, key=lambda name: (sum(name), name)))
    ]


CHUNKS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(num_chunks=CHUNKS, count=st.integers(2, 20), data=st.data())
def test_of_each_request_one_chunk_is_evidence(num_chunks: list[int], count: int, data: st.DataObject) -> None:
    entries = chunked(num_chunks)
    used = data.draw(st.sets(st.sampled_from([entry.trace_id for entry in entries])), label="used")
    trained = {entry.request for entry in entries if entry.trace_id in used}
    unseen = untrained_batch(entries, dict.fromkeys(used, 1), count=count)
    _, judges = closed_form_batch(entries, count=count, num_held_out=count)
    for batch, num_requests in (
        (evaluation_batch(chunked(num_chunks, Pool.EVALUATION), count=count), len(num_chunks)),
        (unseen, len(num_chunks) - len(trained)),
        (trained_batch(entries, dict.fromkeys(used, 1), count=count), len(trained)),
        (judges, len(num_chunks)),
    ):
        requests = [entry.request for entry in batch]
        assert len(requests) == len(set(requests))
        assert len(requests) >= min(count, num_requests)
    share = (len(num_chunks) + 1) // 2 / len(num_chunks)
    assert traffic_mix(entries).shares.get("b", 0) == pytest.approx(share)


@given(num_chunks=CHUNKS, num_judges=st.integers(1, 12), data=st.data())
def test_a_request_of_which_a_chunk_was_learned_judges_nothing(
    num_chunks: list[int], num_judges: int, data: st.DataObject
) -> None:
    entries = chunked(num_chunks)
    used = data.draw(st.sets(st.sampled_from([entry.trace_id for entry in entries])), label="used")
    unseen = untrained_batch(entries, dict.fromkeys(used, 1), count=num_judges)
    assert not {entry.request for entry in unseen} & {entry.request for entry in entries if entry.trace_id in used}
    fitted, judges = closed_form_batch(entries, count=100, num_held_out=num_judges)
    assert not {entry.request for entry in fitted} & {entry.request for entry in judges}
    assert len(fitted) == sum(num_chunks[:-num_judges])


@given(num_chunks=CHUNKS, num_waiting=st.integers(0, 12), seed=st.integers(0, 10))
def test_the_newest_requests_wait_with_all_their_chunks(num_chunks: list[int], num_waiting: int, seed: int) -> None:
    entries = chunked(num_chunks)
    batch = training_batch(entries, {}, num_tokens=8, max_uses=1, rng=random.Random(seed), num_waiting=num_waiting)
    num_training = len(num_chunks) - min(num_waiting, len(num_chunks) // 2)
    assert {entry.request for entry in batch} <= {f"r{number}" for number in range(num_training)}
    assert len(batch) == min(8, sum(num_chunks[:num_training]))


def test_long_requests_are_forgotten_no_sooner_than_short_ones() -> None:
    old = kept(0, cluster="old")
    new = [replace(kept(9 * NUM_REMEMBERED), trace_id=f"new{CHUNK_MARK}{chunk}") for chunk in range(19)]
    assert old in remembered([old, *new]), "ten chunks a request"
    assert old not in remembered([old, *new[:1]])


def of_tenants(tenants: str) -> list[SampleEntry]:
    """One sample of each tenant in this order, the newest last."""
    return [replace(kept(order), tenant=tenant) for order, tenant in enumerate(tenants)]


@given(
    tenants=st.text("abcd", min_size=1, max_size=40), share=st.sampled_from([0.25, 0.5, 1.0]), count=st.integers(1, 40)
)
def test_a_tenant_has_no_more_than_its_share_of_a_choice_while_there_are_others(
    tenants: str, share: float, count: int
) -> None:
    samples = of_tenants(tenants)
    ordered = list(limited(samples, share))
    assert sorted(ordered, key=lambda one: one.order) == samples
    chosen, left = Counter(one.tenant for one in ordered[:count]), Counter(one.tenant for one in ordered[count:])
    for tenant, num in chosen.items():
        others = [other for other in left if other != tenant]
        # One may have more if all who are left have as much, because somebody has to be next.
        assert not others or num <= max(share * min(count, len(samples)), min(chosen[other] for other in others) + 1)


def test_without_other_tenants_or_a_limit_the_order_stays() -> None:
    assert list(limited(of_tenants("aaaa"), 0.25)) == of_tenants("aaaa")
    assert list(limited(of_tenants("aabab"), 1.0)) == of_tenants("aabab")


def test_a_flood_has_half_of_a_batch_also_if_only_its_samples_are_fresh() -> None:
    samples = of_tenants("abcd" * 3 + "x" * 40)
    uses = {one.trace_id: 9 for one in samples if one.tenant != "x"}
    drawn: dict[str, float] = {}
    rng = random.Random(0)
    for _ in range(20):
        batch = training_batch(samples, uses, num_tokens=4, max_uses=6, rng=rng, max_share=0.5, drawn=drawn)
        drawn = tokens_by_tenant(batch, drawn)
    assert drawn["x"] <= 0.5 * sum(drawn.values())
    unlimited = training_batch(samples, uses, num_tokens=20, max_uses=6, rng=rng)
    assert sum(one.tenant == "x" for one in unlimited) > 10


def test_a_flood_is_half_of_those_that_judge_and_of_todays_traffic() -> None:
    samples = of_tenants("abcd" * 10 + "x" * 200)
    held_out = evaluation_batch(samples, count=32, max_share=0.5)
    judges = untrained_batch(samples, {}, count=8, max_share=0.5)
    fitted, judging = closed_form_batch(samples, count=32, num_held_out=8, max_share=0.5)
    for chosen in (held_out, judges, fitted, judging):
        assert sum(one.tenant == "x" for one in chosen) == len(chosen) / 2
    by_kind = [replace(one, cluster=one.tenant) for one in samples]
    assert traffic_mix(by_kind, max_share=0.5).shares["x"] == pytest.approx(0.5, abs=0.02)
    assert traffic_mix(by_kind).shares == {"x": pytest.approx(1.0)}


DAY_MS = 24 * 3_600_000


def test_the_only_request_of_another_tenant_is_not_learned_by_heart() -> None:
    uses, drawn, rng = Counter[str](), dict[str, float](), random.Random(0)
    samples, num_batches = of_tenants("b" + "a" * 40), 400
    for turn in range(num_batches):
        if turn % 4 == 0:  # what is fresh comes from one tenant only
            samples.append(replace(kept(100 + turn), tenant="a"))
        batch = training_batch(samples, uses, num_tokens=4, max_uses=6, rng=rng, max_share=0.5, drawn=drawn)
        drawn = tokens_by_tenant(batch, {tenant: 0.95 * num for tenant, num in drawn.items()})
        uses.update(one.trace_id for one in batch)
    assert uses["0"] <= MAX_REHEARSALS * 6 + num_batches / 40


def test_those_who_wait_are_not_all_of_one_tenant() -> None:
    samples = of_tenants("b" * 8 + "a" * 20)
    batches = [
        training_batch(samples, {}, num_tokens=40, max_uses=1, rng=random.Random(0), num_waiting=8, max_share=max_share)
        for max_share in (0.5, 1.0)
    ]
    assert [len({"4", "5", "6", "7"} & {one.trace_id for one in batch}) for batch in batches] == [0, 4]


def test_requests_of_long_ago_are_not_todays_traffic_though_one_tenant_sends_it_all() -> None:
    old = [replace(one, cluster="old") for one in of_tenants("b" * 40)]
    new = [replace(kept(100 + n, cluster="new"), tenant="a", finished_ms=DAY_MS) for n in range(NUM_RECENT)]
    assert RECENT.days == 1
    assert traffic_mix(old + new, max_share=0.5).shares == pytest.approx({"old": 0.5, "new": 0.5})
    later = [replace(one, finished_ms=DAY_MS + 1) for one in new]
    assert traffic_mix(old + later, max_share=0.5).shares == pytest.approx({"new": 1.0})
    few = later[:16]
    assert traffic_mix(old + few, max_share=0.5).shares == pytest.approx({"old": 40 / 56, "new": 16 / 56}), "too few"


def test_a_kind_that_nobody_is_judged_by_any_more_is_none_of_todays_traffic() -> None:
    old = [replace(one, cluster="old") for one in of_tenants("b" * 40)]
    new = [replace(kept(40 + NUM_REMEMBERED + n, cluster="new"), tenant="a") for n in range(NUM_RECENT)]
    assert {one.cluster for one in remembered(old + new)} == {"new"}
    assert traffic_mix(old + new, max_share=0.5).shares == pytest.approx({"new": 1.0})


def test_what_an_absent_tenant_has_left_is_protected_from_nobody() -> None:
    old, new = of_tenants("b" * 40), [replace(kept(100 + n), tenant="a", finished_ms=1) for n in range(40)]
    assert Counter(one.tenant for one in without_absent(old + new)) == {"a": 40, "b": 40}
    later = [replace(one, finished_ms=PRESENT.days * DAY_MS + 1) for one in new]
    left = without_absent(old + later)
    assert [one.trace_id for one in left] == [one.trace_id for one in old + later]
    assert Counter(one.tenant for one in left) == {"a": 80}
    assert len({one.trace_id for one in evaluation_batch(left, count=32, max_share=0.5)} & {"39", "38"}) == 0


@given(
    tenants=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 9)), max_size=40),
    taken=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 30)),
    share=st.sampled_from([0.25, 0.5]),
)
def test_a_limit_changes_only_the_order(tenants: list[tuple[str, int]], taken: dict[str, float], share: float) -> None:
    samples = [replace(kept(order), tenant=tenant, num_tokens=num) for order, (tenant, num) in enumerate(tenants)]
    ordered = list(limited(samples, share, size=lambda one: float(one.num_tokens), taken=taken))
    assert sorted(ordered, key=lambda one: one.order) == samples
    for tenant in "abcd":
        orders = [one.order for one in ordered if one.tenant == tenant]
        assert orders == sorted(orders)


def test_todays_traffic_stays_covered_by_evaluations_when_a_tenant_gets_another_name() -> None:
    """Half of it would otherwise be kinds of the former name, which nobody is judged by any more."""
    limits = ReplayLimits(window_bytes=400, reservoir_bytes=300, evaluation_bytes=100, max_tenant_share=0.5)
    retention, covered = Retention(limits), list[float]()
    for order in range(3 * NUM_REMEMBERED):
        is_former = order < 2000
        cluster, tenant = ("old", "former") if is_former else ("new", "later")
        pool = Pool.WINDOW if order % 10 else Pool.EVALUATION
        ended_ms = order * 60_000  # a request a minute: ten days
        retention.add(replace(kept(order, cluster=cluster), tenant=tenant, pool=pool, finished_ms=ended_ms))
        if order % 500 == 499:
            entries = without_absent(sorted(retention, key=lambda entry: entry.order))
            held_out = [entry for entry in remembered(entries) if entry.pool is Pool.EVALUATION]
            judged = Counter(entry.cluster for entry in evaluation_batch(held_out, count=16, max_share=0.5))
            mix = traffic_mix(entries, max_share=0.5)
            covered.append(sum(share for kind, share in mix.shares.items() if judged[kind] >= MIN_KIND_SAMPLES))
    assert min(covered) > 0.99
    assert "former" not in {entry.tenant for entry in retention if entry.pool is Pool.WINDOW}
