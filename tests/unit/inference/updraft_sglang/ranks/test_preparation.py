"""A draft that two ranks prepare before they write it, on stand-ins for SGLang's ranks and its exchange between them."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.sglang_draft import Served, shared
from tests.support.tiny_draft import TOKEN_IDS, write_tiny_draft
from tests.support.wait import wait_until
from torch import Tensor, nn

from updraft_sglang import configuration, names
from updraft_sglang.draft import ASLEEP
from updraft_sglang.ranks import preparation
from updraft_sglang.ranks.preparation import (
    PREPARE,
    PREPARED,
    PREPARING,
    SEVERAL_NODES,
    PartlyError,
    Preparation,
    Prepared,
)
from updraft_tap import weights
from updraft_tap.weights import RefusedError

NUM_RANKS = 2
LOADER = "a.loader"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_draft(tmp_path / "v7")


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "resolved", {names.CHECKED: SimpleNamespace}.__getitem__)


class Rank:
    """One process of a server: it holds the whole draft, because what is tested here is who waits for whom."""

    def __init__(self, model: Served, gather: Callable[[Any, Any], list[Any]]) -> None:
        self.model = shared(model)
        self.preparation = Preparation(LOADER, gather)
        self.updater = SimpleNamespace(custom_weight_loaders={LOADER: None})
        worker = SimpleNamespace(
            draft_worker=SimpleNamespace(draft_runner=SimpleNamespace(model=model, weight_updater=self.updater)),
            target_worker=SimpleNamespace(model_runner=SimpleNamespace(model=Served())),
        )
        self.manager = SimpleNamespace(draft_worker=worker, tp_cpu_group="the ranks", offload_tags=set[str]())


class Ranks:
    """Two ranks, each on a thread of its own where they meet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._barrier = threading.Barrier(NUM_RANKS)
        self._values: dict[str, Any] = {}
        monkeypatch.setattr(configuration, "place", lambda: (0, 1))
        monkeypatch.setattr(configuration, "is_one_node", lambda: True)
        self.all = [Rank(Served(), self._gather) for _ in range(NUM_RANKS)]

    def _gather(self, value: Any, group: Any) -> list[Any]:
        assert group == "the ranks"
        self._values[threading.current_thread().name] = value
        self._barrier.wait(60)
        found = [self._values[str(rank)] for rank in range(NUM_RANKS)]
        self._barrier.wait(60)
        return found

    def together(self, body: Callable[[Rank], Any]) -> list[Any]:
        """Each rank's result, or its refusal."""
        found: list[Any] = [None] * NUM_RANKS

        def run(rank: int) -> None:
            try:
                found[rank] = body(self.all[rank])
            except RefusedError as error:
                found[rank] = str(error)

        threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(NUM_RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def check(self, order: str) -> tuple[bool, str]:
        """The answer to an order."""
        request = SimpleNamespace(action=PREPARE + order)
        stock = lambda *_: pytest.fail("not SGLang's")  # noqa: E731
        first, second = self.together(lambda rank: rank.preparation.check(stock, rank.manager, request))
        assert first == second, "all ranks say the same"
        return first.success, first.message

    def prepared(self, order: str) -> tuple[bool, str]:
        """The last answer of an agent that asks until they are ready, or one refuses."""
        answers: list[tuple[bool, str]] = []

        def is_over() -> bool:
            answers.append(self.check(order))
            return not answers[-1][1].startswith(PREPARING)

        wait_until(is_over, what="the ranks")
        return answers[-1]

    def served(self, order: str, problems: Sequence[str] = ("", "")) -> list[Any]:
        """The versions that the ranks serve then, or their refusals."""
        return self.together(
            lambda rank: rank.preparation.serve(order, rank.model, problems[self.all.index(rank)]).version
        )

    @property
    def are_written(self) -> list[bool]:
        """Whether each has got weights."""
        return [any(bool(one.any()) for one in rank.model.parameters()) for rank in self.all]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


@pytest.fixture
def other_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that the second rank reads instead of every other."""
    folder = tmp_path / "other"
    read, threads = weights.read, dict[str, int]()

    def reading(asked: Path, *rest: Any) -> Any:
        with lock:
            number = threads[threading.current_thread().name] = len(threads)
        return read(folder if number % NUM_RANKS else asked, *rest)

    lock = threading.Lock()
    monkeypatch.setattr(weights, "read", reading)
    return folder


def ordered(folder: Path, version: int = 7) -> str:
    return json.dumps({"folder": str(folder), "version": version, "digest": f"sha256:{version}"})


def test_all_ranks_prepare_a_draft_without_a_write_and_then_copy_it(ranks: Ranks, folder: Path) -> None:
    order = ordered(folder)
    assert ranks.prepared(order) == (True, PREPARED)
    (folder / "model.safetensors").unlink()  # nothing is read any more
    assert ranks.are_written == [False, False]

    assert ranks.served(order) == [7, 7]

    assert ranks.are_written == [True, True]
    assert all(torch.equal(rank.model.hot_token_id, TOKEN_IDS) for rank in ranks.all)
    assert ranks.served(order) == ["rank 0: it has not prepared this draft"] * NUM_RANKS


Change = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("fc.weight"), "lacks ['fc.weight']"),
        (lambda t: t["norm.weight"].fill_(float("nan")), "norm.weight has values that are not finite"),
        (lambda t: t["d2t"].add_(6), "tokens that the target does not have"),
        (lambda t: t["fc.weight"].mul_(2), "the ranks have read different drafts"),
    ],
)
def test_a_draft_that_one_rank_reads_otherwise_is_refused_by_all_and_read_again_when_it_is_ordered_again(
    ranks: Ranks, folder: Path, other_disk: Path, change: Change, reason: str
) -> None:
    write_tiny_draft(other_disk)
    tensors = load_file(other_disk / "model.safetensors")
    change(tensors)
    save_file(tensors, other_disk / "model.safetensors")
    order = ordered(folder)

    is_done, message = ranks.prepared(order)

    assert not is_done
    assert reason in message
    assert ranks.served(order) == ["rank 0: it has not prepared this draft"] * NUM_RANKS
    assert ranks.are_written == [False, False]
    write_tiny_draft(other_disk)
    assert ranks.prepared(order) == (True, PREPARED)


def test_a_rank_prepares_one_draft_at_a_time_and_the_same_order_joins_it(
    ranks: Ranks, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read, read, num_read = threading.Event(), weights.read, list[Path]()

    def reading(asked: Path, *rest: Any) -> Any:
        num_read.append(asked)
        assert may_read.wait(60)
        return read(asked, *rest)

    monkeypatch.setattr(weights, "read", reading)
    first, second = ordered(folder), ordered(folder, version=8)
    assert ranks.check(first) == (True, f"{PREPARING}; not ready: 0, 1")
    assert ranks.check(second) == (True, f"{PREPARING}; not ready: 0, 1"), "it waits"
    assert len(num_read) == NUM_RANKS
    assert ranks.check(first) == (True, f"{PREPARING}; not ready: 0, 1")
    may_read.set()

    assert ranks.prepared(first) == (True, PREPARED)
    assert len(num_read) == NUM_RANKS
    assert ranks.prepared(second) == (True, PREPARED)
    assert ranks.served(second) == [8, 8]


@pytest.mark.parametrize("stays", [False, True])
def test_a_copy_that_fails_in_one_rank_is_told_by_all_and_undone_by_all(
    ranks: Ranks, folder: Path, *, stays: bool
) -> None:
    """`stays`: nor can the second rank put its draft back."""
    order = ordered(folder)
    assert ranks.prepared(order) == (True, PREPARED)

    def failing() -> None:
        raise RuntimeError("out of memory")

    job = ranks.all[1].preparation._job
    assert job is not None
    assert isinstance(job.result, Prepared)
    kept = [failing] if stays else job.result.kept
    job.result = replace(job.result, writes=[*job.result.writes[:3], failing], kept=kept)

    first, second = ranks.together(lambda rank: caught(rank, order))

    problem = f"rank 1: the draft in {folder} was loaded only in part: out of memory"
    left = "; rank 1: the one before cannot be put back, so load another one: out of memory" if stays else ""
    assert str(first) == str(second) == problem + left
    assert [isinstance(error, PartlyError) for error in (first, second)] == [stays, stays]
    assert ranks.are_written == [False, stays]


def test_a_draft_that_was_prepared_before_somebody_else_changed_the_weights_is_prepared_again(
    ranks: Ranks, folder: Path
) -> None:
    """What was kept is not what is to be put back."""
    order = ordered(folder)
    assert ranks.prepared(order) == (True, PREPARED)
    ranks.all[1].preparation.forget()

    assert ranks.served(order) == ["rank 1: it has not prepared this draft"] * NUM_RANKS
    assert ranks.prepared(order) == (True, PREPARED)
    assert ranks.served(order) == [7, 7]


def caught(rank: Rank, order: str) -> Exception | None:
    try:
        rank.preparation.serve(order, rank.model, "")
    except RefusedError as error:
        return error
    return None


def test_a_problem_that_one_rank_has_before_it_copies_keeps_all_from_copying(ranks: Ranks, folder: Path) -> None:
    order = ordered(folder)
    assert ranks.prepared(order) == (True, PREPARED)

    assert ranks.served(order, ("", "no memory for the payload")) == ["rank 1: no memory for the payload"] * NUM_RANKS
    assert ranks.are_written == [False, False]


def test_an_order_that_cannot_be_read_is_refused_and_leaves_what_was_prepared(ranks: Ranks, folder: Path) -> None:
    order = ordered(folder)
    assert ranks.prepared(order) == (True, PREPARED)

    assert not ranks.check("nothing")[0]

    assert ranks.served(order) == [7, 7]


def test_with_several_nodes_nobody_waits_for_a_rank_that_may_lack_the_plugin(
    ranks: Ranks, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "is_one_node", lambda: False)
    rank, request = ranks.all[0], SimpleNamespace(action=PREPARE + ordered(folder))

    answer = rank.preparation.check(lambda *_: None, rank.manager, request)

    assert (answer.success, answer.message) == (False, SEVERAL_NODES)
    with pytest.raises(RefusedError, match="several nodes"):
        rank.preparation.serve(ordered(folder), rank.model, "")


def test_another_release_of_sglang_refuses_drafts_and_works_on(
    ranks: Ranks, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, request = ranks.all[0], SimpleNamespace(action=PREPARE + ordered(folder))
    monkeypatch.setattr(configuration, "is_one_node", lambda: SimpleNamespace().nnodes)

    is_done, message = ranks.check(ordered(folder))

    assert not is_done
    assert "has no attribute 'nnodes'" in message

    def no_module(_: str) -> Any:
        raise ImportError

    monkeypatch.setattr(preparation, "resolved", no_module)
    assert rank.preparation.check(lambda *_: "SGLang's", rank.manager, request) == "SGLang's"


def test_a_server_without_a_draft_says_so(ranks: Ranks, folder: Path) -> None:
    for rank in ranks.all:
        rank.manager.draft_worker = None

    assert ranks.prepared(ordered(folder)) == (False, "rank 0: the server does not draft with EAGLE-3")


def test_a_server_without_the_loader_reads_nothing(ranks: Ranks, folder: Path) -> None:
    for rank in ranks.all:
        rank.updater.custom_weight_loaders.clear()

    assert ranks.prepared(ordered(folder)) == (
        False,
        "rank 0: start the server with --custom-weight-loader a.loader",
    )


def test_released_weights_are_neither_prepared_for_nor_written(ranks: Ranks, folder: Path) -> None:
    """Reading or writing them would end the server."""
    order = ordered(folder)
    assert ranks.prepared(order) == (True, PREPARED)
    for rank in ranks.all:
        rank.manager.offload_tags.add("weights")

    assert ranks.served(order) == [f"rank 0: {ASLEEP}"] * NUM_RANKS
    assert ranks.prepared(order) == (False, f"rank 0: {ASLEEP}")
    for rank in ranks.all:
        rank.manager.offload_tags.clear()
    assert ranks.prepared(order) == (True, PREPARED)


def test_checks_of_others_are_left_to_sglang(ranks: Ranks) -> None:
    request = SimpleNamespace(action="checksum")
    assert ranks.all[0].preparation.check(lambda *_: "SGLang's", ranks.all[0].manager, request) == "SGLang's"


def _no_map(model: Any) -> None:
    del model.hot_token_id


def _head_of_target(model: Any) -> None:
    model.load_lm_head_from_target = True


def _other_build(model: Any) -> None:
    model.model.register_parameter("input_norm", nn.Parameter(torch.zeros(24)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(_no_map, "not an EAGLE-3 draft with its own vocabulary", id="no map"),
        pytest.param(_head_of_target, "uses the target's head", id="head"),
        pytest.param(_other_build, "has the parameters", id="build"),
    ],
)
def test_a_served_draft_that_cannot_be_replaced_is_never_written(
    ranks: Ranks, folder: Path, change: Any, reason: str
) -> None:
    change(ranks.all[1].model)

    is_done, message = ranks.prepared(ordered(folder))

    assert not is_done
    assert message.startswith("rank 1: ")
    assert reason in message
