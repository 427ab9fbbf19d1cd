"""From samples to the lines of `make bench-serving`'s table."""

import json

import pytest
from bench.harness import Line
from bench.serving import figures
from bench.serving.figures import (
    AUTO,
    AUTOS,
    CELLS,
    EAGLE3,
    GAP,
    HTTP,
    LOSSLESS,
    NGRAM,
    OVERHEAD,
    PARTS,
    PEERS,
    PLAIN,
    TAUGHT,
    TRANSFORMERS,
    UNTAUGHT,
    VLLM,
    Cell,
    Equality,
    Learnt,
    Measured,
    Part,
    Rate,
    Share,
    Stall,
    Stream,
)
from hypothesis import given
from hypothesis import strategies as st

CODE_1, CODE_8, CHAT_1 = Cell("code", 1, 0.0), Cell("code", 8, 0.0), Cell("chat", 1, 0.0)
CELLS_OF_PLAN = [CODE_1, CODE_8, CHAT_1]


def rates(part: Part, cell: Cell, by_arm: dict[str, list[float]]) -> list[Rate]:
    return [
        Rate(part=part.name, cell=cell, arm=arm, round=n, tokens_per_s=value)
        for arm, values in by_arm.items()
        for n, value in enumerate(values)
    ]


def lines_of(measured: Measured, part: Part, *, has_vllm: bool = True) -> dict[str, Line]:
    found = figures.lines(measured, [part], CELLS_OF_PLAN, has_vllm=has_vllm)
    return {line.bar.name: line for line in found}


def test_a_batch_of_equal_streams_gives_its_tokens_after_the_first_by_the_time_since_that() -> None:
    streams = [Stream(10.0, 12.0, 21), Stream(10.0, 12.0, 21)]
    assert figures.tokens_per_s(streams, 2) == pytest.approx(20.0)


@given(st.lists(st.tuples(st.floats(0.5, 50), st.integers(2, 500)), min_size=1, max_size=16), st.floats(0, 1e4))
def test_when_its_prompts_were_read_does_not_change_a_rate(spans: list[tuple[float, int]], later_s: float) -> None:
    at_once = [Stream(0.0, length_s, count) for length_s, count in spans]
    apart = [Stream(n * later_s, n * later_s + length_s, count) for n, (length_s, count) in enumerate(spans)]
    batch = len(spans)
    assert figures.tokens_per_s(apart, batch) == pytest.approx(figures.tokens_per_s(at_once, batch), rel=1e-3)


def test_a_ratio_is_of_one_round_of_one_cell() -> None:
    found = rates(CELLS, CODE_1, {PLAIN: [10.0, 20.0], NGRAM: [15.0, 40.0]})
    found += rates(CELLS, CODE_8, {PLAIN: [100.0], NGRAM: [90.0]})
    assert figures.ratios(found, NGRAM, PLAIN) == {CODE_1: [1.5, 2.0], CODE_8: [0.9]}


def test_a_round_that_was_cut_off_has_no_ratio() -> None:
    found = rates(CELLS, CODE_1, {PLAIN: [10.0, 20.0], NGRAM: [15.0]})
    assert figures.ratios(found, NGRAM, PLAIN) == {CODE_1: [1.5]}


def test_the_worst_cell_is_that_of_the_lowest_median_not_of_the_lowest_round() -> None:
    assert figures.lowest({CODE_1: [0.5, 1.2, 1.3], CODE_8: [0.99, 1.0]}) == CODE_8
    assert figures.lowest({}) is None


def test_a_bar_is_held_against_the_median_ratio_and_shows_both_rates() -> None:
    measured = Measured(
        rates=rates(PEERS, Cell("mixed", 1, 0.0), {PLAIN: [30.0, 33.0, 90.0], TRANSFORMERS: [20.0] * 3})
    )
    line = lines_of(measured, PEERS)["plain, of transformers' generate, batch 1"]
    assert line.bar.met
    assert line.bar.measured == pytest.approx(1.65)
    assert line.note == "tokens/s: plain 33 and transformers 20"


def test_batch_8_has_its_own_target_and_is_missed_where_it_was_not_reached() -> None:
    measured = Measured(rates=rates(PEERS, Cell("mixed", 1, 0.0), {PLAIN: [40.0], TRANSFORMERS: [20.0]}))
    bar = lines_of(measured, PEERS)["plain, of transformers' generate, batch 8"].bar
    assert (bar.measured, bar.target, bar.met) == (None, 2.5, False)


def test_a_lookup_has_more_to_win_where_answers_repeat_their_request() -> None:
    targets = {name: line.bar.target for name, line in lines_of(Measured(), CELLS).items()}
    assert targets == {
        "adaptive n-gram, of plain: code, batch 1": 1.4,
        "adaptive n-gram, of plain: code, batch 8": 1.15,
        "adaptive n-gram, of plain: chat, batch 1": 1.1,
        "adaptive n-gram, of plain: worst cell": 0.98,
    }


def test_sampled_cells_count_for_the_worst_cell_and_not_for_the_gain_of_their_domain() -> None:
    sampled = Cell("code", 1, 1.0)
    measured = Measured(
        rates=rates(CELLS, CODE_1, {PLAIN: [10.0], NGRAM: [20.0]})
        + rates(CELLS, sampled, {PLAIN: [10.0], NGRAM: [9.0]})
    )
    found = lines_of(measured, CELLS)
    assert found["adaptive n-gram, of plain: code, batch 1"].bar.measured == 2.0
    worst = found["adaptive n-gram, of plain: worst cell"]
    assert worst.bar.measured == 0.9
    assert worst.note == "code, batch 1, temperature 1; of 2 cells"


MATH_1, SAMPLED_8 = Cell("math", 1, 0.0), Cell("math", 8, 1.0)


def test_auto_has_to_pay_on_the_kind_that_the_draft_knows_and_to_cost_nothing_on_every_other() -> None:
    found = rates(TAUGHT, MATH_1, {PLAIN: [20.0, 20.0], AUTO: [28.0, 30.0], NGRAM: [20.0] * 2, EAGLE3: [25.0] * 2})
    found += rates(TAUGHT, CODE_1, {PLAIN: [20.0, 20.0], AUTO: [20.0, 20.0], NGRAM: [19.0] * 2, EAGLE3: [18.0] * 2})
    found += rates(UNTAUGHT, SAMPLED_8, {PLAIN: [100.0], AUTO: [98.0]})
    lines = lines_of(Measured(rates=found), AUTOS)
    bars = {name.removeprefix("auto, of "): line.bar for name, line in lines.items()}
    with_draft, without, shifted = "with a draft of one kind", "before anything is learnt", "right after a shift"
    known = bars[f"plain: math, {with_draft}, batch 1, temperature 0"]
    assert known.measured == pytest.approx(1.45)
    assert (known.target, known.met) == (1.3, True)
    other = bars[f"plain: code, {shifted}"]
    assert (other.measured, other.target) == (1.0, 0.99)
    assert bars[f"plain: every kind, {with_draft}, batch 1, temperature 0"].measured == pytest.approx(1.2)
    assert bars[f"its best part: math, {with_draft}"].measured == pytest.approx(1.16)
    assert bars[f"its best part: code, {shifted}"].measured == 1.0, "doing nothing is a part too"
    assert not bars[f"plain: math, {without}"].met
    assert not bars[f"plain: every kind, {without}, batch 8, temperature 1"].met


def test_which_part_is_best_in_a_round_is_said_by_the_other_rounds() -> None:
    by_arm = {NGRAM: [20.0, 30.0, 20.0, 20.0], EAGLE3: [25.0] * 4, AUTO: [25.0, 25.0, 30.0, 25.0]}
    found = figures.ratios_to_best(rates(TAUGHT, MATH_1, by_arm), AUTO, (NGRAM, EAGLE3))
    assert found == [1.0, 1.0, 1.2, 1.0], "30 in one round makes no best part"


def test_a_run_that_was_stopped_in_its_first_round_compares_auto_with_none_only() -> None:
    found = rates(TAUGHT, MATH_1, {PLAIN: [20.0], NGRAM: [30.0], AUTO: [24.0]})
    bars = {name: line.bar for name, line in lines_of(Measured(rates=found), AUTOS).items()}
    assert bars["auto, of plain: math, with a draft of one kind"].measured == 1.2
    assert bars["auto, of its best part: math, with a draft of one kind"].measured is None


def test_an_auto_that_was_not_measured_misses_its_bar() -> None:
    assert not any(line.bar.met for line in lines_of(Measured(), AUTOS).values())
    assert lines_of(Measured(), AUTOS)


def test_vllm_has_lines_only_where_it_is_built() -> None:
    measured = Measured(rates=rates(HTTP, CODE_8, {PLAIN: [210.0], NGRAM: [280.0], VLLM: [200.0]}))
    found = lines_of(measured, HTTP)
    assert found["plain, of vLLM without a draft, batch 8"].bar.met
    assert found["adaptive n-gram, of vLLM without a draft: code, batch 8"].bar.measured == 1.4
    assert "adaptive n-gram, of vLLM without a draft: chat, batch 1" not in found
    assert lines_of(measured, HTTP, has_vllm=False) == {}


def test_a_stall_is_the_longest_gap_that_overlaps_the_reading_of_the_prompt() -> None:
    times = [[0.0, 0.5, 1.0, 1.1, 1.2, 1.5, 1.6], [1.0, 1.1, 1.2, 1.3, 1.4, 1.9, 3.0]]
    # Sent within a gap, read at 1.7: the gap from 1.9 on is no longer of it, nor is the first stream's before the second.
    found = figures.stall(times, sent_s=1.25, read_s=1.7, round_=3)
    assert found.longest_ms == pytest.approx(500)
    assert found.normal_ms == pytest.approx(100)


def test_a_stall_counts_in_normal_steps() -> None:
    measured = Measured(
        stalls=[Stall(round=n, longest_ms=ms, normal_ms=20.0) for n, ms in enumerate((40.0, 50.0, 90.0))]
    )
    (line,) = lines_of(measured, GAP).values()
    assert line.bar.measured == 2.5
    assert line.bar.met


def test_what_is_not_the_model_is_a_share_of_each_step() -> None:
    shares = [Share(arm=NGRAM, batch=8, step_ms=step, model_ms=0.85 * step) for step in (10.0, 20.0, 40.0)]
    found = lines_of(Measured(shares=shares), OVERHEAD)
    line = found["share of a step that is not the model, ngram, batch 8"]
    assert line.bar.measured == pytest.approx(15)
    assert not line.bar.met
    assert found["share of a step that is not the model, plain, batch 8"].bar.measured is None


def test_one_different_output_is_named_and_misses_the_bar() -> None:
    equalities = [
        Equality(arm=NGRAM, batch=1, lookahead=3, is_equal=True),
        Equality(arm=EAGLE3, batch=16, lookahead=None, is_equal=False),
    ]
    (line,) = lines_of(Measured(equalities=equalities), LOSSLESS).values()
    assert not line.bar.met
    assert line.note.endswith("first: eagle3, batch 16, lookahead adaptive")
    (none,) = lines_of(Measured(), LOSSLESS).values()
    assert not none.bar.met


def test_a_run_that_measured_nothing_meets_no_bar() -> None:
    assert not any(line.bar.met for line in figures.lines(Measured(), PARTS, CELLS_OF_PLAN, has_vllm=True))


def test_every_sample_is_a_row_that_names_its_part() -> None:
    measured = Measured(
        rates=rates(CELLS, CODE_8, {PLAIN: [1.0]}),
        stalls=[Stall(round=0, longest_ms=2.0, normal_ms=1.0)],
        shares=[Share(arm=PLAIN, batch=8, step_ms=2.0, model_ms=1.0)],
        equalities=[Equality(arm=NGRAM, batch=1, lookahead=None, is_equal=True)],
    )
    rows = measured.rows()
    assert [row["part"] for row in rows] == ["cells", "gap", "overhead", "lossless"]
    cell = {"domain": "code", "batch": 8, "temperature": 0.0}
    assert rows[0] == {"part": "cells", **cell, "arm": PLAIN, "round": 0, "tokens_per_s": 1.0}


def test_the_samples_of_auto_come_back_from_a_result_and_no_others() -> None:
    learnt = Learnt(optimizer_steps=40.0, peak_bytes=700_000_000, core_share=0.3)
    own = rates(TAUGHT, CODE_1, {PLAIN: [10.0, 20.0], AUTO: [15.0]}) + rates(UNTAUGHT, CHAT_1, {AUTO: [9.0]})
    measured = Measured(rates=[*own, *rates(CELLS, CODE_8, {PLAIN: [80.0]})], learnt=[learnt])
    found = figures.of_auto(json.loads(json.dumps(measured.rows())))
    assert found.rates == own
    assert found.learnt == [learnt]
    assert found.num_rounds() == {CODE_1: 2, CHAT_1: 1}


def test_a_trainer_beside_has_to_learn_in_every_slice_and_to_stay_below_two_gigabytes() -> None:
    def lines(*steps: float | None) -> dict[str, Line]:
        learnt = [Learnt(optimizer_steps=one, peak_bytes=1_500_000_000, core_share=0.3) for one in steps]
        return lines_of(Measured(learnt=learnt), AUTOS)

    steps, memory = "optimizer steps of the trainer beside", "resident memory of the trainer, peak"
    assert lines(30.0, 20.0)[steps].bar.measured == 20
    assert not lines(30.0, None)[steps].bar.met
    assert lines(30.0)[memory].bar.measured == pytest.approx(1.5)
    assert not {steps, memory} & set(lines())
