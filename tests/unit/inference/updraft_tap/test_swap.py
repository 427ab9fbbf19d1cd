"""A swap, on an engine that holds its weights in a dictionary."""

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_draft import write_tiny_draft
from tests.support.tiny_engine import Engine
from tests.support.wait import wait_until
from torch import Tensor

from updraft_tap import weights
from updraft_tap.between_steps import BetweenSteps, NeverBetweenStepsError
from updraft_tap.swap import Swap
from updraft_tap.weights import UNKNOWN, ServedVersion


class Served:
    """An engine, its swap, and the answers."""

    def __init__(self, *, is_read_at_rest: bool) -> None:
        self.engine = Engine(is_read_at_rest=is_read_at_rest)
        self.version = ServedVersion()
        self.answers: list[dict[str, Any]] = []
        self.between = BetweenSteps()
        self.swap = Swap(draft=self.engine, between=self.between, served=self.version, reply=self.answers.append)

    def load(self, folder: Path, version: int = 7) -> dict[str, Any]:
        before = len(self.answers)
        self.swap.load({"kind": "load", "folder": str(folder), "version": version, "digest": f"sha256:{version}"})
        wait_until(lambda: len(self.answers) > before)
        wait_until(lambda: not self.swap._busy.locked())
        return self.answers[-1]


@pytest.fixture(params=[True, False], ids=["read at rest", "read at any time"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    one = Served(is_read_at_rest=request.param)
    yield one
    one.engine.may_prepare.set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_draft(tmp_path / "v7")


def test_a_draft_is_served_and_proved_by_what_the_engine_holds(served: Served, folder: Path) -> None:
    answer = served.load(folder)

    tensors = load_file(folder / "model.safetensors")
    joined = weights.joined(tensors, torch.bfloat16)
    assert answer["refusal"] == ""
    assert answer["held"] == weights.digest({**joined, "d2t": tensors["d2t"]})
    assert answer["target"] == weights.sampled(served.engine.targets)
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    assert (served.version.version, served.version.digest) == (7, "sha256:7")
    assert served.engine.held.keys() == joined.keys() | {"d2t"}


@pytest.mark.parametrize("problem", ["missing", "not finite", "another size", "token that is none", "int weights"])
def test_a_draft_that_is_refused_leaves_the_one_before(served: Served, folder: Path, problem: str) -> None:
    served.load(folder)
    before = dict(served.engine.held)
    spoil(folder, problem)

    answer = served.load(folder, 8)

    assert answer["refusal"] != ""
    assert not answer["target_changed"]
    assert answer["needs_restart"] == (problem == "another size")
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    assert all(served.engine.held[name] is tensor for name, tensor in before.items())


def test_a_draft_of_another_shape_is_known_by_its_config_however_large_its_file_is(
    served: Served, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 1 << 20}))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)

    answer = served.load(folder)

    assert answer["refusal"].startswith("intermediate_size is 1048576 in the draft's config.json, but ")
    assert answer["needs_restart"]


def spoil(folder: Path, problem: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    if problem == "not finite":
        tensors["norm.weight"][0] = torch.nan
    elif problem == "another size":
        tensors["norm.weight"] = torch.ones(9)
    elif problem == "token that is none":
        tensors["d2t"] += 100
    elif problem == "int weights":
        tensors["norm.weight"] = tensors["norm.weight"].int()
    save_file(tensors, folder / "model.safetensors")
    if problem == "missing":
        (folder / "config.json").unlink()


def test_a_message_that_is_none_is_refused(served: Served) -> None:
    served.swap.load({"kind": "load"})
    wait_until(lambda: bool(served.answers))

    (answer,) = served.answers
    assert (answer["version"], answer["refusal"].startswith("a load needs a folder")) == (None, True)


def test_what_the_engine_holds_otherwise_is_no_success(served: Served, folder: Path) -> None:
    served.engine.spoil = 1.0

    answer = served.load(folder)

    assert "but the engine holds sha256:" in answer["refusal"]
    assert served.version.digest == UNKNOWN


def leave() -> None:
    raise SystemExit("no weights for this CPU")


@pytest.mark.parametrize(
    "problem", ["a write fails", "a write exits", "it holds another one", "it cannot be read", "reading it exits"]
)
def test_a_draft_that_is_refused_after_the_first_write_is_replaced_by_the_one_before(
    served: Served, folder: Path, problem: str
) -> None:
    served.load(folder)
    before = dict(served.engine.held)
    if problem == "a write fails":
        served.engine.fails = 1
    elif problem == "a write exits":
        served.engine.on_write = leave
    elif problem == "it holds another one":
        served.engine.spoil = 1.0
    else:

        def fail() -> None:
            served.engine.on_read = lambda: None
            raise SystemExit("no kernel") if problem == "reading it exits" else RuntimeError("illegal memory access")

        served.engine.on_read = fail

    answer = served.load(folder, 8)

    assert "was loaded, but" in answer["refusal"]
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    assert all(served.engine.held[name] is tensor for name, tensor in before.items())


@pytest.mark.parametrize("is_exit", [False, True], ids=["an error", "an exit"])
def test_no_step_drafts_with_a_mixture_after_a_write_that_failed(
    served: Served, folder: Path, *, is_exit: bool
) -> None:
    served.load(folder)
    before = dict(served.engine.held)
    seen: list[dict[str, Tensor]] = []
    run = served.between.run

    def stepping(body: Callable[[], None], timeout_s: float) -> float:
        try:
            return run(body, timeout_s)
        finally:
            seen.append(dict(served.engine.held))

    served.between.run = stepping  # type: ignore[method-assign]  # a step after each gap
    if is_exit:
        served.engine.on_write = leave
    else:
        served.engine.fails = 1
    served.load(folder, 8)

    assert seen
    assert all(held[name] is tensor for held in seen for name, tensor in before.items())


def test_a_refused_draft_is_put_back_however_long_the_engine_stays_within_a_step(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.load(folder)
    before = dict(served.engine.held)
    run = served.between.run
    stuck = threading.Event()

    def stuck_after_the_writes(body: Callable[[], None], timeout_s: float) -> float:
        if timeout_s < math.inf and stuck.is_set():
            raise NeverBetweenStepsError("the engine was within one step for 60 s")
        stuck.set()
        return run(body, timeout_s)

    monkeypatch.setattr(served.between, "run", stuck_after_the_writes)
    served.engine.spoil = 0.0 if served.engine.is_read_at_rest else 1.0
    answer = served.load(folder, 8)

    assert answer["refusal"] != ""
    assert answer["served"]["version"] == 7
    assert all(served.engine.held[name] is tensor for name, tensor in before.items())


def test_a_load_that_never_comes_between_two_steps_changes_nothing(served: Served, folder: Path) -> None:
    served.load(folder)
    patience = list[float]()

    def never(body: Callable[[], None], timeout_s: float) -> float:
        patience.append(timeout_s)
        raise NeverBetweenStepsError("the engine was within one step for 60 s")

    served.between.run = never  # type: ignore[method-assign]  # an engine that hangs
    answer = served.load(folder, 8)

    assert answer["refusal"] == "the engine was within one step for 60 s"
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    assert len(patience) == 1


def test_a_write_that_fails_in_the_middle_says_so_and_forgets_the_digest(served: Served, folder: Path) -> None:
    served.load(folder)
    served.engine.fails = 3  # also the one before cannot be put back

    answer = served.load(folder, 8)

    assert "loaded only in part; load another one: out of memory" in answer["refusal"]
    assert (served.version.version, served.version.digest) == (7, UNKNOWN)


def test_an_exit_while_the_one_before_is_put_back_is_told(served: Served, folder: Path) -> None:
    served.load(folder)
    put_back = served.engine.kept

    def leaving() -> Sequence[Callable[[], None]]:
        return [*put_back(), leave]

    served.engine.kept = leaving  # type: ignore[method-assign]  # an engine that cannot go back
    served.engine.spoil = 1.0

    answer = served.load(folder, 8)

    assert "so one may be loaded only in part; load another one: no weights for this CPU" in answer["refusal"]
    assert answer["served"]["digest"] == UNKNOWN


def test_a_load_is_refused_while_the_engine_has_closed_its_weights(served: Served, folder: Path) -> None:
    served.load(folder)
    before = dict(served.engine.held)
    served.swap.close("vLLM sleeps")
    pieces = served.engine.pieces

    refused = served.load(folder, 8)

    assert refused["refusal"] == "vLLM sleeps"
    assert refused["served"] == {"version": 7, "digest": UNKNOWN}
    assert served.engine.pieces == pieces
    assert all(served.engine.held[name] is tensor for name, tensor in before.items())
    served.swap.open(lambda: None)
    assert served.load(folder, 9)["served"] == {"version": 9, "digest": "sha256:9"}


def test_weights_that_are_closed_in_the_middle_of_a_load_are_not_touched_again(served: Served, folder: Path) -> None:
    served.load(folder)
    pieces, closing = served.engine.pieces, list[threading.Thread]()

    def close() -> None:
        if not closing:
            closing.append(threading.Thread(target=served.swap.close, args=("vLLM sleeps",)))
            closing[0].start()
            wait_until(lambda: served.swap._closed != "")

    served.engine.on_read = close
    held_before = len(served.answers)
    served.swap.load({"kind": "load", "folder": str(folder), "version": 8, "digest": "sha256:8"})
    wait_until(lambda: len(served.answers) > held_before)
    closing[0].join()

    assert "load another one: vLLM sleeps" in served.answers[-1]["refusal"]
    assert served.answers[-1]["served"]["digest"] == UNKNOWN
    assert served.engine.pieces < 2 * pieces


def test_the_pause_is_that_of_the_longest_piece(served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took_s = iter([0.25, *[0.001] * 3, 0.5, *[0.001] * 1000])
    run = served.between.run

    def timed(body: Callable[[], None], timeout_s: float) -> float:
        run(body, timeout_s)
        return next(took_s)

    monkeypatch.setattr(served.between, "run", timed)

    assert served.load(folder)["pause_us"] == (500_000 if served.engine.is_read_at_rest else 250_000)


def test_after_an_exit_within_a_load_the_agent_hears_of_it_and_the_next_draft_is_loaded(
    served: Served, folder: Path
) -> None:
    served.engine.on_prepare = leave
    assert served.load(folder)["refusal"] == "no weights for this CPU"

    served.engine.on_prepare = lambda: None
    assert served.load(folder)["refusal"] == ""


def test_an_exit_while_it_is_looked_what_is_served_leaves_it_unknown_and_it_is_told(
    served: Served, folder: Path
) -> None:
    served.load(folder)
    served.swap.close("vLLM sleeps")
    served.engine.on_read = leave

    assert looked(served) == (0, UNKNOWN)


def test_a_second_draft_is_refused_while_one_is_being_loaded(served: Served, folder: Path) -> None:
    served.engine.may_prepare.clear()
    served.swap.load({"kind": "load", "folder": str(folder), "version": 7, "digest": "sha256:7"})
    served.swap.load({"kind": "load", "folder": str(folder), "version": 8, "digest": "sha256:8"})
    served.engine.may_prepare.set()
    wait_until(lambda: len(served.answers) == 2)

    assert [(one["version"], one["refusal"]) for one in served.answers] == [
        (8, "another draft is being loaded"),
        (7, ""),
    ]


def spoil_target(served: Served) -> None:
    served.engine.targets["shared embed_tokens.weight"][3] += 1.0


def test_a_draft_whose_load_changes_the_target_is_refused_and_put_back(served: Served, folder: Path) -> None:
    served.load(folder)
    before = dict(served.engine.held)
    served.engine.on_write = lambda: spoil_target(served)

    answer = served.load(folder, 8)

    assert answer["target_changed"]
    assert "that changed weights of the target; the target's weights may not be as before" in answer["refusal"]
    assert "restart the server" in answer["refusal"]
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    assert all(served.engine.held[name] is tensor for name, tensor in before.items())


def test_a_write_that_fails_after_it_changed_the_target_says_so(served: Served, folder: Path) -> None:
    served.load(folder)
    served.engine.on_write = lambda: spoil_target(served)
    served.engine.fails = 1

    answer = served.load(folder, 8)

    assert answer["target_changed"]
    assert "out of memory; the target's weights may not be as before" in answer["refusal"]


def test_a_target_that_cannot_be_read_is_not_compared(served: Served, folder: Path) -> None:
    served.engine.targets["packed"] = torch.eye(4).to_sparse()

    answer = served.load(folder)

    assert (answer["refusal"], answer["target"]) == ("", "")
    served.engine.on_write = lambda: setattr(served.engine, "spoil", 1.0)
    refused = served.load(folder, 8)
    assert not refused["target_changed"]
    assert "the engine holds" in refused["refusal"]


def test_a_target_that_is_put_back_with_the_draft_is_said_to_be_as_before(served: Served, folder: Path) -> None:
    served.load(folder)
    original = served.engine.kept

    def kept_with_target() -> Sequence[Callable[[], None]]:
        embedding = served.engine.targets["shared embed_tokens.weight"]
        before = embedding.clone()

        def put_back() -> None:
            embedding.copy_(before)

        return [*original(), put_back]

    served.engine.kept = kept_with_target  # type: ignore[method-assign]  # the draft has the target's own head
    served.engine.on_write = lambda: spoil_target(served)

    answer = served.load(folder, 8)

    assert answer["target_changed"]
    assert answer["refusal"].endswith("changed weights of the target; the target's weights are as before again")


def test_a_target_that_others_update_during_a_load_is_not_compared(served: Served, folder: Path) -> None:
    loading = served.between.run

    def update_first(body: Callable[[], None], timeout_s: float) -> float:
        served.between.run = loading  # type: ignore[method-assign]
        served.swap.close("someone updates the weights")
        spoil_target(served)
        served.swap._closed = ""
        return loading(body, timeout_s)

    served.between.run = update_first  # type: ignore[method-assign]  # between the two looks

    answer = served.load(folder, 8)

    assert (answer["refusal"], answer["target"]) == ("", "")
    assert served.load(folder, 9)["target"] == weights.sampled(served.engine.targets)


def looked(served: Served) -> tuple[int, str]:
    """The version and the digest once it is known what is served."""
    known = threading.Event()
    served.swap.open(known.set)
    assert known.wait(30)
    return served.version.version, served.version.digest


@pytest.mark.parametrize("is_lost", [False, True])
def test_after_somebody_else_had_the_weights_it_is_said_whether_the_draft_is_still_there(
    served: Served, folder: Path, *, is_lost: bool
) -> None:
    served.load(folder)
    served.swap.close("vLLM sleeps")
    assert served.version.digest == UNKNOWN
    if is_lost:
        served.engine.held["norm.weight"] = torch.zeros(16)

    assert looked(served) == ((0, UNKNOWN) if is_lost else (7, "sha256:7"))

    assert served.load(folder, version=8)["refusal"] == ""
    assert served.version.version == 8


def test_without_a_proof_a_draft_counts_as_lost(served: Served) -> None:
    served.swap.close("vLLM sleeps")
    assert looked(served) == (0, UNKNOWN)
