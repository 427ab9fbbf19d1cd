"""Settings of the operator: `UPDRAFT_OPERATOR_...`."""

import json
import socket
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from updraft_chassis.settings import Settings
from updraft_operator.manifests.manifest import Images, OperatorConfig, digest
from updraft_operator.manifests.redis_users import address_problem
from updraft_operator.manifests.tls.terms import (
    CERTIFICATES_PER_CA,
    CertificateOrder,
    Issuer,
    Lives,
    OwnSecrets,
    Tls,
    TlsMode,
)


def _parsed(value: object) -> object:
    """JSON from a variable."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "[]")
    except ValueError as error:
        raise ValueError(f"expected JSON: {error}") from None


class OperatorSettings(Settings):
    """Read once, in `__main__`."""

    model_config = SettingsConfigDict(env_prefix="UPDRAFT_OPERATOR_")

    namespace: str = "updraft-system"
    """The operator's own namespace: that of its Lease. Registries accept the operator only from this namespace."""
    service_account: str = Field(default="updraft-operator", min_length=1)
    """The operator's own ServiceAccount, in its own namespace. It calls registries with tokens of this account."""
    watch_namespaces: str = ""
    """Namespaces to watch, separated by commas; empty means all."""
    identity: str = Field(default_factory=socket.gethostname, min_length=1)
    """Holder identity in the Lease; in Kubernetes the pod's name."""
    leader_election: bool = True
    """Work only while holding the Lease. Disable it only for a single local process."""
    lease_name: str = "updraft-operator"
    """Name of the Lease: one per set of operators that manage the same resources."""
    lease_seconds: float = Field(default=12.0, ge=3.0, le=300.0)
    """Duration of the Lease: another replica takes over after this time without a renewal."""
    host: str = "127.0.0.1"
    """Bind address of /metrics, /healthz and /readyz."""
    metrics_port: int = Field(default=9093, ge=0, le=65535)
    """Port of /metrics, /healthz and /readyz; 0 takes a free port and logs it."""
    metrics_from: Annotated[tuple[dict[str, Any], ...], NoDecode, BeforeValidator(_parsed)] = ()
    """Peers that may scrape the pods of resources, as a JSON list of those of a NetworkPolicy. If empty, everyone may. Metrics
    of the torch engine are on the port of clients."""
    metrics_token_file: Path | None = None
    """File with the bearer token that /metrics needs; read again when it changes. Without it, everyone who reaches the port can
    read the names of all speculators and of their namespaces."""
    inference_image: str = "updraft-inference:dev"
    """Image of inference pods with engine Torch, and of the agent beside an SGLang or vLLM server."""
    trainer_image: str = "updraft-trainer:dev"
    """Image of trainers."""
    registry_image: str = "updraft-registry:dev"
    """Image of registries."""
    operator_image: str = "updraft-operator:dev"
    """Image of the operator, which also downloads models and imports drafts."""
    sglang_image: str = "lmsysorg/sglang:v0.5.23"
    """Image of SGLang servers: a stock image without Updraft code."""
    vllm_image: str = "vllm/vllm-openai:v0.32.0"
    """Image of vLLM servers: a stock image without Updraft code."""
    redis_image: str = "redis:8.2-bookworm"
    """Image of a dedicated Redis, with sh, redis-server (at least 6.2) and redis-cli."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Pull policy of all these images."""
    image_pull_secrets: str = ""
    """Pull secrets in the namespaces of the resources, separated by commas."""
    fixed_user: bool = True
    """Run pods as user 65532. Set it to false on OpenShift, which chooses a user for each namespace and refuses others."""
    redis_url: SecretStr = SecretStr("")
    """Redis for speculators that name none, with a user that may manage users (ACL LIST, SETUSER, DELUSER) and delete keys.
    Pods and trainers get users of their own. If empty, those speculators capture no traces and train no drafts."""
    redis_tls_secret: str = ""
    """Secret in the operator's own namespace with the certificate of that Redis; with SelfSigned, the operator makes it. Empty:
    the address alone says how to connect."""
    redis_users_seconds: float = Field(default=5.0, gt=0.0, le=300.0)
    """How often those users are compared with what they should be. After a restart of Redis that lost them, pods keep traces in
    memory for that long."""
    redis_key_secret: str = ""
    """Secret in the operator's namespace with the key from which the passwords of dedicated Redis follow; the operator creates
    it. If empty, resources cannot have a Redis of their own (`traces.redis.mode: Dedicated`)."""
    redis_address: str = "{name}-redis.{namespace}.svc:6379"
    """Template of the address of a dedicated Redis."""
    tls_mode: TlsMode = TlsMode.DISABLED
    """Who signs certificates of registries and of the operator's Redis: the operator itself (SelfSigned), cert-manager with
    tls_issuer_name (CertManager), or nobody (Disabled): then they speak no TLS."""
    tls_ca_secret: str = "updraft-ca"  # noqa: S105 - a name
    """Secret in the operator's own namespace with its CA. Remove its data, and the operator makes another CA."""
    tls_ca_seconds: int = Field(default=31_536_000, ge=60)
    """How long a CA is valid. After two thirds of it there is another one; both are trusted until the former one expires."""
    tls_certificate_seconds: int = Field(default=7_776_000, ge=10)
    """How long a certificate is valid, at most a fourth of tls_ca_seconds. It is renewed after two thirds of it."""
    tls_metrics: bool = False
    """Whether the operator, registries, trainers and agents serve their metrics with TLS, unless tls_mode is Disabled.
    Prometheus has to accept any certificate, because none names the address of a pod."""
    tls_issuer_name: str = ""
    """Issuer of cert-manager that signs the certificates; its Secrets must have an entry ca.crt."""
    tls_issuer_kind: str = Field(default="ClusterIssuer", min_length=1)
    """Kind of that issuer. An Issuer must exist in each namespace with speculators."""
    tls_issuer_group: str = Field(default="cert-manager.io", min_length=1)
    """API group of that issuer."""
    registry_address: str = "{name}-registry.{namespace}.svc:50051"
    """Template of the address of a speculator's registry."""
    workers: int = Field(default=8, ge=1, le=64)
    """Number of speculators that are reconciled concurrently."""
    resync_seconds: float = Field(default=300.0, ge=5.0)
    """Period in which everything is listed and reconciled, regardless of the watches."""
    status_seconds: float = Field(default=30.0, ge=0.0)
    """Minimum time between two status writes that change only measurements."""
    cleanup_seconds: float = Field(default=60.0, ge=0.0, le=86_400.0)
    """How long a deletion with policy Delete waits for an unavailable Redis, in addition to the pods' grace period. After that
    the traces are left there, and an Event reports it."""
    upgrades_max_concurrent: int = Field(default=1, ge=0, le=1000)
    """Maximum number of resources whose pods are updated at the same time after an upgrade of the operator; 0 pauses these."""
    upgrades_deadline_seconds: float = Field(default=2400.0, ge=10.0)
    """Time within which the next pod of an updated resource must be ready again, unless its serving.startupSeconds allows more.
    Otherwise no other resource is updated."""
    dry_run: bool = False
    """Watch, and log what would be written, without writing anything. `updraft-operator --dry-run` logs it once and exits."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Minimum level of log messages."""
    log_format: Literal["json", "text"] = "json"
    """Log format: json for machines, text for people."""

    @model_validator(mode="after")
    def _has_an_issuer_and_lives_that_fit(self) -> Self:
        if self.tls_mode is TlsMode.CERT_MANAGER and not self.tls_issuer_name:
            raise ValueError("tls_mode CertManager requires tls_issuer_name, an issuer of cert-manager")
        if self.tls_certificate_seconds * CERTIFICATES_PER_CA > self.tls_ca_seconds:
            raise ValueError(f"tls_certificate_seconds must be at most a {CERTIFICATES_PER_CA}th of tls_ca_seconds")
        return self

    @field_validator("redis_url")
    @classmethod
    def _has_a_readable_address(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value() and (problem := address_problem(url.get_secret_value())):
            raise ValueError(problem)
        return url

    @property
    def namespaces(self) -> tuple[str, ...]:
        return _words(self.watch_namespaces)

    @property
    def own_secrets(self) -> OwnSecrets:
        redis, host = self.redis_tls_secret, urlsplit(self.redis_url.get_secret_value()).hostname or ""
        order = CertificateOrder(secret=redis, name=host) if redis else None
        return OwnSecrets(namespace=self.namespace, authority=self.tls_ca_secret, redis=order)

    @property
    def config(self) -> OperatorConfig:
        """The part of the settings that manifests depend on."""
        images = Images(
            inference=self.inference_image,
            trainer=self.trainer_image,
            registry=self.registry_image,
            operator=self.operator_image,
            sglang=self.sglang_image,
            vllm=self.vllm_image,
            redis=self.redis_image,
            pull_policy=self.image_pull_policy,
            pull_secrets=_words(self.image_pull_secrets),
            has_fixed_user=self.fixed_user,
        )
        config = OperatorConfig(
            images=images,
            namespace=self.namespace,
            account=self.service_account,
            metrics_from=self.metrics_from,
            tls=Tls(
                mode=self.tls_mode,
                issuer=Issuer(name=self.tls_issuer_name, kind=self.tls_issuer_kind, group=self.tls_issuer_group),
                has_metrics=self.tls_metrics,
                lives=Lives(ca_s=self.tls_ca_seconds, certificate_s=self.tls_certificate_seconds),
            ),
            has_redis=bool(self.redis_url.get_secret_value()),
            has_dedicated_redis=bool(self.redis_key_secret),
        )
        pods = replace(
            config, metrics_from=(), tls=replace(config.tls, issuer=None, lives=Lives())
        )  # no template has these
        return replace(
            config,
            runtime=f"{version('updraft')}-{digest(asdict(pods))[:8]}",
            max_upgrades=self.upgrades_max_concurrent,
            upgrade_deadline_s=self.upgrades_deadline_seconds,
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
