"""Swaps of two ranks that an engine's loop leads: both in this process, each with half of every weight."""

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_draft import write_tiny_draft
from tests.support.tiny_engine import Engine
from tests.support.wait import wait_until
from torch import Tensor

from updraft_tap import weights
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.swap import Swap
from updraft_tap.weights import UNKNOWN, ServedVersion
from updraft_vllm import ranks
from updraft_vllm.lead import EngineThread, Leader, MixedRanksError, joined
from updraft_vllm.ranks import Rank


class Half(Engine):
    """A rank with half of each weight."""

    def __init__(self, number: int) -> None:
        self.may_read = threading.Event()
        """Reading a draft begins with a look at the served one."""
        self.may_read.set()
        super().__init__(is_read_at_rest=False)
        self.number = number
        self.rank = Rank(lambda: None)
        self.served = ServedVersion()
        self.between = BetweenSteps()
        self.rank.swap = Swap(
            draft=self, between=self.between, served=self.served, reply=self.rank.answer, lockstep=self.rank
        )
        self.rank.no_swap = ""

    @property
    def config(self) -> Any:
        assert self.may_read.wait(30)
        return self._config

    @config.setter
    def config(self, config: Any) -> None:
        self._config = config

    def part(self, prepared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: tensor.chunk(2)[self.number] for name, tensor in prepared.items()}


class Server:
    """vLLM's loop, its calls to its workers, and the steps between them."""

    def __init__(self) -> None:
        self.halves = (Half(0), Half(1))
        self.workers = [SimpleNamespace(**{ranks.ATTRIBUTE: half.rank}) for half in self.halves]
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.model_executor = self
        self.answers: list[dict[str, Any]] = []
        self.thread = EngineThread(may_skip=True)
        self.leader = Leader(self.thread, self.answers.append)
        self.versions: set[tuple[int, ...]] = set()
        """The versions that all ranks hold, as each step sees them."""
        self.has_ended = False
        self._loop = threading.Thread(target=self.thread.loop, args=(Server._run, self), daemon=True)

    def collective_rpc(self, method: Callable[..., Any], *, args: tuple[Any, ...]) -> list[Any]:
        return [method(worker, *args) for worker in self.workers]

    def _run(self) -> None:
        while True:
            request = self.input_queue.get()
            if request is None:
                return
            try:
                self.thread.handle(lambda *_: None, self, *request)
            except MixedRanksError:
                self.has_ended = True
                return
            for half in self.halves:
                half.between.begin()
            self.versions.add(tuple(half.served.written for half in self.halves))
            for half in self.halves:
                half.between.end()

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        self.input_queue.put(None)
        self._loop.join()

    def load(self, folder: Path, version: int = 7) -> dict[str, Any]:
        before = len(self.answers)
        self.leader.load({"kind": "load", "folder": str(folder), "version": version, "digest": f"sha256:{version}"})
        wait_until(lambda: len(self.answers) > before)
        return self.answers[-1]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    engine = ModuleType("vllm.v1.engine")
    engine.EngineCoreRequestType = SimpleNamespace(WAKEUP="wake up")  # type: ignore[attr-defined]  # vLLM's
    for name, module in (("vllm", ModuleType("vllm")), ("vllm.v1", ModuleType("v1")), ("vllm.v1.engine", engine)):
        monkeypatch.setitem(sys.modules, name, module)
    one = Server()
    one.start()
    wait_until(lambda: one.thread._engine is not None)
    yield one
    one.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_draft(tmp_path / "v7")


def test_a_swap_is_proved_on_all_ranks_which_change_between_the_same_two_steps(server: Server, folder: Path) -> None:
    answer = server.load(folder)

    tensors = load_file(folder / "model.safetensors")
    joined = weights.joined(tensors, torch.bfloat16)
    assert (answer["refusal"], answer["version"]) == ("", 7)
    assert answer["held"] == weights.digest({**joined, "d2t": tensors["d2t"]})
    assert answer["target"].startswith("sha256:")
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    for name, value in joined.items():
        assert torch.equal(torch.cat([half.held[name] for half in server.halves]), value)
    assert all(torch.equal(half.held["d2t"], tensors["d2t"]) for half in server.halves)
    assert server.versions <= {(0, 0), (7, 7)}


def cannot_prepare(half: Half) -> None:
    def fail() -> None:
        half.on_prepare = lambda: None
        raise RuntimeError("no memory")

    half.on_prepare = fail


def cannot_write(half: Half) -> None:
    half.fails = 1


def cannot_prove(half: Half) -> None:
    half.spoil = 1.0


@pytest.mark.parametrize("fails", [cannot_prepare, cannot_write, cannot_prove])
@pytest.mark.parametrize("number", [0, 1])
def test_what_one_rank_refuses_leaves_the_draft_before_on_all(
    server: Server, folder: Path, fails: Callable[[Half], None], number: int
) -> None:
    server.load(folder)
    before = [dict(half.held) for half in server.halves]
    fails(server.halves[number])

    answer = server.load(folder, 8)

    assert answer["refusal"] != ""
    assert not answer["needs_restart"]
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    for half, held in zip(server.halves, before, strict=True):
        assert all(half.held[name] is value for name, value in held.items())
        assert (half.served.version, half.served.digest) == (7, "sha256:7")
    assert all(one == other for one, other in server.versions)
    assert server.load(folder, 9)["served"] == {"version": 9, "digest": "sha256:9"}


def test_a_turn_that_did_not_begin_on_one_rank_is_put_back_once_on_the_others(server: Server, folder: Path) -> None:
    server.load(folder)
    first, second = server.halves
    before = dict(first.held)

    def fail() -> None:
        second.rank._synchronize = lambda: None
        raise RuntimeError("the GPU is busy")

    second.rank._synchronize = fail
    answer = server.load(folder, 8)

    assert answer["refusal"].endswith("rank 1: the GPU is busy")
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    assert (first.served.digest, second.served.digest) == ("sha256:7", "sha256:7")
    assert all(first.held[name] is value for name, value in before.items())
    assert server.load(folder, 9)["served"] == {"version": 9, "digest": "sha256:9"}


def test_a_rank_without_a_plugin_refuses_for_all(server: Server, folder: Path) -> None:
    server.workers[1] = SimpleNamespace()

    answer = server.load(folder)

    assert answer["refusal"] == "rank 1: the plugin did not start on this rank"
    assert answer["served"] == {"version": 0, "digest": ""}
    assert not server.halves[0].held


def test_ranks_that_end_with_different_drafts_are_not_said_to_serve_one(server: Server, folder: Path) -> None:
    server.load(folder)
    second, closing = server.halves[1], list[threading.Thread]()

    def close() -> None:
        for half in server.halves:
            assert half.rank.swap is not None
            half.rank.swap.close("somebody else updates the weights")

    def lose() -> None:  # while both prove
        second.on_read = lambda: None
        closing.append(threading.Thread(target=close))
        closing[0].start()
        wait_until(lambda: bool(second.rank.swap and second.rank.swap._closed))

    second.on_read = lose
    answer = server.load(folder, 8)

    assert answer["refusal"] != ""
    assert answer["served"]["digest"] == UNKNOWN
    assert all(half.served.digest == UNKNOWN for half in server.halves)
    closing[0].join()


def test_only_a_rank_that_knew_what_it_serves_tells_that_it_is_in_doubt(server: Server, folder: Path) -> None:
    told: list[int] = []
    first, second = server.halves
    for half in server.halves:
        half.rank.changed = lambda number=half.number: told.append(number)  # type: ignore[misc]  # a default binds it
    for _ in range(2):
        first.spoil = second.spoil = 1.0
        assert server.load(folder)["served"] == {"version": 0, "digest": UNKNOWN}, "none was ever proved"
    assert told == [], "or the agent would send the same draft again at once, for ever"

    second.served.digest = "sha256:1"
    cannot_prepare(first)
    assert server.load(folder)["served"]["digest"] == UNKNOWN
    assert told == [1]


def test_weights_that_were_closed_for_a_moment_while_they_are_proved_are_not_said_to_be_served(
    server: Server, folder: Path
) -> None:
    second, closing = server.halves[1], list[threading.Thread]()

    def close() -> None:
        for half in server.halves:
            assert half.rank.swap is not None
            half.rank.swap.close("somebody else updates the weights")
            half.rank.swap.open(lambda: None)

    def lose() -> None:  # while both prove
        second.on_read = lambda: None
        closing.append(threading.Thread(target=close))
        closing[0].start()
        wait_until(lambda: bool(second.rank.swap and second.rank.swap._closed))

    second.on_read = lose
    answer = server.load(folder)
    closing[0].join()

    assert answer["refusal"] != ""
    assert answer["served"]["digest"] == UNKNOWN
    assert server.load(folder, 9)["served"] == {"version": 9, "digest": "sha256:9"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_server_whose_ranks_hold_different_drafts_ends(server: Server, folder: Path, number: int) -> None:
    server.load(folder)
    server.halves[number].fails = 3  # to write, and twice to put back

    answer = server.load(folder, 8)

    assert "so this server ends" in answer["refusal"]
    wait_until(lambda: server.has_ended)


def test_ranks_that_read_different_drafts_change_nothing(server: Server, folder: Path) -> None:
    server.load(folder)
    before = [dict(half.held) for half in server.halves]
    second = server.halves[1]

    def rewrite() -> None:
        server.halves[0].on_prepare = lambda: None
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, folder / "model.safetensors")
        second.may_read.set()

    second.may_read.clear()
    server.halves[0].on_prepare = rewrite
    answer = server.load(folder, 8)

    assert answer["refusal"] == "rank 1: it has read another draft than rank 0"
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    for half, held in zip(server.halves, before, strict=True):
        assert all(half.held[name] is value for name, value in held.items())


def test_a_load_whose_leader_gave_up_does_not_hold_up_the_next_one(server: Server, folder: Path) -> None:
    load = {"kind": "load", "folder": str(folder), "version": 7, "digest": "sha256:7"}
    for half in server.halves:
        half.rank.load(load)
    wait_until(lambda: all(half.rank.state()["at"] == ranks.WRITES for half in server.halves))

    wait_until(lambda: server.load(folder, 8)["refusal"] == "")
    assert {half.served.version for half in server.halves} == {8}


@pytest.mark.parametrize(
    ("refusals", "told"),
    [
        (("", "the part of fc has a shape, but this rank of vLLM holds another"), "rank 1: the part of fc has"),
        (("another rank has ended its load", "no memory"), "rank 1: no memory"),
        (("the draft in /d was loaded, but rank 1: no", "the draft in /d was loaded, but no"), "rank 1: the draft"),
        (("rank 1: no memory", "rank 1: no memory"), "rank 1: no memory"),
    ],
)
def test_a_refusal_names_the_rank_whose_it_is(refusals: tuple[str, str], told: str) -> None:
    assert joined([{"refusal": one} for one in refusals])["refusal"].startswith(told)


def test_a_second_load_is_refused_while_one_is_prepared(server: Server, folder: Path) -> None:
    server.halves[1].may_prepare.clear()
    server.leader.load({"kind": "load", "folder": str(folder), "version": 7, "digest": "sha256:7"})

    assert server.load(folder, 8)["refusal"] == "another draft is being loaded"
    server.halves[1].may_prepare.set()
    wait_until(lambda: len(server.answers) == 2)
    assert server.answers[-1]["served"] == {"version": 7, "digest": "sha256:7"}


def test_weights_that_may_have_changed_count_as_lost_on_all_ranks(server: Server, folder: Path) -> None:
    server.load(folder)
    changed: list[int] = []
    for half in server.halves:
        assert half.rank.swap is not None
        half.rank.swap.close("vLLM sleeps")
        half.rank.swap.open(lambda number=half.number: changed.append(number))  # type: ignore[misc]  # a default binds it
    wait_until(lambda: len(changed) == 2)

    assert [(half.served.version, half.served.digest) for half in server.halves] == [(0, UNKNOWN)] * 2
    assert [half.served.written for half in server.halves] == [7, 7]


def test_an_answer_has_what_is_served_when_the_leader_asks(server: Server, folder: Path) -> None:
    first = server.halves[0].rank
    server.load(folder)
    assert first.swap is not None
    assert first.state()["answer"]["served"] == {"version": 7, "digest": "sha256:7"}

    first.swap.close("somebody else updates the weights")
    first.swap.open(lambda: None)

    assert first.state()["answer"]["served"] == {"version": 0, "digest": UNKNOWN}


@pytest.mark.parametrize("installed", [(True, True), (True, False)])
def test_an_untrained_draft_is_left_out_by_all_ranks_or_by_none(installed: tuple[bool, bool]) -> None:
    one = Server()
    hooks = [SimpleNamespace(is_on=False) for _ in installed]
    for half, hook, is_there in zip(one.halves, hooks, installed, strict=True):
        half.rank.proposals = hook if is_there else None  # type: ignore[assignment]  # a stand-in
    one.start()
    one.stop()

    assert [hook.is_on for hook in hooks] == [all(installed)] * 2
