"""When a resource may be updated, when it has come back, and when it has failed to."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.support.manifests import speculator
from tests.support.observed import NOW, NOW_S, as_child, pod, ready_pods, settled
from tests.unit.operator.planning.runtime.test_records import NEWER, SERVING

from updraft_operator.api import names
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed, Refusal
from updraft_operator.planning.plan import Plan, make_plan, objects, ref
from updraft_operator.planning.pods import PodState
from updraft_operator.planning.runtime.upgrade import Stage, Upgrade

TRAINER = Ref("Deployment", "qwen-trainer")
STALE = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 0}


def _plan(observation: Observed, *, after_s: float = 0.0) -> Plan:
    return make_plan(observation, now_unix_s=NOW_S + after_s, now_s=0.0)


def _upgrade(observation: Observed, *, after_s: float = 0.0) -> Upgrade:
    upgrade = _plan(observation, after_s=after_s).upgrade
    assert upgrade is not None
    return upgrade


def _waiting(spec: dict[str, Any] | None = None, *, metadata: dict[str, Any] | None = None, **more: Any) -> Observed:
    """A resource of a former operator."""
    before = settled(spec, **{"pods": ready_pods(), **more})
    return replace(before, config=NEWER, speculator=speculator(spec, **(metadata or {})))


def _begun(**more: Any) -> Observed:
    """The same, right after its turn began: nothing has been replaced yet."""
    before = replace(_waiting(), has_turn=True)
    made = {ref(content): as_child(content, status=STALE) for content in _plan(before).apply}
    return replace(before, children={**before.children, **made}, **more)


def _replaced(observation: Observed) -> Observed:
    """All pods have the new template."""
    status = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}
    children: dict[Ref, Child] = {
        at: replace(child, status=status) if child.rendered else child for at, child in observation.children.items()
    }
    return replace(observation, children=children)


def _written(observation: Observed, *, after_s: float = 0.0) -> Observed:
    """Once its status was written."""
    status = _plan(observation, after_s=after_s).status
    return replace(observation, speculator=speculator(status=status))


@pytest.mark.parametrize(
    ("observation", "reason", "says"),
    [
        pytest.param(
            _waiting(), "WaitingForTurn", "waits for its turn; then the pods of StatefulSet/qwen-registry (", id="turn"
        ),
        pytest.param(
            _waiting({"updatePolicy": {"mode": "OnSpecChange"}}), "WaitingForSpecChange", "upgrade start", id="policy"
        ),
        pytest.param(
            _waiting({"updatePolicy": {"windows": ["22:00-23:00"]}}),
            "WaitingForWindow",
            "opens at 2026-11-25T22:00:00Z",
            id="window",
        ),
        pytest.param(
            _waiting({"updatePolicy": {"windows": ["22:00-23:00 Mars/Olympus"]}}), "InvalidWindow", "Mars", id="zone"
        ),
        pytest.param(_waiting(pods=()), "WaitingForServing", "0 of 1 pods", id="no pod is ready"),
        pytest.param(
            replace(_waiting(), refusals=(Refusal(ref=SERVING, digest="x", reason="QuotaExceeded", message="full"),)),
            "UpdateRefused",
            "full",
            id="refused",
        ),
        pytest.param(
            _waiting({"engine": {"type": "VLLM"}, "serving": {"resources": {"limits": {"nvidia.com/gpu": "3"}}}}),
            "UpdateRefused",
            "GPU",
            id="refused by the operator itself",
        ),
        pytest.param(
            replace(_waiting(), upgrades_stopped_by="a/b"), "WaitingForTurn", "a/b does not come", id="stopped"
        ),
        pytest.param(
            replace(_waiting(), config=replace(NEWER, max_upgrades=0)), "WaitingForTurn", "maxConcurrent", id="off"
        ),
    ],
)
def test_the_condition_says_why_a_resource_waits(observation: Observed, reason: str, says: str) -> None:
    upgrade = _upgrade(observation)
    assert (upgrade.says.status, upgrade.says.reason) == ("False", reason)
    assert says in upgrade.says.message


@pytest.mark.parametrize(
    "spec",
    [{"updatePolicy": {"mode": "OnSpecChange"}}, {"updatePolicy": {"windows": ["22:00-23:00"]}}, {"suspend": True}],
)
def test_somebody_who_asks_for_a_runtime_needs_no_window(spec: dict[str, Any]) -> None:
    asked = {"annotations": {"updraft.dev/upgrade": "2"}}
    assert _upgrade(_waiting(spec, metadata=asked)).stage is Stage.READY
    of_another = {"annotations": {"updraft.dev/upgrade": "1"}}
    if "updatePolicy" in spec:
        assert _upgrade(_waiting(spec, metadata=of_another)).stage is Stage.WAITING


@pytest.mark.parametrize("mode", ["OnSpecChange", "Automatic"])
def test_a_request_for_a_runtime_that_was_rolled_back_begins_no_other_one(mode: str) -> None:
    policy = {"updatePolicy": {"mode": mode, "windows": ["22:00-23:00"]}}
    asked = _waiting(policy, metadata={"annotations": {"updraft.dev/upgrade": "2"}})
    later = replace(NEWER, images=replace(NEWER.images, inference="inference:3"), runtime="3")
    assert _upgrade(asked).stage is Stage.READY
    assert _upgrade(replace(asked, config=later)).stage is Stage.WAITING
    assert _plan(replace(asked, config=later, has_turn=True)).apply == ()


def test_a_turn_that_comes_when_the_window_has_closed_changes_nothing() -> None:
    late = replace(_waiting({"updatePolicy": {"windows": ["22:00-23:00"]}}), has_turn=True)
    assert _plan(late).apply == ()


def test_it_looks_again_when_the_window_opens() -> None:
    plan = _plan(_waiting({"updatePolicy": {"windows": ["22:00-23:00"]}}))
    assert (plan.again_s, plan.needs_plan) == (timedelta(hours=10).total_seconds(), True)


def test_it_is_updating_until_all_pods_are_replaced_and_as_many_serve_as_before() -> None:
    begun = _begun()
    assert _upgrade(begun).stage is Stage.UPDATING
    without_pods = replace(_replaced(begun), pods=())
    assert _upgrade(without_pods).stage is Stage.UPDATING
    back = _replaced(begun)
    assert (_upgrade(back).stage, _upgrade(back).ended) == (Stage.CURRENT, NOW)


def test_an_update_that_ended_is_no_update_when_pods_fail_later() -> None:
    ended = _written(_replaced(_begun()))
    failing = replace(ended, pods=(pod(problem=("OOMKilled", "too much")),))
    assert _upgrade(failing, after_s=60.0).stage is Stage.CURRENT


def test_another_update_may_begin_in_the_second_in_which_one_ended() -> None:
    ended = _written(_replaced(_begun()))
    another = replace(ended, config=replace(NEWER, images=replace(NEWER.images, inference="inference:3"), runtime="3"))
    made = {ref(content): as_child(content, status=STALE) for content in _plan(another).apply}
    assert _upgrade(replace(another, children={**another.children, **made})).stage is Stage.UPDATING


def test_pods_that_do_not_start_fail_an_update_and_so_does_its_deadline() -> None:
    failing = _begun(pods=(pod(problem=("ImagePullBackOff", "no such image")),))
    upgrade = _upgrade(failing)
    assert (upgrade.stage, upgrade.says.reason) == (Stage.FAILED, "UpdateFailed")
    assert "no such image" in upgrade.says.message
    assert _upgrade(_begun(), after_s=NEWER.upgrade_deadline_s - 1).stage is Stage.UPDATING
    assert _upgrade(_begun(), after_s=NEWER.upgrade_deadline_s).stage is Stage.FAILED


@pytest.mark.parametrize(
    ("serving", "seconds"),
    [
        pytest.param({"startupSeconds": 60}, 2400, id="the chart's is the least"),
        pytest.param({"startupSeconds": 5400}, 6000, id="a large model"),
    ],
)
def test_pods_that_may_load_longer_have_longer_to_come_back(serving: dict[str, Any], seconds: int) -> None:
    begun = replace(_begun(), speculator=speculator({"serving": serving}))
    assert _upgrade(begun, after_s=seconds - 1).stage is Stage.UPDATING
    assert _upgrade(begun, after_s=seconds).stage is Stage.FAILED


def _coming_up(*pods: tuple[float, float], replicas: int = 3, **more: Any) -> Observed:
    """An update under way, with pods that were created and became ready so many seconds after its begin."""
    made = tuple(
        pod(f"qwen-serving-{number}", is_ready=True, created_s=NOW_S + created_s, ready_s=NOW_S + ready_s)
        for number, (created_s, ready_s) in enumerate(pods, start=2)
    )
    begun = _begun(**more)
    return replace(begun, pods=(*ready_pods(), *made), speculator=speculator({"serving": {"replicas": replicas}}))


EACH_S = NEWER.upgrade_deadline_s


def test_the_deadline_starts_again_after_each_new_pod() -> None:
    later = _coming_up((5, EACH_S - 1))
    assert _upgrade(later, after_s=2 * EACH_S - 2).stage is Stage.UPDATING
    assert _upgrade(later, after_s=2 * EACH_S - 1).stage is Stage.FAILED


def test_a_former_pod_that_is_ready_again_moves_no_deadline() -> None:
    assert _upgrade(_coming_up((-3600, EACH_S - 1)), after_s=EACH_S).stage is Stage.FAILED


def test_a_pod_that_comes_and_goes_does_not_move_the_deadline_without_end() -> None:
    assert _upgrade(_coming_up((5, 4 * EACH_S - 1)), after_s=4 * EACH_S - 1).stage is Stage.UPDATING
    assert _upgrade(_coming_up((5, 4 * EACH_S - 1)), after_s=4 * EACH_S).stage is Stage.FAILED


def test_fewer_pods_make_no_update_late_that_goes_well() -> None:
    smaller = _coming_up((5, 5 * EACH_S), replicas=2)
    turn = smaller.children[SERVING].turn.replace(" 1,", " 10,")
    children = {at: replace(child, turn=turn) if child.turn else child for at, child in smaller.children.items()}
    assert _upgrade(replace(smaller, children=children), after_s=5 * EACH_S + 60).stage is Stage.UPDATING


def test_the_deadline_is_the_charts_also_when_kubernetes_gives_up_earlier() -> None:
    given_up = {
        **STALE,
        "conditions": [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}],
    }
    longer = _coming_up((5, 6000), config=replace(NEWER, upgrade_deadline_s=7200.0))
    deployment = replace(longer.children[SERVING], status=given_up)
    waiting = replace(longer, children={**longer.children, SERVING: deployment})
    assert _upgrade(waiting, after_s=6000 + 2500).stage is Stage.UPDATING


def test_a_pod_that_comes_up_after_the_deadline_ends_no_failure() -> None:
    failed = _plan(_coming_up(), after_s=EACH_S).status
    later = _coming_up((EACH_S, EACH_S + 60))
    assert _upgrade(later, after_s=EACH_S + 90).stage is Stage.UPDATING
    told = replace(later, speculator=speculator({"serving": {"replicas": 3}}, status=failed))
    assert _upgrade(told, after_s=EACH_S + 90).stage is Stage.FAILED


def test_a_pull_that_fails_once_ends_a_failure_also_after_the_first_deadline() -> None:
    going_well = _coming_up((5, EACH_S), replicas=1)
    failing = replace(going_well, pods=(*going_well.pods, pod(problem=("ImagePullBackOff", "no answer"))))
    failed = _plan(failing, after_s=1.5 * EACH_S).status
    assert _upgrade(failing, after_s=1.5 * EACH_S).stage is Stage.FAILED
    told = replace(going_well, speculator=speculator(status=failed))
    assert _upgrade(told, after_s=1.5 * EACH_S + 20).stage is Stage.UPDATING


def _after_a_refusal(**more: Any) -> tuple[Observed, Refusal]:
    """The turn's first plan was applied, except for the trainer, which was refused."""
    before = replace(_waiting(), has_turn=True, **more)
    wanted = {ref(content): content for content in _plan(before).apply}
    digest = wanted[TRAINER]["metadata"]["annotations"][names.APPLIED]
    refusal = Refusal(ref=TRAINER, digest=digest, reason="QuotaExceeded", message="full")
    made = {at: as_child(content, status=STALE) for at, content in wanted.items() if at != TRAINER}
    return replace(before, children={**before.children, **made}, refusals=(refusal,)), refusal


def test_an_update_under_way_writes_nothing_again_and_keeps_its_deadline() -> None:
    partly, _ = _after_a_refusal()
    for after_s in (1.0, 60.0, NEWER.upgrade_deadline_s - 1):
        plan = _plan(partly, after_s=after_s)
        assert plan.apply == ()
        assert plan.upgrade is not None
        assert (plan.upgrade.stage, len(plan.upgrade.held)) == (Stage.UPDATING, 1)
    late = _plan(partly, after_s=NEWER.upgrade_deadline_s)
    assert late.apply == ()
    assert late.upgrade is not None
    assert late.upgrade.stage is Stage.FAILED


def test_a_workload_that_was_refused_gets_the_same_turn_when_it_is_tried_again() -> None:
    partly, _ = _after_a_refusal()
    again = {ref(content): content for content in _plan(replace(partly, refusals=()), after_s=300.0).apply}
    assert set(again) == {TRAINER}
    assert as_child(again[TRAINER]).turn == partly.children[SERVING].turn


def test_an_update_that_is_refused_again_is_not_recorded_as_one_that_ended() -> None:
    partly, refusal = _after_a_refusal()
    back = _replaced(partly)
    ended = _plan(back).status
    again = replace(back, speculator=speculator(status=ended), refusals=())
    wanted = {ref(content): content for content in _plan(again, after_s=300.0).apply}
    assert set(wanted) == {TRAINER}
    digest = wanted[TRAINER]["metadata"]["annotations"][names.APPLIED]
    refused = replace(again, refusals=(replace(refusal, digest=digest),))
    assert _upgrade(refused, after_s=301.0).ended is None


def test_a_workload_that_did_not_wait_gets_the_turn_once_another_has_it() -> None:
    ended = _written(_replaced(_begun()))
    images = replace(NEWER.images, inference="inference:3")
    begun = replace(ended, config=replace(NEWER, images=images, runtime="3"), has_turn=True)
    turns = []
    for _ in range(2):
        made = {ref(content): as_child(content, status=STALE) for content in _plan(begun, after_s=60.0).apply}
        begun = replace(begun, children={**begun.children, **made})
        turns.append([begun.children[at].turn for at in (SERVING, TRAINER)])
    new = f"[{NOW_S + 60.0}, 1, true]"
    assert turns == [[new, ended.children[TRAINER].turn], [new, new]]
    assert _plan(begun, after_s=61.0).apply == ()


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        pytest.param(["kueue.x-k8s.io/admission"], "", id="Kueue"),
        pytest.param(["example.com/gate"], "", id="another gate"),
        pytest.param([], "0/3 nodes are available: 3 cannot allocate all claims", id="DRA"),
        pytest.param([], "0/3 nodes are available: 3 Insufficient nvidia.com/gpu", id="GPU"),
        pytest.param([], "0/3 nodes are available: 3 Insufficient cpu", id="node"),
    ],
)
def test_a_new_pod_that_waits_for_a_place_has_not_failed_yet(gates: list[str], says: str) -> None:
    body = {
        "metadata": {"name": "qwen-serving-2", "labels": {"app.kubernetes.io/component": "serving"}},
        "spec": {"schedulingGates": [{"name": gate} for gate in gates]},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": says}]},
    }
    waiting = PodState.of(body)
    assert (waiting.part, waiting.problem is None) == ("serving", False)
    assert _upgrade(_begun(pods=(waiting,))).stage is Stage.UPDATING


def test_pods_that_failed_before_do_not_fail_an_update() -> None:
    pods = tuple(pod(f"qwen-serving-{number}", is_ready=number > 1) for number in range(20))
    broken = (*(replace(each, problem=pod(problem=("OOMKilled", "x")).problem) for each in pods[:2]), *pods[2:])
    begun = replace(_begun(), speculator=speculator({"serving": {"replicas": 20}}))
    turn = begun.children[SERVING].turn.replace(" 1,", " 18,")
    children = {**begun.children, SERVING: replace(begun.children[SERVING], turn=turn)}
    assert _upgrade(replace(begun, pods=broken, children=children)).stage is Stage.UPDATING


def test_a_failure_is_told_as_a_warning_and_may_be_skipped() -> None:
    failing = _begun(pods=(pod(problem=("ImagePullBackOff", "no such image")),))
    told = _written(_begun())
    plan = _plan(replace(failing, speculator=told.speculator))
    assert [event.is_warning for event in plan.events if event.reason == "UpdateFailed"] == [True]
    skipped = speculator(annotations={"updraft.dev/skip-upgrade": "2"})
    assert _upgrade(replace(failing, speculator=skipped)).stage is Stage.SKIPPED


def test_a_skipped_resource_still_gets_a_template_that_is_mended_in_the_operator() -> None:
    failing = _begun(pods=(pod(problem=("ImagePullBackOff", "no such image")),))
    mended = replace(
        failing,
        config=replace(NEWER, images=replace(NEWER.images, inference="inference:3")),
        speculator=speculator(annotations={"updraft.dev/skip-upgrade": "2"}),
        has_turn=True,
    )
    assert _upgrade(mended).stage is Stage.SKIPPED
    assert SERVING in {ref(content) for content in _plan(mended).apply}


def test_a_workload_of_a_failed_update_that_is_deleted_ends_no_failure() -> None:
    failing, late_s = _replaced(_begun(pods=())), NEWER.upgrade_deadline_s
    ending = {**failing.children, SERVING: replace(failing.children[SERVING], is_ending=True)}
    without = {at: child for at, child in failing.children.items() if at != SERVING}
    made = {ref(content): as_child(content) for content in _plan(replace(failing, children=without)).apply}
    assert set(made) == {SERVING}
    for children in (ending, without, {**without, **made}):
        assert _upgrade(replace(failing, children=children), after_s=late_s).stage is Stage.FAILED
    only_new = {**{at: replace(child, turn="") for at, child in without.items()}, **made}
    assert _upgrade(replace(failing, children=only_new), after_s=late_s).stage is Stage.FAILED


def test_a_failed_update_is_not_forgotten_when_all_its_workloads_are_deleted() -> None:
    late_s = NEWER.upgrade_deadline_s
    failed = _written(_begun(pods=()), after_s=late_s)
    emptied = replace(failed, children={at: child for at, child in failed.children.items() if not child.rendered})
    assert _upgrade(emptied, after_s=2 * late_s).stage is Stage.FAILED
    again = replace(emptied, has_turn=True)
    made = {ref(content): as_child(content, status=STALE) for content in _plan(again, after_s=2 * late_s).apply}
    made_again = replace(_written(again, after_s=2 * late_s), children={**again.children, **made})
    assert {made_again.children[at].turn for at in (SERVING, TRAINER)} == {made[SERVING].turn}
    assert made[SERVING].turn
    assert _upgrade(made_again, after_s=2 * late_s + 60).stage is Stage.FAILED
    back = replace(_replaced(made_again), pods=ready_pods())
    assert (_upgrade(back, after_s=2 * late_s + 120).stage) is Stage.CURRENT
    ended = _written(back, after_s=2 * late_s + 120)
    without = replace(ended, children=emptied.children, pods=())
    assert _upgrade(without, after_s=2 * late_s + 180).stage is Stage.CURRENT, "a failure that is over stays over"


def _emptied(**more: Any) -> Observed:
    """A failed update whose workloads are all deleted."""
    failed = _written(_begun(pods=()), after_s=EACH_S)
    return replace(failed, children={at: one for at, one in failed.children.items() if not one.rendered}, **more)


def test_a_failed_update_that_is_lost_asks_only_that_clients_are_served() -> None:
    again = _emptied(has_turn=True)
    made = {ref(content): as_child(content, status=STALE) for content in _plan(again, after_s=2 * EACH_S).apply}
    waits = pod("qwen-trainer-1", "trainer", problem=("InsufficientGPU", "no GPU"))
    serving = tuple(each for each in ready_pods() if each.part != "trainer")
    back = replace(_replaced(replace(again, children={**again.children, **made})), pods=(*serving, waits))
    assert _upgrade(back, after_s=2 * EACH_S + 60).stage is Stage.CURRENT


def test_another_operator_does_not_say_that_its_pods_do_not_come_back_before_it_has_made_them() -> None:
    another = _emptied(config=replace(NEWER, runtime="3"), has_turn=True)
    assert _upgrade(another, after_s=2 * EACH_S).stage is not Stage.FAILED


def test_a_workload_that_is_being_deleted_is_not_back() -> None:
    back = _replaced(_begun())
    ending = {**back.children, SERVING: replace(back.children[SERVING], is_ending=True)}
    assert _upgrade(replace(back, children=ending)).stage is Stage.UPDATING


@pytest.mark.parametrize("at", [Ref("StatefulSet", "qwen-registry"), Ref("Deployment", "qwen-trainer")])
def test_a_part_without_a_pod_is_not_back(at: Ref) -> None:
    back = _replaced(_begun())
    status = {"observedGeneration": 1, "replicas": 0, "updatedReplicas": 0}
    refused = {**back.children, at: replace(back.children[at], status=status)}
    assert _upgrade(replace(back, children=refused)).stage is Stage.UPDATING
    assert _upgrade(replace(back, children=refused), after_s=NEWER.upgrade_deadline_s).stage is Stage.FAILED


def test_a_failed_update_is_none_that_ended_well_when_nothing_is_to_run() -> None:
    failing = _begun(pods=(pod(problem=("ImagePullBackOff", "no such image")),))
    status = _plan(failing).status
    suspended = replace(_replaced(failing), pods=(), speculator=speculator({"suspend": True}, status=status))
    assert (_upgrade(suspended).stage, _upgrade(suspended).ended) == (Stage.FAILED, None)
    assert _upgrade(replace(suspended, config=replace(NEWER, runtime="3"))).stage is Stage.CURRENT


def test_an_update_that_a_clock_ahead_began_ends_once() -> None:
    ahead = f"[{NOW_S + 600}, 1, true]"
    begun = _begun()
    back = _replaced(replace(begun, children={at: replace(one, turn=ahead) for at, one in begun.children.items()}))
    assert _plan(_written(back), after_s=1.0).status is None
    failing = replace(_written(back), pods=(pod(problem=("OOMKilled", "too much")),))
    assert _upgrade(failing, after_s=3600.0).stage is Stage.CURRENT


def test_a_turn_far_ahead_is_none() -> None:
    settled_now = _replaced(_begun())
    forged = replace(settled_now.children[SERVING], turn="[9999999999, 1, true]")
    upgrade = _upgrade(_written(replace(settled_now, children={**settled_now.children, SERVING: forged})))
    assert (upgrade.stage, upgrade.ended) == (Stage.CURRENT, None)


def test_a_wrong_window_is_told_before_anything_waits_for_it() -> None:
    upgrade = _upgrade(settled({"updatePolicy": {"windows": ["22:00-23:00 Europe/Berln"]}}, pods=ready_pods()))
    assert (upgrade.stage, upgrade.says.reason) == (Stage.CURRENT, "InvalidWindow")


def test_a_refused_update_that_is_tried_again_does_not_tell_it_again() -> None:
    refused = replace(_waiting(), refusals=(Refusal(ref=SERVING, digest="x", reason="QuotaExceeded", message="full"),))
    status = _plan(refused).status
    again = replace(refused, refusals=(), speculator=speculator(status=status))
    assert _upgrade(again).stage is Stage.READY
    assert _plan(again).events == ()
    assert "full" in _upgrade(again).says.message


def test_a_rollback_of_the_operator_brings_a_failed_resource_back_at_once() -> None:
    failing = _begun(pods=(pod(problem=("ImagePullBackOff", "no such image")),))
    older = replace(failing, config=replace(NEWER, images=settled().config.images, runtime="dev"))
    assert SERVING in {ref(content) for content in _plan(older).apply}


def test_an_operator_that_was_killed_within_an_update_is_followed_by_one_that_completes_it() -> None:
    before = replace(_waiting(), has_turn=True)
    first = next(content for content in _plan(before).apply if "template" in content.get("spec", {}))
    partly = replace(before, children={**before.children, ref(first): as_child(first, status=STALE)})
    rest = {ref(content) for content in _plan(partly).apply if "template" in content.get("spec", {})}
    assert len(rest) == 2
    assert ref(first) not in rest


def test_the_status_names_both_runtimes() -> None:
    status = _plan(_waiting()).status
    assert status is not None
    assert status["runtime"] == {"current": "dev", "available": "2"}
    ended = _plan(_replaced(_begun())).status
    assert ended is not None
    assert ended["runtime"] == {"current": "2", "available": "2", "lastUpdateTime": f"{NOW:%Y-%m-%dT%H:%M:%SZ}"}


def test_a_world_without_turns_is_up_to_date() -> None:
    assert _upgrade(settled()).stage is Stage.CURRENT
    assert objects(settled())
