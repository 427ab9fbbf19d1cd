"""The catalogue: what was written is read back, all or nothing."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.checkpoints import TARGET, draft, evaluation
from tests.support.rollouts import seen
from tests.support.versions import NOW_MS

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Conflict, Corrupt, NotFound
from updraft_registry.messages import wire
from updraft_registry.rollout.comparison import Slice
from updraft_registry.rollout.decision import decide
from updraft_registry.rollout.version import Actor, DesiredState, Rollout, Transition, Version
from updraft_registry.storage.catalogue import Catalogue
from updraft_registry.storage.schema import MIGRATIONS
from updraft_rollouts.policy import RolloutPolicy, RolloutStep
from updraft_rollouts.terms import Comparison, Phase, Strategy

DEFAULTS = RolloutPolicy(revision_history_limit=4)

ROLLOUT = Rollout(
    candidate=2,
    baseline=1,
    comparison=Comparison.PODS,
    started_ms=NOW_MS,
    step_since_ms=NOW_MS,
    run_ms=20_000,
    pods=("pod-1", "pod-7"),
    evidence=replace(seen(1.0), open=Slice(since_ms=0)),
)


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


def move(number: int, before: Phase, after: Phase, at_ms: int = NOW_MS + 5, *, won: bool = False) -> Transition:
    proven_ms = at_ms if won else 0
    return Transition(
        number=number, before=before, after=after, reason="so", actor=Actor.GATE, at_ms=at_ms, proven_ms=proven_ms
    )


def test_a_version_is_read_back_as_it_was_added(catalogue: Catalogue) -> None:
    version = add(catalogue, 1)
    manifest = draft(1).manifest(evaluation=evaluation(num_samples=3))
    assert catalogue.version("default", 1) == (version, manifest)
    speculator = catalogue.speculator("default")
    assert (speculator.versions, speculator.latest) == ((version,), 1)
    assert speculator.target == TARGET


def test_versions_that_were_all_rejected_set_no_target(catalogue: Catalogue) -> None:
    add(catalogue, 1)
    catalogue.record("default", [move(1, Phase.PENDING, Phase.REJECTED)], None)
    assert not catalogue.speculator("default").target
    add(catalogue, 2)
    assert catalogue.speculator("default").target == TARGET


def test_everything_survives_closing_and_opening(path: Path) -> None:
    with closing(Catalogue(path, defaults=DEFAULTS)) as first:
        add(first, 1)
        first.record("default", [move(1, Phase.PENDING, Phase.STABLE, won=True)], ROLLOUT)
        first.pin("default", 1, "why not", NOW_MS)
        first.pause("default", is_paused=True, reason="lunch", now_ms=NOW_MS)
        before = first.speculator("default"), first.history("default", 10)
    with closing(Catalogue(path, defaults=DEFAULTS)) as second:
        assert (second.speculator("default"), second.history("default", 10)) == before
        assert before[0].rollout == ROLLOUT


def test_a_transition_moves_the_version_and_is_history(catalogue: Catalogue) -> None:
    add(catalogue, 1)
    transition = move(1, Phase.PENDING, Phase.STABLE)
    catalogue.record("default", [transition], None)
    version, _ = catalogue.version("default", 1)
    assert (version.phase, version.reason, version.since_ms) == (Phase.STABLE, "so", NOW_MS + 5)
    assert version.proven_ms == 0, "it was not a win"
    newest, published = catalogue.history("default", 10).values()
    assert newest == transition
    assert (published.before, published.after) == (None, Phase.PENDING)


def test_a_win_is_remembered_when_the_version_steps_down(catalogue: Catalogue) -> None:
    add(catalogue, 1)
    won = move(1, Phase.PENDING, Phase.STABLE, won=True)
    catalogue.record("default", [won, move(1, Phase.STABLE, Phase.SUPERSEDED, NOW_MS + 9)], None)
    version, _ = catalogue.version("default", 1)
    assert (version.phase, version.proven_ms) == (Phase.SUPERSEDED, NOW_MS + 5)


def test_the_canary_that_runs_is_noted_with_its_transitions(catalogue: Catalogue) -> None:
    for number in (1, 2):
        add(catalogue, number)
    catalogue.record("default", [move(2, Phase.PENDING, Phase.CANARY)], ROLLOUT)
    assert catalogue.speculator("default").rollout == ROLLOUT
    further = replace(ROLLOUT, step=1, evidence=replace(seen(2.0, slices=20), open=Slice(since_ms=0)))
    catalogue.record("default", [], further)
    assert catalogue.speculator("default").rollout == further
    catalogue.record("default", [move(2, Phase.CANARY, Phase.STABLE)], None)
    assert catalogue.speculator("default").rollout is None


@pytest.mark.parametrize("phase", [Phase.STABLE, Phase.CANARY])
def test_two_versions_in_such_a_phase_are_impossible_and_nothing_of_the_attempt_stays(
    catalogue: Catalogue, phase: Phase
) -> None:
    for number in (1, 2, 3):
        add(catalogue, number)
    catalogue.record("default", [move(1, Phase.PENDING, phase)], ROLLOUT)
    before = catalogue.speculator("default"), catalogue.history("default", 10)
    with pytest.raises(sqlite3.IntegrityError):
        catalogue.record("default", [move(2, Phase.PENDING, Phase.HELD), move(3, Phase.PENDING, phase)], None)
    assert (catalogue.speculator("default"), catalogue.history("default", 10)) == before


def test_an_unknown_speculator_has_the_default_policy_and_nothing_else(catalogue: Catalogue) -> None:
    speculator = catalogue.speculator("nobody")
    assert (speculator.desired, speculator.versions, speculator.latest) == (DesiredState(policy=DEFAULTS), (), 0)
    assert not speculator.is_known
    with pytest.raises(NotFound, match="nobody has no version 1; its newest is none yet"):
        catalogue.version("nobody", 1)


def test_a_policy_may_come_before_the_first_version(catalogue: Catalogue) -> None:
    document = registry_pb2.RolloutPolicy(strategy=registry_pb2.STRATEGY_MANUAL)
    catalogue.set_policy("default", document, NOW_MS)
    assert catalogue.speculator("default").desired.policy == replace(DEFAULTS, strategy=Strategy.MANUAL)
    assert catalogue.policy("default") == document
    assert catalogue.names() == ("default",)


def test_pins_and_pauses_are_history_too(catalogue: Catalogue) -> None:
    add(catalogue, 1)
    catalogue.pin("default", 0, "costs", NOW_MS)
    catalogue.pin("default", None, "", NOW_MS)
    catalogue.pause("default", is_paused=True, reason="lunch", now_ms=NOW_MS)
    catalogue.pause("default", is_paused=False, reason="", now_ms=NOW_MS)
    reasons = [t.reason for t in catalogue.history("default", 4).values()]
    assert reasons == ["resumed", "paused: lunch", "unpinned", "pinned to no draft: costs"]
    assert {t.actor for t in catalogue.history("default", 4).values()} == {Actor.OPERATOR}


def test_a_reason_is_told_as_long_as_it_holds(catalogue: Catalogue) -> None:
    add(catalogue, 1)
    catalogue.pin("default", 1, "it is fast", NOW_MS)
    catalogue.pause("default", is_paused=True, reason="lunch", now_ms=NOW_MS)
    desired = catalogue.speculator("default").desired
    assert (desired.pin_reason, desired.pause_reason) == ("it is fast", "lunch")
    catalogue.pin("default", None, "enough", NOW_MS)
    catalogue.pause("default", is_paused=False, reason="back", now_ms=NOW_MS)
    desired = catalogue.speculator("default").desired
    assert (desired.pin_reason, desired.pause_reason) == ("", "")
    reasons = [event.reason for event in catalogue.history("default", 2).values()]
    assert reasons == ["resumed: back", "unpinned: enough"]


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
    listed: list[tuple[str, int]] = []
    after = None
    while page := catalogue.page("", after=after, size=2):
        listed += [(manifest.speculator, version.number) for version, manifest in page]
        after = listed[-1]
    assert listed == [(speculator, number) for speculator in ("a", "b") for number in (3, 2, 1)]
    assert [v.number for v, _ in catalogue.page("b", after=None, size=9)] == [3, 2, 1]


def test_a_damaged_file_is_told_with_what_to_do(path: Path) -> None:
    path.write_bytes(b"SQLite format 4" + b"\xff" * 5000)
    with pytest.raises(Corrupt, match=r"catalogue.sqlite3 is damaged .* run `updraft registry rebuild`"):
        Catalogue(path, defaults=DEFAULTS)


def test_a_file_of_a_newer_registry_is_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(Conflict, match=r"has schema 99, this registry supports up to \d"):
        Catalogue(path, defaults=DEFAULTS)


def test_a_file_of_the_first_registry_is_migrated_and_owes_all_its_documents(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(MIGRATIONS[0])
        db.execute("INSERT INTO speculators (name) VALUES ('default')")
        db.execute("PRAGMA user_version = 1")
        columns = (draft(1).digest, "t", draft(1).manifest().SerializeToString(), "Stable", "won", 1, 1, 1, 0, 1)
        db.execute("INSERT INTO versions VALUES ('default', 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", columns)
        db.commit()
    with closing(Catalogue(path, defaults=DEFAULTS)) as catalogue:
        assert catalogue.stale_documents() == [("default", 0), ("default", 1)]
        assert [version.phase for version in catalogue.speculator("default").versions] == [Phase.STABLE]


def test_versions_from_before_tenants_were_known_are_incomplete_and_otherwise_as_they_were(path: Path) -> None:
    before = draft(1).manifest(provenance=registry_pb2.Provenance(samples=7))
    with closing(sqlite3.connect(path)) as db:
        db.executescript("".join(MIGRATIONS[:-1]))
        db.execute("INSERT INTO speculators (name) VALUES ('default')")
        db.execute(
            "INSERT INTO versions (speculator, number, digest, tensors_digest, manifest, phase, reason, published_ms, "
            "since_ms, is_retained) VALUES ('default', 1, ?, 't', ?, 'Stable', 'won', 1, 1, 0)",
            (draft(1).digest, before.SerializeToString()),
        )
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) - 1}")
        db.commit()
    with closing(Catalogue(path, defaults=DEFAULTS)) as catalogue:
        _, after = catalogue.version("default", 1)
        assert after.provenance == registry_pb2.Provenance(samples=7, has_more_tenants=True)
        after.provenance.has_more_tenants = False
        assert after == before
        assert ("default", 1) in catalogue.stale_documents()


def test_a_policy_that_cannot_be_followed_any_more_leaves_everything_to_a_person(path: Path) -> None:
    document = registry_pb2.RolloutPolicy(progress_deadline_seconds=300)
    with closing(Catalogue(path, defaults=DEFAULTS)) as catalogue:
        catalogue.set_policy("default", document, NOW_MS)
    longer = replace(DEFAULTS, steps=(RolloutStep(pods_percent=10, hold_seconds=600),))
    with closing(Catalogue(path, defaults=longer)) as catalogue:
        assert catalogue.speculator("default").desired.policy == replace(longer, strategy=Strategy.MANUAL)
        assert catalogue.policy("default") == document, "what was set stays"


WINS = {
    # number: (phase, was proven, transitions to stable: (by whom, when))
    1: ("Superseded", 1, [("gate", 1_000), ("registry", 9_000)]),
    2: ("Superseded", 1, [("gate", 5_000)]),
    3: ("Superseded", 1, [("gate", 3_000)]),  # the clock had been set back
    4: ("Superseded", 1, [("operator", 6_000)]),  # pinned only
    5: ("Rejected", 0, []),
}


@pytest.mark.parametrize(
    ("pinned", "stable", "expected"),
    [
        pytest.param(None, 3, {1: 1_000, 2: 5_000, 3: 5_000, 4: 0, 5: 0}, id="what won last serves"),
        pytest.param(4, 4, {1: 1_000, 2: 5_000, 3: 5_000, 4: 0, 5: 0}, id="a pinned version has not won"),
        pytest.param(None, 4, {1: 1_000, 2: 5_000, 3: 5_000, 4: 5_000, 5: 0}, id="unpinned, what serves goes on"),
    ],
)
def test_who_won_when_is_read_from_the_history_of_the_first_registry(
    path: Path, pinned: int | None, stable: int, expected: dict[int, int]
) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(MIGRATIONS[0])
        db.execute("INSERT INTO speculators (name, pinned) VALUES ('default', ?)", (pinned,))
        for number, (phase, is_proven, wins) in WINS.items():
            now = "Stable" if number == stable else phase
            columns = (number, draft(number).digest, f"t{number}", draft(number).manifest().SerializeToString(), now)
            db.execute(
                "INSERT INTO versions VALUES ('default', ?, ?, ?, ?, ?, 'so', 7, 8, ?, 0, 1)", (*columns, is_proven)
            )
            for actor, at_ms in wins:
                db.execute(
                    "INSERT INTO transitions (speculator, number, before, after, reason, actor, at_ms) "
                    "VALUES ('default', ?, 'Pending', 'Stable', 'so', ?, ?)",
                    (number, actor, at_ms),
                )
        db.execute("PRAGMA user_version = 1")
        db.commit()
    with closing(Catalogue(path, defaults=DEFAULTS)) as catalogue:
        speculator = catalogue.speculator("default")
    assert {v.number: v.proven_ms for v in speculator.versions} == expected
    assert speculator.rollout is None
    decided = decide(speculator, [], NOW_MS)
    assert [v.number for v in decided.versions if v.phase is Phase.STABLE] == [stable], "a migration moves no pod"


def test_a_file_of_this_registry_is_opened_as_it_is(path: Path) -> None:
    for _ in range(2):
        with closing(Catalogue(path, defaults=DEFAULTS)), closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
