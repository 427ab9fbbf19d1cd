"""Shows what training does, in metrics and in the learning record. Nothing depends on it."""

from contextlib import AbstractContextManager
from functools import partial

import torch

from updraft_chassis.clock import Clock
from updraft_trainer.learning import hardware
from updraft_trainer.learning.learner import Learner, StepReport
from updraft_trainer.learning.step_time import Phase, StepTimes
from updraft_trainer.metrics import Metrics
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
    ) -> None:
        """`device` of the optimizer steps; None: the CPU."""
        self._metrics = metrics
        self._throughput = throughput
        self._clock = clock
        self._times = StepTimes(clock=clock.monotonic)
        """Phases outside of optimizer steps."""
        self._begun_s = clock.monotonic()
        """When the work began that is not counted yet."""
        self._tokens, self._step_s = 0, 0.0
        _watch(metrics, throughput, device or torch.device("cpu"))

    def begin(self) -> None:
        """Training begins now; the time before counts for nothing."""
        self._begun_s = self._clock.monotonic()

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Count the block as this phase."""
        return self._times.phase(name)

    def stepped(self, learner: Learner, report: StepReport, *, num_steps: int, duration_s: float) -> None:
        """An optimizer step ended, which changed the weights if `num_steps` is 1."""
        metrics = self._metrics
        metrics.step_seconds.observe(duration_s)
        metrics.trained_rows.inc(report.num_rows)
        metrics.loss.set(report.loss)
        metrics.grad_norm.set(report.grad_norm)
        metrics.learning_rate.set(learner.step_rate)
        metrics.skipped_steps.inc(report.is_skipped)
        metrics.steps.inc(num_steps)
        self._tokens += report.num_rows
        self._step_s += duration_s

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


def _watch(metrics: Metrics, throughput: Throughput, device: torch.device) -> None:
    """Metrics that are read at each scrape, so that steps need not set them."""
    metrics.ranks.labels(throughput.device).set(throughput.world_size)
    if throughput.peak_flops is not None:
        metrics.flops_utilization.labels(throughput.device).set_function(lambda: throughput.flops_utilization or 0.0)
    for kind in hardware.memory_bytes(device):
        metrics.gpu_memory_bytes.labels(kind).set_function(partial(_memory, device, kind))


def _memory(device: torch.device, kind: str) -> int:
    return hardware.memory_bytes(device)[kind]
