"""Keyed hashes of tenants."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_chassis.errors import InvalidInput
from updraft_chassis.tenants import hashes
from updraft_tap.http.terms import UnknownTermsError, tenant_digest

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=256)


@given(NAMES, st.binary(min_size=32, max_size=32))
def test_a_hash_is_the_same_for_the_same_name_and_salt_and_is_read_back(name: str, salt: bytes) -> None:
    tenant = hashes.keyed(hashes.digest(name), salt)

    assert tenant == hashes.keyed(hashes.digest(f" {name} "), salt)
    assert 0 < tenant < 2**64
    assert hashes.parse(hashes.text(tenant)) == tenant


@pytest.mark.parametrize("name", ["", " \t", "a\nb", "x" * 257, "\u00a0", "\u00a0acme", "\udc85", "a\x00"])
def test_a_name_that_nobody_could_type_again_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="1 to 256 printable"):
        hashes.digest(name)
    with pytest.raises(UnknownTermsError, match="1 to 256 printable"):
        tenant_digest(name.encode("utf-8", "surrogateescape"))


@given(NAMES)
def test_pods_and_the_registry_hash_the_same_names_alike(name: str) -> None:
    assert hashes.digest(f" {name}\t") == tenant_digest(f"\t{name} ".encode())


def test_another_salt_makes_another_hash_and_so_does_another_name() -> None:
    one, other = hashes.new_salt(), hashes.new_salt()
    acme, rival = hashes.digest("acme"), hashes.digest("rival")

    assert len({hashes.keyed(acme, one), hashes.keyed(acme, other), hashes.keyed(rival, one)}) == 3
    assert hashes.keyed(acme, one) != int.from_bytes(hashlib.sha256(b"acme").digest()[:8])


def test_what_is_no_hash_is_no_tenant() -> None:
    assert hashes.text(0) == ""
    assert [hashes.parse(text) for text in ("", "acme", "0" * 15, "0" * 17, "G" * 16, "0" * 16)] == [0] * 6
