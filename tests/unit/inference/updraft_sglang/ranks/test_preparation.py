"""A draft that two ranks prepare before they write it, on stand-ins for SGLang's ranks and its exchange between them."""

import json
import threading
from collections.abc import Callable
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
from updraft_sglang.ranks.preparation import PREPARE, PREPARED, PREPARING, Preparation
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

    def check(self, attempt: str, *folders: Path, version: int = 7) -> tuple[bool, str]:
        """The answer to an order; of the folders, each rank sees another one under the same name."""

        def body(rank: Rank) -> Any:
            folder = folders[self.all.index(rank) % len(folders)]
            order = {"attempt": attempt, "folder": str(folder), "version": version, "digest": "sha256:7"}
            request = SimpleNamespace(action=PREPARE + json.dumps(order))
            return rank.preparation.check(lambda *_: pytest.fail("not SGLang's"), rank.manager, request)

        first, second = self.together(body)
        assert first == second, "all ranks say the same"
        return first.success, first.message

    def prepared(self, attempt: str, *folders: Path) -> tuple[bool, str]:
        """The last answer of an agent that asks until they are ready, or one refuses."""
        answers: list[tuple[bool, str]] = []

        def is_over() -> bool:
            answers.append(self.check(attempt, *folders))
            return answers[-1] != (True, PREPARING)

        wait_until(is_over, what="the ranks")
        return answers[-1]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def test_all_ranks_prepare_a_draft_without_a_write_and_then_copy_it(ranks: Ranks, folder: Path) -> None:
    assert ranks.prepared("a", folder) == (True, PREPARED)
    (folder / "model.safetensors").unlink()  # nothing is read any more
    assert not any(parameter.any() for rank in ranks.all for parameter in rank.model.parameters())

    for prepared in ranks.together(lambda rank: rank.preparation.take("a", rank.model)):
        assert (prepared.order.version, prepared.order.digest) == (7, "sha256:7")
        for write in prepared.writes:
            write()

    for rank in ranks.all:
        assert dict(rank.model.named_parameters())["model.fc.weight"].any()
        assert torch.equal(rank.model.hot_token_id, TOKEN_IDS)
    again = ranks.together(lambda rank: rank.preparation.take("a", rank.model))
    assert again == ["rank 0: it has not prepared this draft"] * NUM_RANKS


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
def test_what_one_rank_reads_otherwise_is_refused_by_all(
    ranks: Ranks, folder: Path, tmp_path: Path, change: Change, reason: str
) -> None:
    other = write_tiny_draft(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    change(tensors)
    save_file(tensors, other / "model.safetensors")

    is_done, message = ranks.prepared("a", folder, other)

    assert not is_done
    assert reason in message


def test_a_rank_that_refuses_keeps_all_others_from_writing_and_the_next_attempt_reads_again(
    ranks: Ranks, folder: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    is_done, message = ranks.prepared("a", folder, missing)

    assert (is_done, message.startswith(f"rank 1: cannot read the draft in {missing}")) == (False, True)
    refusals = ranks.together(lambda rank: rank.preparation.take("a", rank.model))
    assert refusals == ["rank 1: it has not prepared this draft"] * NUM_RANKS
    write_tiny_draft(missing)
    assert ranks.prepared("b", folder, missing) == (True, PREPARED)


def test_an_order_that_cannot_be_read_is_refused_and_leaves_what_was_prepared(ranks: Ranks, folder: Path) -> None:
    assert ranks.prepared("a", folder) == (True, PREPARED)
    request = SimpleNamespace(action=f"{PREPARE}nothing")

    answers = ranks.together(lambda rank: rank.preparation.check(lambda *_: None, rank.manager, request))

    assert [one.success for one in answers] == [False] * NUM_RANKS
    assert "take" not in ranks.together(lambda rank: rank.preparation.take("a", rank.model).order.attempt)


def test_released_weights_are_neither_prepared_for_nor_written(ranks: Ranks, folder: Path) -> None:
    """Reading or writing them would end the server."""
    assert ranks.prepared("a", folder) == (True, PREPARED)
    for rank in ranks.all:
        rank.manager.offload_tags.add("weights")

    assert ranks.together(lambda rank: rank.preparation.take("a", rank.model)) == [f"rank 0: {ASLEEP}"] * NUM_RANKS
    assert ranks.prepared("b", folder) == (False, f"rank 0: {ASLEEP}")
    for rank in ranks.all:
        rank.manager.offload_tags.clear()
    assert ranks.prepared("c", folder) == (True, PREPARED)


def test_a_server_without_the_loader_reads_nothing(ranks: Ranks, folder: Path) -> None:
    for rank in ranks.all:
        rank.updater.custom_weight_loaders.clear()

    assert ranks.prepared("a", folder) == (False, "rank 0: start the server with --custom-weight-loader a.loader")


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

    is_done, message = ranks.prepared("a", folder)

    assert not is_done
    assert message.startswith("rank 1: ")
    assert reason in message
