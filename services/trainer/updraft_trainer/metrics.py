"""All metrics of the trainer. A version is the value of a gauge, never a label."""

from prometheus_client import CollectorRegistry

from updraft_chassis.metrics import MetricFactory


class Metrics:
    """Built once per process and passed to each component."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        new = MetricFactory(registry, "updraft_trainer")

        self.admitted = new.counter("samples_admitted", "New samples stored, by split", "split")
        self.stored_tokens = new.counter(
            "stored_tokens",
            "Output tokens of new samples stored that have a prediction of the target, by split",
            "split",
        )
        self.refused = new.counter(
            "samples_refused",
            "Traces not stored, by reason (duplicate: already stored; malformed and schema: moved to the dead letters)",
            "reason",
        )
        self.traffic = new.counter(
            "traffic",
            "Output tokens, verify steps, and proposed and accepted draft tokens of all traces, with or without a payload",
            "what",
        )
        self.stream_lag = new.gauge("stream_lag_seconds", "Age of the last entry when it was stored, by shard", "shard")
        self.stream_up = new.gauge("stream_up", "1 while traces can be read and stored, by shard", "shard")
        self.replay_samples = new.gauge("replay_samples", "Stored samples, by pool", "place")
        self.replay_bytes = new.gauge("replay_bytes", "Bytes of stored traces, by pool", "place")
        self.replay_file_bytes = new.gauge(
            "replay_file_bytes",
            "Bytes of replay's files: of stored traces, and of dropped ones until their space is reclaimed",
        )
        self.replay_damaged = new.counter(
            "replay_damaged", "Stored traces that were dropped because their bytes on disk are damaged"
        )

        self.deleted = new.counter(
            "traces_deleted",
            "Traces deleted before space was short, by reason: forgotten (stored samples and entries of streams, of tenants who"
            " asked for it), expired (stored samples beyond the age limit)",
            "reason",
        )

        self.demand = new.gauge(
            "demand_tokens_per_second",
            "Captured tokens per second that the trainer can store and use, as stated to the registry for its grants to pods",
        )

        self.steps = new.counter("optimizer_steps", "Optimizer steps since the process started")
        self.skipped_steps = new.counter(
            "optimizer_steps_skipped", "Optimizer steps skipped because the loss or its gradient was not finite"
        )
        self.trained_rows = new.counter("trained_rows", "Tokens trained on; a repeated token counts each time")
        self.step_seconds = new.histogram(
            "step_seconds", "Duration of an optimizer step", (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
        )
        self.phase_seconds = new.counter(
            "phase_seconds",
            "Time by phase of training: compile (torch.compile, once), data, transfer (to the device), forward (with the loss),"
            " backward, all_reduce (with the wait for slower ranks), optimizer, estimate, fit, save, publish, and waiting for"
            " requests to train on. Ranks other than 0 count what is within a step only",
            "phase",
        )
        self.ranks = new.gauge("ranks", "Processes that train together, by the device of this one", "device")
        self.flops_utilization = new.gauge(
            "flops_utilization_ratio",
            "Model FLOPs utilization of optimizer steps over the last minute; absent on a CPU, or if the GPU's peak is unknown",
            "device",
        )
        self.gpu_memory_bytes = new.gauge(
            "gpu_memory_bytes",
            "GPU memory: allocated to tensors, the peak of that, reserved by torch, and total; absent on a CPU",
            "kind",
        )
        self.loss = new.gauge("loss", "Loss of the last step that changed the weights")
        self.grad_norm = new.gauge("grad_norm", "Gradient norm of that step, before clipping")
        self.learning_rate = new.gauge("learning_rate", "Learning rate of that step, also during warmup")
        self.checkpoint_seconds = new.histogram(
            "checkpoint_seconds", "Duration of saving the training state", (0.03, 0.1, 0.3, 1, 3, 10, 30)
        )
        self.checkpoint_pause = new.histogram(
            "checkpoint_pause_seconds",
            "Time that training stands still for a save, while the state is copied",
            (0.03, 0.1, 0.3, 1, 3, 10, 30),
        )
        self.checkpoint_failures = new.counter("checkpoint_failures", "Training states that could not be saved")

        self.lost_curve_points = new.counter(
            "lost_curve_points", "Points of curves for TensorBoard that could not be written"
        )

        self._add_publishing(new)

    def _add_publishing(self, new: MetricFactory) -> None:
        self.acceptance_length = new.gauge(
            "acceptance_length_tokens", "Tokens per verify step on held-out requests, from the last estimate", "role"
        )
        self.trained_length = new.gauge(
            "trained_acceptance_length_tokens",
            "Tokens per verify step of the candidate on requests that it was trained on. Far more than on held-out ones: it has"
            " learned them by heart, and needs new requests instead of more steps",
        )
        self.unknown_tokens = new.gauge(
            "unknown_tokens_ratio",
            "Share of the output of today's traffic that the candidate cannot propose, because it is outside its vocabulary",
        )
        self.gain = new.gauge(
            "gain_ratio", "Acceptance length of the candidate over the baseline's, minus one", "bound"
        )
        self.evaluation_seconds = new.histogram(
            "evaluation_seconds", "Duration of an estimate", (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        )
        self.fit_seconds = new.histogram(
            "fit_seconds",
            "Duration of a fit in closed form, with the choice of its vocabulary",
            (0.3, 1, 3, 10, 30, 100, 300, 1000),
        )
        self.publishes = new.counter(
            "publishes",
            "Candidates by outcome: the version's phase, withheld, unavailable, or refused (also for a full disk)",
            "outcome",
        )
        self.serving_version = new.gauge("serving_version", "Stable version according to the registry; 0: no draft")
        self.stalls = new.counter(
            "stalls",
            "Times that an activity has lasted UPDRAFT_TRAINER_STALL_SECONDS, or twice as long as at the last time. The log"
            " names the ranks that are waited for. torch.compile counts only after half an hour",
            "activity",
        )
        self.activity = new.gauge(
            "activity",
            "1 for what this rank is busy with now: idle, join (other ranks start), first_draft, load (a draft to train),"
            " compile, step, mark_good (weights to return to), baseline (the draft that serves), estimate, fit, publish,"
            " collect (the state of all ranks), save, or end",
            "activity",
        )
        self.leads = new.gauge(
            "leads",
            "1 while this process holds the speculator's lease: it may publish. 0: another trainer has it, or Redis is away, or"
            " this is a rank other than 0",
        )
        self.registry_up = new.gauge(
            "registry_up", "1 while the registry responds; 0 at ranks other than 0, which do not ask it"
        )
