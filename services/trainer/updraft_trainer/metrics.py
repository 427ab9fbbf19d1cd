"""All metrics of the trainer. A version is the value of a gauge, never a label."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Built once per process and passed to each component."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)

        self.admitted = counter("updraft_trainer_samples_admitted_total", "New samples stored, by split", ["split"])
        self.refused = counter(
            "updraft_trainer_samples_refused_total",
            "Traces not stored, by reason (duplicate: already stored; malformed and schema: moved to the dead letters)",
            ["reason"],
        )
        self.traffic = counter(
            "updraft_trainer_traffic_total",
            "Output tokens, verify steps, and proposed and accepted drafts of all traces, with or without a payload",
            ["what"],
        )
        self.stream_lag = gauge("updraft_trainer_stream_lag_seconds", "Age of the last entry when it was stored")
        self.stream_up = gauge("updraft_trainer_stream_up", "1 while traces can be read and stored")
        self.replay_samples = gauge("updraft_trainer_replay_samples", "Stored samples, by pool", ["place"])
        self.replay_bytes = gauge("updraft_trainer_replay_bytes", "Bytes of stored traces, by pool", ["place"])

        self.steps = counter("updraft_trainer_optimizer_steps_total", "Optimizer steps since the process started")
        self.skipped_steps = counter(
            "updraft_trainer_optimizer_steps_skipped_total",
            "Optimizer steps skipped because the loss or its gradient was not finite",
        )
        self.trained_rows = counter(
            "updraft_trainer_trained_rows_total", "Tokens trained on; a repeated token counts each time"
        )
        self.step_seconds = histogram(
            "updraft_trainer_step_seconds", "Duration of an optimizer step", buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10)
        )
        self.loss = gauge("updraft_trainer_loss", "Loss of the last step")
        self.grad_norm = gauge("updraft_trainer_grad_norm", "Gradient norm of the last step, before clipping")
        self.checkpoint_seconds = histogram(
            "updraft_trainer_checkpoint_seconds",
            "Duration of saving the training state",
            buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30),
        )
        self.checkpoint_failures = counter(
            "updraft_trainer_checkpoint_failures_total", "Training states that could not be saved"
        )

        self.acceptance_length = gauge(
            "updraft_trainer_acceptance_length_tokens",
            "Tokens per verify step on held-out requests, from the last estimate",
            ["role"],
        )
        self.gain = gauge(
            "updraft_trainer_gain_ratio", "Acceptance length of the candidate over the baseline's, minus one", ["bound"]
        )
        self.evaluation_seconds = histogram(
            "updraft_trainer_evaluation_seconds", "Duration of an estimate", buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30)
        )
        self.publishes = counter(
            "updraft_trainer_publishes_total",
            "Candidates by outcome: the version's phase, withheld, unavailable, or refused (also for a full disk)",
            ["outcome"],
        )
        self.serving_version = gauge(
            "updraft_trainer_serving_version", "Stable version according to the registry; 0: no draft"
        )
        self.registry_up = gauge("updraft_trainer_registry_up", "1 while the registry responds")
