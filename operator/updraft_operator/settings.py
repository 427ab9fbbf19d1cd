"""Settings of the operator: `UPDRAFT_OPERATOR_...`."""

import socket
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from updraft_chassis.settings import Settings
from updraft_operator.manifests.manifest import Images, OperatorConfig


class OperatorSettings(Settings):
    """Read once, in `__main__`."""

    model_config = SettingsConfigDict(env_prefix="UPDRAFT_OPERATOR_")

    namespace: str = "updraft-system"
    """Its own namespace: of its Lease, and the one whose operator pods registries let in."""
    watch_namespaces: str = ""
    """Namespaces whose resources are looked after, with commas between; empty: all."""
    identity: str = Field(default_factory=socket.gethostname, min_length=1)
    """Who holds the Lease; in Kubernetes the pod's name."""
    leader_election: bool = True
    """Work only while holding the Lease. Turn it off for a single process at a desk."""
    lease_name: str = "updraft-operator"
    """The Lease: one for each set of operators that look after the same resources."""
    lease_seconds: float = Field(default=12.0, ge=3.0, le=300.0)
    """After this long without a sign of life another replica takes over."""
    host: str = "127.0.0.1"
    """Address of /metrics, /healthz and /readyz."""
    metrics_port: int = Field(default=9093, ge=0, le=65535)
    """Its port; 0 takes a free one and logs it."""
    inference_image: str = "updraft-inference:dev"
    """Image of inference pods with engine torch, and of the agent beside SGLang."""
    trainer_image: str = "updraft-trainer:dev"
    """Image of trainers."""
    registry_image: str = "updraft-registry:dev"
    """Image of registries."""
    operator_image: str = "updraft-operator:dev"
    """Image of the operator itself: it also downloads models and imports drafts."""
    sglang_image: str = "lmsysorg/sglang:v0.5.23"
    """Image of SGLang servers; stock, nothing of ours is in it."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Of all of them."""
    image_pull_secrets: str = ""
    """Secrets in the resources' own namespaces, with commas between."""
    redis_url: SecretStr = SecretStr("")
    """Redis for speculators that name none; empty: those learn nothing."""
    registry_address: str = "{name}-registry.{namespace}.svc:50051"
    """How a speculator's registry is reached."""
    workers: int = Field(default=8, ge=1, le=64)
    """Speculators that are worked on at once."""
    resync_seconds: float = Field(default=300.0, ge=5.0)
    """How often everything is listed and looked at, whether or not the watches said something."""
    status_seconds: float = Field(default=30.0, ge=0.0)
    """Least time between two writes of a status in which only measurements changed."""
    cleanup_seconds: float = Field(default=60.0, ge=0.0, le=86_400.0)
    """How long a deletion with policy Delete waits for a Redis that is away, beyond the pods' grace period; then the traces
    stay there, and an Event says so."""
    dry_run: bool = False
    """Watch, and log what would be written; write nothing. (`updraft-operator --dry-run` says it once, and exits.)"""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe message that is logged."""
    log_format: Literal["json", "text"] = "json"
    """json for machines, text for a person."""

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Those to look after; empty: all."""
        return _words(self.watch_namespaces)

    @property
    def config(self) -> OperatorConfig:
        """What builds take from here."""
        return OperatorConfig(
            images=Images(
                inference=self.inference_image,
                trainer=self.trainer_image,
                registry=self.registry_image,
                operator=self.operator_image,
                sglang=self.sglang_image,
                pull_policy=self.image_pull_policy,
                pull_secrets=_words(self.image_pull_secrets),
            ),
            namespace=self.namespace,
            has_redis=bool(self.redis_url.get_secret_value()),
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
