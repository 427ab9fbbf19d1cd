"""The trainer's progress as the registry shows it: evidence that drafts follow the traffic."""

import math
from collections.abc import Iterator, Mapping, Sequence

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.sizing import redis_too_small
from updraft_rollouts.evidence import Gain
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import Pool, SampleEntry
from updraft_trainer.data.selection import outliers_together
from updraft_trainer.publishing import traffic
from updraft_trainer.publishing.estimate import GainEstimate
from updraft_trainer.publishing.throughput import Throughput

_MAX_PERCENT = 1e6
"""Bounds of a gain beyond this say nothing: there are too few requests."""


class LearningRecord:
    """The loop counts, and another thread reads."""

    def __init__(
        self,
        replay: Replay,
        capacity: Capacity,
        *,
        min_samples: int,
        version_bytes: int,
        stream_bytes: int,
        samples_to_start: int,
    ) -> None:
        self._replay = replay
        self._capacity = capacity
        self._min_samples = min_samples
        self._version_bytes = version_bytes
        self._stream_bytes = stream_bytes
        self.throughput = Throughput()
        self.max_memory = 0
        """Bytes that Redis may use; 0: no limit, or not known. The operator's Redis tells only the operator."""
        self.elsewhere = (0, 0)
        """Requests that other ranks store: to train on, and held out."""
        self.samples_to_start = samples_to_start
        """Stored requests that a new draft waits for; 0 once a draft is trained."""
        self.last_step_s = 0.0
        """Unix time of this process's last optimizer step."""
        self.steps = 0
        """Optimizer steps of the draft in training."""
        self.estimates = 0
        """Candidates that held-out requests judged."""
        self.forgotten_ms = 0
        """All ranks have carried out the orders to forget tenants up to this time."""
        self.last_save_s = 0.0
        """Unix time of the last saved state; 0: none yet."""
        self.loss: float | None = None
        """Loss of that step; None: none was taken yet."""
        self.trained_length: float | None = None
        """Acceptance length on requests that the draft was trained on, at the last estimate."""
        self.lag_s: float | None = None
        """Age of the newest stored trace when it was stored; None: none came in the last minute."""
        self._steps_to_estimate, self._estimate_due_s = 0, 0.0
        self._shifts = traffic.ShiftDetector()
        self._gain: Gain | None = None
        self._lengths: Mapping[str, tuple[float, float]] = {}
        """Acceptance lengths of candidate and baseline by kind of traffic."""

    def trained(self, step: int, now_s: float | None) -> None:
        """A draft is in training at this step; `now_s` if it was just taken."""
        self.steps, self.samples_to_start = step, 0
        if now_s is not None:
            self.last_step_s = now_s

    def next_estimate(self, steps: int, at_s: float) -> None:
        """One is due after `steps`, or at this Unix time if anything has changed."""
        self._steps_to_estimate, self._estimate_due_s = steps, at_s

    def estimated(self, estimate: GainEstimate, gain: Gain) -> None:
        """Held-out requests judged a candidate."""
        self.estimates += 1
        self._gain, self._lengths = gain, estimate.lengths()

    def read(self) -> registry_pb2.Learning:
        requests = {pool: self._replay.num_requests(pool) for pool in Pool}
        pools = [(requests[pool], self._replay.num_bytes(pool)) for pool in Pool]
        held_out = requests[Pool.EVALUATION]
        throughput = self.throughput
        stored = outliers_together(self._replay.entries())
        self._shifts.follow(stored)
        return registry_pb2.Learning(
            samples=sum(requests.values()) - held_out + self.elsewhere[0],
            held_out=held_out + self.elsewhere[1],
            steps=self.steps,
            estimates=self.estimates,
            too_small=self._capacity.too_small(pools, min_samples=self._min_samples)
            or redis_too_small(self.max_memory, self._stream_bytes),
            version_bytes=self._version_bytes,
            samples_to_start=self.samples_to_start,
            last_step_unix_ms=int(1000 * self.last_step_s),
            device=throughput.device,
            world_size=throughput.world_size,
            tokens_per_second=throughput.tokens_per_s,
            phases=[registry_pb2.PhaseShare(phase=name, share=share) for name, share in throughput.shares.items()],
            flops_utilization=throughput.flops_utilization,
            last_save_unix_ms=int(1000 * self.last_save_s),
            steps_to_estimate=self._steps_to_estimate,
            estimate_due_unix_ms=int(1000 * self._estimate_due_s),
            stream_bytes=self._stream_bytes,
            forgotten_unix_ms=self.forgotten_ms,
            loss=_finite(self.loss),
            lag_seconds=_finite(self.lag_s),
            held_out_length=_estimate(self._gain) if self._gain else None,
            trained_length=_finite(self.trained_length),
            kinds=self._kinds(stored),
            shifts=[
                registry_pb2.TrafficShift(
                    unix_ms=shift.at_ms, before=traffic.label(shift.before), after=traffic.label(shift.after)
                )
                for shift in self._shifts.shifts
            ],
        )

    def _kinds(self, stored: Sequence[SampleEntry]) -> Iterator[registry_pb2.TrafficKind]:
        for kind in traffic.kinds(stored, self._replay.traffic_mix()):
            candidate, stable = self._lengths.get(kind.name, (0.0, 0.0))
            yield registry_pb2.TrafficKind(
                name=traffic.label(kind.name),
                samples=kind.training,
                held_out=kind.held_out,
                last_hour=kind.last_hour,
                last_day=kind.last_day,
                recent_share=kind.recent_share,
                candidate_length=candidate,
                stable_length=stable,
            )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _estimate(gain: Gain) -> registry_pb2.Estimate | None:
    """An interval that says nothing is open, as the registry's are."""
    is_open = not gain.high_percent <= _MAX_PERCENT
    figures = (gain.candidate, gain.baseline, gain.percent, gain.low_percent)
    if not all(map(math.isfinite, figures)):
        return None
    return registry_pb2.Estimate(
        candidate=gain.candidate,
        stable=gain.baseline,
        change_percent=gain.percent,
        low_percent=-100.0 if is_open else gain.low_percent,
        high_percent=math.inf if is_open else gain.high_percent,
    )
