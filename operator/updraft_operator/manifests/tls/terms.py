"""Lives of certificates: pure decisions about when to renew one, which CA signs, and which CAs are trusted.

Certificates and CAs are renewed at two thirds of their life. A new CA is trusted at once, but signs only after all clients had
time to hear of it; the former one stays trusted until it expires. So at no time does a client meet a certificate of a CA that
it does not know.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

_RENEWED_AT = 2 / 3
"""Fraction of a life after which a certificate is renewed."""

_OVERDUE_AT = 5 / 6
"""Fraction of a life."""

CERTIFICATES_PER_CA = 4
"""A CA lives at least so many times as long as a certificate: what the former CA has signed ends before that CA does."""

_MAX_ANNOUNCED_S = 3600.0
_ANNOUNCED_PER_LIFE = 24


class TlsMode(StrEnum):
    SELF_SIGNED = "SelfSigned"
    """The operator has a CA and signs."""
    CERT_MANAGER = "CertManager"
    """cert-manager signs with an issuer that the installation names."""
    DISABLED = "Disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """An issuer of cert-manager."""

    name: str
    kind: str = "ClusterIssuer"
    group: str = "cert-manager.io"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """How long new certificates are valid, in seconds."""

    ca_s: float = 31_536_000
    certificate_s: float = 7_776_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS of an installation."""

    mode: TlsMode = TlsMode.DISABLED
    issuer: Issuer | None = None
    lives: Lives = Lives()
    has_metrics: bool = False
    """Whether pods serve their metrics with TLS."""
    authorities: str = ""
    """The CAs that clients trust, in PEM format; empty until they are known."""
    can_sign: bool = False
    """Whether the operator has them with their keys."""
    problem: str = ""
    """Why it has not, or cannot renew them; empty if it does not know."""

    @property
    def is_on(self) -> bool:
        return self.mode is not TlsMode.DISABLED

    @property
    def is_on_for_metrics(self) -> bool:
        return self.is_on and self.has_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Facts about a server's certificate, or a CA's own, from which decisions follow. Times are Unix seconds."""

    key_id: str
    """Identifies its public key."""
    names: frozenset[str]
    """DNS names; a CA has none."""
    not_before_s: float
    not_after_s: float
    authorities: str = ""
    """The CAs that were handed out with it, in PEM format."""
    is_signed: bool = True
    """By one of them directly."""

    @property
    def renewed_s(self) -> float:
        return self.not_before_s + _RENEWED_AT * (self.not_after_s - self.not_before_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateOrder:
    """A certificate to sign, and the Secret to keep it in."""

    secret: str
    name: str
    """Its DNS name."""
    part: str = ""
    """The part of the resource that it is for; empty for the operator's own Secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSecrets:
    """Secrets in the operator's own namespace."""

    namespace: str
    authority: str
    """Name of the one with the CA."""
    redis: CertificateOrder | None = None
    """The certificate of the chart's Redis; None if it speaks no TLS."""


def is_due(certificate: Certificate | None, name: str, authorities: str, now_s: float) -> bool:
    """Whether a server needs another certificate of this name, where clients trust `authorities`."""
    if certificate is None or not certificate.is_signed or certificate.authorities != authorities:
        return True
    return certificate.names != {name} or now_s >= certificate.renewed_s or now_s < certificate.not_before_s


def overdue_s(certificate: Certificate | None) -> float:
    """The Unix time after which somebody should look why it has not been renewed; a missing one is overdue."""
    if certificate is None:
        return 0.0
    return certificate.not_before_s + _OVERDUE_AT * (certificate.not_after_s - certificate.not_before_s)


def needs_ca(authorities: Iterable[Certificate], now_s: float) -> bool:
    """Whether a new CA is needed beside these, or as the first one. One from the future, of a clock that was wrong, is none."""
    return not any(authority.not_before_s <= now_s < authority.renewed_s for authority in authorities)


def trusted(authorities: Iterable[Certificate], now_s: float) -> list[Certificate]:
    """Those that are valid now, newest first."""
    valid = (authority for authority in authorities if authority.not_before_s <= now_s < authority.not_after_s)
    return sorted(valid, key=lambda authority: authority.not_before_s, reverse=True)


def signer(authorities: Sequence[Certificate], now_s: float) -> Certificate:
    """The CA that signs now: the newest that clients have heard of, of at least one that is `trusted`.

    If that one is about to end, the newest signs at once: what the former one signs now would end with it.
    """
    known = (authority for authority in authorities if now_s - authority.not_before_s >= _announced_s(authority))
    found = next(known, authorities[-1])
    return found if found.not_after_s - now_s > 2 * _announced_s(found) else authorities[0]


def _announced_s(authority: Certificate) -> float:
    """How long a CA is known before it signs: kubelets take up to two minutes to renew a mounted file, nodes may be busy."""
    return min(_MAX_ANNOUNCED_S, (authority.not_after_s - authority.not_before_s) / _ANNOUNCED_PER_LIFE)
