"""The rollout policy of a resource as the registry's message, and whether the registry follows it already."""

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api.rollout import Rollout


def policy(rollout: Rollout) -> pb.RolloutPolicy:
    """The policy that the registry should follow; the offline gate and the confidence stay the registry's own."""
    analysis = rollout.analysis
    return pb.RolloutPolicy(
        strategy=rollout.strategy.to_proto(),
        steps=[
            pb.RolloutStep(pods_percent=step.pods_percent, hold_seconds=step.hold_seconds) for step in rollout.steps
        ],
        analysis=pb.Analysis(
            interval_seconds=analysis.interval_seconds,
            min_samples=analysis.min_samples,
            failure_limit=analysis.failure_limit,
            max_acceptance_regression_percent=analysis.max_acceptance_regression_percent,
            max_latency_regression_percent=analysis.max_latency_regression_percent,
            on_inconclusive=analysis.on_inconclusive.to_proto(),
            dry_run=analysis.dry_run,
            comparison=analysis.comparison.to_proto(),
            switchback_seconds=analysis.switchback_seconds,
        ),
        auto_rollback=rollout.auto_rollback,
        progress_deadline_seconds=rollout.progress_deadline_seconds,
        max_pods_swapping=rollout.max_pods_swapping,
        revision_history_limit=rollout.revision_history_limit,
    )


def is_followed(desired: pb.RolloutPolicy, effective: pb.RolloutPolicy) -> bool:
    """Whether the effective policy matches the desired one in every field that the desired one sets."""
    both = pb.RolloutPolicy()
    both.CopyFrom(effective)
    if desired.steps:
        both.ClearField("steps")
    both.MergeFrom(desired)
    both.analysis.comparison = desired.analysis.comparison  # 0 is a setting too: the registry chooses
    return both == effective
