"""Ranks add, share and gather; one that dies or never comes ends the others with one sentence."""

from datetime import timedelta

import pytest
import torch
from tests.support.ports import free_port
from tests.support.ranks import environment, run_ranks
from torch import Tensor

from updraft_chassis.errors import Conflict, InvalidInput, Unavailable
from updraft_trainer.coordination.ranks import ALONE, Ranks, buckets, from_environment, joined


def _exchange(ranks: Ranks) -> dict[str, object]:
    own = [
        torch.full((3,), 1.0 + ranks.rank),
        torch.arange(4.0).view(2, 2).T,
        torch.tensor([ranks.rank], dtype=torch.long),
    ]
    ranks.sum(own)
    shown = torch.tensor([7.0 if ranks.leads else 0.0])
    ranks.broadcast([shown])
    shared: str = ranks.broadcast_object("go" if ranks.leads else None)
    return {"sum": own, "broadcast": shown, "share": shared, "gather": ranks.gather(f"rank {ranks.rank}")}


def _random_sum(ranks: Ranks) -> Tensor:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(ranks.rank))
    ranks.sum([values])
    return values


def _loses_a_rank(ranks: Ranks) -> str:
    if not ranks.leads:
        return "left"  # and the process group with it
    with pytest.raises(Unavailable) as raised:
        ranks.gather(None)
    return str(raised.value)


def test_ranks_sum_tensors_of_any_layout_and_dtype_and_share_what_rank_0_says() -> None:
    first, second = run_ranks(_exchange)
    for result in (first, second):
        assert [one.tolist() for one in result["sum"]] == [[3.0] * 3, [[0.0, 4.0], [2.0, 6.0]], [1]]  # type: ignore[attr-defined]
        assert result["broadcast"] == torch.tensor([7.0])
        assert result["share"] == "go"
    assert first["gather"] == ["rank 0", "rank 1"]
    assert second["gather"] == []


def test_all_ranks_have_the_same_bits_of_a_sum() -> None:
    sums = run_ranks(_random_sum, size=3)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_a_rank_that_leaves_ends_the_others_at_once() -> None:
    message, _ = run_ranks(_loses_a_rank)
    assert message.startswith("rank 0 of 2 has lost another rank, and ends to be restarted: ")


def _disagreeing(ranks: Ranks, seeds: list[str]) -> str:
    try:
        ranks.check_agreement({"model": "sha256:m", "seed": seeds[ranks.rank]})
    except Conflict as error:
        return str(error)
    return ""


def test_ranks_with_other_settings_are_named_everywhere() -> None:
    sentence = "rank 1 has the seed 8, but rank 0 has 7; all ranks need the same model and settings"
    assert run_ranks(_disagreeing, ["7", "8"]) == [sentence, sentence]
    ALONE.check_agreement({"seed": "7"})


def test_an_error_of_a_collective_that_is_not_about_another_rank_does_not_say_so() -> None:
    with (
        pytest.raises(Unavailable, match="because a collective operation failed: invalid shape"),
        ALONE.collective_errors(),
    ):
        raise RuntimeError("invalid shape")
    with pytest.raises(Unavailable, match="has lost another rank"), ALONE.collective_errors():
        raise RuntimeError("[/pytorch/third_party/gloo/pair.cc:548] Connection closed by peer [127.0.0.1]:1")


def test_one_process_needs_no_others() -> None:
    tensor = torch.ones(2)
    with joined({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, torch.device("cpu")) as ranks:
        ranks.sum([tensor])
        ranks.broadcast([tensor])
        assert ranks == ALONE
        assert ranks.leads
        assert ranks.broadcast_object("go") == "go"
        assert ranks.gather(3) == [3]
    assert torch.equal(tensor, torch.ones(2))
    assert from_environment({}) == ALONE


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param({"RANK": "x"}, "RANK is x, no number", id="no number"),
        pytest.param({"LOCAL_RANK": ""}, "LOCAL_RANK is not", id="missing"),
        pytest.param({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2", id="too high"),
        pytest.param({"MASTER_ADDR": ""}, "MASTER_ADDR is not", id="no address"),
        pytest.param({"MASTER_PORT": "-1"}, "MASTER_PORT is -1, no number", id="no port"),
    ],
)
def test_a_wrong_environment_is_refused_with_its_variable(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        from_environment(environment(1, 2, 29500) | changes)


def test_a_rank_whose_others_never_come_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = environment(1, 2, free_port())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(Unavailable, match=r"rank 1 of 2 cannot join the others at 127\.0\.0\.1:"),
        joined(variables, torch.device("cpu"), timedelta(seconds=1)),
    ):
        pass


def test_a_rank_without_a_gpu_of_its_own_says_so_before_it_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(Conflict, match="local rank 1 needs a GPU of its own, but this machine has 1;"),
        joined(environment(1, 2, free_port()), torch.device("cuda")),
    ):
        pass


def test_buckets_keep_dtypes_apart_and_have_a_limit() -> None:
    small, large, other = torch.ones(2), torch.ones(100), torch.ones(2, dtype=torch.float64)
    grouped = list(buckets([small, other, small, large, small], limit_bytes=64))
    assert sorted([len(one), one[0].numel()] for one in grouped) == [[1, 2], [1, 2], [1, 100], [2, 2]]
    assert list(buckets([])) == []
