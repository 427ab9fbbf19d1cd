"""Salts and orders to forget: kept, in order, and restored from documents."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.checkpoints import draft
from tests.support.versions import NOW_MS

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Exhausted
from updraft_registry.messages import wire
from updraft_registry.storage import tenants
from updraft_registry.storage.catalogue import Catalogue
from updraft_registry.storage.tenants import TenantRecord
from updraft_rollouts.policy import RolloutPolicy

ACME, RIVAL = 2**64 - 1, 7


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite3"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    with closing(Catalogue(path, defaults=RolloutPolicy())) as opened:
        yield opened


def test_a_salt_is_made_once_per_speculator_and_outlives_the_process(catalogue: Catalogue, path: Path) -> None:
    salt = catalogue.tenants.salt("one")

    assert len(salt) == 32
    assert catalogue.tenants.salt("one") == salt != catalogue.tenants.salt("two")
    assert catalogue.names() == (), "a pod that asks for a salt makes no speculator known"
    with closing(Catalogue(path, defaults=RolloutPolicy())) as again:
        assert again.tenants.salt("one") == salt


def test_so_many_speculators_get_a_salt_and_no_more(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "MAX_SALTS", 2)

    for name in ("a", "b"):
        assert len(catalogue.tenants.salt(name)) == 32
    with pytest.raises(Exhausted, match=r"2 speculators without a version .* c gets none"):
        catalogue.tenants.salt("c")

    catalogue.pause("default", is_paused=True, reason="", now_ms=NOW_MS)
    assert len(catalogue.tenants.salt("default")) == 32, "names that pods made up take nothing from a known one"


def test_orders_have_times_that_ascend_whatever_the_clock_does(catalogue: Catalogue) -> None:
    for tenant, now_ms in ((ACME, NOW_MS), (RIVAL, NOW_MS - 5_000), (ACME, NOW_MS)):
        catalogue.forget("default", tenant, now_ms)

    assert catalogue.tenants.record("default").forgotten == {RIVAL: NOW_MS + 1, ACME: NOW_MS + 2}
    assert catalogue.speculator("default").forgotten_ms == NOW_MS + 2
    assert [event.reason for event in catalogue.history("default", 9).values()] == [
        "tenant ffffffffffffffff is to be forgotten",
        "tenant 0000000000000007 is to be forgotten",
        "tenant ffffffffffffffff is to be forgotten",
    ]


def test_so_many_tenants_can_be_forgotten_and_the_same_ones_again(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "MAX_FORGOTTEN", 1)
    catalogue.forget("default", ACME, NOW_MS)
    catalogue.forget("default", ACME, NOW_MS)

    with pytest.raises(Exhausted, match="has 1 forgotten tenants"):
        catalogue.forget("default", RIVAL, NOW_MS)

    assert catalogue.tenants.record("default").forgotten.keys() == {ACME}


def test_a_speculator_with_a_salt_has_a_document_as_soon_as_it_is_known(catalogue: Catalogue) -> None:
    catalogue.tenants.salt("default")
    assert catalogue.documents() == frozenset()

    manifest = draft(1).manifest()
    catalogue.add(wire.pending(manifest, 1, NOW_MS), manifest)

    assert catalogue.documents() == {("default", 0), ("default", 1)} == set(catalogue.stale_documents())


def test_a_salt_of_a_known_speculator_is_written_into_its_document(catalogue: Catalogue) -> None:
    manifest = draft(1).manifest()
    catalogue.add(wire.pending(manifest, 1, NOW_MS), manifest)
    catalogue.mark_written(catalogue.stale_documents())

    catalogue.tenants.salt("default")

    assert catalogue.stale_documents() == [("default", 0)]


def test_a_restore_that_fails_halfway_can_be_repeated(catalogue: Catalogue, path: Path) -> None:
    record = TenantRecord(salt=bytes(32), forgotten={ACME: NOW_MS})
    desired = registry_pb2.SpeculatorState(speculator="default", paused=True)
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON salts BEGIN SELECT RAISE(ABORT, 'halfway'); END")
        with pytest.raises(sqlite3.IntegrityError, match="halfway"):
            catalogue.restore(desired, {}, record)
        assert catalogue.names() == (), "the next start takes it for unknown, and reads its document again"
        other.execute("DROP TRIGGER full")

    catalogue.restore(desired, {}, record)
    assert catalogue.tenants.record("default") == record
    assert catalogue.names() == ("default",)


def test_what_a_document_says_is_restored(catalogue: Catalogue) -> None:
    record = TenantRecord(salt=bytes(32), forgotten={ACME: NOW_MS})
    catalogue.forget("default", RIVAL, NOW_MS)
    catalogue.tenants.salt("default")

    catalogue.tenants.restore("default", record)

    assert catalogue.tenants.salt("default") == bytes(32)
    assert catalogue.tenants.record("default").forgotten == {ACME: NOW_MS, RIVAL: NOW_MS}
