"""Over years of rotations, whenever anybody looks, a server's certificate is one that every client trusts."""

from dataclasses import dataclass, field, replace
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from updraft_operator.manifests.tls.terms import (
    CERTIFICATES_PER_CA,
    Certificate,
    Lives,
    is_due,
    needs_ca,
    signer,
    trusted,
)

NAME = "qwen-registry.team.svc"
_IDS = count()


def _certificate(now_s: float, life_s: float, **more: object) -> Certificate:
    facts = Certificate(
        key_id=f"key {next(_IDS)}", names=frozenset({NAME}), not_before_s=now_s, not_after_s=now_s + life_s
    )
    return replace(facts, **more)  # type: ignore[arg-type] # fields of it


@dataclass
class Rotation:
    """An operator that looks now and then, and a client that hears of new CAs a while later."""

    lives: Lives
    cas: list[Certificate] = field(default_factory=list)
    leaf: Certificate | None = None
    signed_by: Certificate | None = None
    heard: list[tuple[float, list[Certificate]]] = field(default_factory=list)
    num_leaves: int = 0

    def look(self, now_s: float) -> None:
        self.cas = trusted(self.cas, now_s)
        if needs_ca(self.cas, now_s):
            self.cas = [_certificate(now_s, self.lives.ca_s), *self.cas]
        bundle = " ".join(each.key_id for each in self.cas)
        if not self.heard or self.heard[-1][1] != self.cas:
            self.heard.append((now_s, self.cas))
        if is_due(self.leaf, NAME, bundle, now_s):
            self.signed_by = signer(self.cas, now_s)
            life_s = min(self.lives.certificate_s, self.signed_by.not_after_s - now_s)
            self.leaf = _certificate(now_s, life_s, authorities=bundle)
            self.num_leaves += 1

    def trusted_by_client(self, now_s: float, lag_s: float) -> list[Certificate]:
        """The first CAs come with the first certificate; a later set needs its time."""
        known = [cas for at_s, cas in self.heard if at_s + lag_s <= now_s]
        return known[-1] if known else self.heard[0][1]


@settings(deadline=None, max_examples=60)
@given(
    certificate_s=st.integers(600, 10_000_000),
    per_ca=st.integers(CERTIFICATES_PER_CA, 20),
    looks=st.lists(st.floats(0.001, 0.3), min_size=60, max_size=200),
    lag=st.floats(0.0, 1.0),
)
def test_every_client_trusts_what_a_server_shows(
    certificate_s: int, per_ca: int, looks: list[float], lag: float
) -> None:
    lives = Lives(ca_s=certificate_s * per_ca, certificate_s=certificate_s)
    rotation, now_s = Rotation(lives), 1_000_000.0
    lag_s = lag * min(3600.0, lives.ca_s / 24)
    rotation.look(now_s)
    for step in looks:  # fractions of a certificate's life
        for part in range(1, 4):  # between two looks of the operator
            at_s = now_s + part / 3 * step * certificate_s
            assert rotation.leaf is not None
            assert rotation.leaf.not_before_s <= at_s < rotation.leaf.not_after_s
            assert rotation.signed_by in rotation.trusted_by_client(at_s, lag_s)
            assert rotation.signed_by.not_after_s > at_s
        now_s += step * certificate_s
        rotation.look(now_s)


def test_certificates_and_cas_are_renewed_at_two_thirds_of_their_life() -> None:
    leaf = _certificate(0.0, 90.0, authorities="ca")
    assert not is_due(leaf, NAME, "ca", 59.9)
    assert is_due(leaf, NAME, "ca", 60.0)
    ca = _certificate(0.0, 900.0)
    assert not needs_ca([ca], 599.0)
    assert needs_ca([ca], 600.0)
    assert needs_ca([], 0.0)


def test_a_certificate_of_another_name_signer_or_time_is_replaced() -> None:
    leaf = _certificate(0.0, 90.0, authorities="ca")
    assert is_due(None, NAME, "ca", 1.0)
    assert is_due(leaf, "another.team.svc", "ca", 1.0)
    assert is_due(leaf, NAME, "another ca", 1.0)
    assert is_due(replace(leaf, is_signed=False), NAME, "ca", 1.0)
    assert is_due(leaf, NAME, "ca", -1.0), "the clock went back"


def test_a_new_ca_signs_after_clients_had_time_to_hear_of_it() -> None:
    former, new = _certificate(0.0, 8640.0), _certificate(5760.0, 8640.0)
    assert signer([new, former], 5760.0 + 359) is former
    assert signer([new, former], 5760.0 + 360) is new
    assert signer([former], 0.0) is former, "the first one has nobody to wait for"


def test_a_ca_that_is_about_to_end_signs_nothing_that_would_end_with_it() -> None:
    """The operator was away for long."""
    former, new = _certificate(0.0, 8640.0), _certificate(8000.0, 8640.0)
    assert signer([new, former], 8000.0) is new
    assert signer([former], 8000.0) is former, "there is no other"


def test_a_ca_from_the_future_is_neither_trusted_nor_enough() -> None:
    valid, future = _certificate(0.0, 8640.0), _certificate(10_000.0, 8640.0)
    assert needs_ca([future], 100.0)
    assert not needs_ca([future, valid], 100.0)
    assert trusted([future, valid], 100.0) == [valid]
