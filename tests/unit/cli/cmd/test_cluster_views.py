"""The plugin's output, without a cluster."""

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console, RenderableType
from tests.support import speculator_objects as objects
from tests.support.speculator_objects import condition, moment, ready

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli import output
from updraft_cli.backends import wire
from updraft_cli.backends.drafts import DraftList, History
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.objects import draft, event, events_of, history, newest_first, speculator, waiting_imports
from updraft_cli.cmd.draft import view as draft_view
from updraft_cli.cmd.explain import view as explain_view
from updraft_cli.cmd.explain.explanation import explain
from updraft_cli.cmd.follow import Lines, View
from updraft_cli.cmd.status import view as status_view

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)

NO_GPU = condition("Available", "False", "InsufficientGPU", "0 of 2 pods are ready; qwen-serving-a: 0/3 nodes")
NOT_READY = condition("Ready", "False", "InsufficientGPU", "0 of 2 pods are ready; qwen-serving-a: 0/3 nodes")


def now() -> datetime:
    return NOW


def text(picture: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=1000, highlight=False)
    console.print(picture)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def status(*contents: Any, namespace: str = "team", is_wide: bool = False) -> str:
    return text(status_view.rendered(of(*contents, namespace=namespace), NOW, is_wide=is_wide))


def explained(content: Any, *versions: Any, imports: Any = (), is_wide: bool = False) -> str:
    owner = speculator(content)
    explanation = explain(owner, [draft(version, owner) for version in versions], waiting_imports(imports), NOW)
    return text(explain_view.rendered(explanation, NOW, is_wide=is_wide))


def test_what_speculation_is_worth_is_told_with_its_interval() -> None:
    content = objects.speculator()
    content["status"]["acceptance"] |= {"speedup": "0.91", "speedupLow": "0.88", "speedupHigh": "0.94"}
    assert "speed     0.91 times that of decoding without drafts (0.88 to 0.94)" in status(content).splitlines()


@pytest.mark.attack(boundary="text", attack="a domain with terminal markup", outcome="it is shown as text")
def test_acceptance_is_told_by_domain_and_a_hostile_name_is_only_text() -> None:
    content = objects.speculator()
    domains = [{"domain": "sql", "stable": "2.31"}, {"domain": "[red]x[/red]", "stable": "1.10"}]
    content["status"]["acceptance"] |= {"domains": domains}
    assert status(content).splitlines()[-3:] == ["domain        stable", "sql             2.31", "[red]x[/red]    1.10"]


def test_one_speculator_is_told_in_facts() -> None:
    assert status(objects.speculator()).splitlines() == [
        "qwen in namespace team: ready",
        "why       requests are served",
        "stable    version 2, 2.59 tokens per step",
        "rollout   version 2 is stable",
        "pods      2/2 ready, 2 with version 2",
        "learning  drafts are learned from the traffic",
        "trainer   training, published 5 min ago",
    ]


SMALL = "replay has room for 3 held-out requests of 26.3 MB, the mean, but 8 are needed to judge a draft: raise it"


def test_what_is_too_small_to_learn_is_told_on_a_cluster_and_on_one_machine() -> None:
    sized = condition("Sized", "False", "TooSmall", SMALL)
    assert f"too small  {SMALL}" in status(objects.speculator(status={"conditions": [sized]})).splitlines()
    state = pb.SpeculatorState(speculator="default", learning=pb.Learning(too_small=SMALL))
    assert f"too small  {SMALL}" in local(state)


@pytest.mark.parametrize(("adapting", "is_shown"), [("Learning", True), ("TooSmall", False)])
def test_dropped_traces_do_not_hide_what_is_learned(adapting: str, *, is_shown: bool) -> None:
    sized = condition("Sized", "False", "TracesDropped", "pod p: traces were dropped")
    learned = condition("Adapting", "True" if is_shown else "False", adapting, "drafts are learned")
    rows = status(objects.speculator(status={"conditions": [sized, learned]})).splitlines()
    assert "too small  pod p: traces were dropped" in rows
    assert any(row.startswith("learning") for row in rows) == is_shown


def test_a_registry_on_one_machine_with_too_little_room_is_named_with_its_folder() -> None:
    state = pb.SpeculatorState(speculator="default", learning=pb.Learning(version_bytes=800_000_000))
    state.volume_bytes = 4 * 10**9
    assert wire.speculator(state).too_small == ""
    state.volume_bytes = 2 * 10**9
    assert wire.speculator(state).too_small == (
        "the registry's volume has 2.00 GB, but the stable version, the one before it, a canary, an upload of 800 MB each need"
        " 3.20 GB: move UPDRAFT_REGISTRY_DATA_DIR to a larger disk"
    )


def test_a_registry_on_one_machine_that_accepts_no_version_of_this_size_is_named_with_its_setting() -> None:
    state = pb.SpeculatorState(speculator="default", learning=pb.Learning(version_bytes=800_000_000))
    state.max_draft_bytes = 800_000_000
    assert wire.speculator(state).too_small == ""
    state.max_draft_bytes = 512_000_000
    assert wire.speculator(state).too_small == (
        "a version has 800 MB, but the registry accepts at most 512 MB: set UPDRAFT_REGISTRY_MAX_DRAFT_BYTES to at least"
        " 800000000"
    )


def test_what_a_trainer_has_done_is_told_on_one_machine() -> None:
    learning = pb.Learning(samples=1_200, held_out=130, steps=500, estimates=20)
    done = "1,200 requests to train on and 130 held-out ones, 500 steps, 20 estimates since the trainer started"
    assert f"learning  {done}" in local(pb.SpeculatorState(speculator="default", learning=learning))


SHARES = {"forward": 0.41, "backward": 0.33, "all_reduce": 0.12, "data": 0.08, "transfer": 0.02, "estimate": 0.02}
SHARES |= {"save": 0.009, "waiting": 0.0}


def trains(**more: Any) -> pb.SpeculatorState:
    """A registry's state, whose trainer reported; `more` are fields of the report."""
    ms = int(1000 * NOW.timestamp())
    learning = pb.Learning(
        device="NVIDIA H100 80GB HBM3",
        world_size=2,
        tokens_per_second=51_234.5,
        flops_utilization=0.434,
        phases=[pb.PhaseShare(phase=phase, share=share) for phase, share in SHARES.items()],
        steps_to_estimate=12,
        estimate_due_unix_ms=ms + 8_000,
        last_save_unix_ms=ms - 40_000,
    )
    learning.MergeFrom(pb.Learning(**more))
    return pb.SpeculatorState(speculator="default", learning=learning)


def test_how_fast_training_is_and_where_its_time_goes_is_told_on_one_machine() -> None:
    rows = local(trains())
    assert (
        "training  2 ranks on NVIDIA H100 80GB HBM3, 51,234 trained tokens/s in the last minute, 43 % of peak" in rows
    )
    assert "time      forward 41 %, backward 33 %, all-reduce 12 %, data 8 %, transfer 2 %, other 4 %" in rows
    assert "next      an estimate in 12 steps or in 8 s; saved 40 s ago" in rows
    assert max(len(row) for row in rows if row.startswith(("training", "time", "next"))) <= 100


def test_one_process_on_a_cpu_is_told_without_ranks_and_peak() -> None:
    state = trains(device="cpu (1 thread)", world_size=1)
    state.learning.ClearField("flops_utilization")
    state.learning.ClearField("last_save_unix_ms")
    rows = local(state)
    assert "training  on cpu (1 thread), 51,234 trained tokens/s in the last minute" in rows
    assert "next      an estimate in 12 steps or in 8 s; nothing is saved yet" in rows


@pytest.mark.parametrize(
    ("steps", "wait_s", "expected"),
    [
        pytest.param(1, 130, "an estimate in 1 step or in 2 min 10 s", id="both"),
        pytest.param(5, -60, "an estimate in 5 steps or as soon as anything has changed", id="late"),
        pytest.param(0, -60, "an estimate is due", id="due"),
    ],
)
def test_when_the_next_estimate_is_due_is_told(steps: int, wait_s: int, expected: str) -> None:
    state = trains()
    state.learning.steps_to_estimate = steps
    state.learning.estimate_due_unix_ms = int(1000 * (NOW.timestamp() + wait_s))
    assert f"next      {expected}; saved 40 s ago" in local(state)


def test_nothing_is_told_of_a_pace_before_the_first_turn_of_training() -> None:
    state = trains()
    for name in ("phases", "tokens_per_second", "estimate_due_unix_ms", "steps_to_estimate", "last_save_unix_ms"):
        state.learning.ClearField(name)
    assert not [row for row in local(state) if row.startswith(("training", "time", "next"))]
    content = objects.speculator()
    content["status"]["trainer"]["progress"] = {"device": "cpu (1 thread)", "ranks": 1, "tokensPerSecond": 0}
    assert not [row for row in status(content).splitlines() if row.startswith(("training", "time", "next"))]


def test_how_fast_training_is_is_told_on_a_cluster() -> None:
    content = objects.speculator()
    content["status"]["trainer"]["progress"] = {
        "device": "NVIDIA H100 80GB HBM3",
        "ranks": 2,
        "tokensPerSecond": 51_234,
        "flopsUtilizationPercent": 43,
        "phases": [{"phase": "forward", "percent": 60}, {"phase": "all_reduce", "percent": 40}],
        "stepsToEstimate": 12,
        "lastSaveTime": "2026-11-24T11:59:20Z",
    }
    rows = status(content).splitlines()
    assert (
        "training  2 ranks on NVIDIA H100 80GB HBM3, 51,234 trained tokens/s in the last minute, 43 % of peak" in rows
    )
    assert "time      forward 60 %, all-reduce 40 %" in rows
    assert "next      an estimate in 12 steps; saved 40 s ago" in rows


def local(state: pb.SpeculatorState) -> list[str]:
    installation = Installation(namespace="", speculators=(wire.speculator(state),))
    return text(status_view.rendered(installation, NOW, is_wide=False)).splitlines()


WHY = "the draft of 340 samples waits for 8 held-out requests of today's traffic, has 5"


def test_why_nothing_is_published_is_told_next_to_the_trainer() -> None:
    content = objects.speculator(status={"trainer": {"state": "Training", "message": WHY}})
    assert f"trainer   training: {WHY}" in status(content).splitlines()
    assert f"The trainer is training: {WHY}." in explained(content)


def test_a_local_registry_tells_it_too_and_nothing_while_no_trainer_reports() -> None:
    for message, shown in ((WHY, [f"trainer  {WHY}"]), ("", [])):
        state = pb.SpeculatorState(speculator="default", trainer_message=message)
        assert [line for line in local(state) if line.startswith("trainer")] == shown


def test_what_is_tried_and_what_holds_it_is_told() -> None:
    tried = {
        "versions": {"stable": 2, "candidate": 3, "latest": 3},
        "rollout": {"phase": "Canary", "version": 3, "step": 1, "steps": 2, "message": "step 2 in 48 s"},
        "acceptance": {"stable": "2.59", "candidate": "2.71"},
        "lastFailure": {"version": 1, "reason": "Rejected", "message": "too slow", "time": objects.SINCE},
    }
    lines = status(objects.speculator(rollout={"paused": True, "pinnedVersion": "NoDraft"}, status=tried)).splitlines()
    assert "candidate     version 3, step 1 of 2, 2.71 tokens per step: step 2 in 48 s" in lines
    assert "pinned        no draft" in lines
    assert "paused        yes" in lines
    assert "last failure  version 1 5 min ago: too slow" in lines


def test_wide_has_every_condition_with_reason_age_and_message() -> None:
    picture = status(objects.speculator(status=ready(NO_GPU, NOT_READY)), is_wide=True)
    assert picture.startswith("qwen in namespace team: not ready (InsufficientGPU)")
    rows = [line.split() for line in picture.splitlines()]
    (serving,) = (row for row in rows if row[:1] == ["Available"])
    assert serving[:6] == ["Available", "False", "InsufficientGPU", "5", "min", "ago"]
    assert sum(r[:1] == [kind["type"]] for r in rows for kind in ready()["conditions"]) == 8


def test_several_speculators_are_rows_and_of_all_namespaces_with_theirs() -> None:
    both = (objects.speculator("b"), objects.speculator("a", status=ready(NO_GPU, NOT_READY)))
    assert [line.split()[:2] for line in status(*both).splitlines()] == [
        ["name", "ready"],
        ["a", "not"],
        ["b", "ready"],
    ]
    assert [line.split()[0] for line in status(*both, namespace="").splitlines()] == ["namespace", "team", "team"]


def test_no_speculator_and_one_that_nobody_looked_at_are_reported() -> None:
    fresh = {**objects.speculator(), "status": {}}
    assert status() == "There is no AdaptiveSpeculator in namespace team."
    assert "why      no operator has reconciled it yet" in status(fresh).splitlines()
    assert "No operator has reconciled it yet. Is one running" in explained(fresh)


def test_a_status_of_before_the_last_change_is_told_as_that() -> None:
    late = objects.speculator(status={"observedGeneration": 2})
    assert "why       before the last change of the spec: requests are served" in status(late)
    assert "The operator has not acted on the last change of the spec yet" in explained(late)


def test_versions_are_newest_first() -> None:
    items = [
        objects.version(1, "Superseded", reason="version 2 took over"),
        objects.version(2, "Stable", pods={"loaded": 1, "target": 2}, acceptance={"length": "2.59"}, reason="it won"),
    ]
    owner = speculator(objects.speculator(rollout={"pinnedVersion": 2}))
    drafts = newest_first(draft(item, owner) for item in items)
    listing = DraftList(namespace="team", speculator="qwen", drafts=drafts)
    assert text(draft_view.rendered_list(listing, NOW, is_wide=False)).splitlines() == [
        "version  phase           accepted  loaded  published  reason",
        "      2  stable, pinned      2.59     1/2  2 h ago    it won",
        "      1  superseded             -     -/-  2 h ago    version 2 took over",
    ]
    wide = text(draft_view.rendered_list(listing, NOW, is_wide=True))
    assert "qwen-v2" in wide
    assert "size" not in wide.splitlines()[0], "a cluster does not know it"
    everywhere = DraftList(speculator="", drafts=drafts)
    assert text(draft_view.rendered_list(everywhere, NOW, is_wide=False)).split()[:2] == ["namespace", "speculator"]
    none = DraftList(namespace="team", speculator="", drafts=())
    assert text(draft_view.rendered_list(none, NOW, is_wide=False)) == "No drafts of namespace team yet."


def test_imports_that_are_no_version_yet_are_below_the_versions() -> None:
    running = objects.draft_import(objects.condition("Ready", "False", "Importing", "a Job imports it"))
    failed = objects.draft_import(
        objects.condition("Ready", "False", "ImportFailed", "404 Not Found"),
        objects.condition("Stalled", "True", "ImportFailed", "404 Not Found"),
    )
    imports = tuple(waiting_imports([running, failed, objects.draft_import(), objects.draft_import(version=3)]))
    one = DraftList(namespace="team", speculator="qwen", drafts=(), imports=imports)
    assert text(draft_view.rendered_list(one, NOW, is_wide=False)).splitlines() == [
        "No drafts of qwen yet.",
        "",
        "The DraftImport qwen-mine has not finished (Importing): a Job imports it.",
        "The DraftImport qwen-mine failed (ImportFailed): 404 Not Found.",
        "The DraftImport qwen-mine has not finished (Pending): the operator has not said yet.",
    ]
    everywhere = DraftList(speculator="", drafts=(), imports=imports[:1])
    assert text(draft_view.rendered_list(everywhere, NOW, is_wide=False)).splitlines()[-1] == (
        "team: The DraftImport qwen-mine has not finished (Importing): a Job imports it."
    )


def changes(*, problem: str = "", events: tuple[Any, ...] | None = None) -> History:
    versions = [
        objects.version(1, "Superseded", history=[moment(1, "Stable", "first"), moment(9, "Superseded", "2 won")]),
        objects.version(2, "Stable", history=[moment(5, "Canary", "tried"), moment(8, "Stable", "it won")]),
    ]
    entries = sorted((entry for version in versions for entry in history(version)), key=lambda entry: entry.time)
    return History(
        namespace="team",
        speculator="qwen",
        events=tuple(entries),
        kubernetes_events=None if events is None else events_of(events, "qwen"),
        events_problem=problem,
    )


def test_the_history_of_all_versions_is_in_the_order_of_time() -> None:
    assert text(draft_view.rendered_history(changes(), is_wide=False)).splitlines() == [
        "time (UTC)           version  became      by        why",
        "2026-11-24 11:01:00        1  stable      registry  first",
        "2026-11-24 11:05:00        2  canary      registry  tried",
        "2026-11-24 11:08:00        2  stable      registry  it won",
        "2026-11-24 11:09:00        1  superseded  registry  2 won",
    ]


def kubernetes_event(kind: str, name: str, **more: Any) -> Any:
    return {
        "metadata": {"creationTimestamp": "2026-11-24T11:00:00Z"},
        "involvedObject": {"kind": kind, "name": name},
        "type": "Warning",
        "reason": "RolledBack",
        "message": "acceptance is down",
        **more,
    }


def test_wide_history_has_the_events_of_the_speculator_and_its_versions_only() -> None:
    events = (
        kubernetes_event("DraftVersion", "qwen-v9", eventTime="2026-11-24T11:07:00.123456Z"),
        kubernetes_event("AdaptiveSpeculator", "qwen", lastTimestamp="2026-11-24T11:03:00Z", count=4),
        kubernetes_event("DraftVersion", "qwen-vx-v1"),
        kubernetes_event("AdaptiveSpeculator", "qwen-v1"),
        kubernetes_event("DraftVersion", "other-v1"),
    )
    shown = changes(events=events)
    assert [(event.kind, event.name, event.count) for event in shown.kubernetes_events or ()] == [
        ("AdaptiveSpeculator", "qwen", 4),
        ("DraftVersion", "qwen-v9", 1),
    ]
    assert "2026-11-24 11:07:00" in text(draft_view.rendered_history(shown, is_wide=True))
    assert "There are no Events" in text(draft_view.rendered_history(changes(events=()), is_wide=True))
    denied = changes(problem='User "ann" cannot list events')
    assert 'Events cannot be read: User "ann" cannot list events.' in text(
        draft_view.rendered_history(denied, is_wide=True)
    )


def test_an_event_that_comes_again_has_the_time_of_its_series() -> None:
    series = {"count": 7, "lastObservedTime": "2026-11-24T11:30:00Z"}
    found = event(kubernetes_event("AdaptiveSpeculator", "qwen", eventTime="2026-11-24T11:00:00Z", series=series))
    assert (found.count, found.time) == (7, datetime(2026, 11, 24, 11, 30, tzinfo=UTC))


def test_an_explanation_says_what_it_does_and_what_restarts_pods() -> None:
    told = explained(objects.speculator(), objects.version(2, "Stable"))
    assert "It serves hf://org/qwen at http://qwen.team.svc/v1; 2 of 2 pods ready." in told
    assert "Version 2 of the draft serves: 2.59 tokens per verify step over more than 12,000 steps." in told
    assert "The trainer is training; it last published 5 min ago." in told
    assert "Every condition is True." in told
    assert "A new draft, a pin, a pause or a policy restarts nothing." in told
    assert "replaces the serving pods: spec.engine, spec.targetModel.revision" in told
    assert "replaces the trainer pods" not in told
    assert "replaces the trainer pods" in explained(objects.speculator(), is_wide=True)


def test_a_condition_that_is_not_true_is_explained_once_with_what_to_do() -> None:
    told = explained(objects.speculator(status=ready(NO_GPU, NOT_READY)))
    assert "Available has been False for 5 min: InsufficientGPU" in told
    assert "0 of 2 pods are ready; qwen-serving-a: 0/3 nodes. No node has as many free GPUs as a pod requests." in told
    assert "What to do: Free or add GPU nodes" in told
    assert "Ready has been False" not in told.replace("Available has been False", "")
    assert "Every condition is True." not in told


def test_a_reason_that_is_not_known_here_keeps_its_message() -> None:
    told = explained(objects.speculator(status=ready(condition("Adapting", "Unknown", "Cooling", "it is warm"))))
    assert "Adapting has been Unknown for 5 min: Cooling\nIt is warm.\n" in told


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (objects.speculator(suspend=True), "It is suspended: no pod serves or learns"),
        (objects.speculator(status={"versions": {}}), "No draft serves: answers are right, and no faster"),
        (objects.speculator(rollout={"pinnedVersion": 1}), "Version 1 is pinned (spec.rollout.pinnedVersion)"),
        (objects.speculator(rollout={"paused": True}), "It is paused (spec.rollout.paused)"),
        (objects.speculator(rollout={"strategy": "Manual"}), "it waits for a person: version 5 can be promoted."),
        (
            objects.speculator(status={"serving": {"readyReplicas": 2, "updatedReplicas": 1, "failedReplicas": 1}}),
            "1 of 2 ready pods have loaded it.\n1 pod with a problem; see the conditions.",
        ),
    ],
)
def test_an_explanation_says_what_holds_a_rollout(content: Any, sentence: str) -> None:
    assert sentence in explained(content, objects.version(5, "Held"))


def test_an_explanation_says_why_an_import_is_no_version() -> None:
    running = objects.condition("Ready", "False", "Importing", "a Job imports it")
    failed = [objects.condition(kind, "True", "ImportFailed", "404 Not Found") for kind in ("Ready", "Stalled")]
    done = objects.draft_import(version=3)
    told = explained(objects.speculator(), imports=[objects.draft_import(running), objects.draft_import(*failed), done])
    assert "The DraftImport qwen-mine has not finished (Importing): a Job imports it." in told
    assert "The DraftImport qwen-mine failed (ImportFailed): 404 Not Found." in told
    assert told.count("DraftImport") == 2


def test_programs_get_plain_values_with_times_in_iso_8601() -> None:
    content = json.loads(output.as_json(of(objects.speculator())))["speculators"][0]
    assert content["resource"]["last_published"] == "2026-11-24T11:55:00+00:00"
    assert [content[role] for role in ("stable", "candidate", "previous", "latest")] == [2, 0, 1, 2]


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(out: io.StringIO) -> Callable[..., Lines[Installation]]:
    view = View(items=status_view.items, rendered=status_view.rendered)
    return lambda **more: Lines(Console(file=out, width=1000, highlight=False), now, view, **more)


def of(*contents: Any, namespace: str = "team") -> Installation:
    speculators = sorted(map(speculator, contents), key=lambda found: (found.namespace, found.name))
    return Installation(namespace=namespace, speculators=tuple(speculators))


def test_a_watch_writes_a_line_for_each_speculator_that_changed(
    lines: Callable[..., Lines[Installation]], out: io.StringIO
) -> None:
    shown = lines()
    shown.show(of(objects.speculator("a"), objects.speculator("b")))
    shown.show(of(objects.speculator("a"), objects.speculator("b")))
    shown.show(of(objects.speculator("a"), objects.speculator("b", status=ready(NO_GPU, NOT_READY))))
    assert out.getvalue().splitlines() == [
        "2026-11-24 12:00:00 team/a ready, 2/2 pods ready, serves version 2: requests are served",
        "2026-11-24 12:00:00 team/b ready, 2/2 pods ready, serves version 2: requests are served",
        f"2026-11-24 12:00:00 team/b not ready (InsufficientGPU), 2/2 pods ready, serves version 2: {NO_GPU['message']}",
    ]


def test_a_watch_writes_one_object_per_line_for_a_program(
    lines: Callable[..., Lines[Installation]], out: io.StringIO
) -> None:
    lines(is_json=True).show(of(objects.speculator("a"), objects.speculator("b")))
    assert [json.loads(line)["name"] for line in out.getvalue().splitlines()] == ["a", "b"]


def test_an_outage_and_a_deletion_are_reported_on_stderr(
    lines: Callable[..., Lines[Installation]], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lines()
    shown.show(of(objects.speculator("a")))
    shown.lost("no API server answers")
    shown.lost("no API server answers")
    shown.show(of())
    assert capsys.readouterr().err.splitlines() == [
        "2026-11-24 12:00:00 no API server answers; trying again",
        "2026-11-24 12:00:00 team/a is gone",
    ]


def test_the_json_of_a_cluster_keeps_its_names_of_pods() -> None:
    serving = {"serving": {"readyReplicas": 1, "updatedReplicas": 1, "failedReplicas": 1}}
    (content,) = json.loads(output.as_json(of(objects.speculator(status=serving))))["speculators"]
    assert {name: content["pods"][name] for name in ("ready", "wanted", "serving_stable", "failed", "connected")} == {
        "ready": 1,
        "wanted": 2,
        "serving_stable": 1,
        "failed": 1,
        "connected": None,
    }
