"""Publication, recovery, retention: store and catalogue stay together."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.archives import POLICY, Opened
from tests.support.checkpoints import BF16_NAN, OTHER_TARGET, draft, sha256
from tests.support.disk import file_size_limit
from tests.support.versions import NOW_MS

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import Conflict, Exhausted, InvalidInput, NotFound
from updraft_registry.rollout.retention import versions_to_keep
from updraft_registry.rollout.version import Actor, Transition, newest_proven
from updraft_registry.storage.archive import Recovered, open_archive
from updraft_rollouts.terms import Phase, Strategy


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    archive = Opened(tmp_path / "registry")
    yield archive
    archive.close()


def test_versions_count_from_one(opened: Opened) -> None:
    assert opened.publish(draft(1)) == (1, False)
    assert opened.publish(draft(2), parent_version=1) == (2, False)
    manifest = opened.archive.weights("default", 2)
    with opened.archive.store.open(manifest.digest) as file:
        assert file.read() == draft(2).data
    assert manifest == draft(2).manifest(parent_version=1)


def test_the_same_content_again_is_the_version_that_it_was(opened: Opened) -> None:
    opened.publish(draft(1))
    assert opened.publish(draft(1)) == (1, True)
    assert opened.phases() == {1: Phase.PENDING}


def test_the_same_content_that_lost_the_race_is_the_version_of_the_winner(opened: Opened) -> None:
    manifest = draft(1).manifest()
    late = opened.archive.begin(manifest)
    late.write(0, draft(1).data)
    opened.archive.verify(late, manifest)
    opened.publish(draft(1))
    assert opened.archive.publish(late, manifest, NOW_MS) == (1, True)
    late.discard()
    assert opened.publish(draft(2)) == (2, False)


def test_the_same_content_is_another_version_of_another_speculator(opened: Opened) -> None:
    opened.publish(draft(1))
    assert opened.publish(draft(1), speculator="other") == (1, False)
    assert opened.blobs() == {draft(1).digest}


def test_what_is_refused_leaves_nothing_behind(opened: Opened) -> None:
    opened.publish(draft(1))
    with pytest.raises(InvalidInput, match="256 values that are not finite"):
        opened.publish(draft(fc=BF16_NAN * 256))
    with pytest.raises(InvalidInput, match="the target of this draft"):
        opened.publish(draft(2), target_fingerprint=OTHER_TARGET)
    with pytest.raises(NotFound, match="the parent"):
        opened.publish(draft(2), parent_version=9)
    assert opened.blobs() == {draft(1).digest}
    assert list((opened.folder / "uploads").iterdir()) == []
    assert opened.phases() == {1: Phase.PENDING}


def test_a_row_that_is_missing_comes_back_from_its_document(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.settle()
    opened.close()
    opened.lose_catalogue()
    opened.reopen()
    assert opened.recovered == Recovered(uploads=0, added=1, lost=0)
    assert opened.phases() == {1: Phase.STABLE}
    assert opened.publish(draft(2)) == (2, False)


def test_a_rebuilt_catalogue_remembers_what_was_rejected_and_has_one_stable_version(opened: Opened) -> None:
    trainer = {"source": registry_pb2.SOURCE_TRAINER}
    opened.publish(draft(1))
    opened.settle()
    opened.publish(draft(2), **trainer)
    opened.settle()
    before = opened.archive.catalogue.speculator("default").versions
    assert opened.phases() == {1: Phase.STABLE, 2: Phase.REJECTED}
    opened.close()
    opened.lose_catalogue()
    opened.reopen()
    assert opened.archive.catalogue.speculator("default").versions == before
    assert opened.publish(draft(2), **trainer) == (2, True)
    opened.settle()
    assert opened.phases() == {1: Phase.STABLE, 2: Phase.REJECTED}


def test_a_rebuilt_catalogue_remembers_pins_pauses_policies_and_every_reason(opened: Opened) -> None:
    policy = registry_pb2.RolloutPolicy(revision_history_limit=3)
    opened.archive.set_policy("default", policy, NOW_MS)
    for seed in (1, 2, 3):
        opened.publish(draft(seed))
        opened.settle()
    opened.pin(2, "the third is slow")
    opened.archive.retain("default", 3, is_retained=True, now_ms=NOW_MS)
    opened.archive.pause("default", "lunch", is_paused=True, now_ms=NOW_MS)
    opened.publish(draft(4), speculator="other")
    speculator, history = opened.archive.catalogue.speculator("default"), opened.history()
    assert [event.reason for event in history.values()][:2] == ["paused: lunch", "retained: its weights are kept"]
    opened.close()
    opened.lose_catalogue()
    opened.reopen()
    assert opened.archive.catalogue.speculator("default") == speculator
    assert opened.archive.catalogue.policy("default") == policy
    assert list(opened.history().items()) == list(history.items()), "in the same order"
    assert opened.archive.catalogue.names() == ("default", "other")


def test_a_rebuild_with_other_defaults_keeps_the_wishes_beside_a_policy_that_no_longer_fits(opened: Opened) -> None:
    step = registry_pb2.RolloutStep(pods_percent=50, hold_seconds=POLICY.progress_deadline_seconds)
    policy = registry_pb2.RolloutPolicy(strategy=registry_pb2.STRATEGY_CANARY, steps=[step])
    opened.archive.set_policy("default", policy, NOW_MS)
    opened.publish(draft(1))
    opened.pin(1, "it is good")
    opened.archive.pause("default", "lunch", is_paused=True, now_ms=NOW_MS)
    opened.close()
    opened.lose_catalogue()
    shorter = replace(POLICY, progress_deadline_seconds=step.hold_seconds - 1)
    with open_archive(opened.folder, defaults=shorter, max_draft_bytes=10**6) as archive:
        archive.recover(NOW_MS)
        desired = archive.catalogue.speculator("default").desired
        assert archive.catalogue.policy("default") == policy
    assert (desired.pinned, desired.pin_reason, desired.pause_reason) == (1, "it is good", "lunch")
    assert desired.policy.strategy is Strategy.MANUAL


def test_a_rebuilt_catalogue_knows_what_can_be_gone_back_to(opened: Opened) -> None:
    for seed in (1, 2):
        opened.publish(draft(seed))
        opened.settle()
        opened.pin(seed)
    opened.close()
    opened.lose_catalogue()
    opened.reopen()
    versions = opened.archive.catalogue.speculator("default").versions
    previous = newest_proven(versions, other_than=2)
    assert previous is not None
    assert (previous.number, previous.phase) == (1, Phase.SUPERSEDED)


def test_what_happens_after_a_rebuild_comes_last_in_the_history(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.settle()
    opened.close()
    opened.lose_catalogue()
    opened.reopen()
    opened.pin(0, "no drafts today")
    reasons = [event.reason for event in opened.history().values()]
    assert reasons[-1] == "published (Imported)"
    assert "pinned to no draft: no drafts today" in reasons[:2]


def test_a_document_of_an_older_registry_without_history_still_makes_a_row(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.settle()
    opened.close()
    document = opened.folder / "versions" / "default" / "1.json"
    document.write_text(document.read_text().replace('"history"', '"story"'))
    opened.lose_catalogue()
    opened.reopen()
    assert opened.phases() == {1: Phase.STABLE}
    assert [event.reason for event in opened.history().values()] == ["the first version needs no evaluation"]


@pytest.mark.parametrize("phase", [Phase.STABLE, Phase.CANARY])
def test_of_two_documents_that_claim_the_same_seat_the_newer_is_right(opened: Opened, phase: Phase) -> None:
    for seed in (1, 2):
        opened.publish(draft(seed))
    opened.close()
    for document in (opened.folder / "versions" / "default").iterdir():
        document.write_text(document.read_text().replace("PHASE_PENDING", f"PHASE_{phase.name}"))
    opened.lose_catalogue()
    opened.reopen()
    assert opened.phases() == {1: Phase.SUPERSEDED, 2: phase}
    reasons = {v.number: v.reason for v in opened.archive.catalogue.speculator("default").versions}
    assert reasons[1] == f"a newer version was {phase}"


def test_a_rebuilt_catalogue_does_not_let_serve_what_has_no_weights(opened: Opened) -> None:
    for seed in (1, 2):
        opened.publish(draft(seed))
        opened.settle()
        opened.pin(seed)
    opened.pin(None)
    opened.close()
    opened.lose_catalogue()
    opened.lose_blob(draft(1))
    opened.reopen()
    assert opened.recovered == Recovered(uploads=0, added=2, lost=1)
    assert opened.phases() == {1: Phase.SUPERSEDED, 2: Phase.HELD}
    assert next(event.reason for event in opened.history(1).values()) == "its weights are missing in the store"


def test_a_document_that_is_lost_is_written_again(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.pin(1)
    opened.close()
    documents = sorted((opened.folder / "versions" / "default").iterdir())
    before = [path.read_bytes() for path in documents]
    for path in documents:
        path.unlink()
    opened.reopen()
    assert [path.read_bytes() for path in documents] == before


def test_a_document_that_had_no_room_follows_with_the_next_change(opened: Opened) -> None:
    opened.publish(draft(1))
    document = opened.folder / "versions" / "default" / "1.json"
    gone = Transition(
        number=1, before=None, after=Phase.SUPERSEDED, reason="x" * 100, actor=Actor.OPERATOR, at_ms=NOW_MS
    )
    opened.archive.catalogue.record("default", [gone], None)
    with file_size_limit(len(document.read_bytes()) - 1):
        opened.archive.write_stale_documents()
    assert "PHASE_PENDING" in document.read_text()
    assert opened.archive.catalogue.stale_documents() == [("default", 1)]
    opened.publish(draft(2))
    opened.archive.write_stale_documents()
    assert "PHASE_SUPERSEDED" in document.read_text()
    assert opened.archive.catalogue.stale_documents() == []


@pytest.mark.parametrize(
    "rubbish",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"{}", id="nothing said"),
        pytest.param(b'{"version": 8, "manifest": {"speculator": "default"}}', id="another version"),
        pytest.param(b'{"version": 7, "manifest": {"speculator": "default"}}', id="no digest"),
    ],
)
def test_a_document_that_is_rubbish_is_ignored(opened: Opened, rubbish: bytes) -> None:
    opened.publish(draft(1))
    opened.close()
    (opened.folder / "versions" / "default" / "7.json").write_bytes(rubbish)
    opened.reopen()
    assert opened.phases() == {1: Phase.PENDING}


def test_a_speculators_document_that_cannot_be_read_is_kept_with_its_salt_until_it_is_repaired(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.archive.forget("default", 7, NOW_MS)
    before = opened.archive.catalogue.tenants.record("default")
    document = opened.folder / "versions" / "default" / "0.json"
    good = document.read_bytes()
    for _ in range(2):  # the second start knows the speculator from its version
        opened.close()
        (opened.folder / "catalogue.sqlite3").unlink(missing_ok=True) if document.read_bytes() == good else None
        document.write_bytes(good.replace(b'"0000000000000007"', b'"acme"'))
        opened.reopen()
        opened.archive.pause("default", "lunch", is_paused=True, now_ms=NOW_MS)
        assert opened.archive.tenant_salt("default") == b""
        with pytest.raises(Conflict, match="cannot be read, and its salt for tenants may be only there: repair"):
            opened.archive.forget("default", 8, NOW_MS)
        assert b'"acme"' in document.read_bytes(), "it is not overwritten"

    opened.close()
    document.write_bytes(good)
    opened.reopen()
    assert opened.archive.catalogue.tenants.record("default") == before
    assert opened.archive.tenant_salt("default") == before.salt != b""
    assert opened.archive.catalogue.speculator("default").desired.is_paused
    assert b'"paused": true' in document.read_bytes()


def test_a_document_that_repeats_the_content_of_another_is_ignored(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.close()
    documents = opened.folder / "versions" / "default"
    copy = (documents / "1.json").read_text().replace('"version": 1', '"version": 2')
    (documents / "2.json").write_text(copy)
    opened.reopen()
    assert opened.phases() == {1: Phase.PENDING}


def test_a_blob_without_a_row_is_harmless_and_goes_with_the_next_sweep(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.close()
    stray = opened.folder / "blobs" / "sha256" / sha256(b"stray").removeprefix("sha256:")
    stray.write_bytes(b"stray")
    opened.reopen()
    assert opened.recovered == Recovered(uploads=0, added=0, lost=0)
    assert opened.archive.sweep(opened.archive.catalogue.speculator("default"), {1}) == 1
    assert opened.blobs() == {draft(1).digest}


def test_blobs_that_seem_to_be_nobodys_stay_while_a_document_cannot_be_read(opened: Opened) -> None:
    for seed in (1, 2):
        opened.publish(draft(seed))
    opened.close()
    document = opened.folder / "versions" / "default" / "1.json"
    whole = document.read_bytes()
    document.write_bytes(whole[:-50])
    opened.lose_catalogue()
    opened.reopen()
    assert opened.phases() == {2: Phase.PENDING}
    assert opened.archive.sweep(opened.archive.catalogue.speculator("default"), {2}) == 0
    opened.close()
    document.write_bytes(whole)
    opened.reopen()
    assert opened.phases() == {1: Phase.PENDING, 2: Phase.PENDING}


def test_retained_weights_are_kept_until_they_are_not(opened: Opened) -> None:
    for seed in range(1, 5):
        opened.publish(draft(seed), source=registry_pb2.SOURCE_TRAINER)
        opened.settle()
    opened.archive.retain("default", 2, is_retained=True, now_ms=NOW_MS)
    opened.archive.retain("default", 2, is_retained=True, now_ms=NOW_MS)
    assert next(event.reason for event in opened.history(2).values()) == "retained: its weights are kept"
    speculator = opened.archive.catalogue.speculator("default")
    opened.archive.sweep(speculator, versions_to_keep(speculator, ()))
    assert opened.blobs() == {draft(2).digest}
    with pytest.raises(Conflict, match="version 1 of default is Rejected; its weights are no longer kept"):
        opened.archive.retain("default", 1, is_retained=True, now_ms=NOW_MS)
    with pytest.raises(NotFound, match="default has no version 9"):
        opened.archive.retain("default", 9, is_retained=True, now_ms=NOW_MS)
    opened.archive.retain("default", 2, is_retained=False, now_ms=NOW_MS)
    speculator = opened.archive.catalogue.speculator("default")
    opened.archive.sweep(speculator, versions_to_keep(speculator, ()))
    assert opened.blobs() == set()


def test_weights_that_vanished_serve_no_more_until_they_are_published_again(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.settle()
    opened.close()
    opened.lose_blob(draft(1))
    opened.reopen()
    assert opened.recovered == Recovered(uploads=0, added=0, lost=1)
    version, _ = opened.archive.catalogue.version("default", 1)
    assert (version.phase, version.reason) == (Phase.SUPERSEDED, "its weights are missing in the store")
    with pytest.raises(NotFound, match="version 1 of default is Superseded; its weights are no longer kept"):
        opened.archive.weights("default", 1)
    assert opened.publish(draft(1)) == (1, True)
    opened.settle()
    assert opened.phases() == {1: Phase.STABLE}


def test_leftovers_of_an_interrupted_upload_are_cleaned_at_start(opened: Opened) -> None:
    opened.close()
    (opened.folder / "uploads" / "a.part").write_bytes(b"half")
    opened.reopen()
    assert opened.recovered.uploads == 1
    assert list((opened.folder / "uploads").iterdir()) == []


def test_weights_that_were_swept_come_back_with_the_same_content(opened: Opened) -> None:
    opened.publish(draft(1))
    opened.archive.sweep(opened.archive.catalogue.speculator("default"), ())
    assert opened.blobs() == set()
    with pytest.raises(Conflict, match="version 1 of default is Pending; its weights are no longer kept"):
        opened.archive.pin("default", 1, "", NOW_MS)
    assert opened.publish(draft(1)) == (1, True)
    opened.archive.pin("default", 1, "", NOW_MS)


def test_a_condemned_version_cannot_be_pinned(opened: Opened) -> None:
    opened.publish(draft(1), source=registry_pb2.SOURCE_TRAINER)
    opened.settle()
    with pytest.raises(Conflict, match="version 1 of default is Rejected and never serves again: it has no evaluation"):
        opened.archive.pin("default", 1, "", NOW_MS)


def test_an_unknown_speculator_cannot_be_pinned_or_paused(opened: Opened) -> None:
    with pytest.raises(NotFound, match="there is no speculator 'default'; known speculators: none yet"):
        opened.archive.pin("default", 0, "", NOW_MS)
    with pytest.raises(NotFound, match="there is no speculator"):
        opened.archive.pause("default", "", is_paused=True, now_ms=NOW_MS)


def test_one_folder_is_one_registrys(opened: Opened) -> None:
    with pytest.raises(Conflict, match="another registry uses"):
        Opened(opened.folder)


def test_a_folder_that_is_a_file_is_told_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="set UPDRAFT_REGISTRY_DATA_DIR to a folder"):
        Opened(tmp_path / "file")


def test_a_publication_without_room_for_its_row_leaves_no_blob_and_no_document(opened: Opened) -> None:
    opened.publish(draft(1))
    with file_size_limit(4096), pytest.raises(Exhausted, match=r"catalogue.sqlite3 is full"):
        opened.publish(draft(2))
    assert opened.blobs() == {draft(1).digest}
    assert [path.name for path in (opened.folder / "versions" / "default").iterdir()] == ["1.json"]
    with file_size_limit(4096), pytest.raises(Exhausted):
        opened.publish(draft(1), speculator="other")
    assert opened.blobs() == {draft(1).digest}, "the first speculator needs it"
    assert opened.publish(draft(2)) == (2, False)
