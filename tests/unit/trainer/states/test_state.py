import random
import shutil
from pathlib import Path

import pytest
from tests.support.disk import file_size_limit
from tests.support.states import DRAFT, IDENTITY, make_state

from updraft_chassis.errors import Conflict, Corrupt, Exhausted
from updraft_trainer.states import state as state_module
from updraft_trainer.states.state import MAX_SENT, MAX_TENANTS, Identity, States, TrainingHistory


def step_of(states: States) -> int:
    """The step of the state that a start would go on from."""
    loaded = states.load(IDENTITY)
    assert loaded is not None
    return int(loaded.learner["step"])


def test_everything_that_was_saved_comes_back(tmp_path: Path) -> None:
    saved = make_state(7)
    States(tmp_path).save(saved)
    loaded = States(tmp_path).load(IDENTITY)
    assert loaded is not None
    assert loaded.learner["step"] == 7
    assert loaded.learner["network"]["w"].equal(saved.learner["network"]["w"])
    assert loaded.token_ids.equal(saved.token_ids)
    assert loaded.history == saved.history
    assert loaded.draft_config == DRAFT
    rng = random.Random()
    rng.setstate(loaded.rng)
    expected = random.Random(7)
    expected.random()
    assert rng.random() == expected.random()


def test_an_empty_folder_holds_no_state(tmp_path: Path) -> None:
    assert States(tmp_path / "absent").load(IDENTITY) is None


def test_the_newest_of_two_kept_states_is_loaded(tmp_path: Path) -> None:
    states = States(tmp_path)
    for step in range(1, 13):
        states.save(make_state(step))
    assert len(list(tmp_path.iterdir())) == 2
    loaded = states.load(IDENTITY)
    assert loaded is not None
    assert loaded.learner["step"] == 12


def files(folder: Path) -> list[Path]:
    """All files of a state: values, tensors and their index."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(found) == 3
    return found


@pytest.mark.parametrize("number", range(3))
def test_a_flipped_bit_in_any_file_costs_one_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    states = States(tmp_path)
    states.save(make_state(1))
    file = files(states.save(make_state(2)))[number]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert step_of(states) == 1
    assert "damaged" in caplog.text
    assert file.name in caplog.text


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_that_is_cut_off_or_missing_costs_one_save(tmp_path: Path, number: int, *, is_there: bool) -> None:
    states = States(tmp_path)
    states.save(make_state(1))
    file = files(states.save(make_state(2)))[number]
    file.write_bytes(file.read_bytes()[:-3]) if is_there else file.unlink()
    assert step_of(states) == 1


def test_a_damaged_state_is_removed_by_the_next_save_instead_of_an_intact_one(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save(make_state(1))
    for step in (2, 3):
        file = files(states.save(make_state(step)))[0]
        file.write_bytes(file.read_bytes()[:-3])
        assert step_of(states) == 1


def test_when_every_state_is_damaged_nothing_starts_anew(tmp_path: Path) -> None:
    states = States(tmp_path)
    for step in (1, 2):
        for file in files(states.save(make_state(step))):
            file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Corrupt, match="move them away"):
        states.load(IDENTITY)


def test_a_save_that_was_cut_off_is_no_state_and_the_next_one_removes_what_it_left(tmp_path: Path) -> None:
    states = States(tmp_path)
    path = states.save(make_state(1))
    for name in ("state.part", "state.removed"):
        shutil.copytree(path, tmp_path / name)
        files(tmp_path / name)[0].unlink()
    assert step_of(states) == 1
    states.save(make_state(2))
    assert len(list(tmp_path.iterdir())) == 2
    assert step_of(states) == 2


def test_what_is_no_state_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state-of-mind").mkdir()
    (tmp_path / "lost+found").mkdir()
    states = States(tmp_path)
    assert states.load(IDENTITY) is None
    for step in range(5):
        states.save(make_state(step))
    assert (tmp_path / "state-of-mind").is_dir()
    assert (tmp_path / "lost+found").is_dir()


def test_a_full_disk_costs_one_save_and_nothing_that_was_saved_before(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save(make_state(1))
    with file_size_limit(100), pytest.raises(Exhausted, match=f"cannot save to {tmp_path}: .+"):
        states.save(make_state(2))
    assert len(list(tmp_path.iterdir())) == 1
    loaded = states.load(IDENTITY)
    assert loaded is not None
    assert loaded.learner["step"] == 1


def test_a_folder_that_cannot_be_made_is_told_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Exhausted, match=r"cannot save to .*/file/states: .*Not a directory"):
        States(tmp_path / "file" / "states").save(make_state(1))


@pytest.mark.parametrize("field", ["speculator", "target_fingerprint", "tokenizer_fingerprint"])
def test_a_state_of_something_else_is_refused(tmp_path: Path, field: str) -> None:
    fields = {name: getattr(IDENTITY, name) for name in Identity.__dataclass_fields__}
    other = Identity(**(fields | {field: "other"}))
    States(tmp_path).save(make_state(1, identity=other))
    with pytest.raises(Conflict, match=f"{field.replace('_', ' ')} other.*UPDRAFT_TRAINER_DATA_DIR"):
        States(tmp_path).load(IDENTITY)


def test_progress_counts_samples_once_and_remembers_the_first_and_the_last() -> None:
    progress = TrainingHistory()
    assert [progress.count_uses(ids) for ids in (("a", "b"), ("a", "c"), ("b",))] == [2, 1, 0]
    assert progress.uses == {"a": 2, "b": 2, "c": 1}
    assert (progress.num_samples, progress.first_trace_id, progress.last_trace_id) == (3, "a", "c")


def test_tenants_are_listed_once_and_up_to_a_limit_of_which_none_leaves() -> None:
    history = TrainingHistory()
    history.learn_from(["b", "", "a", "b"])
    assert (history.tenants, history.has_more_tenants) == (["a", "b"], False)

    history.learn_from(f"{n:04}" for n in range(MAX_TENANTS))

    assert len(history.tenants) == MAX_TENANTS
    assert {"a", "b"} < set(history.tenants)
    assert history.tenants == sorted(history.tenants)
    assert history.has_more_tenants
    history.learn_from(["a"])
    assert history.has_more_tenants, "a version lists no fewer than the one before"


def test_what_a_draft_continues_may_have_had_more_tenants_than_it_lists() -> None:
    history = TrainingHistory()
    history.learn_from([], has_more=True)
    assert (history.tenants, history.has_more_tenants) == ([], True)


def test_sent_digests_are_bounded() -> None:
    progress = TrainingHistory()
    for n in range(MAX_SENT + 5):
        progress.add_sent(str(n))
    assert len(progress.sent_digests) == MAX_SENT
    assert progress.sent_digests[-1] == str(MAX_SENT + 4)


def test_a_state_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(state_module, "FORMAT", "updraft-trainer-state/9")
        States(tmp_path).save(make_state(1))
    with pytest.raises(Conflict, match="has the format updraft-trainer-state/9, this version reads"):
        States(tmp_path).load(IDENTITY)


def test_a_copy_of_a_state_does_not_change_with_training() -> None:
    taken = make_state(7)
    copied = taken.copied()
    taken.learner["network"]["w"].fill_(9.0)
    taken.token_ids.zero_()
    taken.history.count_use("b")
    taken.history.add_sent("sha256:y")
    expected = make_state(7)
    assert copied.learner["network"]["w"].equal(expected.learner["network"]["w"])
    assert copied.token_ids.equal(expected.token_ids)
    assert copied.history.uses == {"a": 7}
