"""The hooks around a step, on a stand-in for each of vLLM's runners that has the attributes that are read."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tap_channel import Collected
from torch import Tensor

from updraft_tap.between_steps import BetweenSteps
from updraft_tap.http.terms import Terms, marked
from updraft_tap.policy import Policy
from updraft_tap.steps import VERSION_ATTRIBUTE
from updraft_tap.weights import ServedVersion
from updraft_vllm import runners
from updraft_vllm.rows import RowHooks

VOCAB, WIDTH = 11, 4
EVERYTHING = Policy(payload=1.0, prompt_rows=100, counterfactual_rows=3)


def new_request(rid: str, params: Any) -> Any:
    return SimpleNamespace(req_id=rid, sampling_params=params, lora_request=None, prompt_embeds=None, mm_features=[])


class Vllm:
    """Two requests: `a` decodes with 2 draft tokens, of which 1 is accepted; `b` reads a prompt of 3 tokens."""

    def __init__(self, kind: runners.Runner) -> None:
        self.channel = Collected()
        self.served = ServedVersion()
        self.between = BetweenSteps()
        self.hooks = RowHooks(
            channel=self.channel,  # type: ignore[arg-type]  # stands for it
            between=self.between,
            served=self.served,
            runner=kind,
            top_k=2,
        )
        self.hooks.policy = EVERYTHING
        self.kind = kind
        self.logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
        self.states = [torch.arange(6.0)[:, None] + 10 * part for part in range(3)]
        self.runner = SimpleNamespace(device=torch.device("cpu"), execute_model_state=None)
        self.seen: list[str] = []

    def output(self, *, new: tuple[str, ...] = ("b",), finished: tuple[str, ...] = ()) -> Any:
        params = SimpleNamespace(extra_args=marked(None, Terms()))
        return SimpleNamespace(
            num_scheduled_tokens={"a": 3, "b": 3},
            scheduled_spec_decode_tokens={"a": [5, 6]},
            finished_req_ids=set(finished),
            scheduled_new_reqs=[new_request(rid, params) for rid in new],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        )

    def step(self, output: Any) -> Any:
        """As vLLM does it: the forward, then sampling, which changes the logits, and proposals."""

        def execute(runner: Any, _: Any) -> None:
            self.seen.append("execute")
            self._show(runner)

        def sample(*_: Any) -> Any:
            self.logits.fill_(0)
            ids = torch.tensor([[5, 9, -1], [7, -1, -1]])
            if self.kind is runners.FIRST:
                return SimpleNamespace(sampled_token_ids=ids)
            return ids, torch.tensor([2, 1]), torch.tensor([1, 0])

        def sample_tokens(runner: Any, _: Any) -> Any:
            self.seen.append("sample")
            if self.kind is runners.SECOND:
                self.hooks.compute_logits(lambda: self.logits)
            self.hooks.sample(sample, runner, None, None)
            runner.execute_model_state = None
            return SimpleNamespace()

        self.hooks.execute(execute, self.runner, output)
        return self.hooks.sample_tokens(sample_tokens, self.runner, None)

    def _show(self, runner: Any) -> None:
        tokens, positions = torch.tensor([4, 5, 6, 1, 2, 3]), torch.tensor([8, 9, 10, 0, 1, 2])
        if self.kind is runners.FIRST:
            runner.input_ids, runner.positions = SimpleNamespace(gpu=tokens), positions
            runner.input_batch = SimpleNamespace(
                req_ids=["a", "b"],
                num_computed_tokens_cpu=np.array([8, 0]),
                num_prompt_tokens=np.array([5, 3]),
                num_tokens_no_spec=np.array([9, 3]),
            )
            runner.execute_model_state = SimpleNamespace(logits=self.logits, aux_hidden_states=self.states)
            return
        inputs = SimpleNamespace(
            req_ids=["a", "b"],
            num_scheduled_tokens=np.array([3, 3]),
            num_draft_tokens_per_req=np.array([2, 0]),
            num_computed_tokens_np=np.array([8, 0]),
            prefill_len_np=np.array([5, 3]),
            idx_mapping_np=np.array([1, 0]),
            input_ids=tokens,
            positions=positions,
        )
        runner.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([3, 5])))
        runner.execute_model_state = SimpleNamespace(input_batch=inputs, aux_hidden_states=self.states)


@pytest.fixture(params=[runners.FIRST, runners.SECOND], ids=["first runner", "second runner"])
def vllm(request: pytest.FixtureRequest) -> Vllm:
    return Vllm(request.param)


def messages(vllm: Vllm) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    assert vllm.channel.errors == []
    return [item.message() for item in vllm.channel.items]


def test_a_step_gives_the_rows_of_prompts_and_of_drafts_before_sampling_changes_the_logits(vllm: Vllm) -> None:
    expected, vllm.served.version = vllm.logits.logsumexp(-1), 4
    vllm.step(vllm.output(new=("a", "b")))
    vllm.served.version = 5
    (prefill, rows_b), (steps, rows_a) = messages(vllm)

    (b,), (a,) = prefill["requests"], steps["requests"]
    assert b == {"rid": "b", "probability": 1.0, "position": 0, "cached": 0, "rows": 3, "teacher_rows": 1}
    assert rows_b["aux"].tolist() == [[3, 13, 23], [4, 14, 24], [5, 15, 25]]
    assert torch.allclose(rows_b["log_sum_exp"], expected[3:])
    assert (a["rid"], a["position"], a["accepted"], a["drafts"]) == ("a", 8, 1, [5, 6])
    assert a["probability"] == 1.0
    assert (a["rows"], a["counterfactual_rows"], a["version"]) == (2, 1, 0)
    assert rows_a["aux"].tolist() == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]
    assert torch.allclose(rows_a["log_sum_exp"], expected[:3])


def test_a_proposal_is_of_the_version_that_was_served_when_it_was_made(vllm: Vllm) -> None:
    vllm.served.version = 4
    told = vllm.step(vllm.output(new=("a", "b")))
    vllm.served.version = 5
    vllm.step(vllm.output(new=()))

    versions = [header["requests"][0]["version"] for header, _ in messages(vllm) if header["kind"] == "steps"]
    assert versions == [0, 4]
    assert getattr(told, VERSION_ATTRIBUTE) == 4


def test_a_proposal_keeps_its_version_if_a_swap_falls_into_the_gap_after_its_step(vllm: Vllm) -> None:
    vllm.served.version = 4
    end = vllm.between.end

    def swapped() -> None:
        end()
        vllm.served.version = 5

    vllm.between.end = swapped  # type: ignore[method-assign]  # a swap in each gap
    told = vllm.step(vllm.output(new=("a", "b")))
    vllm.step(vllm.output(new=()))

    versions = [header["requests"][0]["version"] for header, _ in messages(vllm) if header["kind"] == "steps"]
    assert versions == [0, 4]
    assert getattr(told, VERSION_ATTRIBUTE) == 4


def test_another_agent_gets_no_rows_of_requests_that_the_one_before_chose(vllm: Vllm) -> None:
    vllm.step(vllm.output(new=("a", "b")))
    before = len(messages(vllm))

    vllm.hooks.forget()
    for _ in range(2):
        vllm.step(vllm.output(new=()))
    assert len(messages(vllm)) == before

    vllm.hooks.policy = EVERYTHING
    vllm.step(vllm.output(new=("b",)))
    (again,) = (header for header, _ in messages(vllm)[before:])
    assert [request["rid"] for request in again["requests"]] == ["b"]


def test_another_agent_gets_no_rows_of_a_step_that_is_in_progress(vllm: Vllm) -> None:
    show = vllm._show

    def another(runner: Any) -> None:
        show(runner)
        vllm.hooks.forget()
        vllm.hooks.policy = EVERYTHING

    vllm._show = another  # type: ignore[method-assign]  # in the middle of a step
    vllm.step(vllm.output(new=("a", "b")))

    assert messages(vllm) == []


def test_a_request_of_an_adapter_gives_no_rows(vllm: Vllm) -> None:
    output = vllm.output(new=("a", "b"))
    for new in output.scheduled_new_reqs:
        new.lora_request = object()
    vllm.step(output)

    assert messages(vllm) == []


@pytest.mark.parametrize("off", ["no policy", "no agent", "opted out", "not asked", "finished"])
def test_without_a_captured_request_no_tensor_is_read(vllm: Vllm, off: str) -> None:
    output = vllm.output(new=("a", "b"))
    if off == "no policy":
        vllm.hooks.policy = Policy()
    elif off == "no agent":
        vllm.channel.is_open = False
    elif off == "opted out":
        for new in output.scheduled_new_reqs:
            new.sampling_params.extra_args = marked({"updraft_capture": "off"}, Terms())
    elif off == "not asked":
        for new in output.scheduled_new_reqs:
            new.sampling_params.extra_args = None
    else:
        vllm.hooks._options = dict.fromkeys(("a", "b"))  # type: ignore[assignment]  # never read
        output = vllm.output(new=(), finished=("a", "b"))
    vllm.states = None  # type: ignore[assignment]  # to read it is an error
    if vllm.kind is runners.FIRST:
        vllm.logits = vllm.logits.clone()

    vllm.step(output)

    assert messages(vllm) == []
    assert vllm.seen == ["execute", "sample"]


def test_a_hook_that_raises_three_times_is_unhooked_and_vllm_goes_on(vllm: Vllm) -> None:
    vllm.states = None  # type: ignore[assignment]  # to read it is an error
    for _ in range(5):
        vllm.step(vllm.output(new=("a", "b")))

    (problem,) = vllm.channel.ends
    assert problem.startswith("the hook rows raised 3 times and is unhooked, the last: TypeError")
    assert len(vllm.channel.errors) == 3
    assert vllm.seen == ["execute", "sample"] * 5


def test_without_the_hook_that_tells_versions_rows_go_on_and_it_is_named(vllm: Vllm) -> None:
    class Told:
        __slots__ = ()  # takes no version

    for i in range(4):
        vllm.hooks.execute(
            lambda runner, _: vllm._show(runner), vllm.runner, vllm.output(new=("a", "b")[: 2 * (i == 0)])
        )
        vllm.hooks.sample_tokens(lambda *_: Told(), vllm.runner, None)
    vllm.channel.errors.clear()
    vllm.step(vllm.output(new=()))

    assert vllm.channel.ends == []
    assert vllm.hooks.guard.unhooked["version"].startswith("the hook version raised 3 times and is unhooked")
    assert vllm.channel.restated == 1
    assert "steps" in [header["kind"] for header, _ in messages(vllm)]


def test_a_vllm_without_the_state_of_a_step_is_served_on(vllm: Vllm) -> None:
    del vllm.runner.execute_model_state
    for _ in range(2):
        assert vllm.hooks.execute(lambda *_: "hidden", vllm.runner, vllm.output(new=("a", "b"))) == "hidden"
        assert vllm.hooks.sample_tokens(lambda *_: "tokens", vllm.runner, None) == "tokens"

    assert vllm.between.run(lambda: None, 5) >= 0


def test_a_dummy_run_is_no_step(vllm: Vllm) -> None:
    def forward(runner: Any, *_: Any, dummy_run: bool) -> bool:
        vllm._show(runner)
        return dummy_run

    assert vllm.hooks.execute(forward, vllm.runner, vllm.output(), None, dummy_run=True)

    assert vllm.between.run(lambda: None, 5) >= 0
    assert messages(vllm) == []


@pytest.mark.parametrize("where", ["execute", "sample_tokens"])
def test_an_error_of_vllm_passes_and_leaves_no_step_open(vllm: Vllm, where: str) -> None:
    def failing(*_: Any) -> Any:
        raise MemoryError("no page is left")

    hook: Callable[..., Any] = getattr(vllm.hooks, where)
    if where == "sample_tokens":
        vllm.hooks.execute(lambda runner, _: vllm._show(runner), vllm.runner, vllm.output())
    with pytest.raises(MemoryError):
        hook(failing, vllm.runner, vllm.output())

    assert vllm.between.run(lambda: None, 5) >= 0


def test_a_step_in_which_nothing_is_sampled_is_over_at_once(vllm: Vllm) -> None:
    vllm.hooks.execute(lambda *_: "empty", vllm.runner, vllm.output())

    assert vllm.between.run(lambda: None, 5) >= 0


def test_a_step_of_the_second_runner_that_drafts_nothing_has_no_draft_tokens() -> None:
    inputs = SimpleNamespace(
        req_ids=["a"],
        num_scheduled_tokens=np.array([1, 0]),  # the array may be longer than the batch
        num_draft_tokens_per_req=None,
        num_computed_tokens_np=np.array([8]),
        prefill_len_np=np.array([5]),
        idx_mapping_np=np.array([0]),
        input_ids=torch.tensor([4]),
        positions=torch.tensor([8]),
    )
    runner = SimpleNamespace(
        execute_model_state=SimpleNamespace(input_batch=inputs, aux_hidden_states=[]),
        req_states=SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([5]))),
    )

    batch = runners.second_step(runner, None, lambda _: False).batch

    assert (batch.rids, batch.tokens, batch.drafts, batch.read(0).drafts) == (["a"], [1], [0], 0)
    assert not batch.read(0).is_prefill
