"""Settings of the trainer: `UPDRAFT_TRAINER_...`."""

import socket
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from updraft_chassis import streams
from updraft_chassis.credentials import Credentials
from updraft_chassis.settings import Name, Settings
from updraft_trainer.learning.learner import Hyper
from updraft_trainer.publishing.decision import PublishThresholds
from updraft_trainer.publishing.schedule import TrainingSchedule


class TrainerSettings(Settings):
    """Read once, in `__main__`."""

    model_config = SettingsConfigDict(env_prefix="UPDRAFT_TRAINER_")

    model: Path
    """Folder of the target in Hugging Face layout; only its embedding, head and last norm are read."""
    data_dir: Path
    """Folder of the replay, the saved states and the serving draft. One trainer at a time."""
    redis_url: SecretStr = Field(min_length=1)
    """Where the traces come from: redis://host:port/0 or unix:///path."""
    registry_address: str = Field(min_length=1)
    """host:port of the registry that drafts are published to."""
    registry_token_file: Path | None = None
    """File with the token that the registry knows this trainer by, of role publish; read again when it changes."""
    registry_ca_file: Path | None = None
    """Authority of the registry's certificate, in PEM format: speak TLS, and only to whom it vouches for."""
    registry_cert_file: Path | None = None
    """Certificate of this process, for a registry that asks for one (mTLS); read at the start."""
    registry_key_file: Path | None = None
    """Its key."""
    speculator: Name = "default"
    """Whose traffic to learn from, and whose drafts to publish."""
    namespace: Name = "default"
    """Part of the stream's name, as the serving pods have it."""
    pod_name: str = Field(default_factory=socket.gethostname, min_length=1)
    """This consumer's name in the stream's group: stable over restarts, so that what was in hand is handed back."""
    metrics_host: str = "127.0.0.1"
    """Address of /metrics, /healthz and /readyz."""
    metrics_port: int = Field(default=9092, ge=0, le=65535)
    """Its port; 0 takes a free one and logs it."""
    num_threads: int = Field(default=1, ge=1)
    """Threads of the tensor library: what is left to serving on a shared machine."""
    niceness: int = Field(default=10, ge=0, le=19)
    """Added to the process's nice value: 10 leaves serving about nine tenths of a contended core, 19 almost all."""
    scheduling: Literal["normal", "batch", "idle"] = "batch"
    """Linux policy: batch wakes without preempting serving; idle runs only where nothing else wants to."""

    draft_vocab_size: int = Field(default=8192, ge=16)
    """Tokens that a new draft can propose. An existing lineage keeps its own."""
    first_samples: int = Field(default=8, ge=0)
    """Samples to wait for before a new lineage chooses its vocabulary; 0 takes the lowest token ids."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of AdamW, after warmup."""
    warmup_steps: int = Field(default=20, ge=0)
    """Optimizer steps over which the learning rate rises."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm that is applied as it is."""
    ttt_steps: int = Field(default=3, ge=1, le=8)
    """Draft steps that training unrolls (training-time test); at least the lookahead of serving is of use."""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of an unrolled step relative to the one before it."""
    loss: Literal["forward_kl", "reverse_kl", "acceptance"] = "forward_kl"
    """What is minimised between draft and target."""
    acceptance_weight: float = Field(default=0.0, ge=0)
    """Weight of the acceptance loss added to it: 1 - sum of min(p, q), the probability that a draft is refused."""
    correction_weight: float = Field(default=1.0, ge=0)
    """Extra weight of tokens that replaced a rejected draft."""
    discard_weight: float = Field(default=0.0, ge=0)
    """Weight of the divergence after rejected drafts (lambda of Aurora's discard loss), added to it; pods have to capture
    these rows (UPDRAFT_INFERENCE_CAPTURE_COUNTERFACTUAL_ROWS). 0: they are not looked at."""
    trains_head: bool = False
    """Train the draft's output head too, which doubles the cost of a step; it starts as the target's."""
    seed: int = 0
    """Of the draft's first weights and of the choice of samples."""

    batch_samples: int = Field(default=4, ge=1)
    """Samples an optimizer step."""
    max_uses: int = Field(default=6, ge=1)
    """Optimizer steps for which a sample counts as fresh; without fresh samples training rests."""
    replay_max_bytes: int = Field(default=512 * 1024**2, ge=1024**2)
    """Disk for stored traces: half for the newest, four tenths for older ones of every kind, a tenth held out."""
    cache_max_bytes: int = Field(default=256 * 1024**2, ge=0)
    """Memory for decoded samples."""

    lookahead: int = Field(default=3, ge=1, le=8)
    """Drafts a verify step that estimates assume, as serving uses."""
    evaluation_samples: int = Field(default=32, ge=2)
    """Held-out requests an estimate looks at."""
    evaluate_steps: int = Field(default=20, ge=1)
    """Optimizer steps after which a new estimate is due."""
    evaluate_seconds: float = Field(default=15.0, gt=0)
    """Seconds after which one is due if anything changed at all."""
    min_samples: int = Field(default=8, ge=2)
    """Held-out requests below which nothing is published; the registry's gate asks for as many."""
    min_gain_percent: float = Field(default=1.0, ge=0)
    """Gain in acceptance length over the serving draft that a candidate must surely have."""
    min_first_gain_percent: float = Field(default=15.0, ge=0)
    """Estimated gain over no draft before the first is published: it has to pay for drafting."""
    confidence: float = Field(default=0.9, gt=0, lt=1)
    """Two-sided confidence of "surely". Above the gate's, for the trainer looks often and the gate once."""
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    """Seconds of training that a kill may cost."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe message that is logged."""
    log_format: Literal["json", "text"] = "json"
    """json for machines, text for a person."""

    @property
    def registry_credentials(self) -> Credentials:
        """What to show the registry."""
        return Credentials(
            token_file=self.registry_token_file,
            ca_file=self.registry_ca_file,
            cert_file=self.registry_cert_file,
            key_file=self.registry_key_file,
        )

    @property
    def stream_key(self) -> str:
        """The Redis stream of the speculator's traces."""
        return streams.key(self.namespace, self.speculator)

    @property
    def hyper(self) -> Hyper:
        """How to learn."""
        return Hyper(
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            clip_norm=self.clip_norm,
            ttt_steps=self.ttt_steps,
            step_decay=self.step_decay,
            loss=self.loss,
            acceptance_weight=self.acceptance_weight,
            correction_weight=self.correction_weight,
            discard_weight=self.discard_weight,
            trains_head=self.trains_head,
        )

    @property
    def bar(self) -> PublishThresholds:
        """What a candidate has to reach."""
        return PublishThresholds(
            min_samples=self.min_samples,
            min_gain_percent=self.min_gain_percent,
            min_first_gain_percent=self.min_first_gain_percent,
            confidence=self.confidence,
        )

    @property
    def pace(self) -> TrainingSchedule:
        """How often to estimate and to save."""
        return TrainingSchedule(
            evaluate_steps=self.evaluate_steps,
            evaluate_seconds=self.evaluate_seconds,
            checkpoint_seconds=self.checkpoint_seconds,
        )
