"""The catalogue: what was written is read back, all or nothing."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.checkpoints import TARGET, draft, evaluation
from tests.support.versions import NOW_MS

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Conflict, Corrupt, NotFound
from updraft_registry import wire
from updraft_registry.catalogue import Catalogue
from updraft_registry.version import Actor, Phase, Policy, Strategy, Transition, Version, Wish

DEFAULTS = Policy(history_limit=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite3"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    with closing(Catalogue(path, defaults=DEFAULTS)) as opened:
        yield opened


def add(catalogue: Catalogue, number: int, *, speculator: str = "default") -> Version:
    manifest = draft(number).manifest(speculator, evaluation=evaluation(num_samples=3))
    version = wire.pending(manifest, number, NOW_MS)
    catalogue.add(version, manifest)
    return version


def move(number: int, before: Phase, after: Phase, at_ms: int = NOW_MS + 5) -> Transition:
    return Transition(number=number, before=before, after=after, reason="so", actor=Actor.GATE, at_ms=at_ms)


def test_a_version_is_read_back_as_it_was_added(catalogue: Catalogue) -> None:
    version = add(catalogue, 1)
    manifest = draft(1).manifest(evaluation=evaluation(num_samples=3))
    assert catalogue.version("default", 1) == (version, manifest)
    speculator = catalogue.speculator("default")
    assert (speculator.versions, speculator.latest) == ((version,), 1)
    assert speculator.lineage is not None
    assert speculator.lineage.target_fingerprint == TARGET


def test_everything_survives_closing_and_opening(path: Path) -> None:
    with closing(Catalogue(path, defaults=DEFAULTS)) as first:
        add(first, 1)
        first.record("default", [move(1, Phase.PENDING, Phase.STABLE)])
        first.pin("default", 1, "why not", NOW_MS)
        first.pause("default", is_paused=True, reason="lunch", now_ms=NOW_MS)
        before = first.speculator("default"), first.history("default", 10)
    with closing(Catalogue(path, defaults=DEFAULTS)) as second:
        assert (second.speculator("default"), second.history("default", 10)) == before


def test_a_transition_moves_the_version_and_is_history(catalogue: Catalogue) -> None:
    add(catalogue, 1)
    transition = move(1, Phase.PENDING, Phase.STABLE)
    catalogue.record("default", [transition])
    version, _ = catalogue.version("default", 1)
    assert (version.phase, version.reason, version.since_ms) == (Phase.STABLE, "so", NOW_MS + 5)
    assert version.is_proven
    newest, published = catalogue.history("default", 10)
    assert newest == transition
    assert (published.before, published.after) == (None, Phase.PENDING)


def test_what_has_served_stays_proven_when_it_steps_down(catalogue: Catalogue) -> None:
    add(catalogue, 1)
    catalogue.record(
        "default", [move(1, Phase.PENDING, Phase.STABLE), move(1, Phase.STABLE, Phase.SUPERSEDED, NOW_MS + 9)]
    )
    version, _ = catalogue.version("default", 1)
    assert (version.phase, version.is_proven) == (Phase.SUPERSEDED, True)


def test_two_stable_versions_are_impossible_and_nothing_of_the_attempt_stays(catalogue: Catalogue) -> None:
    for number in (1, 2, 3):
        add(catalogue, number)
    catalogue.record("default", [move(1, Phase.PENDING, Phase.STABLE)])
    before = catalogue.speculator("default"), catalogue.history("default", 10)
    with pytest.raises(sqlite3.IntegrityError):
        catalogue.record("default", [move(2, Phase.PENDING, Phase.HELD), move(3, Phase.PENDING, Phase.STABLE)])
    assert (catalogue.speculator("default"), catalogue.history("default", 10)) == before


def test_an_unknown_speculator_has_the_default_policy_and_nothing_else(catalogue: Catalogue) -> None:
    speculator = catalogue.speculator("nobody")
    assert (speculator.wish, speculator.versions, speculator.latest) == (Wish(policy=DEFAULTS), (), 0)
    assert not speculator.is_known
    with pytest.raises(NotFound, match="nobody has no version 1; its newest is none yet"):
        catalogue.version("nobody", 1)


def test_a_policy_may_come_before_the_first_version(catalogue: Catalogue) -> None:
    document = registry_pb2.RolloutPolicy(strategy=registry_pb2.STRATEGY_MANUAL)
    catalogue.set_policy("default", document, NOW_MS)
    assert catalogue.speculator("default").wish.policy == replace(DEFAULTS, strategy=Strategy.MANUAL)
    assert catalogue.policy("default") == document
    assert catalogue.names() == ("default",)


def test_pins_and_pauses_are_history_too(catalogue: Catalogue) -> None:
    add(catalogue, 1)
    catalogue.pin("default", 0, "costs", NOW_MS)
    catalogue.pin("default", None, "", NOW_MS)
    catalogue.pause("default", is_paused=True, reason="lunch", now_ms=NOW_MS)
    catalogue.pause("default", is_paused=False, reason="", now_ms=NOW_MS)
    reasons = [t.reason for t in catalogue.history("default", 4)]
    assert reasons == ["resumed", "paused: lunch", "unpinned", "pinned to no draft: costs"]
    assert {t.actor for t in catalogue.history("default", 4)} == {Actor.OPERATOR}


def test_weights_that_are_no_longer_kept_leave_the_version_known(catalogue: Catalogue) -> None:
    version = add(catalogue, 1)
    catalogue.keep("default", 1, is_kept=False)
    assert catalogue.speculator("default").versions == ()
    assert catalogue.speculator("default").latest == 1
    assert catalogue.find("default", version.tensors_digest) == replace(version, is_kept=False)
    assert catalogue.kept_digests() == frozenset()


def test_pages_follow_one_another_without_a_gap(catalogue: Catalogue) -> None:
    for speculator in ("a", "b"):
        for number in (1, 2, 3):
            add(catalogue, number, speculator=speculator)
    seen: list[tuple[str, int]] = []
    after = None
    while page := catalogue.page("", after=after, size=2):
        seen += [(manifest.speculator, version.number) for version, manifest in page]
        after = seen[-1]
    assert seen == [(speculator, number) for speculator in ("a", "b") for number in (3, 2, 1)]
    assert [v.number for v, _ in catalogue.page("b", after=None, size=9)] == [3, 2, 1]


def test_a_damaged_file_is_told_with_what_to_do(path: Path) -> None:
    path.write_bytes(b"SQLite format 4" + b"\xff" * 5000)
    with pytest.raises(Corrupt, match=r"catalogue.sqlite3 is damaged .* move it away"):
        Catalogue(path, defaults=DEFAULTS)


def test_a_file_of_a_newer_registry_is_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(Conflict, match="has schema 99, this registry knows 1"):
        Catalogue(path, defaults=DEFAULTS)
