"""How a new draft comes to serve: the part of a spec that the registry follows, and that restarts no pod."""

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from updraft_operator.api.schema import Count, Model, Percent, Positive, Seconds, rules


class Strategy(StrEnum):
    """How what passed the offline gate comes to serve."""

    CANARY = "Canary"
    IMMEDIATE = "Immediate"
    MANUAL = "Manual"


class OnInconclusive(StrEnum):
    """What becomes of a canary without a verdict at its deadline."""

    PAUSE = "Pause"
    ROLLBACK = "Rollback"
    PROMOTE = "Promote"


class Comparison(StrEnum):
    """How candidate and stable version are measured beside each other."""

    AUTO = "Auto"
    PODS = "Pods"
    SWITCHBACK = "Switchback"


class Step(Model):
    """A part of the pods, and how long at least it serves the candidate."""

    pods_percent: Annotated[int, Field(ge=1, le=100)]
    """Part of the pods that serve the candidate, rounded up."""
    hold_seconds: Seconds = 120
    """Least time before the next step."""


class Analysis(Model):
    """What the live gate asks of a candidate."""

    interval_seconds: Annotated[int, Field(ge=1, le=86_400)] = 30
    """Least length of a slice, which is one observation of candidate against stable version."""
    min_samples: Positive = 200
    """Requests that a candidate must have served before it can win."""
    failure_limit: Count = 2
    """Errors and crashes that are tolerated."""
    max_acceptance_regression_percent: Percent = 2
    """Rolled back once acceptance length is surely down by more."""
    max_latency_regression_percent: Percent = 5
    """Rolled back once inter-token latency is surely up by more."""
    on_inconclusive: OnInconclusive = OnInconclusive.ROLLBACK
    """At the deadline without a verdict."""
    dry_run: bool = False
    """Measure and report, never decide: the steps run by time and end in a promotion."""
    comparison: Comparison = Comparison.AUTO
    """Auto: by switchback up to two pods, by pods beyond."""
    switchback_seconds: Annotated[int, Field(ge=2, le=3600)] = 20
    """One turn of a switchback."""


class Rollout(Model):
    """How a new draft comes to serve, or does not."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.strategy != 'Canary' || size(self.steps) > 0", "a canary needs at least one step"),
            (
                "self.steps.map(s, s.podsPercent).isSorted()",
                "steps[].podsPercent must not decrease",
            ),
            (
                "self.strategy != 'Canary' || self.steps.map(s, s.holdSeconds).sum() <= self.progressDeadlineSeconds",
                "progressDeadlineSeconds is less than all steps hold together",
            ),
        )
    )

    strategy: Strategy = Strategy.CANARY
    """Canary; Immediate: what passes the offline gate serves everyone at once; Manual: it waits for promotedVersion."""
    paused: bool = False
    """Freeze the rollout where it is; what fails is still rolled back."""
    pinned_version: Count | None = None
    """Serve exactly this version now, without analysis: roll back, or forward. 0: no draft. Newer ones are held until the
    field is removed."""
    promoted_version: Positive | None = None
    """Let this version win now, if it waits or is in canary: the answer to strategy Manual. Later versions are tried as
    usual."""
    steps: Annotated[list[Step], Field(max_length=10)] = [Step(pods_percent=10), Step(pods_percent=50)]
    """How a canary spreads; after the last one the verdict is awaited."""
    max_pods_swapping: Count = 0
    """Pods that may be on their way from one version to another at once; 0: all."""
    analysis: Analysis = Analysis()
    auto_rollback: bool = True
    """Off: a canary that failed stays where it is, for a person."""
    progress_deadline_seconds: Annotated[int, Field(ge=30, le=2_592_000)] = 900
    """Time that a canary has, without pauses."""
    revision_history_limit: Annotated[int, Field(ge=1, le=50)] = 10
    """Versions whose weights are kept besides those in use, pinned or retained."""
