"""How new drafts roll out: the part of a spec that the registry follows, and that never restarts a pod."""

from typing import Annotated, Final, Literal

from pydantic import ConfigDict, Field

from updraft_operator.api.schema import Count, Model, Percent, Positive, Seconds, rules
from updraft_rollouts.policy import DEFAULT, MAX_SECONDS, MIN_SWITCHBACK_SECONDS
from updraft_rollouts.terms import Comparison, OnInconclusive, Strategy


class Step(Model):
    """A share of the pods, and the minimum time for which it serves the candidate."""

    pods_percent: Annotated[int, Field(ge=1, le=100)]
    """Percentage of the pods that serve the candidate, rounded up."""
    hold_seconds: Seconds = DEFAULT.steps[0].hold_seconds
    """Minimum time before the next step."""


class Analysis(Model):
    """Criteria of the live gate."""

    interval_seconds: Annotated[int, Field(ge=1, le=86_400)] = DEFAULT.analysis.interval_seconds
    """Minimum length of a slice, which is one comparison of the candidate with the stable version."""
    min_samples: Positive = DEFAULT.analysis.min_samples
    """Requests that a candidate must serve before it can be promoted."""
    failure_limit: Count = DEFAULT.analysis.failure_limit
    """Number of errors and crashes that are tolerated."""
    max_acceptance_regression_percent: Percent = DEFAULT.analysis.max_acceptance_regression_percent
    """Roll back if the candidate's acceptance length is significantly lower by more than this."""
    max_domain_regression_percent: Percent = DEFAULT.analysis.max_domain_regression_percent
    """Roll back if the candidate's acceptance length in one domain is significantly lower by more than this."""
    max_latency_regression_percent: Percent = DEFAULT.analysis.max_latency_regression_percent
    """Roll back if the candidate's inter-token latency is significantly higher by more than this."""
    on_inconclusive: OnInconclusive = DEFAULT.analysis.on_inconclusive
    """Action at the deadline if there is no verdict."""
    dry_run: bool = DEFAULT.analysis.dry_run
    """Measure and report, but never decide: steps advance by time alone, and the last one promotes the candidate."""
    comparison: Comparison = DEFAULT.analysis.comparison
    """Pods: between pods at the same time; Switchback: all pods alternate between versions; Auto: Switchback with up to two
    pods, otherwise Pods."""
    switchback_seconds: Annotated[int, Field(ge=MIN_SWITCHBACK_SECONDS, le=3600)] = DEFAULT.analysis.switchback_seconds
    """How long the pods serve one version before they switch to the other."""


NO_DRAFT: Final = "NoDraft"

PinnedVersion = Annotated[
    Positive
    | Annotated[Literal["NoDraft"], Field(json_schema_extra={"pattern": f"^{NO_DRAFT}$", "maxLength": len(NO_DRAFT)})],
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
"""One field for both, so that a patch of it never leaves the other one behind."""


class Rollout(Model):
    """How new drafts roll out."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.strategy != 'Canary' || size(self.steps) > 0", "a canary needs at least one step"),
            (
                "self.steps.map(s, s.podsPercent).isSorted()",
                "steps[].podsPercent must not decrease",
            ),
            (
                "self.strategy != 'Canary' || self.steps.map(s, s.holdSeconds).sum() <= self.progressDeadlineSeconds",
                "progressDeadlineSeconds is less than the sum of holdSeconds of all steps",
            ),
        )
    )

    strategy: Strategy = DEFAULT.strategy
    """Canary: step by step; Immediate: on all pods once the offline gate passes; Manual: wait for promotedVersion."""
    paused: bool = False
    """Freeze the rollout at its current step. A candidate that fails is still rolled back."""
    pinned_version: PinnedVersion | None = None
    """Serve exactly this version now, without analysis, to roll back or forward, or NoDraft. Newer versions are held until the
    field is removed."""
    promoted_version: Positive | None = None
    """Promote this version now if it is waiting or in canary, for example with strategy Manual. Later versions roll out as
    usual."""
    steps: Annotated[list[Step], Field(max_length=10)] = [
        Step(pods_percent=step.pods_percent, hold_seconds=step.hold_seconds) for step in DEFAULT.steps
    ]
    """Steps of a canary. After the last one, the rollout waits for the verdict."""
    max_pods_swapping: Positive | None = None
    """Maximum number of pods that swap versions at the same time. Defaults to no limit."""
    analysis: Analysis = Analysis()
    auto_rollback: bool = DEFAULT.auto_rollback
    """Roll back a failed candidate. If false, a failed canary stays at its step until someone decides."""
    progress_deadline_seconds: Annotated[int, Field(ge=30, le=MAX_SECONDS)] = DEFAULT.progress_deadline_seconds
    """Deadline of a canary, excluding pauses."""
    revision_history_limit: Annotated[int, Field(ge=1, le=50)] = DEFAULT.revision_history_limit
    """Number of old versions whose weights are kept, besides versions in use, pinned or retained."""
    revision_history_megabytes: Positive | None = None
    """Maximum size of all kept weights in 10^6 bytes; versions in use, pinned or retained stay beyond it too. Defaults to no
    limit: old versions are deleted early only if the volume is full."""

    @property
    def pinned(self) -> int | None:
        """Number of the pinned version as the registry has it, where 0 is no draft. None: no pin."""
        return 0 if self.pinned_version == NO_DRAFT else self.pinned_version
