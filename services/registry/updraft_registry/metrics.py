"""Every metric of the registry, on one page.

Labels are few and bounded: a speculator, a phase, a reason. A version is the value of a gauge, never a label.
"""

from dataclasses import dataclass
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge

_PREFIX = "updraft_registry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Built once, passed to whoever counts."""

    published: Counter
    refused: Counter
    published_bytes: Counter
    fetched_bytes: Counter
    transitions: Counter
    version: Gauge
    pods: Gauge
    reports: Counter
    deleted_blobs: Counter
    failed_decisions: Counter

    @classmethod
    def on(cls, registry: CollectorRegistry) -> Self:
        """Register all of them."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, labels, registry=registry)

        return cls(
            published=counter(
                "published_versions",
                "Uploads that ended well, by whether their content was known (new, existed).",
                *("speculator", "result"),
            ),
            refused=counter(
                "refused_uploads",
                "Uploads that were refused, by the gRPC status of the reason; CANCELLED: the sender went away.",
                "reason",
            ),
            published_bytes=counter("published_bytes", "Bytes of weights that became versions."),
            fetched_bytes=counter("fetched_bytes", "Bytes of weights sent."),
            transitions=counter(
                "transitions",
                "Versions that changed their phase, by the phase they came to and by who caused it.",
                *("speculator", "phase", "actor"),
            ),
            version=gauge("version", "Version in a role (stable, latest); 0 = no draft.", "speculator", "role"),
            pods=gauge(
                "pods",
                "Connected pods: all, those that serve the stable version, those that refuse a version.",
                *("speculator", "state"),
            ),
            reports=counter("reports", "Reports of pods."),
            deleted_blobs=counter("deleted_blobs", "Weights deleted by retention."),
            failed_decisions=counter(
                "failed_decisions",
                "Decisions that could not be written (a full disk); the old state holds, and they are tried again.",
            ),
        )
