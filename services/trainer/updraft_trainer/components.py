"""The objects and options of the training loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from updraft_chassis.clock import Clock
from updraft_trainer.data.demand import DemandMeter
from updraft_trainer.data.replay import Replay
from updraft_trainer.following import Followers
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.decision import PublishThresholds
from updraft_trainer.publishing.evaluator import Evaluator
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView
from updraft_trainer.publishing.schedule import TrainingSchedule
from updraft_trainer.states.state import States


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """See the settings of the same names."""

    batch_tokens: int | None
    max_uses: int
    schedule: TrainingSchedule
    thresholds: PublishThresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Objects that the trainer uses but does not own."""

    replay: Replay
    registry: RegistryView
    evaluator: Evaluator
    publisher: Publisher
    states: States
    record: LearningRecord
    monitor: Monitor
    demand: DemandMeter
    metrics: Metrics
    clock: Clock
    check: Callable[[], None]
    """Called before each part of long work, which it may end by an exception."""
    folder_ids: Sequence[str] = ("",)
    """IDs of the data folders of all ranks, in their order."""
    followers: Followers = field(default_factory=Followers)
