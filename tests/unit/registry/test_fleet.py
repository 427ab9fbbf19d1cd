"""The fleet in memory: last reports, streams, expiry."""

from typing import Any

import pytest
from tests.support.checkpoints import OTHER_TARGET, TARGET

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.access import Caller, Grant, Role
from updraft_chassis.errors import InvalidInput, NotFound, Unavailable
from updraft_registry.fleet import Fleet, Session
from updraft_registry.messages import reports, wire
from updraft_registry.messages.reports import Report, Swaps
from updraft_registry.rollout.placement import Directive, Pod
from updraft_rollouts.terms import Phase

ORDER = Directive(serve=2, digest="sha256:2", prefetch=(2,), phase=Phase.STABLE, reason="it won")
NONCE = wire.directive_to_proto(ORDER).nonce


def report(pod: str = "pod-0", **fields: Any) -> Report:
    return reports.read(pod_report(pod, **fields))


def pod_report(
    pod: str = "pod-0",
    *,
    loaded: int = 0,
    nonce: str = "",
    outcome: fleet_pb2.Outcome.ValueType = fleet_pb2.OUTCOME_UNSPECIFIED,
    steps: int = 0,
    target: str = TARGET,
    boot: str = "1",
    swaps: fleet_pb2.SwapCounters | None = None,
    draining: bool = False,
) -> fleet_pb2.PodReport:
    return fleet_pb2.PodReport(
        identity=fleet_pb2.PodIdentity(speculator="default", pod=pod, target_fingerprint=target, boot_id=boot),
        loaded=fleet_pb2.Loaded(version=loaded, tensors_digest=f"sha256:{loaded}" if loaded else ""),
        status=fleet_pb2.DirectiveStatus(nonce=nonce, outcome=outcome, version=2, reason="not finite"),
        versions=[fleet_pb2.VersionCounters(version=loaded, verify_steps=steps)] if steps else [],
        swaps=swaps,
        draining=draining,
    )


async def told(session: Session) -> fleet_pb2.Directive:
    """The directive that is due."""
    assert session.is_due
    return await anext(session.directives())


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(expiry_s=45.0)


def test_a_new_pod_and_a_new_load_matter_and_mere_counters_do_not(fleet: Fleet) -> None:
    session = Session()
    assert fleet.report(session, report(), 0.0).is_change
    assert not fleet.report(session, report(steps=5), 1.0).is_change
    assert fleet.report(session, report(loaded=2), 2.0).is_change
    assert not fleet.report(session, report(loaded=2, steps=5), 3.0).is_change
    assert fleet.pods("default") == (Pod(name="pod-0", boot="1", loaded=2, tensors_digest="sha256:2"),)
    assert fleet.pods("default")[0].traffic[2].verify_steps == 5
    assert fleet.report(session, report(loaded=2, boot="2"), 4.0).is_change
    assert fleet.report(session, report(loaded=2, boot="2", draining=True), 5.0).is_change


def test_a_pod_whose_stream_is_broken_cannot_be_told_anything_until_it_is_back(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(), 0.0)
    fleet.disconnect(session)
    assert [pod.is_connected for pod in fleet.pods("default")] == [False]
    fleet.report(Session(), report(), 1.0)
    assert [pod.is_connected for pod in fleet.pods("default")] == [True]


def test_a_pod_that_captures_nothing_says_why_for_as_long_as_it_is_there(fleet: Fleet) -> None:
    session, broken = Session(), pod_report("pod-1")
    broken.capture.problem = "the hook did not bind\n"
    broken.capture.too_small = "the queue"
    fleet.report(Session(), report(), 0.0)
    assert fleet.capture_problem("default") == ""
    fleet.report(session, reports.read(broken), 0.0)
    assert fleet.capture_problem("default") == "pod-1: the hook did not bind "
    assert fleet.capture_too_small("default") == "pod-1: the queue"
    fleet.disconnect(session)
    assert fleet.capture_problem("default") == ""


def test_what_speculation_is_worth_is_the_mean_of_the_connected_pods_that_know(fleet: Fleet) -> None:
    sessions = [Session(), Session(), Session()]
    reports_of = [pod_report(f"pod-{n}") for n in range(3)]
    reports_of[0].speedup.CopyFrom(pb.Speedup(ratio=1.2, low=1.1, high=1.3))
    reports_of[1].speedup.CopyFrom(pb.Speedup(ratio=1.4, low=1.3, high=1.5))
    assert fleet.speedup("default") is None
    for session, one in zip(sessions, reports_of, strict=True):
        fleet.report(session, reports.read(one), 0.0)
    speedup = fleet.speedup("default")
    assert speedup is not None
    assert (speedup.ratio, speedup.low, speedup.high) == pytest.approx((1.3, 1.3 - 0.05 * 2**0.5, 1.3 + 0.05 * 2**0.5))
    fleet.disconnect(sessions[0])
    speedup = fleet.speedup("default")
    assert speedup is not None
    assert (speedup.ratio, speedup.low, speedup.high) == pytest.approx((1.4, 1.3, 1.5))


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_speedup_that_cannot_be_is_refused(ratio: float) -> None:
    broken = pod_report()
    broken.speedup.ratio = ratio
    with pytest.raises(InvalidInput, match="a speedup of"):
        reports.read(broken)


def test_swaps_and_their_pauses_are_told_once(fleet: Fleet) -> None:
    session = Session()
    counted = fleet_pb2.SwapCounters(swaps=3, failures=1, pause_us_sum=9_000)
    assert fleet.report(session, report(swaps=counted), 0.0).swaps == Swaps(), "what was before is not known"
    counted.swaps, counted.pause_us_sum = 4, 11_000
    swaps = fleet.report(session, report(swaps=counted), 1.0).swaps
    assert (swaps.swapped, swaps.refused, round(swaps.pause_s, 6)) == (1, 0, 0.002)
    assert fleet.report(session, report(swaps=counted), 2.0).swaps == Swaps()
    anew = fleet_pb2.SwapCounters(swaps=1, pause_us_sum=500)
    assert fleet.report(session, report(swaps=anew, boot="2"), 3.0).swaps == Swaps(swapped=1, pause_s=0.0005)


def test_a_refusal_is_read_from_a_nack_only(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(outcome=fleet_pb2.OUTCOME_PENDING), 0.0)
    assert fleet.pods("default")[0].refused == 0
    assert fleet.report(session, report(outcome=fleet_pb2.OUTCOME_NACK), 1.0).is_change
    assert (fleet.pods("default")[0].refused, fleet.pods("default")[0].refusal) == (2, "not finite")


def test_a_pod_that_has_started_anew_since_it_was_looked_at_hears_no_order_that_may_have_killed_it(
    fleet: Fleet,
) -> None:
    session = Session()
    fleet.report(Session(), report(boot="1"), 0.0)
    observed_pods = fleet.pods("default")
    fleet.report(session, report(boot="2"), 1.0)
    fleet.send("default", {"pod-0": ORDER}, observed_pods)
    assert not session.is_due
    fleet.send("default", {"pod-0": ORDER}, fleet.pods("default"))
    assert session.is_due


async def test_a_directive_is_sent_once_and_again_to_a_pod_that_speaks_of_another(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(), 0.0)
    fleet.send("default", {"pod-0": ORDER}, fleet.pods("default"))
    assert (await told(session)).nonce == NONCE
    fleet.send("default", {"pod-0": ORDER}, fleet.pods("default"))
    assert not session.is_due
    fleet.report(session, report(nonce=NONCE), 1.0)
    assert not session.is_due
    fleet.report(session, report(nonce="older"), 2.0)
    assert (await told(session)).nonce == NONCE


async def test_a_slow_pod_hears_only_the_newest_directive(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(), 0.0)
    fleet.send("default", {"pod-0": Directive(reason="old")}, fleet.pods("default"))
    fleet.send("default", {"pod-0": ORDER}, fleet.pods("default"))
    assert (await told(session)).serve_version == 2
    assert not session.is_due


def test_a_newer_stream_of_a_pod_takes_over(fleet: Fleet) -> None:
    old, new = Session(), Session()
    fleet.report(old, report(loaded=2), 0.0)
    assert fleet.report(new, report(loaded=2), 1.0).is_change
    with pytest.raises(Unavailable, match="a newer stream of the same pod took over"):
        old.check()
    fleet.disconnect(old)
    assert fleet.count("default", 2).connected == 1


def test_what_an_ended_stream_has_left_unread_is_not_heard_over_what_the_newer_one_says(fleet: Fleet) -> None:
    old, new = Session(), Session()
    fleet.report(old, report(boot="1"), 0.0)
    fleet.report(new, report(boot="2", loaded=2), 1.0)
    assert not fleet.report(old, report(boot="1", steps=5), 2.0).is_change
    assert fleet.pods("default") == (Pod(name="pod-0", boot="2", loaded=2, tensors_digest="sha256:2"),)
    assert not new.is_closed


def test_a_stream_belongs_to_one_pod(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report("pod-0"), 0.0)
    with pytest.raises(InvalidInput, match="this stream belongs to pod"):
        fleet.report(session, report("pod-1"), 1.0)


def test_a_broken_stream_disconnects_and_the_pod_is_known_until_it_expires(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(loaded=2), 0.0)
    fleet.disconnect(session)
    assert fleet.count("default", 2).connected == 0
    assert fleet.in_use("default") == {2}
    assert fleet.expire(45.0) == frozenset()
    assert fleet.expire(45.1) == {"default"}
    assert fleet.pods("default") == ()


def test_a_silent_pod_with_an_open_stream_is_told_to_come_back(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(), 0.0)
    fleet.expire(100.0)
    with pytest.raises(Unavailable, match="no report for 45 s"):
        session.check()


def test_a_pod_of_another_target_is_refused(fleet: Fleet) -> None:
    ours, theirs = Session(), Session()
    fleet.report(ours, report("ours"), 0.0)
    fleet.report(theirs, report("theirs", target=OTHER_TARGET), 0.0)
    fleet.refuse_foreign("default", "")
    fleet.refuse_foreign("default", TARGET)
    ours.check()
    with pytest.raises(InvalidInput, match=f"pod theirs cannot serve default: its target is {OTHER_TARGET}"):
        theirs.check()
    assert [pod.name for pod in fleet.pods("default")] == ["ours"]


def test_pods_are_counted_by_what_they_serve_and_not_while_they_drain(fleet: Fleet) -> None:
    ack, nack = fleet_pb2.OUTCOME_ACK, fleet_pb2.OUTCOME_NACK
    for i, (loaded, outcome) in enumerate([(2, ack), (2, ack), (1, nack), (3, ack)]):
        fleet.report(Session(), report(f"pod-{i}", loaded=loaded, outcome=outcome), 0.0)
    fleet.report(Session(), report("leaving", loaded=2, draining=True), 0.0)
    pods = fleet.count("default", 2, 3)
    assert (pods.connected, pods.serving_stable, pods.serving_candidate, pods.failed) == (4, 2, 1, 1)
    assert fleet.count("default", 2).serving_candidate == 0


def test_only_pods_that_need_a_restart_for_what_should_serve_wait_for_one(fleet: Fleet) -> None:
    message = pod_report("pod-0", loaded=1, outcome=fleet_pb2.OUTCOME_PENDING)
    message.status.version = 2
    message.status.reason = "not yet: the disk is full"
    fleet.report(Session(), reports.read(message), 0.0)
    assert fleet.count("default", 2).waiting_for_restart == 0
    message.status.needs_restart = True
    fleet.report(Session(), reports.read(message), 0.0)
    assert fleet.count("default", 2, 3).waiting_for_restart == 1
    assert fleet.count("default", 0, 2).waiting_for_restart == 1
    assert fleet.count("default", 3, 2).waiting_for_restart == 0, "the stable version comes first"
    assert fleet.count("default", 0).waiting_for_restart == 0
    message.status.outcome = fleet_pb2.OUTCOME_ACK
    fleet.report(Session(), reports.read(message), 0.0)
    assert fleet.count("default", 2).waiting_for_restart == 0


def test_what_a_pod_holds_or_has_ready_is_in_use_until_it_expires(fleet: Fleet) -> None:
    session = Session()
    ready = pod_report(loaded=2)
    ready.prefetched_versions.extend([3, 5])
    fleet.report(session, reports.read(ready), 0.0)
    fleet.disconnect(session)
    assert fleet.in_use("default") == {2, 3, 5}


def test_traffic_is_what_the_pods_say_now(fleet: Fleet) -> None:
    one, two = Session(), Session()
    fleet.report(one, report("one", loaded=2, steps=5), 0.0)
    fleet.report(one, report("one", loaded=2, steps=9), 1.0)
    fleet.report(two, report("two", loaded=2, steps=1), 1.0)
    assert [traffic.verify_steps for traffic in fleet.traffic("default")] == [10]


def test_closing_the_fleet_ends_every_stream(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(), 0.0)
    fleet.close()
    with pytest.raises(Unavailable, match="the registry is shutting down"):
        session.check()


def offered(pod: str, tokens: int, **fields: Any) -> Report:
    message = pod_report(pod, **fields)
    message.capture.offered_tokens = tokens
    return reports.read(message)


async def test_a_demand_is_handed_to_the_pods_by_their_traffic_with_their_directives(fleet: Fleet) -> None:
    sessions = {pod: Session() for pod in ("a", "b")}
    for at_s in range(0, 100, 2):
        fleet.report(sessions["a"], offered("a", 900 * at_s, nonce=NONCE), float(at_s))
        fleet.report(sessions["b"], offered("b", 100 * at_s, nonce=NONCE), float(at_s))
    fleet.send("default", dict.fromkeys(sessions, ORDER), fleet.pods("default"))
    assert not (await told(sessions["a"])).HasField("capture"), "no trainer has said anything yet"

    assert fleet.grant("default", 1000.0) == pytest.approx(1000.0)

    directives = {pod: await told(session) for pod, session in sessions.items()}
    grants = {pod: directive.capture.payload_tokens_per_second for pod, directive in directives.items()}
    assert grants == pytest.approx({"a": 860.0, "b": 140.0}, rel=0.01)
    assert {(d.serve_version, d.nonce) for d in directives.values()} == {(2, NONCE)}, "the same order as before"


async def test_of_pods_that_share_an_order_only_those_that_are_bound_get_the_salt_also_with_later_grants(
    fleet: Fleet,
) -> None:
    sessions = {
        "bound": Session(Caller(grants=frozenset({Grant(role=Role.SERVE, speculator="default")}))),
        "free": Session(Caller(grants=frozenset({Grant(role=Role.SERVE)}))),
    }
    for pod, session in sessions.items():
        fleet.report(session, report(pod, nonce=NONCE), 0.0)
    fleet.send("default", dict.fromkeys(sessions, ORDER), fleet.pods("default"), tenant_salt=b"salt")
    first = {pod: await told(session) for pod, session in sessions.items()}
    fleet.grant("default", 1000.0)
    later = {pod: await told(session) for pod, session in sessions.items()}

    for directives in (first, later):
        assert {pod: directive.tenant_salt for pod, directive in directives.items()} == {"bound": b"salt", "free": b""}
    assert {directive.capture.payload_tokens_per_second for directive in later.values()} == {500.0}


def test_a_grant_for_one_speculator_takes_nothing_from_one_for_all() -> None:
    caller = Caller(grants=frozenset({Grant(role=Role.SERVE), Grant(role=Role.SERVE, speculator="chat")}))
    assert caller.may_report_for("other")
    assert [caller.may_hash_tenants_of(name) for name in ("chat", "other")] == [True, False]


async def test_a_small_change_of_a_grant_is_not_sent(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(nonce=NONCE), 0.0)
    fleet.send("default", {"pod-0": ORDER}, fleet.pods("default"))
    fleet.grant("default", 1000.0)
    assert (await told(session)).capture.payload_tokens_per_second == 1000.0
    fleet.grant("default", 1040.0)
    assert not session.is_due
    fleet.grant("default", 1060.0)
    assert (await told(session)).capture.payload_tokens_per_second == 1060.0


async def test_what_pods_had_that_left_or_drain_goes_to_the_others_and_they_get_it_back(fleet: Fleet) -> None:
    sessions = [Session() for _ in range(3)]
    for n, session in enumerate(sessions):
        fleet.report(session, report(f"pod-{n}"), 0.0)
    fleet.grant("default", 900.0)
    assert [session.granted for session in sessions] == pytest.approx([300.0] * 3)
    fleet.disconnect(sessions[0])
    fleet.report(sessions[1], report("pod-1", draining=True), 1.0)
    assert fleet.grant("default", 900.0) == pytest.approx(900.0)
    assert sessions[2].granted == pytest.approx(900.0)
    assert fleet.granted("default") == pytest.approx(900.0), "as the metric"
    sessions[0] = Session()
    fleet.report(sessions[0], report("pod-0"), 2.0)
    fleet.grant("default", 900.0)
    assert (sessions[0].granted, sessions[2].granted) == pytest.approx((450.0, 450.0))


def test_a_pod_that_restarts_keeps_its_share_although_it_counts_from_zero(fleet: Fleet) -> None:
    sessions = [Session(), Session()]
    for at_s in range(0, 100, 2):
        fleet.report(sessions[0], offered("a", 1000 * at_s), float(at_s))
        fleet.report(sessions[1], offered("b", 1000 * at_s), float(at_s))
    sessions[0] = Session()
    fleet.report(sessions[0], offered("a", 5, boot="2"), 100.0)
    fleet.grant("default", 1000.0)
    assert sessions[0].granted == pytest.approx(500.0, rel=0.05)


def test_a_count_of_offered_tokens_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidInput, match="tokens were offered for capture"):
        offered("a", 2**60)


def test_a_pods_state_has_the_time_of_its_last_report_and_whether_it_has_a_stream(fleet: Fleet) -> None:
    session = Session()
    fleet.report(session, report(loaded=2, steps=5), 100.0)
    fleet.disconnect(session)
    (state,) = fleet.states("default", 103.5, 1_000_000, after="", size=10)
    assert (state.pod, state.loaded, state.connected) == ("pod-0", 2, False)
    assert state.last_report_unix_ms == 1_000_000 - 3_500
    assert fleet.state("default", "pod-0", 103.5, 0).traffic[0].verify_steps == 5
    with pytest.raises(NotFound, match="no pod pod-1; a pod is forgotten 45 s after its last report"):
        fleet.state("default", "pod-1", 103.5, 0)
