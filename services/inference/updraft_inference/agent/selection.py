"""Selects which requests are captured, and how much of each, before a request starts and only by its trace id. Pure.

The evaluation slice is a uniform sample by hash, independent of the traffic and of how well the draft does, so it
estimates what users get. It always includes hidden states, and the trainer never trains on it.
"""

import hashlib
from dataclasses import dataclass, field, replace

from updraft.fleet.v1 import fleet_pb2
from updraft_inference.engine import CaptureParams


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRates:
    """How much is captured. Fractions are of requests."""

    is_enabled: bool = True
    payload_fraction: float = 1.0
    evaluation_fraction: float = 0.1
    prompt_rows: int = 512
    counterfactual_rows: int = 0

    def under(self, policy: fleet_pb2.CapturePolicy) -> "CaptureRates":
        """These rates with the registry's policy applied; the number of rows stays the pod's own setting."""
        return replace(
            self,
            is_enabled=policy.enabled,
            payload_fraction=policy.payload_fraction,
            evaluation_fraction=policy.evaluation_fraction,
            counterfactual_rows=self.counterfactual_rows if policy.counterfactuals else 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """What to capture of one request, and `params` for the engine. `payload_probability` is the probability with which its
    payload was selected."""

    trace_id: bytes
    is_captured: bool = False
    is_opted_out: bool = False
    is_evaluation: bool = False
    payload_probability: float = 0.0
    params: CaptureParams = field(default_factory=CaptureParams)
    domain: str = ""


def plan(rates: CaptureRates, trace_id: bytes, *, is_opted_out: bool = False, domain: str = "") -> CapturePlan:
    if is_opted_out or not rates.is_enabled:
        return CapturePlan(trace_id=trace_id, is_opted_out=is_opted_out)
    is_evaluation = _uniform(b"evaluation", trace_id) < rates.evaluation_fraction
    probability = 1.0 if is_evaluation else rates.payload_fraction
    params = CaptureParams()
    if _uniform(b"payload", trace_id) < probability:
        # Counterfactual rows are for training only, so held-out requests have none.
        counterfactual_rows = 0 if is_evaluation else rates.counterfactual_rows
        params = CaptureParams(payload=True, prompt_rows=rates.prompt_rows, counterfactual_rows=counterfactual_rows)
    return CapturePlan(
        trace_id=trace_id,
        is_captured=True,
        is_evaluation=is_evaluation,
        payload_probability=probability,
        params=params,
        domain=domain,
    )


def _uniform(purpose: bytes, trace_id: bytes) -> float:
    """A number in [0, 1) that is equal on every pod and independent between purposes."""
    digest = hashlib.sha256(purpose + trace_id).digest()
    return int.from_bytes(digest[:6]) / 2**48  # 48 bits: exact in a float, so never rounded up to 1
