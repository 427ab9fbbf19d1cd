"""Selects which requests are captured, and how much of each, before a request starts. Pure.

The choice depends on the trace id, on what the sender permits, and on a probability. The evaluation slice is a uniform sample
by hash, independent of the traffic and of how well the draft does, so it estimates what users get. The trainer never trains on
it. A request whose sender forbids training has a payload only if it is in that slice, so that it stays a uniform sample. Where
the pod's own setting forbids training, there is no slice.
"""

import hashlib
from dataclasses import dataclass, field, replace
from enum import StrEnum

from updraft_chassis.tenants import hashes
from updraft_inference.agent.credits import CERTAIN, Chance
from updraft_inference.engine import CaptureParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """Permitted uses of a trace: the fields of `trace_pb2.Policy`. `region` is where it may be stored; "": anywhere.
    `retention_seconds` after its end it has to be deleted; 0: when the trainer's own limits say so."""

    train: bool = True
    retain: bool = True
    region: str = ""
    retention_seconds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureTerms:
    """The inputs of the decision to capture one request: its sender's permissions, and properties of the request."""

    is_opted_out: bool = False
    is_opted_in: bool = False
    """The sender asked for capture."""
    is_unasked: bool = False
    """The sender could not say whether it opts out, so it counts as if it did."""
    may_train: bool = True
    may_retain: bool = True
    is_constrained: bool = False
    """A grammar masks tokens, so the text does not follow the target's own distribution."""
    domain: str = ""
    tenant: str = ""
    """The SHA-256 of the tenant's name, in hexadecimal; empty for none. It never leaves the pod."""
    retention_s: int = 0
    """Age at which its traces are deleted; 0: as all others."""
    region: str = ""
    """The only one in which its traces may be stored; empty: any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRates:
    """How much is captured, at most. Fractions are of requests."""

    payload_fraction: float = 1.0
    evaluation_fraction: float = 0.1
    prompt_rows: int = 512
    counterfactual_rows: int = 0
    permissions: Permissions = Permissions()
    needs_opt_in: bool = False
    """Only requests that opted in are captured."""
    tenant_salt: bytes = b""
    """With which tenants are hashed. Without it, requests of a tenant are not captured: they could not be forgotten."""


class Refusal(StrEnum):
    """Why nothing of a request is captured."""

    OPTED_OUT = "opted_out"
    NOT_OPTED_IN = "not_opted_in"
    NOT_ASKED = "not_asked"
    NO_SALT = "no_salt"
    OTHER_REGION = "other_region"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """The decision for one request, with `params` for the engine. `payload_probability` is the probability with which its
    payload was selected."""

    trace_id: bytes
    is_captured: bool = False
    refusal: Refusal | None = None
    is_evaluation: bool = False
    is_constrained: bool = False
    payload_probability: float = 0.0
    params: CaptureParams = field(default_factory=CaptureParams)
    permissions: Permissions = Permissions()
    domain: str = ""
    tenant: int = 0
    """The keyed hash of its tenant; 0: none."""

    @property
    def may_have_payload(self) -> bool:
        """The trainer stores everything that it learns from, and also everything that it only judges by."""
        is_useful = self.permissions.retain and (self.permissions.train or self.is_evaluation)
        return self.is_captured and is_useful and not self.is_constrained


def plan(
    rates: CaptureRates, trace_id: bytes, terms: CaptureTerms = CaptureTerms(), chance: Chance = CERTAIN
) -> CapturePlan:
    """The plan of a request. One that the trainer would refuse has no payload, because nobody could use it."""
    light = _light(rates, trace_id, terms)
    if not light.may_have_payload:
        return light
    is_evaluation = light.is_evaluation
    probability = min(1.0, chance.held_out) if is_evaluation else min(rates.payload_fraction, chance.payload)
    params = CaptureParams()
    if _uniform(b"payload", trace_id) < probability:
        params = _payload(rates, is_evaluation=is_evaluation)
    return replace(light, payload_probability=probability, params=params)


def plan_of_chosen(
    rates: CaptureRates, trace_id: bytes, terms: CaptureTerms = CaptureTerms(), *, probability: float
) -> CapturePlan:
    """The plan of a request for whose payload a server chose it, with this probability: see updraft_tap.policy."""
    light = _light(rates, trace_id, terms)
    if not light.may_have_payload:
        return light
    params = _payload(rates, is_evaluation=light.is_evaluation)
    return replace(light, payload_probability=probability, params=params)


def _light(rates: CaptureRates, trace_id: bytes, terms: CaptureTerms) -> CapturePlan:
    """Without a payload."""
    if (refusal := refusal_of(rates, terms)) is not None:
        return CapturePlan(trace_id=trace_id, refusal=refusal)
    permissions = Permissions(
        train=rates.permissions.train and terms.may_train,
        retain=rates.permissions.retain and terms.may_retain,
        region=rates.permissions.region or terms.region,
        retention_seconds=terms.retention_s,
    )
    return CapturePlan(
        trace_id=trace_id,
        is_captured=True,
        is_evaluation=rates.permissions.train and _uniform(b"evaluation", trace_id) < rates.evaluation_fraction,
        is_constrained=terms.is_constrained,
        permissions=permissions,
        domain=terms.domain,
        tenant=hashes.keyed(terms.tenant, rates.tenant_salt) if terms.tenant else 0,
    )


def refusal_of(rates: CaptureRates, terms: CaptureTerms) -> Refusal | None:
    """Why nothing of a request with these terms is captured; None if it is."""
    if terms.is_unasked:
        return Refusal.NOT_ASKED
    if terms.is_opted_out:
        return Refusal.OPTED_OUT
    if rates.needs_opt_in and not terms.is_opted_in:
        return Refusal.NOT_OPTED_IN
    if terms.region and rates.permissions.region not in ("", terms.region):
        return Refusal.OTHER_REGION
    return Refusal.NO_SALT if terms.tenant and not rates.tenant_salt else None


def _payload(rates: CaptureRates, *, is_evaluation: bool) -> CaptureParams:
    """Counterfactual rows are for training only, so held-out requests have none."""
    return CaptureParams(
        payload=True,
        prompt_rows=rates.prompt_rows,
        counterfactual_rows=0 if is_evaluation else rates.counterfactual_rows,
    )


def _uniform(purpose: bytes, trace_id: bytes) -> float:
    """A number in [0, 1) that is equal on every pod and independent between purposes."""
    digest = hashlib.sha256(purpose + trace_id).digest()
    return int.from_bytes(digest[:6]) / 2**48  # 48 bits: exact in a float, so never rounded up to 1
