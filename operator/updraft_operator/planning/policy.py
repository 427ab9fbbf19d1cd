"""The rollout policy of a resource as the registry's message, and whether the registry follows it already."""

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api.rollout import Rollout


def policy(rollout: Rollout) -> pb.RolloutPolicy:
    """The policy that the registry should follow; the offline gate and the confidence stay the registry's own."""
    fields = rollout.model_dump(include=set(pb.RolloutPolicy.DESCRIPTOR.fields_by_name))
    fields["strategy"] = rollout.strategy.to_proto()
    fields["analysis"]["on_inconclusive"] = rollout.analysis.on_inconclusive.to_proto()
    fields["analysis"]["comparison"] = rollout.analysis.comparison.to_proto()
    # Of the registry, 0 is no limit.
    fields["max_pods_swapping"] = rollout.max_pods_swapping or 0
    fields["revision_history_megabytes"] = rollout.revision_history_megabytes or 0
    return pb.RolloutPolicy(**fields)


def is_followed(desired: pb.RolloutPolicy, effective: pb.RolloutPolicy) -> bool:
    """Whether the effective policy matches the desired one in every field that the desired one sets."""
    both = pb.RolloutPolicy()
    both.CopyFrom(effective)
    if desired.steps:
        both.ClearField("steps")
    both.MergeFrom(desired)
    both.analysis.comparison = desired.analysis.comparison  # 0 is a setting too: the registry chooses
    return both == effective
