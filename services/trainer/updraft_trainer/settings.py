"""Settings of the trainer: `UPDRAFT_TRAINER_...`."""

import socket
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from updraft_artifacts.draft_shape import MIN_VOCAB, ShapeChoice
from updraft_chassis import streams
from updraft_chassis.credentials import Credentials
from updraft_chassis.settings import Name, Settings, StreamNamespace
from updraft_trainer.learning.compute import Compute, Sharding
from updraft_trainer.learning.learner import Hyperparameters
from updraft_trainer.publishing.decision import PublishThresholds
from updraft_trainer.publishing.schedule import TrainingSchedule

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")


class TrainerSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="UPDRAFT_TRAINER_")

    model: Path
    """Folder of the target model in Hugging Face layout. Only its embedding, head and final norm are read."""
    data_dir: Path
    """Folder for the replay, saved training states and the serving draft. Only one trainer can use it at a time. Of
    several ranks on a machine, the first uses this folder and rank N the folder rank-N in it."""
    redis_url: SecretStr = Field(min_length=1)
    """Redis with the trace streams: redis://host:port/0, redis+cluster://host:port or unix:///path; rediss:// and
    rediss+cluster:// with TLS."""
    stream_shards: int = Field(default=1, ge=1, le=streams.MAX_SHARDS)
    """Number of trace streams, at least as many as ranks. It must match the serving pods' setting."""
    registry_address: str = Field(min_length=1)
    """host:port of the registry that drafts are published to."""
    registry_token_file: Path | None = None
    """File with the trainer's token for the registry (role publish). It is read again when it changes."""
    registry_ca_file: Path | None = None
    """CAs of the registry's certificate, in PEM format. Enables TLS, and is reloaded when it changes."""
    registry_cert_file: Path | None = None
    """Client certificate for a registry that requires one (mTLS). Reloaded when it changes."""
    registry_key_file: Path | None = None
    """Private key of the client certificate."""
    speculator: Name = "default"
    """Speculator to train and to publish drafts for."""
    namespace: StreamNamespace = "default"
    """Start of stream keys: NAMESPACE or INSTALLATION:NAMESPACE. It must match the serving pods' setting."""
    region: str = Field(default="", max_length=63)
    """Region in which this trainer stores traces. Traces that may be stored only in another region are refused."""
    pod_name: str = Field(default_factory=socket.gethostname, min_length=1)
    """Consumer name in the stream's group, stable across restarts, so that unfinished entries are delivered again. Ranks on the
    same machine add a number to it."""
    lease_seconds: float = Field(default=30.0, ge=1.0)
    """Time after which another trainer of the speculator goes on if this one falls silent. Until then it waits."""
    stall_seconds: float = Field(default=300.0, gt=0)
    """Duration of a step, an estimate or another phase of training from which on the log says which rank waits for which."""
    metrics_host: str = "127.0.0.1"
    """Address for /metrics, /healthz and /readyz."""
    metrics_tls_cert_file: Path | None = None
    """Certificate chain of metrics_port in PEM format; with metrics_tls_key_file, it speaks HTTPS. Reloaded when it changes."""
    metrics_tls_key_file: Path | None = None
    """Private key of metrics_tls_cert_file."""
    tensorboard_dir: Path | None = None
    """Folder for learning curves that TensorBoard shows, at most 64 MiB a speculator in a folder of its name. None by
    default. A full disk costs points of the curves, and nothing else."""
    metrics_port: int = Field(default=9092, ge=0, le=65535)
    """Port for /metrics, /healthz and /readyz. 0 selects a free port and logs it. Of several ranks on a machine, each has the
    next port."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to train. auto: the first GPU if torch sees one that can, else the CPU. cuda refuses to start without a GPU of
    compute capability 8.0 or later. Training on a GPU has not been tried yet, so it has to be asked for."""
    pack_tokens: int | None = Field(default=None, ge=16)
    """Tokens that are packed for one forward and backward pass; a longer request has a pass of its own. An optimizer step may
    take several passes, and learns the same. Default: 1024 on a CPU, 16384 on a GPU. Halved once if the GPU's memory is
    full."""
    recompute: bool = False
    """Compute inner values again in the backward pass instead of keeping them (gradient checkpointing). A step takes longer,
    and long requests need far less memory."""
    compile: bool = False
    """Compile the operations between large products (torch.compile), which takes up to minutes at the start; log, status and
    metrics show it. Needs a C++ compiler on a CPU, and Triton on a GPU. Where it does not work, training goes on without it."""
    sharding: Sharding = "auto"
    """For a trainer of many ranks: replicate keeps all of the optimizer's state on each, shard divides it among them. auto
    divides it if the learner would otherwise take more than a quarter of the device's memory. They learn the same."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Dense bfloat16 operations per second that the GPU can do, for the metric of its utilization. Default: from the data
    sheets of common GPUs; no utilization is shown for others, and none for a CPU."""
    num_threads: int = Field(default=1, ge=1)
    """Number of compute threads."""
    niceness: int = Field(default=10, ge=0, le=19)
    """Added to the process's nice value. 10 leaves about nine tenths of a contended core to serving, 19 almost all of it."""
    scheduling: Literal["normal", "batch", "idle"] = "batch"
    """Linux scheduling policy. batch never preempts serving when it wakes up; idle runs only on otherwise idle cores."""

    draft_num_attention_heads: int | None = Field(default=None, ge=1)
    """Attention heads of a new draft. Default: the target's, or heads of 128 if its attention is compressed. A draft that
    starts from a published one keeps all its sizes."""
    draft_num_key_value_heads: int | None = Field(default=None, ge=1)
    """Key-value heads of a new draft. Default: the target's, or 8."""
    draft_intermediate_size: int | None = Field(default=None, ge=1)
    """MLP width of a new draft. Default: the target's, or 3 times the hidden size if its experts are narrower."""
    draft_vocab_size: int | None = Field(default=None, ge=MIN_VOCAB)
    """Number of tokens that a new draft can propose, at most the target's. Default: as many as make its head as large as the
    rest of it, within 8192 and 32000."""
    first_samples: int = Field(default=8, ge=0)
    """Requests to wait for before a new draft starts: its first weights and its vocabulary come from them. 0 starts at once,
    with random weights and the lowest token ids."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW learning rate after warmup, of a draft that starts from random weights."""
    adaptation_rate: float = Field(default=1.5e-4, gt=0)
    """AdamW learning rate after warmup, of a draft that starts in closed form or from a published draft."""
    warmup_steps: int = Field(default=20, ge=0)
    """Optimizer steps over which the learning rate increases."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Maximum gradient norm; larger gradients are scaled down."""
    ttt_steps: int = Field(default=3, ge=1, le=8)
    """Draft steps that training unrolls (training-time test). Use at least the lookahead of serving."""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of an unrolled step relative to the previous one."""
    loss: Literal["forward_kl", "reverse_kl", "acceptance"] = "forward_kl"
    """Divergence between draft and target that is minimised."""
    acceptance_weight: float = Field(default=0.0, ge=0)
    """Weight of an additional acceptance loss: 1 - sum of min(p, q), the probability that a draft is rejected."""
    correction_weight: float = Field(default=1.0, ge=0)
    """Additional weight of tokens that replaced a rejected draft token."""
    discard_weight: float = Field(default=0.0, ge=0)
    """Weight of an additional loss after rejected draft tokens (lambda of Aurora's discard loss). Pods must capture these rows
    (UPDRAFT_INFERENCE_CAPTURE_COUNTERFACTUAL_ROWS). 0 ignores them."""
    trains_head: bool = False
    """Also train the draft's output head, which doubles the cost of a step. It is initialised with the target's head."""
    seed: int = 0
    """Random seed for initial weights and the choice of samples."""

    batch_tokens: int | None = Field(default=None, ge=1)
    """Captured tokens per optimizer step of each rank, with those of prompts; about as many, because requests are not
    cut. A step has a fresh request and, unless that fills it, one that rehearses, so long requests may exceed this, by less
    than one request. Default: as many as four requests of the stored ones' mean length have, or 16384 on a GPU."""
    max_uses: int = Field(default=6, ge=1)
    """Optimizer steps for which a sample counts as fresh. Without fresh samples training pauses."""
    replay_max_bytes: int | None = Field(default=None, ge=1024**2)
    """Bytes of stored traces, at each rank: half for the newest, four tenths for older ones of all clusters, a tenth for
    held-out ones. Files take up to a quarter more, and at most 64 MiB, until the space of dropped traces is reclaimed. The
    default is enough for 2,000 requests and 128 held-out ones of this target (see `updraft size`), or less if the disk is
    smaller."""
    capture_max_bytes: int | None = Field(default=None, ge=1024)
    """Maximum size of the streams in Redis together, as the pods have it (UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES). The trainer
    reports a Redis that may use less memory. The default is what `updraft size` shows for engine sglang."""
    retention_seconds: int | None = Field(default=None, ge=60)
    """Age at which traces are deleted: in the streams, and stored ones to train or evaluate on. By default only sizes limit
    it."""
    max_tenant_share: float = Field(default=0.5, gt=0, le=1)
    """Largest share of one tenant in replay and in what a draft is trained on and judged by, while there are requests of
    others. Requests without a tenant count as one. 1: no limit."""
    cache_max_bytes: int | None = Field(default=None, ge=0)
    """Memory for samples that may be used again; 0 keeps none. The default is at most 512 MiB, less for small targets:
    enough for 32 requests, as `updraft size` shows."""

    lookahead: int = Field(default=3, ge=1, le=8)
    """Drafts per verify step that estimates assume. Use the lookahead of serving."""
    evaluation_samples: int = Field(default=32, ge=2)
    """Held-out requests per estimate. More are used if a kind of traffic would otherwise have fewer than four."""
    evaluate_steps: int = Field(default=20, ge=1)
    """Optimizer steps between estimates."""
    evaluate_seconds: float = Field(default=15.0, gt=0)
    """Seconds after which an estimate is due earlier, if weights or held-out requests have changed. For drafts whose estimates
    take long, four times as long as the last one took."""
    min_samples: int = Field(default=8, ge=2)
    """Minimum number of held-out requests of today's traffic for publishing. The registry's gate requires the same number."""
    min_gain_percent: float = Field(default=1.0, ge=0)
    """Minimum gain in acceptance length over the serving draft, at the lower bound of the confidence interval."""
    min_first_gain_percent: float = Field(default=15.0, ge=0)
    """Minimum estimated gain of a first draft over no draft, because it has to pay for drafting."""
    confidence: float = Field(default=0.9, gt=0, lt=1)
    """Two-sided confidence of that interval. Higher than the gate's, because the trainer decides often and the gate once."""
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    """Training time that a kill may cost, in seconds. States are saved in the background, and early enough for that."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""
    log_format: Literal["json", "text"] = "json"
    """json for machines, text for people."""

    @property
    def registry_credentials(self) -> Credentials:
        return Credentials.of(self)

    @property
    def stream_keys(self) -> list[str]:
        return streams.keys(self.namespace, self.speculator, self.stream_shards)

    @property
    def shape(self) -> ShapeChoice:
        return _subset(self, ShapeChoice)

    @property
    def hyper(self) -> Hyperparameters:
        return _subset(self, Hyperparameters)

    @property
    def compute(self) -> Compute:
        """Conflict if the device is not there."""
        compute = Compute.on(self.device, pack_tokens=self.pack_tokens, recompute=self.recompute, compiles=self.compile)
        return replace(compute, sharding=self.sharding)

    @property
    def thresholds(self) -> PublishThresholds:
        return _subset(self, PublishThresholds)

    @property
    def schedule(self) -> TrainingSchedule:
        return _subset(self, TrainingSchedule)


def _subset(settings: TrainerSettings, cls: type[D]) -> D:
    """The settings that a dataclass has fields for."""
    return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})
