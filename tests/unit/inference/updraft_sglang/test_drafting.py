"""Whether a step of SGLang drafts, on stand-ins of its worker and of its controller."""

import logging
import os
import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from updraft_sglang import configuration, drafting, names
from updraft_sglang.drafting import DraftingHooks, Policy
from updraft_sglang.ranks import plan
from updraft_sglang.reloads import UnprovedDraft
from updraft_sglang.weights import ServedVersion
from updraft_tap import hooks
from updraft_tap.drafting.speedup import FIRST_BLOCK, FIRST_SLICE
from updraft_tap.drafting.switch import UNTRAINED, Drafting, Tell


class Controller(SimpleNamespace):
    """SGLang's AdaptiveController."""

    def __init__(self, worker: Any, params: Any) -> None:
        super().__init__(worker=worker, params=params)


class Configured:
    """SGLang's policy of a server with --speculative-adaptive."""

    candidate_steps = (1, 3)

    def __init__(self) -> None:
        self.fed: list[int] = []
        self.sizes: list[int] | None = None

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self.sizes = cuda_graph_bs

    def get_steps_for_batch(self, batch_size: int) -> int:
        return 3 if batch_size < 8 else 1

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int:
        self.fed += num_correct_drafts_per_req
        return 1

    def cuda_graph_bs_for_step(self, step: int) -> list[int]:
        return [step]


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The parts of SGLang that are looked up by name, and what they say."""
    monkeypatch.setenv(names.SKIP_EXTEND, "left by this test")  # so that it is put back
    monkeypatch.delenv(names.SKIP_EXTEND)
    said = SimpleNamespace(
        nnodes=1, pp_size=1, enable_lora=False, enable_hisparse=False, reason=None, misfit="", scheduler_recv_interval=1
    )
    parts = {names.CONTROLLER: Controller, names.RESOLVED: lambda _: said, names.NOT_ADAPTIVE: lambda _: said.reason}
    monkeypatch.setattr(drafting, "resolved", parts.__getitem__)
    monkeypatch.setattr(plan, "resolved", {names.ABORT: SimpleNamespace}.__getitem__)
    monkeypatch.setattr(drafting, "gathered", lambda value, _: [value])
    monkeypatch.setattr(hooks, "problems", lambda _: filter(None, [said.misfit]))
    monkeypatch.setattr(configuration, "group", lambda: "all ranks")
    monkeypatch.setattr(configuration, "place", lambda: (0, 1))
    return said


def worker(*, untrained: bool = True, configured: Configured | None = None, is_eagle3: bool = True) -> Any:
    draft = SimpleNamespace(**({UNTRAINED: True} if untrained else {}))
    runner = SimpleNamespace(model_config=SimpleNamespace(hf_config=draft))
    return SimpleNamespace(
        speculative_num_steps=2,
        speculative_algorithm=SimpleNamespace(is_eagle3=lambda: is_eagle3),
        draft_worker=SimpleNamespace(draft_runner=runner),
        adaptive_controller=configured and Controller(None, configured),
    )


def started(worker: Any, served: ServedVersion | None = None, tell: Tell | None = None) -> DraftingHooks:
    guard = hooks.logged_guard(logging.getLogger("test"), "failed")
    found = DraftingHooks(served=served or ServedVersion(), guard=guard, tell=tell, secret="")
    found.start(lambda *_: None, worker, "server_args")
    return found


def length(found: DraftingHooks, worker: Any, batch_size: int = 1) -> int:
    """Drafts of the next step, before which SGLang receives requests."""
    assert found.receive(lambda _, sent: list(sent or ()), "receiver", local_reqs=None) == []
    return int(worker.adaptive_controller.params.get_steps_for_batch(batch_size))


def test_an_untrained_draft_proposes_nothing_and_does_not_run_until_another_one_is_in_place() -> None:
    served, one = ServedVersion(), worker()
    found = started(one, served)
    policy = one.adaptive_controller.params
    said = []
    for served.version in (0, 1, 0):
        said.append((length(found, one), os.environ.get(names.SKIP_EXTEND)))

    assert found.problem == ""
    assert policy.candidate_steps == [0, 2], "SGLang prepares both"
    assert policy.cuda_graph_bs_for_step(0) is policy.cuda_graph_bs_for_step(2) is None, "for all batches"
    assert said == [(0, "true"), (2, None), (0, "true")]


def test_a_server_that_starts_with_a_trained_draft_drafts_from_its_first_step() -> None:
    one = worker(untrained=False)
    found = started(one)

    assert length(found, one) == 2


def test_a_policy_of_the_server_itself_chooses_the_number_where_drafting_is_on() -> None:
    configured, is_on = Configured(), True
    policy = Policy(configured, lambda _: is_on)
    policy.set_cuda_graph_bs([1, 2])

    assert policy.candidate_steps == [0, 1, 3]
    assert configured.sizes == [1, 2]
    assert (policy.cuda_graph_bs_for_step(0), policy.cuda_graph_bs_for_step(3)) == (None, [3])
    assert [policy.get_steps_for_batch(1), policy.get_steps_for_batch(9)] == [3, 1]
    policy.on_verify_complete([2, 3], 2)
    for is_on in (False, True):
        assert policy.get_steps_for_batch(1) == (3 if is_on else 0)
        policy.on_verify_complete([0, 0], 2)
    assert configured.fed == [2, 3], "a step without drafts says nothing of their number"


def test_the_policy_of_an_adaptive_server_is_wrapped() -> None:
    one = worker(configured=Configured())
    controller = one.adaptive_controller
    assert started(one).problem == ""

    assert one.adaptive_controller is controller
    assert controller.params.candidate_steps == [0, 1, 3]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("nnodes", 2, "unless all ranks run on one node"),
        ("misfit", "recv_requests takes nothing", "recv_requests takes nothing"),
        ("pp_size", 2, "with pipeline parallelism"),
        ("scheduler_recv_interval", 4, "--scheduler-recv-interval above 1"),
        ("enable_lora", True, "with LoRA or HiSparse"),
        ("reason", "attention DP is not supported", "attention DP is not supported"),
    ],
)
def test_a_server_whose_number_of_drafts_is_fixed_says_why(
    sglang: SimpleNamespace, field: str, value: Any, reason: str
) -> None:
    setattr(sglang, field, value)
    one = worker()

    assert reason in started(one).problem
    assert one.adaptive_controller is None


def test_another_algorithm_is_left_as_it_is() -> None:
    one = worker(is_eagle3=False)

    assert started(one).problem == "this server does not draft with EAGLE-3"
    assert one.adaptive_controller is None


def test_a_worker_that_does_not_fit_starts_all_the_same() -> None:
    assert started(SimpleNamespace()).problem == "the policy cannot be replaced"


def _no_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "resolved", {}.__getitem__)


def _abort_without_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "resolved", lambda _: lambda rid: SimpleNamespace(request=rid))


def _no_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "resolved", {}.__getitem__)


@pytest.mark.parametrize("change", [_no_abort, _abort_without_id, _no_view])
def test_another_release_of_sglang_starts_with_its_own_policy(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    change(monkeypatch)
    one = worker(configured=Configured())
    configured = one.adaptive_controller.params

    found = started(one)

    assert found.problem == "the policy cannot be replaced"
    assert one.adaptive_controller.params is configured
    assert found.receive(lambda _, local_reqs: local_reqs, "receiver", local_reqs=None) is None


def test_where_a_step_cannot_be_read_an_untrained_draft_stays_off_and_a_trained_one_is_used() -> None:
    served, one = ServedVersion(), worker()
    found = started(one, served, tell=lambda _: None)
    for _ in range(5):
        found.step(lambda *_: None, "scheduler", "batch", "no result")
    said = []
    for served.version in (0, 1):
        said.append(length(found, one))

    assert said == [0, 2]


@pytest.mark.parametrize("problem", ["this server does not draft with EAGLE-3", "", None])
def test_ranks_switch_only_if_all_of_them_can(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    """One of two ranks has a problem, or both are as they should be, or the other one cannot be read at all."""
    problems = ["", "the policy cannot be replaced" if problem is None else problem]
    monkeypatch.setattr(drafting, "gathered", lambda value, group: problems if group == "all ranks" else [value])
    one = worker(configured=Configured())
    configured = one.adaptive_controller.params

    found = started(one)

    assert found.problem == (f"rank 1: {problems[1]}" if problems[1] else "")
    assert (one.adaptive_controller.params is configured) is bool(problems[1])
    assert found.receive(lambda _, local_reqs: local_reqs, "receiver", local_reqs=["theirs"]) == ["theirs"]


def test_all_ranks_take_the_same_number_at_each_step_though_only_the_first_one_measures_and_knows_the_draft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock of the first one decides, and the second one is told of no version."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(drafting, "Drafting", partial(Drafting, clock=lambda: clock.now_s, rng=random.Random(1)))
    served, workers, ranks = ServedVersion(), [worker(), worker()], list[DraftingHooks]()
    for rank, one in enumerate(workers):
        monkeypatch.setattr(configuration, "place", lambda rank=rank: (rank, 2))
        ranks.append(started(one, served if rank == 0 else ServedVersion(), tell=lambda _: None))

    lengths = set[int]()
    for number in range(8 * FIRST_BLOCK):
        served.version = int(number >= FIRST_BLOCK)
        sent = list[Any]()

        def first(_: Any, local: Any, sent: list[Any] = sent) -> list[Any]:
            sent.extend(local or ())
            return list(sent)

        assert ranks[0].receive(first, "receiver", local_reqs=None) == []
        assert ranks[1].receive(lambda _, __, sent=sent: list(sent), "receiver", local_reqs=None) == []
        chosen = {one.adaptive_controller.params.get_steps_for_batch(2) for one in workers}
        assert len(chosen) == 1
        assert chosen == {0} or served.version
        lengths |= chosen
        clock.now_s += 0.02
        for found in ranks:
            step(found, [min(chosen), 0], width=min(chosen) + 1)

    assert lengths == {0, 2}


def test_while_ranks_may_hold_different_drafts_none_of_them_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "place", lambda: (0, 2))
    served, one = ServedVersion(), worker(untrained=False)
    found = started(one, served)
    numbers = []
    for served.is_mixed in (False, True, False):
        numbers.append(length(found, one))

    assert numbers == [2, 0, 2]


def test_an_update_by_someone_else_leaves_ranks_with_equal_drafts_so_they_go_on_proposing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(configuration, "place", lambda: (0, 2))
    served, one = ServedVersion(), worker(untrained=False)
    found = started(one, served)

    UnprovedDraft(served).close("an update")

    assert length(found, one) == 2


def test_each_replica_decides_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tensor-parallel rank of the second replica, which talks to no agent."""
    monkeypatch.setattr(configuration, "is_sender", lambda: False)
    one = worker(untrained=False)

    assert length(started(one), one) == 2


def test_where_no_plan_can_be_made_a_trained_draft_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    served, one = ServedVersion(), worker()
    found = started(one, served)

    def failing(*_: Any) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr(found, "_plan", failing)
    served.version = 1
    for _ in range(2):
        assert length(found, one) == 0
        step(found, None, is_decode=False)

    assert length(found, one) == 2


def test_slices_without_drafts_show_what_drafting_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    clock = SimpleNamespace(now_s=0.0)
    on_this_clock = partial(Drafting, clock=lambda: clock.now_s, rng=random.Random(1))
    monkeypatch.setattr(drafting, "Drafting", on_this_clock)
    one = worker(untrained=False)
    found = started(one, tell=told.append)
    lengths = []
    for number in range(20 * FIRST_BLOCK):
        num_drafts = length(found, one, batch_size=2)
        lengths.append(num_drafts)
        clock.now_s += 0.04 if num_drafts else 0.03
        step(found, [num_drafts, 0], width=num_drafts + 1)
        if number % 40 == 10:
            clock.now_s += 100
            step(found, None, is_decode=False)
        elif number % 40 == 30:
            clock.now_s += 100
            found.resume(lambda *_: None, "scheduler", "request")
    num_told = len(told)
    found.forget()
    step(found, [0, 0], width=1)

    assert 2 * FIRST_SLICE <= lengths[: 3 * FIRST_BLOCK].count(0) <= 4 * FIRST_SLICE
    assert len(told) == num_told + 1, "another agent is told, too"
    assert {(message["kind"], message["version"]) for message in told} == {("speedup", 0)}
    ((_, ratio, *_), *_) = told[-1]["loads"]
    assert ratio == pytest.approx((4 / 0.04) / (2 / 0.03)), "neither prompts nor pauses count"


def step(found: DraftingHooks, accepted: list[int] | None, *, width: int = 1, is_decode: bool = True) -> None:
    """SGLang processes the result of a step."""
    result = SimpleNamespace(
        num_correct_drafts_per_req_cpu=accepted, speculative_num_draft_tokens=width, num_non_draft_tokens_per_req=1
    )
    batch = SimpleNamespace(reqs=["a", "b"], forward_mode=SimpleNamespace(is_decode=lambda: is_decode))
    assert found.step(lambda *_: "done", "scheduler", batch, result) == "done"
