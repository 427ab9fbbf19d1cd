"""All metrics of the trainer. A version is the value of a gauge, never a label."""

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


@dataclass(frozen=True, slots=True)
class Metrics:
    """Built once in `__main__`, and passed to who counts."""

    registry: CollectorRegistry
    admitted: Counter = field(init=False)
    refused: Counter = field(init=False)
    traffic: Counter = field(init=False)
    stream_lag: Gauge = field(init=False)
    stream_up: Gauge = field(init=False)
    replay_samples: Gauge = field(init=False)
    replay_bytes: Gauge = field(init=False)
    steps: Counter = field(init=False)
    skipped_steps: Counter = field(init=False)
    trained_rows: Counter = field(init=False)
    step_seconds: Histogram = field(init=False)
    loss: Gauge = field(init=False)
    grad_norm: Gauge = field(init=False)
    acceptance_length: Gauge = field(init=False)
    gain: Gauge = field(init=False)
    evaluation_seconds: Histogram = field(init=False)
    publishes: Counter = field(init=False)
    serving_version: Gauge = field(init=False)
    registry_up: Gauge = field(init=False)
    checkpoint_seconds: Histogram = field(init=False)
    checkpoint_failures: Counter = field(init=False)

    def __post_init__(self) -> None:
        for name, metric in (_intake(self.registry) | _learning(self.registry) | _publishing(self.registry)).items():
            object.__setattr__(self, name, metric)


_Metric = Counter | Gauge | Histogram


def _intake(r: CollectorRegistry) -> dict[str, _Metric]:
    return {
        "admitted": Counter(
            "updraft_trainer_samples_admitted_total", "New samples stored, by split", ["split"], registry=r
        ),
        "refused": Counter(
            "updraft_trainer_samples_refused_total",
            "Traces that were not stored, by reason (duplicate: stored already; malformed, schema: dead letters)",
            ["reason"],
            registry=r,
        ),
        "traffic": Counter(
            "updraft_trainer_traffic_total",
            "Output tokens, verify steps, and drafts proposed and accepted, of all traces, light ones too",
            ["what"],
            registry=r,
        ),
        "stream_lag": Gauge(
            "updraft_trainer_stream_lag_seconds", "Age of the last entry when it was stored", registry=r
        ),
        "stream_up": Gauge("updraft_trainer_stream_up", "1 while traces can be read and stored", registry=r),
        "replay_samples": Gauge("updraft_trainer_replay_samples", "Samples kept, by place", ["place"], registry=r),
        "replay_bytes": Gauge("updraft_trainer_replay_bytes", "Bytes of kept traces, by place", ["place"], registry=r),
    }


def _learning(r: CollectorRegistry) -> dict[str, _Metric]:
    return {
        "steps": Counter("updraft_trainer_optimizer_steps_total", "Optimizer steps since the start", registry=r),
        "skipped_steps": Counter(
            "updraft_trainer_optimizer_steps_skipped_total",
            "Steps that changed nothing, for the loss or its gradient was not finite",
            registry=r,
        ),
        "trained_rows": Counter("updraft_trainer_trained_rows_total", "Tokens trained on, repeats counted", registry=r),
        "step_seconds": Histogram(
            "updraft_trainer_step_seconds",
            "One optimizer step",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10),
            registry=r,
        ),
        "loss": Gauge("updraft_trainer_loss", "Loss of the last step", registry=r),
        "grad_norm": Gauge("updraft_trainer_grad_norm", "Gradient norm of the last step, before clipping", registry=r),
        "checkpoint_seconds": Histogram(
            "updraft_trainer_checkpoint_seconds",
            "Saving the whole state",
            buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30),
            registry=r,
        ),
        "checkpoint_failures": Counter(
            "updraft_trainer_checkpoint_failures_total", "States that could not be saved", registry=r
        ),
    }


def _publishing(r: CollectorRegistry) -> dict[str, _Metric]:
    return {
        "acceptance_length": Gauge(
            "updraft_trainer_acceptance_length_tokens",
            "Tokens a verify step on held-out requests, of the last estimate",
            ["role"],
            registry=r,
        ),
        "gain": Gauge(
            "updraft_trainer_gain_ratio", "Candidate over baseline acceptance length, minus one", ["bound"], registry=r
        ),
        "evaluation_seconds": Histogram(
            "updraft_trainer_evaluation_seconds",
            "One estimate",
            buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30),
            registry=r,
        ),
        "publishes": Counter(
            "updraft_trainer_publishes_total",
            "Candidates by what became of them: a phase of the registry, unavailable, or refused (or the disk is full)",
            ["outcome"],
            registry=r,
        ),
        "serving_version": Gauge(
            "updraft_trainer_serving_version", "Version that serves, as the registry says; 0 = no draft", registry=r
        ),
        "registry_up": Gauge("updraft_trainer_registry_up", "1 while the registry answers", registry=r),
    }
