"""Every metric of the inference process, on one page.

Labels are few and bounded: a drafter, a position, a reason. A draft version is the value of a gauge, never a
label.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from updraft_inference.agent.counters import LATENCY_BOUNDS_S, emitted, usage
from updraft_inference.engine import CaptureLoss, Drafter, Engine, FinishedRequest, LookaheadEstimates, UncapturedSteps

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
_PAUSES_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)

_PREFIX = "updraft_inference"
_POSITIONS, _ROWS = (1, 2, 3, 4, 6, 8), (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Built once, passed to whoever counts."""

    requests: Counter
    refusals: Counter
    hang_ups: Counter
    prompt_tokens: Counter
    output_tokens: Counter
    verify_steps: Counter
    proposed: Counter
    accepted: Counter
    uncaptured_steps: Counter
    missing_rows: Counter
    acceptance_length: Histogram
    time_to_first_token: Histogram
    inter_token_latency: Histogram
    request_duration: Histogram
    captured: Counter
    capture_dropped: Counter
    swaps: Counter
    swap_pause: Histogram
    draft_version: Gauge
    draft_mismatches: Counter
    registry_connected: Gauge
    registry_denials: Counter
    own_kernels: Gauge

    @classmethod
    def on(cls, registry: CollectorRegistry) -> Self:
        """Register all of them."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=buckets, registry=registry)

        return cls(
            requests=counter("requests", "Ended requests by why they ended (stop, length, cancelled).", "finish"),
            refusals=counter("refusals", "Requests refused with an error, by HTTP status.", "status"),
            hang_ups=counter("hang_ups", "Clients that closed their connection before the answer was whole."),
            prompt_tokens=counter("prompt_tokens", "Prompt tokens of ended requests."),
            output_tokens=counter("output_tokens", "Generated tokens of ended requests."),
            verify_steps=counter("verify_steps", "Verify steps by who proposed the drafts.", "drafter"),
            proposed=counter("proposed_tokens", "Drafts proposed, by position in the chain.", "drafter", "position"),
            accepted=counter("accepted_tokens", "Drafts accepted, by position in the chain.", "drafter", "position"),
            uncaptured_steps=counter(
                "uncaptured_steps", "Verify steps that the engine gave only sums of; they are in verify_steps too."
            ),
            missing_rows=counter("missing_rows", "Rows of captured hidden states that did not come and are marked."),
            acceptance_length=histogram(
                "acceptance_length_tokens",
                "Tokens a verify step, one observation a request.",
                _LENGTHS,
                "drafter",
            ),
            time_to_first_token=histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS),
            inter_token_latency=histogram(
                "inter_token_latency_seconds",
                "Step time over its tokens, one observation a token.",
                LATENCY_BOUNDS_S,
            ),
            request_duration=histogram("request_duration_seconds", "From arrival to the end.", _SECONDS),
            captured=counter("captured_traces", "Traces in the stream, by whether they carry a payload.", "kind"),
            capture_dropped=counter("capture_dropped_traces", "Traces that were not kept, by reason.", "reason"),
            swaps=counter("swaps", "Draft swaps by outcome (swapped, refused).", "outcome"),
            swap_pause=histogram("swap_pause_seconds", "How long the decode loop stood still for a swap.", _PAUSES_S),
            draft_version=gauge("draft_version", "The draft version that the engine holds; 0 = none."),
            draft_mismatches=counter(
                "draft_mismatches", "Times that the engine's draft was found to have changed in memory."
            ),
            registry_connected=gauge("registry_connected", "1 while the stream to the registry is up."),
            registry_denials=counter(
                "registry_denials",
                "Times that the registry refused this pod: its token, the token's role, or what it serves.",
            ),
            own_kernels=gauge(
                "own_kernels",
                "1 if the built-in engine uses its C++ kernels (amx, avx512, avx2, neon), 0 if torch's operations (torch).",
                "variant",
            ),
        )

    def observe_kernels(self, variant: str) -> None:
        """Set once an engine is open; see `EngineInfo.kernels`."""
        self.own_kernels.labels(variant=variant).set(variant not in {"", "torch"})

    def observe(self, finished: FinishedRequest) -> None:
        """Count one ended request."""
        self.requests.labels(finish=finished.reason.value).inc()
        self.prompt_tokens.inc(len(finished.request.prompt_ids))
        self.output_tokens.inc(len(finished.output_ids))
        self.request_duration.observe(finished.duration_s)
        if finished.output_ids:
            self.time_to_first_token.observe(finished.time_to_first_token_s)
        served = usage(finished)
        if served.acceptance_length is not None:
            self.acceptance_length.labels(drafter=served.drafter.value).observe(served.acceptance_length)
        self._observe_steps(finished)
        if finished.hidden is not None:
            self.missing_rows.inc(len(finished.hidden.missing_rows))
        if finished.uncaptured is not None:
            self._observe_sums(finished.uncaptured)

    def _observe_sums(self, sums: UncapturedSteps) -> None:
        drafter = sums.drafter.value
        self.uncaptured_steps.inc(sums.verify_steps)
        self.verify_steps.labels(drafter=drafter).inc(sums.verify_steps)
        for position, num in enumerate(sums.proposed):
            self.proposed.labels(drafter=drafter, position=str(position + 1)).inc(num)
        for position, num in enumerate(sums.accepted):
            self.accepted.labels(drafter=drafter, position=str(position + 1)).inc(num)
        for _ in range(sums.tokens):
            self.inter_token_latency.observe(sums.duration_s / sums.tokens)

    def _observe_steps(self, finished: FinishedRequest) -> None:
        for step, num_tokens in emitted(finished):
            drafter = step.drafter.value
            self.verify_steps.labels(drafter=drafter).inc()
            for position in range(len(step.draft_ids)):
                self.proposed.labels(drafter=drafter, position=str(position + 1)).inc()
            for position in range(step.accepted):
                self.accepted.labels(drafter=drafter, position=str(position + 1)).inc()
            for _ in range(num_tokens):
                self.inter_token_latency.observe(step.duration_s / num_tokens)


def watch_engine(registry: CollectorRegistry, engine: Engine) -> None:
    """Gauges of how busy the engine is, read at each scrape."""
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "running_requests": ("Requests that hold a slot.", lambda: engine.load.running),
        "queued_requests": ("Requests that wait for a slot.", lambda: engine.load.queued),
        "used_context_tokens": ("Tokens in the KV cache.", lambda: engine.load.used_tokens),
        "slots": ("Requests that can run at once.", lambda: engine.info.num_slots),
        "draft_faults": (
            "Steps in which drafting failed; they cost drafts, no request.",
            lambda: sum(engine.faults.values()),
        ),
        "lookahead_tokens": ("Drafts a step that the engine chose last.", lambda: engine.load.lookahead),
        "cached_prompt_tokens": (
            "Prompt tokens so far that were not read, since another request had read them.",
            lambda: engine.load.cached_tokens,
        ),
    }
    for name, (text, read) in gauges.items():
        Gauge(f"{_PREFIX}_{name}", text, registry=registry).set_function(read)
    losses = Gauge(
        f"{_PREFIX}_capture_lost_parts",
        "Parts of traces so far that did not come from the engine or could not be kept, by reason.",
        ("reason",),
        registry=registry,
    )
    for loss in CaptureLoss:
        losses.labels(reason=loss.value).set_function(partial(_lost, engine, loss))


def _lost(engine: Engine, loss: CaptureLoss) -> int:
    return engine.capture_losses.get(loss, 0)


def watch_lookahead(registry: CollectorRegistry, estimates: LookaheadEstimates) -> None:
    """Gauges of what lookahead is chosen by, read at each scrape."""
    survival = Gauge(
        f"{_PREFIX}_expected_survival_ratio",
        "How probable it is, by what was seen lately, that the drafts up to a position are kept.",
        ("drafter", "position"),
        registry=registry,
    )
    seconds = Gauge(
        f"{_PREFIX}_verify_seconds",
        "What it costs to verify so many rows at once, as measured when the engine started.",
        ("rows",),
        registry=registry,
    )
    for drafter, position in product((Drafter.NGRAM, Drafter.EAGLE3), _POSITIONS):
        labelled = survival.labels(drafter=drafter.value, position=str(position))
        labelled.set_function(partial(estimates.survival, drafter, position))
    for rows in _ROWS:
        seconds.labels(rows=str(rows)).set_function(partial(estimates.step_seconds, rows))
