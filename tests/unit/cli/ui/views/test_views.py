"""View models of the pages, from states in memory."""

import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.support.console import NOW, state

from updraft_cli.backends.differences import Difference, Field
from updraft_cli.backends.drafts import Acceptance, DomainAcceptance
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.snapshot import PodState, SpeculatorSnapshot
from updraft_cli.backends.speculators import Condition, MetricChange, Pods, Resource, Speedup
from updraft_cli.ui.samples import Samples
from updraft_cli.ui.views import charts, fleet, learning, overview, parts, rollout, traffic, versions
from updraft_cli.ui.views.figures import counters, figures


def one(**changes: Any) -> SpeculatorSnapshot:
    return state(**changes).speculators[0]


def test_a_speed_that_is_surely_above_or_below_one_is_good_or_bad() -> None:
    def kind(low: float, high: float) -> str:
        shown = overview.card(one(speedup=Speedup(ratio=1.0, low=low, high=high)), NOW)
        return next(figure.kind for figure in shown.figures if figure.title == "speed over no drafts")

    assert [kind(1.1, 1.3), kind(0.9, 1.1), kind(0.7, 0.9)] == ["good", "", "bad"]


def test_what_is_not_known_is_left_out() -> None:
    bare = one(speedup=None, acceptance=None, learning=None, trial=None, traffic=(), pace=None, domains=())
    assert [figure.title for figure in overview.card(bare, NOW).figures] == ["serves"]
    assert rollout.rollout(bare, NOW).comparison is None
    assert (
        figures(bare, state().installation, {}).keys().isdisjoint({"stable", "candidate", "speedup", "trained tokens"})
    )


def test_an_acceptance_length_of_a_few_steps_is_shown_only_beside_their_number() -> None:
    few = Acceptance(length=4.0, verify_steps=1, tokens=4)
    new = one(num_versions=1, acceptance=few, traffic=())
    new = replace(new, drafts=tuple(replace(draft, acceptance=few) for draft in new.drafts))
    assert "acceptance length" not in [figure.title for figure in overview.card(new, NOW).figures]
    shown = versions.versions(new)
    assert "4.00" not in [cell.text for row in shown.table.rows for cell in row]
    assert [node.label for node in shown.lineage.nodes] == ["stable"]
    served = rollout.rollout(new, NOW).serving.rows[0]
    assert (served[3].text, served[4].text) == ("4.00", "1")


def test_a_pin_a_pause_and_what_blocks_learning_are_notices() -> None:
    blocked = one(
        pinned=0, pin_reason="an incident", paused=True, capture_problem="pod-1: no Redis", too_small="raise it"
    )
    texts = [notice.text for notice in overview.notices(blocked)]
    assert texts == [
        "Pinned to no draft: an incident. Newer versions are held.",
        "The rollout is paused.",
        "Raise it.",
        "Capture has a problem on pod-1: no Redis.",
    ]


def resource() -> Resource:
    return Resource(
        target="",
        engine="torch",
        url="",
        is_suspended=False,
        is_current=True,
        is_reconciled=True,
        promoted=None,
        trainer_state="",
        last_published=None,
        last_failure=None,
        conditions=(
            Condition(type="Ready", status="False", reason="NoPods", message="no pod is ready", since=None),
            Condition(
                type="Adapting", status="False", reason="TooSmall", message="the stream is too small", since=None
            ),
        ),
    )


def test_a_condition_that_is_false_is_a_notice() -> None:
    blocked = one(resource=resource())
    assert overview.state(blocked.speculator).text == "not ready: NoPods"
    assert [n.text for n in overview.notices(blocked)] == ["Adapting is false: The stream is too small."]


def test_the_rollout_has_the_time_left_and_the_verdict() -> None:
    facts = {fact.name: fact.value.text for fact in rollout.rollout(one(), NOW).facts}
    assert facts["time left"] == "26 min of 30 min; then, without a verdict, it is rolled back"
    assert facts["verdict"] == "not yet known"
    assert facts["failures"] == "0 (0 tolerated)"
    assert facts["evidence from"] == "312 requests, 41 slices, by pods"


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"paused": True}, "of 30 min: the clock stands still while the rollout is paused"),
        ({"pods": Pods(connected=0)}, "of 30 min: the clock stands still while there are no pods"),
        ({"baseline": 0}, "counts only slices with traffic: a first version is not rolled back for a lack of it"),
    ],
)
def test_the_time_left_is_told_only_while_it_passes(changes: dict[str, Any], left: str) -> None:
    shown = one(**{name: value for name, value in changes.items() if name != "baseline"})
    assert shown.speculator.trial is not None
    trial = replace(shown.speculator.trial, baseline=changes.get("baseline", shown.speculator.trial.baseline))
    shown = replace(shown, speculator=replace(shown.speculator, trial=trial))
    facts = {fact.name: fact.value.text for fact in rollout.rollout(shown, NOW).facts}
    assert facts["time left"] == left


def test_a_canary_has_the_evidence_of_each_domain_and_later_the_traffic_has_the_lengths() -> None:
    compared, later = (rollout.rollout(shown, NOW).domains for shown in (one(), one(trial=None)))
    assert compared is not None
    assert [[cell.text for cell in row] for row in compared.rows] == [
        ["math", "2.30", "2.20", "+4.5 % (-4.1 to +13.6 %)"],
        ["code", "-", "-", "not enough data yet"],
    ]
    assert later is not None
    assert [row[0].text for row in later.rows] == ["code", "math"]


def test_the_steps_of_a_rollout_are_done_current_or_next() -> None:
    view = rollout.rollout(one(), NOW)
    assert [(step.text, step.state) for step in view.steps] == [
        ("10 % of the pods for 2 min", "current"),
        ("50 % of the pods for 2 min", "next"),
    ]
    assert {step.state for step in rollout.rollout(one(trial=None), NOW).steps} == {"next"}


@pytest.mark.parametrize(
    ("low", "high", "limit"), [(-0.4, 13.1, -5.0), (2.0, 4.0, None), (-9.0, -6.0, -5.0), (0.0, 0.0, 0.0)]
)
def test_an_interval_keeps_its_order_on_the_scale(low: float, high: float, limit: float | None) -> None:
    change = MetricChange(
        candidate=1.0, stable=1.0, change_percent=(low + high) / 2, low_percent=low, high_percent=high
    )
    placed = parts.interval("x", change, limit, is_up_good=True)
    assert placed is not None
    assert 0 <= placed.low <= placed.point <= placed.high <= 100
    assert 0 <= placed.zero <= 100
    assert (placed.low < placed.zero) == (low < 0)


def test_a_change_without_bounds_has_no_interval() -> None:
    change = MetricChange(candidate=2.0, stable=1.0, change_percent=100.0)
    assert parts.interval("x", change, None, is_up_good=True) is None
    assert parts.change(change) == "+100.0 % (no bounds yet)"
    assert parts.change(None) == "not enough data yet"


@pytest.mark.parametrize(
    ("low", "high", "is_up_good", "kind"),
    [(1, 2, True, "good"), (1, 2, False, "bad"), (-2, -1, True, "bad"), (-2, -1, False, "good"), (-1, 1, True, "")],
)
def test_a_change_is_good_or_bad_only_without_doubt(low: float, high: float, is_up_good: bool, kind: str) -> None:  # noqa: FBT001
    change = MetricChange(candidate=1.0, stable=1.0, change_percent=0.0, low_percent=low, high_percent=high)
    assert parts.change_kind(change, is_up_good=is_up_good) == kind


def test_a_chart_has_its_points_its_band_and_the_changes_of_versions() -> None:
    samples, shown, now_s = Samples(), one(), NOW.timestamp()
    samples.add(now_s, figures(shown, state().installation, {}))
    samples.add(now_s + 1, {"acceptance change": math.nan})
    content = charts.content(charts.CHARTS["evidence"], samples, shown, since_s=0.0)
    assert [(line["label"], line["values"]) for line in content["series"]] == [
        ("change", [6.2, None]),
        ("low", [-0.4, None]),
        ("high", [13.1, None]),
    ]
    assert content["bands"] == [{"low": 1, "high": 2, "label": "confidence sequence"}]
    changes = [mark for mark in content["marks"] if mark["kind"] != "shift"]
    assert changes[-1] == {"time": NOW.timestamp() + 120, "label": "version 6 canary", "kind": "canary"}
    assert charts.content(charts.CHARTS["evidence"], samples, shown, since_s=now_s)["times"] == [now_s + 1]


def test_the_evidence_begins_with_the_canary_that_runs() -> None:
    samples, shown = Samples(), one()
    assert shown.speculator.trial is not None
    assert shown.speculator.trial.started is not None
    start_s = shown.speculator.trial.started.timestamp()
    for second in (-60.0, 1.0):
        samples.add(start_s + second, {"acceptance change": second, "loss": second})
    evidence_json, loss_json = (
        charts.content(charts.CHARTS[name], samples, shown, since_s=0.0) for name in ("evidence", "loss")
    )
    assert (evidence_json["start"], evidence_json["times"]) == (start_s, [start_s + 1])
    assert (loss_json["start"], loss_json["times"]) == (None, [start_s - 60, start_s + 1])
    (evidence, *_) = charts.charts_of("rollout", samples, shown)
    assert [at_s for at_s, _ in evidence.rows] == [start_s + 1]


def test_every_domain_is_a_line_of_its_own() -> None:
    samples = Samples()
    domains = (DomainAcceptance(domain="code", stable=3.0, candidate=None),)
    samples.add(1.0, figures(one(domains=domains), state().installation, {}))
    content = charts.content(charts.CHARTS["domains"], samples, one(), since_s=0.0)
    assert [line["label"] for line in content["series"]] == ["code"]


def test_the_acceptance_of_the_last_minute_is_that_of_the_versions_in_the_roles() -> None:
    shown = figures(one(), state().installation, {4: 2.1, 6: 2.9, 3: 9.9})
    assert (shown["stable"], shown["candidate"]) == (2.1, 2.9)
    assert counters(one().speculator) == {6: (310_000, 120_000), 4: (310_000, 120_000)}


def test_a_mean_since_the_start_is_no_point_of_the_last_minutes_line() -> None:
    cluster = one(resource=resource(), traffic=())
    shown = figures(cluster, state().installation, {})
    assert {"stable", "candidate"}.isdisjoint(shown)
    samples = Samples()
    samples.add(1.0, shown)
    labels = [
        line["label"] for line in charts.content(charts.CHARTS["acceptance"], samples, cluster, since_s=0.0)["series"]
    ]
    assert labels[2:] == ["mean since the pods' start, version that serves", "mean since the pods' start, candidate"]


def test_the_marks_of_a_chart_are_listed_in_words() -> None:
    (acceptance, *_) = charts.charts_of("overview", Samples(), one())
    assert "shift from chat to code" in [label for _, label in acceptance.marks]


def test_the_table_of_a_chart_has_a_dozen_points_at_most_newest_first() -> None:
    samples = Samples()
    for second in range(100):
        samples.add(float(second), {"loss": float(second)})
    loss, *_ = charts.charts_of("learning", samples, one())
    assert len(loss.rows) <= 12
    assert loss.rows[0][0] == 99.0


def test_pods_are_grouped_by_what_tells_them_apart() -> None:
    shown = fleet.fleet(one(num_pods=20), "version", NOW)
    assert [group.title for group in shown.groups] == ["version 4: 18 pods", "version 6: 2 pods"]
    assert {square.state for square in shown.groups[0].squares} == {"stable"}
    assert {square.state for square in shown.groups[1].squares} == {"candidate"}
    assert shown.ways == ("version", "state", "engine", "device", "digest", "report")
    assert shown.groups[0].squares[0].short == "00002"
    assert fleet.fleet(one(), "<script>", NOW).by == "version"


def test_pods_are_grouped_by_the_device_that_they_report_or_else_request() -> None:
    gpu = "1 nvidia.com/gpu"
    pods = (
        PodState(name="a", state="ready", device="cuda:0", requested_device=gpu),
        PodState(name="b", state="ready", device="cuda:0"),
        PodState(name="c", state="ready", requested_device=gpu),
    )
    shown = fleet.fleet(replace(one(), pods=pods), "device", NOW)
    assert [group.title for group in shown.groups] == ["cuda:0: 2 pods", "requests 1 nvidia.com/gpu: 1 pod"]


def test_pods_that_are_silent_or_cannot_load_are_told_apart() -> None:
    pods = (
        PodState(name="a", state="connected", version=4, last_report=NOW - timedelta(seconds=5)),
        PodState(name="b", state="failed", version=4, problem="not finite", last_report=NOW - timedelta(minutes=5)),
        PodState(name="c", state="connected", version=0, last_report=NOW),
    )
    shown = fleet.fleet(replace(one(), pods=pods), "report", NOW)
    assert [group.title for group in shown.groups] == [
        "reported within 20 s: 2 pods",
        "silent for more than 20 s: 1 pod",
    ]
    squares = {square.name: square for group in shown.groups for square in group.squares}
    assert {name: square.state for name, square in squares.items()} == {"a": "stable", "b": "failed", "c": "none"}
    assert squares["b"].title == "b, failed, version 4: not finite"


def test_learning_without_a_trainer_says_so() -> None:
    silent = one(learning=None, pace=None)
    installation = replace(state().installation, training=None)
    assert learning.learning(silent, installation, NOW).is_silent
    assert not learning.learning(one(), state().installation, NOW).is_silent


def test_learning_has_stored_requests_by_kind_and_age_and_the_shifts() -> None:
    view = learning.learning(one(), state().installation, NOW)
    assert view.kinds is not None
    assert view.shifts is not None
    assert [cell.text for cell in view.kinds.rows[0]] == [
        *("code", "60 %", "2,000", "150", "700", "1,300", "150", "2.90", "2.80")
    ]
    assert [cell.text for cell in view.shifts.rows[0]] == ["33 min ago", "chat", "code"]
    facts = {fact.name: fact.value.text for fact in view.facts}
    assert facts["lag"] == "the newest request was stored 0.4 s after it was sent"
    assert facts["demand"].startswith("900 ")
    assert facts["credits"].startswith("800 ")


def test_a_registry_without_metrics_of_its_trainer_has_the_same_charts_of_learning() -> None:
    remote = replace(state().installation, training=None, serving=None, processes=None)
    assert {"loss": 1.234, "held-out candidate": 2.7, "demand": 900.0, "granted": 800.0}.items() <= figures(
        one(), remote, {}
    ).items()


def test_traffic_has_the_lookaheads_that_engines_chose() -> None:
    view = traffic.traffic(one(), state().installation)
    assert view.lookaheads is not None
    assert view.lookaheads.columns == ("draft tokens chosen", ">0", ">1", ">2", ">3")
    assert [[cell.text for cell in row] for row in view.lookaheads.rows] == [
        ["all steps", "4 %", "8 %", "18 %", "70 %"],
        ["steps of version 6", "-", "8 %", "18 %", "70 %"],
        ["steps of version 4", "-", "8 %", "18 %", "70 %"],
    ]


def test_steps_without_a_draft_are_part_of_all_steps() -> None:
    first = one().speculator.traffic[0]
    bare = replace(first, version=0, acceptance=replace(first.acceptance, by_position=(), by_lookahead=(1.0,)))
    view = traffic.traffic(one(traffic=(first, bare)), state().installation)
    assert view.lookaheads is not None
    assert [cell.text for cell in view.lookaheads.rows[0]] == ["all steps", "52 %", "4 %", "9 %", "35 %"]
    unknown = replace(bare, acceptance=replace(bare.acceptance, by_lookahead=()))
    view = traffic.traffic(one(traffic=(first, unknown)), state().installation)
    assert view.lookaheads is not None
    assert [row[0].text for row in view.lookaheads.rows] == ["steps of version 6"]


def test_figures_of_one_pod_are_on_its_page_in_a_cluster() -> None:
    cluster = one(namespace="team")
    assert traffic.traffic(cluster, Installation(speculators=())).is_by_pod
    assert not traffic.traffic(one(), state().installation).is_by_pod
    here = [chart.name for chart in charts.charts_of("traffic", Samples(), one())]
    there = [chart.name for chart in charts.charts_of("traffic", Samples(), cluster, is_on_this_machine=False)]
    assert (here, there) == (["domains", "lookahead", "drops"], ["domains"])


def test_shifts_and_swaps_are_marks_of_the_acceptance_chart() -> None:
    samples = Samples()
    samples.swaps.add(1.0, {"pod-0": 3, "pod-1": 3})
    samples.swaps.add(2.0, {"pod-0": 4, "pod-1": 4})
    marks = charts.content(charts.CHARTS["acceptance"], samples, one(), since_s=0.0)["marks"]
    assert {"time": 2.0, "label": "2 pods to version 4", "kind": "swap"} in marks
    assert [mark["label"] for mark in marks if mark["kind"] == "shift"] == ["shift from chat to code"]


def test_traffic_without_a_version_is_not_said_to_be_of_one_drafter() -> None:
    served = one().speculator.traffic[0]
    assert parts.served_name(replace(served, version=0)) == "mixed or no draft"


def test_the_shares_of_a_step_lie_side_by_side() -> None:
    shares = learning.learning(one(), state().installation, NOW).shares
    assert [(share.label, share.start, share.percent) for share in shares][:3] == [
        ("forward", 0.0, 41.0),
        ("backward", 41.0, 37.0),
        ("optimizer", 78.0, 10.0),
    ]


def test_traffic_has_positions_by_version_and_drops_by_reason() -> None:
    view = traffic.traffic(one(), state().installation)
    assert [(one_.title, one_.shares[0]) for one_ in view.positions] == [("version 6", 82.0), ("version 4", 82.0)]
    assert view.drops is not None
    assert [cell.text for cell in view.drops.rows[0]] == ["queue full", "3"]


def test_the_facts_of_a_comparison_have_names_of_their_own() -> None:
    fields = (
        Field(part="evaluation", name="tokens per step", old="1.2", new="1.3"),
        Field(part="traffic", name="tokens per step", old="1.1", new="1.4"),
        Field(part="manifest", name="parent", old="1", new="2"),
    )
    shown = versions.diff(Difference(speculator="qwen", old=1, new=2, fields=fields, tensors=())).fields
    assert shown is not None
    names = [row[0].text for row in shown.rows]
    assert names == ["tokens per step (evaluation)", "tokens per step (traffic)", "parent"]


def test_two_versions_are_suggested_for_a_comparison() -> None:
    view = versions.versions(one())
    assert (view.old, view.new, view.numbers[0]) == (4, 6, 6)
    assert len(view.table.rows) == 6


def test_the_metrics_of_this_machine_are_not_those_of_another_speculator() -> None:
    ours = replace(state().installation, speculator="qwen")
    assert ours.about("qwen").training is not None
    others = ours.about("llama")
    assert (others.training, others.serving) == (None, None)
    assert "lookahead" not in figures(one(), others, {})


def test_metrics_without_a_name_are_those_of_the_only_speculator() -> None:
    unnamed = state().installation
    assert unnamed.about("qwen").training is not None
    assert replace(unnamed, speculators=(one().speculator, one().speculator)).about("qwen").training is None
