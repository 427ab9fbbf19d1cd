"""Settings of the registry: `UPDRAFT_REGISTRY_...`."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from updraft_chassis.settings import Settings
from updraft_registry.version import GatePolicy, Policy


class RegistrySettings(Settings):
    """Read once, in `__main__`."""

    model_config = SettingsConfigDict(env_prefix="UPDRAFT_REGISTRY_")

    host: str = "127.0.0.1"
    """Address to listen on.

    There is no authentication yet: beyond this machine, let a network policy guard it.
    """
    port: int = Field(default=50051, ge=0, le=65535)
    """gRPC port; 0 takes a free one and logs it."""
    metrics_port: int = Field(default=9091, ge=0, le=65535)
    """HTTP port of /metrics, /healthz and /readyz; 0 takes a free one and logs it."""
    data_dir: Path
    """Folder of the weights and the catalogue.

    One registry at a time; a local disk or a volume, no network share.
    """
    gate_min_samples: int = Field(default=8, ge=2)
    """Held-out requests that a trainer's evaluation must cover."""
    gate_min_gain_percent: float = Field(default=1.0, gt=-100.0, lt=1000.0)
    """Gain in acceptance length that a candidate must surely have over what serves; against no draft: what drafting costs."""
    gate_confidence: float = Field(default=0.8, gt=0.0, lt=1.0)
    """Two-sided confidence of that gain; its lower bound decides."""
    max_draft_bytes: int = Field(default=2 * 1024**3, ge=1)
    """Largest weights file that is taken."""
    revision_history_limit: int = Field(default=10, ge=1)
    """Versions whose weights are kept besides those in use, unless a policy says otherwise."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe message that is logged."""
    log_format: Literal["json", "text"] = "json"
    """json for machines, text for a person."""

    @property
    def policy(self) -> Policy:
        """What a speculator's own policy leaves open."""
        return Policy(
            gate=GatePolicy(
                min_samples=self.gate_min_samples,
                min_gain_percent=self.gate_min_gain_percent,
                confidence=self.gate_confidence,
            ),
            history_limit=self.revision_history_limit,
        )
