"""Settings of the registry: `UPDRAFT_REGISTRY_...`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from updraft_chassis.credentials import ServerTls
from updraft_chassis.errors import InvalidInput
from updraft_chassis.settings import Settings
from updraft_rollouts.policy import (
    DEFAULT,
    MIN_GATE_SAMPLES,
    Analysis,
    OfflineGate,
    RolloutPolicy,
    RolloutStep,
    problem,
)
from updraft_rollouts.terms import OnInconclusive, Strategy


class RegistrySettings(Settings):
    """Read once, in `__main__`."""

    model_config = SettingsConfigDict(env_prefix="UPDRAFT_REGISTRY_")

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all. Beyond this machine, set a certificate and tokens."""
    port: int = Field(default=50051, ge=0, le=65535)
    """gRPC port; 0 takes a free one and logs it."""
    metrics_port: int = Field(default=9091, ge=0, le=65535)
    """HTTP port of /metrics, /healthz and /readyz; 0 takes a free one and logs it."""
    tls_cert_file: Path | None = None
    """Certificate chain of the gRPC port, in PEM format: clients speak TLS. Read again when it changes."""
    tls_key_file: Path | None = None
    """Its key. Read again when it changes."""
    tls_client_ca_file: Path | None = None
    """Authority of the clients' certificates: only who has one gets in (mTLS). Read again when it changes."""
    tokens_file: Path | None = None
    """Who may call what: a line `role:token` each, of role read, serve, publish or operate. Read again when it changes.

    None: whoever connects may do everything.
    """
    data_dir: Path
    """Folder of the weights and the catalogue.

    One registry at a time; a local disk or a volume, no network share.
    """
    strategy: Strategy = DEFAULT.strategy
    """How a version that passed the offline gate gets to the pods. This and what follows up to the history: unless a policy
    says otherwise."""
    rollout_steps: str = Field(default="10:120,50:120", pattern=r"^\d+:\d+(,\d+:\d+)*$")
    """Steps of a canary: percent of the pods, and seconds that they hold."""
    progress_deadline_seconds: int = Field(default=DEFAULT.progress_deadline_seconds, ge=1)
    """Time that a canary has, without pauses."""
    max_pods_swapping: int = Field(default=DEFAULT.max_pods_swapping, ge=0)
    """Pods that may go from one version to another at once; 0: all."""
    auto_rollback: bool = DEFAULT.auto_rollback
    """Roll a canary back once it failed, or leave it to a person."""
    analysis_interval_seconds: int = Field(default=DEFAULT.analysis.interval_seconds, ge=1)
    """Least length of a slice, which is one observation of candidate against stable version."""
    analysis_min_samples: int = Field(default=DEFAULT.analysis.min_samples, ge=1)
    """Requests that a candidate must have served before it can win."""
    analysis_confidence: float = Field(default=DEFAULT.analysis.confidence, gt=0.0, lt=1.0)
    """1 - this bounds the rate of false promotions, however often one looks."""
    analysis_on_inconclusive: OnInconclusive = DEFAULT.analysis.on_inconclusive
    """What becomes of a canary without a verdict at its deadline."""
    gate_min_samples: int = Field(default=DEFAULT.offline_gate.min_samples, ge=MIN_GATE_SAMPLES)
    """Held-out requests that a trainer's evaluation must cover."""
    gate_min_gain_percent: float = Field(default=DEFAULT.offline_gate.min_gain_percent, gt=-100.0, lt=1000.0)
    """Gain in acceptance length that a candidate must surely have over what serves; against no draft: what drafting costs."""
    gate_confidence: float = Field(default=DEFAULT.offline_gate.confidence, gt=0.0, lt=1.0)
    """Two-sided confidence of that gain; its lower bound decides."""
    max_draft_bytes: int = Field(default=2 * 1024**3, ge=1)
    """Largest weights file that is taken."""
    revision_history_limit: int = Field(default=DEFAULT.revision_history_limit, ge=1)
    """Versions whose weights are kept besides those in use, unless a policy says otherwise."""
    store_url: str = ""
    """Bucket for weights and documents: s3://bucket/prefix, gs://... or az://...; empty: the data folder.

    Credentials and endpoint come from the environment, as AWS_..., GOOGLE_... or AZURE_... . One registry a prefix.
    """
    store_cache_bytes: int = Field(default=8 * 1024**3, ge=0)
    """Copies of a bucket's weights in the data folder: at most this much, and at least what was used last."""
    store_redirect: bool = False
    """Send pods to the bucket itself, with signed addresses. They must reach it; those that cannot are served from here."""
    store_redirect_seconds: int = Field(default=900, ge=60, le=604800)
    """How long such an address is good."""
    delta_cache_bytes: int = Field(default=1024**3, ge=0)
    """Deltas between versions that are kept in the data folder; 0: versions are always sent whole."""
    max_fetches: int = Field(default=16, ge=1)
    """Readers of weights that are sent to at once, a mebibyte in flight each; the others queue."""
    fetch_stall_seconds: float = Field(default=60.0, gt=0.0)
    """A reader that takes no mebibyte for this long loses its turn; it resumes when it comes again."""
    settle_seconds: float = Field(default=15.0, ge=0.0)
    """From the first pod that comes after a start until the fleet is taken for whole: before, no canary begins or is judged
    by who is missing. Pods try to connect at least every five seconds."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe message that is logged."""
    log_format: Literal["json", "text"] = "json"
    """json for machines, text for a person."""

    @property
    def tls(self) -> ServerTls | None:
        """How the gRPC port speaks; None: in plaintext. InvalidInput for half a certificate."""
        if self.tls_cert_file is None and self.tls_key_file is None and self.tls_client_ca_file is None:
            return None
        if self.tls_cert_file is None or self.tls_key_file is None:
            raise InvalidInput("TLS takes both UPDRAFT_REGISTRY_TLS_CERT_FILE and UPDRAFT_REGISTRY_TLS_KEY_FILE")
        return ServerTls(
            cert_file=self.tls_cert_file, key_file=self.tls_key_file, client_ca_file=self.tls_client_ca_file
        )

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        wrong = problem(self.policy)
        if wrong:
            raise ValueError(f"the rollout cannot be followed: {wrong}")
        return self

    @property
    def policy(self) -> RolloutPolicy:
        """What a speculator's own policy leaves open."""
        return RolloutPolicy(
            strategy=self.strategy,
            steps=tuple(_step(step) for step in self.rollout_steps.split(",")),
            analysis=Analysis(
                interval_seconds=self.analysis_interval_seconds,
                min_samples=self.analysis_min_samples,
                on_inconclusive=self.analysis_on_inconclusive,
                confidence=self.analysis_confidence,
            ),
            auto_rollback=self.auto_rollback,
            progress_deadline_seconds=self.progress_deadline_seconds,
            max_pods_swapping=self.max_pods_swapping,
            offline_gate=OfflineGate(
                min_samples=self.gate_min_samples,
                min_gain_percent=self.gate_min_gain_percent,
                confidence=self.gate_confidence,
            ),
            revision_history_limit=self.revision_history_limit,
        )


def _step(text: str) -> RolloutStep:
    percent, _, hold_seconds = text.partition(":")
    return RolloutStep(pods_percent=int(percent), hold_seconds=int(hold_seconds))
