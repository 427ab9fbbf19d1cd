"""All metrics of the inference process.

Labels have few, bounded values: a drafter, a position, a reason. A draft version is the value of a gauge, never a label.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

from prometheus_client import CollectorRegistry

from updraft_chassis.metrics import MetricFactory
from updraft_inference.agent.counters import LATENCY_BOUNDS_S, Latencies, usage
from updraft_inference.engine import (
    CaptureLoss,
    CountedRequest,
    CountedSteps,
    Drafter,
    DraftHolder,
    Engine,
    FinishedRequest,
    LookaheadEstimates,
    StepSums,
)
from updraft_tap.drafting.speedup import LOADS

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
_PAUSES_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)

_PREFIX = "updraft_inference"
_POSITIONS, _ROWS = (1, 2, 3, 4, 6, 8), (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        new = MetricFactory(registry, _PREFIX)
        self.requests = new.counter(
            "requests", "Finished requests by finish reason (stop, length, cancelled).", "finish"
        )
        self.refusals = new.counter("refusals", "Requests rejected with an error, by HTTP status.", "status")
        self.hang_ups = new.counter("hang_ups", "Clients that disconnected before the answer was complete.")
        self.prompt_tokens = new.counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.output_tokens = new.counter("output_tokens", "Generated tokens of finished requests.")
        self.verify_steps = new.counter("verify_steps", "Verify steps, by drafter.", "drafter")
        self.proposed = new.counter(
            "proposed_tokens", "Draft tokens proposed, by position in the draft.", "drafter", "position"
        )
        self.accepted = new.counter(
            "accepted_tokens", "Draft tokens accepted, by position in the draft.", "drafter", "position"
        )
        self.uncaptured_steps = new.counter(
            "uncaptured_steps",
            "Verify steps of captured requests that are missing from their traces; they are included in verify_steps.",
        )
        self.missing_rows = new.counter(
            "missing_rows", "Rows that are missing from captured hidden states; traces mark them as missing."
        )
        self.acceptance_length = new.histogram(
            "acceptance_length_tokens", "Tokens per verify step, one observation per request.", _LENGTHS, "drafter"
        )
        self.time_to_first_token = new.histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token.", _SECONDS
        )
        self.inter_token_latency = new.bulk_histogram(
            "inter_token_latency_seconds",
            "Step duration divided by its tokens, one observation per token.",
            LATENCY_BOUNDS_S,
        )
        self.request_duration = new.histogram(
            "request_duration_seconds", "Time from arrival to the end of the answer.", _SECONDS
        )
        self.captured = new.counter(
            "captured_traces", "Traces written to the stream, by kind: payload (with hidden states) or light.", "kind"
        )
        self.captured_tokens = new.counter(
            "captured_tokens",
            "Tokens with hidden states written to the stream, each once: output, and rows of prompts.",
        )
        self.granted = new.gauge(
            "capture_granted_tokens_per_second",
            "Tokens with hidden states per second that the registry grants this pod.",
        )
        self.capture_dropped = new.counter("capture_dropped_traces", "Traces that were dropped, by reason.", "reason")
        self.evicted_entries = new.counter(
            "evicted_stream_entries",
            "Stream entries, of any pod, that made room for newer ones before the trainer had stored them.",
        )
        self.swaps = new.counter("swaps", "Draft swaps by outcome (swapped, refused).", "outcome")
        self.swap_pause = new.histogram(
            "swap_pause_seconds", "How long the decode loop was paused for a swap.", _PAUSES_S
        )
        self.draft_version = new.gauge("draft_version", "Draft version that the engine serves; 0: none.")
        self.draft_mismatches = new.counter(
            "draft_mismatches", "Times that the draft in the engine's memory had changed."
        )
        self.target_changes = new.counter(
            "target_changes", "Swaps that were refused because they changed weights of the target."
        )
        self.registry_connected = new.gauge("registry_connected", "1 while the stream to the registry is connected.")
        self.registry_denials = new.counter(
            "registry_denials",
            "Times that the registry rejected this pod because of its token, its role or its target.",
        )
        self.own_kernels = new.gauge(
            "own_kernels",
            "1 if the built-in engine uses C++ kernels (amx, vnni, avx512, avx2, neon), 0 if torch's operations (torch).",
            "variant",
        )

    def observe_kernels(self, variant: str) -> None:
        """Set once an engine is open; see `EngineInfo.kernels`."""
        self.own_kernels.labels(variant=variant).set(variant != "torch")

    def observe(self, finished: FinishedRequest | CountedRequest) -> None:
        self.requests.labels(finish=finished.reason.value).inc()
        self.prompt_tokens.inc(finished.num_prompt)
        self.output_tokens.inc(finished.num_output)
        self.request_duration.observe(finished.duration_s)
        if finished.num_output and finished.time_to_first_token_s is not None:
            self.time_to_first_token.observe(finished.time_to_first_token_s)
        served = usage(finished)
        if served.acceptance_length is not None:
            self.acceptance_length.labels(drafter=served.drafter.value).observe(served.acceptance_length)
        for sums in finished.sums:
            self._observe_steps(sums, Latencies.of_sums(sums))
        if isinstance(finished, CountedRequest):
            self.missing_rows.inc(finished.num_missing_rows)
            self.uncaptured_steps.inc(finished.num_uncaptured)

    def _observe_steps(self, steps: StepSums | CountedSteps, latencies: Latencies) -> None:
        drafter = steps.drafter.value
        self.verify_steps.labels(drafter=drafter).inc(steps.verify_steps)
        for counter, by_position in ((self.proposed, steps.proposed), (self.accepted, steps.accepted)):
            for position, num in enumerate(by_position, start=1):
                counter.labels(drafter=drafter, position=str(position)).inc(num)
        self.inter_token_latency.observe_many(latencies.counts, latencies.seconds)


def watch_holder(registry: CollectorRegistry, holder: DraftHolder) -> None:
    """Register gauges of what goes wrong, read at each scrape."""
    new = MetricFactory(registry, _PREFIX)
    new.gauge(
        "draft_faults", "Steps in which drafting failed. Such steps run without a draft; no request fails."
    ).set_function(lambda: sum(holder.faults.values()))
    losses = new.gauge(
        "capture_lost_parts", "Parts of traces that were lost between the engine and capture, by reason.", "reason"
    )
    for loss in CaptureLoss:
        losses.labels(reason=loss.value).set_function(partial(_lost, holder, loss))


def watch_engine(registry: CollectorRegistry, engine: Engine) -> None:
    """Register gauges of the engine load that are read at each scrape."""
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "running_requests": ("Requests that occupy a slot.", lambda: engine.load.running),
        "queued_requests": ("Requests that are waiting for a slot.", lambda: engine.load.queued),
        "used_context_tokens": ("Tokens in the KV cache.", lambda: engine.load.used_tokens),
        "slots": ("Requests that can run concurrently.", lambda: engine.info.num_slots),
        "lookahead_tokens": ("Draft tokens per step that the engine chose last.", lambda: engine.load.lookahead),
        "cached_prompt_tokens": (
            "Prompt tokens that were reused from the prefix cache instead of being computed.",
            lambda: engine.load.cached_tokens,
        ),
    }
    new = MetricFactory(registry, _PREFIX)
    for name, (text, read) in gauges.items():
        new.gauge(name, text).set_function(read)


def watch_speedups(registry: CollectorRegistry, holder: DraftHolder) -> None:
    """Register gauges of what speculation is worth, read at each scrape; NaN while it is not known."""
    new = MetricFactory(registry, _PREFIX)
    speedup = new.gauge(
        "speedup_ratio",
        "Speed of decoding over that without drafts, measured in random slices of steps: the mean and the 90 % interval."
        " `batch` is the smallest batch size of a load, 0 is all traffic.",
        *("batch", "bound"),
    )
    for batch, bound in product((0, *LOADS), ("mean", "low", "high")):
        speedup.labels(batch=str(batch), bound=bound).set_function(partial(_speedup, holder, batch, bound))


def _speedup(holder: DraftHolder, batch: int, bound: str) -> float:
    measured = holder.speedups.get(batch)
    return math.nan if measured is None else float(getattr(measured, "ratio" if bound == "mean" else bound))


def _lost(holder: DraftHolder, loss: CaptureLoss) -> int:
    return holder.capture_losses.get(loss, 0)


def watch_lookahead(registry: CollectorRegistry, estimates: LookaheadEstimates) -> None:
    """Register gauges of the inputs to the lookahead choice that are read at each scrape."""
    new = MetricFactory(registry, _PREFIX)
    survival = new.gauge(
        "expected_survival_ratio",
        "Estimated probability that the draft tokens up to a position are accepted, from recent steps.",
        *("drafter", "position"),
    )
    seconds = new.gauge(
        "verify_seconds",
        "Seconds to verify so many rows at once, measured when the engine starts and corrected by every step.",
        "rows",
    )
    for drafter, position in product((Drafter.NGRAM, Drafter.EAGLE3, Drafter.HYBRID), _POSITIONS):
        labelled = survival.labels(drafter=drafter.value, position=str(position))
        labelled.set_function(partial(estimates.survival, drafter, position))
    for rows in _ROWS:
        seconds.labels(rows=str(rows)).set_function(partial(estimates.step_seconds, rows))
