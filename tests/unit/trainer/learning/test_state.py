import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.disk import file_size_limit

from updraft_artifacts.rope import Rope
from updraft_chassis.errors import Conflict, Corrupt, Exhausted
from updraft_draft.config import DraftConfig
from updraft_trainer.learning.state import MAX_SENT, Identity, State, States, TrainingHistory

IDENTITY = Identity(speculator="default", target_fingerprint="sha256:t", tokenizer_fingerprint="sha256:k")


DRAFT = DraftConfig(
    vocab_size=64,
    draft_vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope=Rope(theta=5e5, kind="llama3", factor=8.0, high_freq_factor=4.0, original_max_position=64),
    max_position=128,
    target_hidden_size=8,
    aux_layers=(2, 4, 5),
    norm_before_residual=True,
)


def state(step: int, *, identity: Identity = IDENTITY) -> State:
    rng = random.Random(step)
    rng.random()
    return State(
        identity=identity,
        token_ids=torch.arange(16),
        learner={"network": {"w": torch.full((4, 4), float(step))}, "step": step},
        history=TrainingHistory(uses={"a": step}, num_samples=step, first_trace_id="a", sent_digests=["sha256:x"]),
        rng=rng.getstate(),
        config_digest="sha256:c",
        draft_config=DRAFT,
    )


def test_everything_that_was_saved_comes_back(tmp_path: Path) -> None:
    saved = state(7)
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
        states.save(state(step))
    assert len(list(tmp_path.iterdir())) == 2
    loaded = states.load(IDENTITY)
    assert loaded is not None
    assert loaded.learner["step"] == 12


def test_a_flipped_bit_costs_one_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = States(tmp_path)
    states.save(state(1))
    newest = states.save(state(2))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    loaded = states.load(IDENTITY)
    assert loaded is not None
    assert loaded.learner["step"] == 1
    assert "damaged" in caplog.text


def test_when_every_state_is_damaged_nothing_starts_anew(tmp_path: Path) -> None:
    states = States(tmp_path)
    for step in (1, 2):
        path = states.save(state(step))
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Corrupt, match="move them away"):
        states.load(IDENTITY)


def test_a_save_that_was_cut_off_is_no_state(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save(state(1))
    (tmp_path / "state.part").write_bytes(b"half")
    loaded = states.load(IDENTITY)
    assert loaded is not None
    assert loaded.learner["step"] == 1
    states.save(state(2))
    assert not (tmp_path / "state.part").exists()


def test_a_full_disk_costs_one_save_and_nothing_that_was_saved_before(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save(state(1))
    with file_size_limit(100), pytest.raises(Exhausted, match=f"cannot save to {tmp_path}: .+"):
        states.save(state(2))
    assert len(list(tmp_path.iterdir())) == 1
    loaded = states.load(IDENTITY)
    assert loaded is not None
    assert loaded.learner["step"] == 1


def test_a_folder_that_cannot_be_made_is_told_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Exhausted, match=r"cannot save to .*/file/states: .*Not a directory"):
        States(tmp_path / "file" / "states").save(state(1))


@pytest.mark.parametrize("field", ["speculator", "target_fingerprint", "tokenizer_fingerprint"])
def test_a_state_of_something_else_is_refused(tmp_path: Path, field: str) -> None:
    fields = {name: getattr(IDENTITY, name) for name in Identity.__dataclass_fields__}
    other = Identity(**(fields | {field: "other"}))
    States(tmp_path).save(state(1, identity=other))
    with pytest.raises(Conflict, match=f"{field.replace('_', ' ')} other.*UPDRAFT_TRAINER_DATA_DIR"):
        States(tmp_path).load(IDENTITY)


def test_progress_counts_samples_once_and_remembers_the_first_and_the_last() -> None:
    progress = TrainingHistory()
    for trace_id in ("a", "b", "a", "c", "b"):
        progress.count_use(trace_id)
    assert progress.uses == {"a": 2, "b": 2, "c": 1}
    assert (progress.num_samples, progress.first_trace_id, progress.last_trace_id) == (3, "a", "c")


def test_sent_digests_are_bounded() -> None:
    progress = TrainingHistory()
    for n in range(MAX_SENT + 5):
        progress.add_sent(str(n))
    assert len(progress.sent_digests) == MAX_SENT
    assert progress.sent_digests[-1] == str(MAX_SENT + 4)


def test_a_state_of_a_version_that_kept_no_shape_is_read(tmp_path: Path) -> None:
    States(tmp_path).save(replace(state(1), draft_config=None))
    loaded = States(tmp_path).load(IDENTITY)
    assert loaded is not None
    assert loaded.draft_config is None
