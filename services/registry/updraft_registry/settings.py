"""Settings of the registry: `UPDRAFT_REGISTRY_...`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from updraft_artifacts.sizing import MAX_VERSION_BYTES
from updraft_chassis.credentials import ServerTls
from updraft_chassis.errors import InvalidInput
from updraft_chassis.settings import Settings
from updraft_registry.identity.service_accounts import parse_accounts
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
    """Settings of one registry process."""

    model_config = SettingsConfigDict(env_prefix="UPDRAFT_REGISTRY_")

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces. If other machines can reach it, set a certificate and tokens."""
    port: int = Field(default=50051, ge=0, le=65535)
    """gRPC port; 0 takes a free one and logs it."""
    metrics_port: int = Field(default=9091, ge=0, le=65535)
    """HTTP port of /metrics, /healthz and /readyz; 0 takes a free one and logs it."""
    metrics_tls: bool = False
    """Whether metrics_port speaks HTTPS, with the certificate of the gRPC port."""
    tls_cert_file: Path | None = None
    """Certificate chain of the gRPC port in PEM format. It enables TLS and is reloaded when it changes."""
    tls_key_file: Path | None = None
    """Private key of the certificate. Reloaded when it changes."""
    tls_client_ca_file: Path | None = None
    """CA of client certificates. If set, clients must present a certificate (mTLS). Reloaded when it changes."""
    tokens_file: Path | None = None
    """Access tokens, one `role:token` per line, with role read, serve, publish or operate. Reloaded when it changes.

    `serve@speculator:token` is for the pods of one speculator; only they get what requests of tenants are captured with.

    Without tokens and without an issuer, every client may call everything.
    """
    issuer: str = ""
    """Issuer of the Kubernetes cluster whose ServiceAccounts may call, from its /.well-known/openid-configuration. If empty,
    tokens of ServiceAccounts are refused."""
    audience: str = Field(default="updraft-registry", min_length=1)
    """Audience that tokens of ServiceAccounts must have. Use a different one for each registry: a registry could use the tokens
    that it receives at any other registry with the same audience."""
    accounts: str = ""
    """Roles of ServiceAccounts: role:namespace/name entries, separated by commas. An account may have several roles. Bind
    serving pods to their speculator: serve@speculator:namespace/name."""
    key_set: str = ""
    """JSON Web Key Set that verifies tokens of ServiceAccounts: a file or an https URL. Within the cluster, use
    https://kubernetes.default.svc/openid/v1/jwks."""
    key_set_token_file: Path | None = None
    """File with the token for requests to that URL. Read for each request."""
    key_set_ca_file: Path | None = None
    """CA of that URL's certificate, PEM; by default, the CAs of the system. Read for each request."""
    data_dir: Path
    """Folder of the weights and the catalogue, on a local disk or a volume, not on a network share.

    Only one registry may use it at a time.
    """
    strategy: Strategy = DEFAULT.strategy
    """How a version that passed the offline gate reaches the pods. A speculator's own policy overrides this and the other
    rollout settings."""
    rollout_steps: str = Field(default="10:120,50:120", pattern=r"^\d+:\d+(,\d+:\d+)*$")
    """Steps of a canary as percent:seconds, the share of the pods and how long the step holds."""
    progress_deadline_seconds: int = Field(default=DEFAULT.progress_deadline_seconds, ge=1)
    """Time limit of a canary, without pauses."""
    max_pods_swapping: int = Field(default=DEFAULT.max_pods_swapping, ge=0)
    """Pods that may change versions at the same time; 0: all."""
    auto_rollback: bool = DEFAULT.auto_rollback
    """Roll back a canary that failed. Otherwise it waits for a person."""
    analysis_interval_seconds: int = Field(default=DEFAULT.analysis.interval_seconds, ge=1)
    """Minimum length of a slice, which is one observation of candidate against stable version."""
    analysis_min_samples: int = Field(default=DEFAULT.analysis.min_samples, ge=1)
    """Requests that a candidate must serve before it can win."""
    analysis_confidence: float = Field(default=DEFAULT.analysis.confidence, gt=0.0, lt=1.0)
    """The rate of false promotions is at most one minus this, however often the evidence is read."""
    analysis_on_inconclusive: OnInconclusive = DEFAULT.analysis.on_inconclusive
    """Action for a canary without a verdict at its deadline."""
    gate_min_samples: int = Field(default=DEFAULT.offline_gate.min_samples, ge=MIN_GATE_SAMPLES)
    """Held-out requests that a trainer's evaluation must cover."""
    gate_min_gain_percent: float = Field(default=DEFAULT.offline_gate.min_gain_percent, gt=-100.0, lt=1000.0)
    """Gain in acceptance length that the offline gate must be confident of. Without a serving version, the gain must cover the
    cost of drafting."""
    gate_confidence: float = Field(default=DEFAULT.offline_gate.confidence, gt=0.0, lt=1.0)
    """Two-sided confidence of the gain. The lower bound decides."""
    max_draft_bytes: int = Field(default=MAX_VERSION_BYTES, ge=1)
    """Largest weights file that is accepted. The default fits a 405B target; see `updraft size`."""
    revision_history_limit: int = Field(default=DEFAULT.revision_history_limit, ge=1)
    """Versions whose weights are kept in addition to those in use."""
    revision_history_megabytes: int = Field(default=DEFAULT.revision_history_megabytes, ge=0)
    """Maximum size of all kept weights of a speculator, in 10^6 bytes; versions in use are kept beyond it too. 0: no limit, so
    that old versions are deleted early only to make room for an upload on a full volume, the oldest first."""
    store_url: str = ""
    """Bucket for weights and documents: s3://bucket/prefix, gs://... or az://...; empty: the data folder.

    Credentials and endpoint come from the environment (AWS_..., GOOGLE_... or AZURE_...). Use one prefix per registry.
    """
    store_cache_bytes: int = Field(default=8 * 1024**3, ge=0)
    """Size of the local cache of the bucket's weights, in the data folder. The file used last is always kept."""
    store_redirect: bool = False
    """Redirect pods to the bucket with signed URLs. Pods that cannot reach the bucket fetch from the registry."""
    store_redirect_seconds: int = Field(default=900, ge=60, le=604800)
    """Lifetime of a signed URL."""
    delta_cache_bytes: int = Field(default=1024**3, ge=0)
    """Size of the cache of deltas between versions, in the data folder; 0: always send versions whole."""
    max_fetches: int = Field(default=16, ge=1)
    """Fetches of weights that are served at the same time, with 1 MiB in flight each. The others queue."""
    fetch_stall_seconds: float = Field(default=60.0, gt=0.0)
    """A fetch that makes no progress for this long is ended. The reader can resume it."""
    settle_seconds: float = Field(default=15.0, ge=0.0)
    """Time after a start, from the first pod on, in which pods may still be reconnecting. Until it ends, no canary begins and
    missing pods do not count against one. Pods try to connect at least every five seconds."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest severity that is logged."""
    log_format: Literal["json", "text"] = "json"
    """json for machines, text for people."""

    @property
    def tls(self) -> ServerTls | None:
        """TLS of the gRPC port; None: plaintext. InvalidInput if only one of certificate and key is set."""
        if self.tls_cert_file is None and self.tls_key_file is None and self.tls_client_ca_file is None:
            return None
        if self.tls_cert_file is None or self.tls_key_file is None:
            raise InvalidInput("TLS takes both UPDRAFT_REGISTRY_TLS_CERT_FILE and UPDRAFT_REGISTRY_TLS_KEY_FILE")
        return ServerTls(
            cert_file=self.tls_cert_file, key_file=self.tls_key_file, client_ca_file=self.tls_client_ca_file
        )

    @model_validator(mode="after")
    def _check_metrics_tls(self) -> Self:
        if self.metrics_tls and (self.tls_cert_file is None or self.tls_key_file is None):
            raise ValueError("METRICS_TLS requires TLS_CERT_FILE and TLS_KEY_FILE")
        return self

    @model_validator(mode="after")
    def _check_identity(self) -> Self:
        if bool(self.issuer) != bool(self.key_set) or (self.accounts and not self.issuer):
            raise ValueError("tokens of ServiceAccounts require an issuer, a key set and accounts")
        if "://" in self.key_set and not self.key_set.startswith("https://"):
            raise ValueError(
                "the key set must be a file or an https:// URL: without TLS, anyone could replace the keys"
            )
        try:
            if self.issuer and not parse_accounts(self.accounts):
                raise ValueError("an issuer requires accounts: without them, no ServiceAccount may call")
        except InvalidInput as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        wrong = problem(self.policy)
        if wrong:
            raise ValueError(f"invalid rollout settings: {wrong}")
        return self

    @property
    def policy(self) -> RolloutPolicy:
        """Defaults for fields that a speculator's own policy leaves unset."""
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
            revision_history_megabytes=self.revision_history_megabytes,
        )


def _step(text: str) -> RolloutStep:
    percent, _, hold_seconds = text.partition(":")
    return RolloutStep(pods_percent=int(percent), hold_seconds=int(hold_seconds))
