"""Keyed hashes of tenants."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from updraft_chassis.tenants import hashes


@given(st.text(), st.binary(min_size=32, max_size=32))
def test_a_hash_is_the_same_for_the_same_name_and_salt_and_is_read_back(name: str, salt: bytes) -> None:
    tenant = hashes.keyed(hashes.digest(name), salt)

    assert tenant == hashes.keyed(hashes.digest(f" {name} "), salt)
    assert 0 < tenant < 2**64
    assert hashes.parse(hashes.text(tenant)) == tenant


def test_another_salt_makes_another_hash_and_so_does_another_name() -> None:
    one, other = hashes.new_salt(), hashes.new_salt()
    acme, rival = hashes.digest("acme"), hashes.digest("rival")

    assert len({hashes.keyed(acme, one), hashes.keyed(acme, other), hashes.keyed(rival, one)}) == 3
    assert hashes.keyed(acme, one) != int.from_bytes(hashlib.sha256(b"acme").digest()[:8])


def test_what_is_no_hash_is_no_tenant() -> None:
    assert hashes.text(0) == ""
    assert [hashes.parse(text) for text in ("", "acme", "0" * 15, "0" * 17, "G" * 16, "0" * 16)] == [0] * 6
