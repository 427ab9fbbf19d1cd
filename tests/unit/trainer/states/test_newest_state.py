"""Whoever leads goes on from the newest intact state of all ranks."""

import shutil
from pathlib import Path

import pytest
from tests.support.ranks import run_ranks
from tests.support.states import IDENTITY, make_state

from updraft_chassis.errors import Conflict, Corrupt, UpdraftError
from updraft_trainer.coordination.ranks import ALONE, Ranks
from updraft_trainer.states import newest_state
from updraft_trainer.states.newest_state import load_newest
from updraft_trainer.states.state import Identity, State, States


def saved(folder: Path, *steps: int, identity: Identity = IDENTITY) -> States:
    states = States(folder)
    for step in steps:
        states.save(make_state(step, identity=identity))
    return states


def damage(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])


def _loaded(ranks: Ranks, folder: Path) -> tuple[State | None, list[str]]:
    """The state of a start of this rank, and then, at rank 0, the names of the states after a save."""
    newest_state.CHUNK_BYTES = 1000  # several for each file
    states = States(folder / str(ranks.rank))
    state = load_newest(states, IDENTITY, ranks)
    if ranks.leads:
        states.save(make_state(1000))
    return state, sorted(path.name[:14] for path in (folder / str(ranks.rank)).glob("state-*"))


def _error(ranks: Ranks, folder: Path) -> str:
    with pytest.raises(UpdraftError) as raised:
        load_newest(States(folder / str(ranks.rank)), IDENTITY, ranks)
    return f"{type(raised.value).__name__}: {raised.value}"


def test_rank_0_takes_over_the_newest_state_and_later_ones_have_higher_numbers(tmp_path: Path) -> None:
    saved(tmp_path / "0", 1, 2)
    saved(tmp_path / "1", 10, 20, 30, 40)
    saved(tmp_path / "2", 100)
    (first, names), (second, _), (third, _) = run_ranks(_loaded, tmp_path, size=3)
    assert first is not None
    assert (second, third) == (None, None)
    assert first.learner["step"] == 40
    assert first.learner["network"]["w"].equal(make_state(40).learner["network"]["w"])
    assert first.history == make_state(40).history
    assert names == ["state-00000004", "state-00000005"]
    (again, _), _ = run_ranks(_loaded, tmp_path)
    assert again is not None
    assert again.learner["step"] == 1000, "its own is the newest now"


def test_a_rank_whose_states_are_all_damaged_stops_nobody_who_has_another(tmp_path: Path) -> None:
    saved(tmp_path / "0", 1, 2, 3)
    damage(tmp_path / "0")
    saved(tmp_path / "1", 10)
    (first, _), _ = run_ranks(_loaded, tmp_path)
    assert first is not None
    assert first.learner["step"] == 10


def test_a_damaged_copy_of_the_newest_state_is_replaced_by_that_of_another_rank(tmp_path: Path) -> None:
    saved(tmp_path / "0", 1, 2)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    for file in (tmp_path / "0").glob("state-00000002-*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    (first, _), _ = run_ranks(_loaded, tmp_path)
    assert first is not None
    assert first.learner["step"] == 2


def test_states_of_another_target_end_all_ranks_with_the_same_sentence(tmp_path: Path) -> None:
    other = Identity(speculator="default", target_fingerprint="sha256:u", tokenizer_fingerprint="sha256:k")
    saved(tmp_path / "0", 1)
    saved(tmp_path / "1", 10, identity=other)
    first, second = run_ranks(_error, tmp_path)
    assert first == second
    assert first.startswith(f"Conflict: {tmp_path}/1/state-00000001-")
    assert "has the target fingerprint sha256:u" in first


def test_a_process_that_is_alone_has_its_own_states(tmp_path: Path) -> None:
    assert load_newest(States(tmp_path), IDENTITY, ALONE) is None
    state = load_newest(saved(tmp_path, 1, 2), IDENTITY, ALONE)
    assert state is not None
    assert state.learner["step"] == 2
    damage(tmp_path)
    with pytest.raises(Corrupt, match="move them away to start over"):
        load_newest(States(tmp_path), IDENTITY, ALONE)
    with pytest.raises(Conflict):
        load_newest(States(tmp_path), Identity(speculator="x", target_fingerprint="", tokenizer_fingerprint=""), ALONE)
