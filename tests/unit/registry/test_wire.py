"""Protobuf and domain tell the same."""

import pytest
from tests.support.checkpoints import draft, evaluation
from tests.support.versions import NOW_MS

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry import wire
from updraft_registry.rollout import Order
from updraft_registry.version import GatePolicy, Phase, Policy, Source, Strategy


def test_a_manifest_becomes_a_pending_version_with_its_evaluation() -> None:
    manifest = draft().manifest(
        source=registry_pb2.SOURCE_TRAINER, parent_version=2, evaluation=evaluation(baseline=2, num_samples=3)
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
    message.phase = wire.phase_to_proto(phase)
    version = wire.version_from_proto(message)
    assert version.phase is phase
    assert wire.version_to_proto(version, message.manifest) == message


def test_a_table_row_comes_without_what_a_table_does_not_show() -> None:
    manifest = draft().manifest(evaluation=evaluation())
    message = wire.version_to_proto(wire.pending(manifest, 1, NOW_MS), manifest, is_full=False)
    assert not message.manifest.tensors
    assert not message.manifest.config_json
    assert not message.manifest.evaluation.samples
    assert message.manifest.digest == manifest.digest
    assert manifest.tensors, "the original keeps them"


DEFAULTS = Policy(gate=GatePolicy(min_samples=5), history_limit=7)


def test_a_policy_left_open_is_the_registrys_own() -> None:
    policy = wire.policy_from_proto(registry_pb2.RolloutPolicy(), DEFAULTS)
    assert policy == DEFAULTS
    told = wire.policy_to_proto(policy, registry_pb2.RolloutPolicy())
    assert told.strategy == registry_pb2.STRATEGY_IMMEDIATE
    assert (told.offline_gate.min_samples, told.revision_history_limit) == (5, 7)


def test_what_a_policy_says_beyond_this_registry_is_told_back_as_it_was_set() -> None:
    document = registry_pb2.RolloutPolicy(
        strategy=registry_pb2.STRATEGY_MANUAL,
        steps=[registry_pb2.RolloutStep(pods_percent=10, hold_seconds=60)],
        progress_deadline_seconds=900,
    )
    policy = wire.policy_from_proto(document, DEFAULTS)
    assert policy.strategy is Strategy.MANUAL
    told = wire.policy_to_proto(policy, document)
    assert (told.steps, told.progress_deadline_seconds) == (document.steps, 900)


@pytest.mark.parametrize(
    ("document", "why"),
    [
        pytest.param({"strategy": registry_pb2.STRATEGY_CANARY}, "no canaries yet", id="canary"),
        pytest.param({"strategy": 9}, "IMMEDIATE or MANUAL", id="unknown strategy"),
        pytest.param({"offline_gate": registry_pb2.OfflineGate(confidence=0.8)}, "min_samples is 0", id="no samples"),
        pytest.param(
            {"offline_gate": registry_pb2.OfflineGate(min_samples=2, confidence=1.0)}, "confidence is 1", id="certainty"
        ),
        pytest.param(
            {"offline_gate": registry_pb2.OfflineGate(min_samples=2, confidence=0.5, min_gain_percent=float("nan"))},
            "min_gain_percent is nan",
            id="nan",
        ),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(document: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        wire.policy_from_proto(registry_pb2.RolloutPolicy(**document), DEFAULTS)  # type: ignore[arg-type] # drawn


def test_the_same_order_has_the_same_nonce_and_another_has_another() -> None:
    order = Order(serve=3, digest="sha256:3", prefetch=(3,), phase=Phase.STABLE, reason="it won")
    assert wire.directive(order) == wire.directive(order)
    assert wire.directive(order).nonce != wire.directive(Order()).nonce
    assert (wire.directive(order).serve_version, wire.directive(order).serve_phase) == (3, registry_pb2.PHASE_STABLE)


def counters(version: int, steps: int, accepted: list[int]) -> fleet_pb2.VersionCounters:
    return fleet_pb2.VersionCounters(
        version=version, verify_steps=steps, tokens=2 * steps, proposed=3 * steps, accepted_by_position=accepted
    )


def test_traffic_is_summed_over_pods_by_version_newest_first() -> None:
    one = fleet_pb2.PodReport(versions=[counters(1, 10, [5]), counters(2, 4, [3, 1])])
    two = fleet_pb2.PodReport(versions=[counters(2, 6, [4, 2, 1])])
    newest, oldest = wire.sum_traffic([one, two])
    assert (newest.version, newest.verify_steps, newest.tokens, newest.proposed) == (2, 10, 20, 30)
    assert list(newest.accepted_by_position) == [7, 3, 1]
    assert (oldest.version, oldest.verify_steps) == (1, 10)
