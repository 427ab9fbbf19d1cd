"""Shows what training does: in metrics, in the throughput that the registry is told, and in curves for TensorBoard.

Nothing that is learned depends on it.
"""

from contextlib import AbstractContextManager
from functools import partial

import torch

from updraft_chassis.clock import Clock
from updraft_rollouts.evidence import Gain
from updraft_trainer.learning import hardware
from updraft_trainer.learning.gradients import StepReport
from updraft_trainer.learning.learner import Learner
from updraft_trainer.learning.step_time import Phase, StepTimes
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.curves import Curves
from updraft_trainer.publishing.throughput import Throughput, Work


class Monitor:
    """The loop tells it what was done. `throughput` is read by other threads."""

    def __init__(
        self,
        metrics: Metrics,
        throughput: Throughput,
        clock: Clock,
        *,
        device: torch.device | None = None,
        curves: Curves | None = None,
    ) -> None:
        """`device` of the optimizer steps; None: the CPU."""
        self._metrics = metrics
        self._throughput = throughput
        self._clock = clock
        self._curves = curves
        self._device = device or torch.device("cpu")
        self._times = StepTimes(clock=clock.monotonic)
        """Phases outside of optimizer steps."""
        self._begun_s = clock.monotonic()
        """When the work began that is not counted yet."""
        self._tokens, self._step_s = 0, 0.0
        _watch(metrics, throughput, self._device)

    def begin(self) -> None:
        """Training begins now; the time before counts for nothing."""
        self._begun_s = self._clock.monotonic()

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Count the block as this phase."""
        return self._times.phase(name)

    def stepped(self, learner: Learner, report: StepReport, *, num_steps: int, duration_s: float) -> None:
        """An optimizer step ended, which changed the weights if `num_steps` is 1. Otherwise nothing was trained on."""
        metrics = self._metrics
        metrics.step_seconds.observe(duration_s)
        metrics.skipped_steps.inc(report.is_skipped)
        self._step_s += duration_s
        if not num_steps:
            return
        metrics.trained_rows.inc(report.num_rows)
        metrics.loss.set(report.loss)
        metrics.grad_norm.set(report.grad_norm)
        metrics.learning_rate.set(learner.step_rate)
        metrics.steps.inc(num_steps)
        self._tokens += report.num_rows
        if self._curves is not None and self._curves.is_due:
            self._curves.add(self._point(learner, report))
            if not self._curves.write(learner.step):
                metrics.lost_curve_points.inc()

    def estimated(self, gain: Gain) -> None:
        """Held-out requests judged a draft."""
        lengths = {"candidate": gain.candidate, "baseline": gain.baseline}
        for role, length in lengths.items():
            self._metrics.acceptance_length.labels(role).set(length)
        for bound, percent in (("low", gain.low_percent), ("high", gain.high_percent), ("mean", gain.percent)):
            self._metrics.gain.labels(bound).set(percent / 100)
        if self._curves is not None:
            self._curves.add({f"acceptance_length/{role}": length for role, length in lengths.items()})

    def turn(self, learner: Learner) -> None:
        """One turn of the loop ended: count what was done in it."""
        now_s, steps, outside = self._clock.monotonic(), learner.times.take(), self._times.take()
        work = Work(
            start_s=self._begun_s,
            end_s=now_s,
            seconds=steps.seconds,
            tokens=self._tokens,
            flops=steps.flops,
            step_s=self._step_s,
        )
        work += Work(start_s=self._begun_s, end_s=now_s, seconds=outside.seconds)
        for phase, seconds in work.seconds.items():
            self._metrics.phase_seconds.labels(phase).inc(seconds)
        self._throughput.add(work)
        self._begun_s, self._tokens, self._step_s = now_s, 0, 0.0

    def _point(self, learner: Learner, report: StepReport) -> dict[str, float]:
        throughput = self._throughput
        point = {
            "train/loss": report.loss,
            "train/grad_norm": report.grad_norm,
            "train/learning_rate": learner.step_rate,
            "throughput/tokens_per_second": throughput.tokens_per_s,
        }
        point |= {f"time/{phase}": share for phase, share in throughput.shares.items()}
        if (utilization := throughput.flops_utilization) is not None:
            point["throughput/flops_utilization"] = utilization
        return point | {f"gpu_memory/{kind}": float(n) for kind, n in hardware.memory_bytes(self._device).items()}


def _watch(metrics: Metrics, throughput: Throughput, device: torch.device) -> None:
    """Metrics that are read at each scrape, so that steps need not set them."""
    metrics.ranks.labels(throughput.device).set(throughput.world_size)
    if throughput.peak_flops is not None:
        metrics.flops_utilization.labels(throughput.device).set_function(lambda: throughput.flops_utilization or 0.0)
    for kind in hardware.memory_bytes(device):
        metrics.gpu_memory_bytes.labels(kind).set_function(partial(_memory, device, kind))


def _memory(device: torch.device, kind: str) -> int:
    return hardware.memory_bytes(device)[kind]
