"""Protobuf and domain tell the same."""

from dataclasses import replace

import pytest
from tests.support.checkpoints import draft, evaluation
from tests.support.rollouts import STEPS, World
from tests.support.versions import NOW_MS

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput
from updraft_registry.messages import wire
from updraft_registry.rollout.decision import explain
from updraft_registry.rollout.gate.live import DomainEstimate
from updraft_registry.rollout.placement import Directive, Switchback
from updraft_rollouts.policy import Analysis, OfflineGate, RolloutPolicy, RolloutStep
from updraft_rollouts.terms import Comparison, OnInconclusive, Phase, Source, Strategy


def test_a_manifest_becomes_a_pending_version_with_its_evaluation() -> None:
    manifest = draft().manifest(
        source=pb.SOURCE_TRAINER, parent_version=2, evaluation=evaluation(baseline=2, num_samples=3)
    )
    pending = wire.pending(manifest, 3, NOW_MS)
    assert (pending.number, pending.phase, pending.source) == (3, Phase.PENDING, Source.TRAINER)
    assert pending.reason == "published (Trainer, trained from version 2)"
    assert pending.evaluation is not None
    assert pending.evaluation.baseline_version == 2
    assert [s.trace_id for s in pending.evaluation.samples] == ["trace-0", "trace-1", "trace-2"]


@pytest.mark.parametrize("phase", list(Phase))
def test_a_version_survives_its_document(phase: Phase) -> None:
    message = wire.version_to_proto(wire.pending(draft().manifest(), 3, NOW_MS), draft().manifest())
    message.phase = phase.to_proto()
    version = wire.version_from_proto(message)
    assert version.phase is phase
    assert wire.version_to_proto(version, message.manifest) == message


def test_a_table_row_comes_without_what_a_table_does_not_show() -> None:
    manifest = draft().manifest(evaluation=evaluation())
    message = wire.version_to_proto(wire.pending(manifest, 1, NOW_MS), manifest, is_full=False)
    assert not message.manifest.tensors
    assert message.manifest.config_json == manifest.config_json, "the operator compares the sizes of drafts"
    assert not message.manifest.evaluation.samples
    assert message.manifest.digest == manifest.digest
    assert manifest.tensors, "the original keeps them"


DEFAULTS = RolloutPolicy(
    strategy=Strategy.MANUAL,
    steps=(RolloutStep(pods_percent=20, hold_seconds=30),),
    analysis=Analysis(
        interval_seconds=11,
        min_samples=12,
        failure_limit=13,
        max_acceptance_regression_percent=14,
        max_latency_regression_percent=15,
        max_domain_regression_percent=18,
        on_inconclusive=OnInconclusive.PAUSE,
        confidence=0.9,
        comparison=Comparison.SWITCHBACK,
        switchback_seconds=16,
    ),
    auto_rollback=False,
    progress_deadline_seconds=500,
    max_pods_swapping=17,
    offline_gate=OfflineGate(min_samples=5, min_gain_percent=3.0, confidence=0.7),
    revision_history_limit=7,
    revision_history_megabytes=21_000,
)


def test_a_version_whose_weights_are_gone_says_so() -> None:
    manifest = draft().manifest()
    kept = wire.pending(manifest, 3, NOW_MS)
    assert not wire.version_to_proto(kept, manifest).pruned
    assert wire.version_to_proto(replace(kept, is_kept=False), manifest).pruned


def test_a_policy_left_open_is_the_registrys_own() -> None:
    assert RolloutPolicy.from_proto(pb.RolloutPolicy(), DEFAULTS) == DEFAULTS
    assert (
        RolloutPolicy.from_proto(pb.RolloutPolicy(analysis=pb.Analysis(), offline_gate=pb.OfflineGate()), DEFAULTS)
        == DEFAULTS
    )


@pytest.mark.parametrize("policy", [DEFAULTS, RolloutPolicy(), RolloutPolicy(analysis=Analysis(dry_run=True))])
def test_a_policy_that_is_told_and_set_again_is_the_same(policy: RolloutPolicy) -> None:
    assert RolloutPolicy.from_proto(policy.to_proto(), RolloutPolicy()) == policy


def test_where_zero_is_a_value_it_is_one() -> None:
    zeros = pb.Analysis(
        failure_limit=0,
        max_acceptance_regression_percent=0,
        max_latency_regression_percent=0,
        max_domain_regression_percent=0,
        dry_run=False,
    )
    document = pb.RolloutPolicy(analysis=zeros, offline_gate=pb.OfflineGate(min_gain_percent=0.0), max_pods_swapping=0)
    defaults = replace(DEFAULTS, analysis=replace(DEFAULTS.analysis, dry_run=True))
    policy = RolloutPolicy.from_proto(document, defaults)
    assert policy.max_pods_swapping == 0
    assert not policy.analysis.dry_run
    assert RolloutPolicy.from_proto(pb.RolloutPolicy(), defaults).analysis.dry_run
    assert policy.analysis.failure_limit == 0
    assert policy.analysis.max_acceptance_regression_percent == policy.analysis.max_latency_regression_percent == 0
    assert policy.analysis.max_domain_regression_percent == 0
    assert policy.offline_gate == replace(DEFAULTS.offline_gate, min_gain_percent=0.0)


@pytest.mark.parametrize(
    ("document", "why"),
    [
        pytest.param(pb.RolloutPolicy(strategy=9), "strategy is 9, expected one of CANARY", id="strategy"),  # type: ignore[arg-type] # none
        pytest.param(
            pb.RolloutPolicy(analysis=pb.Analysis(on_inconclusive=9)),  # type: ignore[arg-type] # no such value
            "analysis.on_inconclusive is 9",
            id="on inconclusive",
        ),
        pytest.param(
            pb.RolloutPolicy(analysis=pb.Analysis(comparison=9)),  # type: ignore[arg-type] # no such value
            "analysis.comparison is 9",
            id="comparison",
        ),
        pytest.param(
            pb.RolloutPolicy(strategy=pb.STRATEGY_CANARY, steps=[pb.RolloutStep(pods_percent=10, hold_seconds=501)]),
            "expected at least 501, which the steps hold in total",
            id="what no policy may be",
        ),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(document: pb.RolloutPolicy, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        RolloutPolicy.from_proto(document, DEFAULTS)


def test_the_same_order_has_the_same_nonce_and_another_has_another() -> None:
    order = Directive(serve=3, digest="sha256:3", prefetch=(3,), phase=Phase.STABLE, reason="it won")
    assert wire.directive_to_proto(order) == wire.directive_to_proto(order)
    assert wire.directive_to_proto(order).nonce != wire.directive_to_proto(Directive()).nonce
    assert (wire.directive_to_proto(order).serve_version, wire.directive_to_proto(order).serve_phase) == (
        3,
        pb.PHASE_STABLE,
    )


def test_pods_come_for_weights_over_a_time_that_grows_with_their_number() -> None:
    order = Directive(serve=3, digest="sha256:3", prefetch=(3,))
    few, many = wire.directive_to_proto(order, num_pods=2), wire.directive_to_proto(order, num_pods=1000)
    assert (few.prefetch_spread_ms, many.prefetch_spread_ms) == (10, 5000)
    assert few.nonce == many.nonce, "it is no other order because the fleet grew"


def test_a_switchback_is_part_of_the_order() -> None:
    plan = Switchback(versions=(3, 4), digests=("sha256:3", "sha256:4"), slice_s=20, start_ms=NOW_MS)
    order = Directive(serve=3, digest="sha256:3", prefetch=(3, 4))
    message = wire.directive_to_proto(replace(order, switchback=plan))
    assert message.switchback == fleet_pb2.Switchback(
        version_a=3, version_b=4, digest_a="sha256:3", digest_b="sha256:4", slice_seconds=20, start_unix_ms=NOW_MS
    )
    assert message.nonce != wire.directive_to_proto(order).nonce


def test_an_order_that_compares_is_another_one_because_pods_have_to_receive_it() -> None:
    order = Directive(serve=3, digest="sha256:3", prefetch=(3,))
    message = wire.directive_to_proto(replace(order, is_comparing=True))
    assert (message.comparing, wire.directive_to_proto(order).comparing) == (True, False)
    assert message.nonce != wire.directive_to_proto(order).nonce


def state(world: World) -> pb.SpeculatorState:
    message, canary_state = explain(world.speculator, list(world.pods.values()))
    return wire.state_to_proto(world.speculator, canary_state, message, pods=pb.Pods(), traffic=[])


def test_the_state_tells_how_far_a_canary_is() -> None:
    world = World(16, steps=STEPS)
    world.canary(gain_percent=5, failures=1)
    world.run(90)
    message = state(world)
    assert (message.stable, message.candidate, message.latest, message.step) == (1, 2, 2, 1)
    assert message.message == world.message
    rollout = message.rollout
    assert (rollout.candidate, rollout.baseline, rollout.comparison) == (2, 1, pb.COMPARISON_PODS)
    assert (rollout.step, rollout.steps, rollout.pods_percent) == (1, 2, 50)
    assert (rollout.started_unix_ms, rollout.step_since_unix_ms) == (NOW_MS, NOW_MS + 60_000)
    assert (rollout.verdict, rollout.candidate_requests, rollout.slices, rollout.failures) == (
        pb.VERDICT_PASS,
        600,
        12,
        1,
    )
    assert rollout.acceptance_length.change_percent == pytest.approx(5.0)
    assert rollout.acceptance_length.low_percent < 5.0 < rollout.acceptance_length.high_percent
    assert rollout.evidence.startswith("acceptance is significantly higher")


def test_the_state_has_the_evidence_of_each_domain_and_no_estimate_of_one_without_bounds() -> None:
    world = World(16)
    world.canary(gain_percent=5)
    world.run(90)
    _, canary_state = explain(world.speculator, list(world.pods.values()))
    assert canary_state is not None
    sure = canary_state.judgement.acceptance
    assert sure is not None
    domains = tuple(
        DomainEstimate(name=name, estimate=replace(sure, high_percent=high), num_slices=12)
        for name, high in (("sql", sure.high_percent), ("chat", float("inf")))
    )
    shown = replace(canary_state, judgement=replace(canary_state.judgement, domains=domains))
    rollout = wire.state_to_proto(world.speculator, shown, "", pods=pb.Pods(), traffic=[]).rollout
    sql, chat = rollout.domains
    assert (sql.domain, sql.acceptance_length) == ("sql", rollout.acceptance_length)
    assert (chat.domain, chat.HasField("acceptance_length")) == ("chat", False)


def test_the_state_has_no_estimate_without_bounds_and_no_rollout_without_a_canary() -> None:
    world = World(16)
    assert not state(world).HasField("rollout")
    world.canary(gain_percent=5, slices=1)
    assert not state(world).rollout.HasField("acceptance_length")


def test_the_state_tells_pins_and_pauses_with_their_reasons() -> None:
    world = World(16)
    world.desired(pinned=1, pin_reason="quiet", is_paused=True, pause_reason="lunch")
    message = state(world)
    assert (message.pinned, message.pin_reason, message.paused, message.pause_reason) == (1, "quiet", True, "lunch")
