"""Whether a step of vLLM drafts, on stand-ins that have the attributes that are read."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from updraft_tap import hooks
from updraft_tap.drafting.switch import UNTRAINED, Drafting
from updraft_tap.hooks import Guard
from updraft_tap.steps import VERSION_ATTRIBUTE
from updraft_tap.weights import ServedVersion
from updraft_vllm import runners
from updraft_vllm.drafting import ProposalHooks, StepHooks, fixed, is_untrained, or_end


def guard() -> Guard:
    return hooks.logged_guard(logging.getLogger("test"), "failed")


def config(draft: Any = None, *, method: str = "eagle3", data: int = 1, full: bool = False, second: bool = True) -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=method, draft_model_config=SimpleNamespace(hf_config=draft or SimpleNamespace())
        ),
        parallel_config=SimpleNamespace(data_parallel_size=data),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: full)),
        use_v2_model_runner=second,
    )


class Scheduler(SimpleNamespace):
    """One that is asked before each step; the worker says which draft proposes."""

    def __init__(self, drafting: Drafting, schedule: list[int] | None = None) -> None:
        super().__init__(vllm_config=config(), dynamic_sd_lookup=schedule, num_spec_tokens=3)
        self.hooks = StepHooks(drafting, guard())
        assert fixed(self) == ""
        self.hooks.limit(self)

    def step(self, version: int | None, **changed: Any) -> int:
        """The number of drafts that the step of two requests proposes. It verifies those of the step before."""
        verified, self.proposed = getattr(self, "proposed", 0), self.dynamic_sd_lookup[2]
        scheduled: dict[str, Any] = {
            "num_scheduled_tokens": dict.fromkeys("ab", 1 + verified),
            "total_num_scheduled_tokens": 2 + 2 * verified,
            "scheduled_spec_decode_tokens": {rid: [7] * verified for rid in "ab" if verified},
            "scheduled_new_reqs": [],
            "num_spec_tokens_to_schedule": self.proposed,
        }
        output = SimpleNamespace(sampled_token_ids=[[1] * (1 + verified), [1]])
        if version is not None:
            setattr(output, VERSION_ATTRIBUTE, version)
        given = SimpleNamespace(**{**scheduled, **changed})
        assert self.hooks.update(lambda *_: "updated", self, given, output) == "updated"
        return int(self.proposed)


def test_an_untrained_draft_proposes_nothing_until_another_one_is_in_place() -> None:
    scheduler = Scheduler(Drafting(is_untrained=True))

    assert [scheduler.step(version) for version in (None, 0, 1, 1, None, 0, 0)] == [0, 0, 0, 3, 3, 3, 0]


def test_a_server_of_a_trained_draft_and_one_with_a_schedule_of_its_own_draft_as_configured() -> None:
    assert Scheduler(Drafting(is_untrained=False)).step(0) == 3
    scheduled = Scheduler(Drafting(is_untrained=True), schedule=[0, 3, 2])
    assert [scheduled.step(1), scheduled.step(1)] == [0, 2]


@pytest.mark.parametrize("broken", ["allows", "stepped"])
def test_where_a_switch_fails_or_cannot_measure_trained_drafts_are_used(broken: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    drafting = Drafting(is_untrained=True)
    setattr(drafting, broken, fail)
    scheduler = Scheduler(drafting)

    assert [scheduler.step(0) for _ in range(5)] == [0] * 5
    assert [scheduler.step(1) for _ in range(5)] == [0, 3, 3, 3, 3]


def test_a_slice_does_not_last_for_ever_where_measuring_fails_in_it() -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    drafting = Drafting(is_untrained=False, tell=lambda _: None)
    scheduler = Scheduler(drafting)
    while drafting.allows(2):
        scheduler.step(0)
    drafting.stepped = fail  # type: ignore[method-assign]

    assert [scheduler.step(0) for _ in range(5)] == [0, 0, 0, 3, 3]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (config(method="ngram"), "does not draft with EAGLE-3"),
        (config(data=2), "with data parallelism"),
        (config(full=True, second=False), "VLLM_USE_V2_MODEL_RUNNER=1"),
    ],
)
def test_a_server_whose_number_of_drafts_is_fixed_says_why(found: Any, reason: str) -> None:
    scheduler = SimpleNamespace(vllm_config=found, dynamic_sd_lookup=None, num_spec_tokens=3)

    assert reason in fixed(scheduler)


def test_another_release_without_the_attribute_says_so() -> None:
    scheduler = SimpleNamespace(vllm_config=config(), num_spec_tokens=3)

    assert "has no dynamic_sd_lookup" in fixed(scheduler)


def test_only_the_config_of_a_draft_says_that_nobody_has_trained_it() -> None:
    assert is_untrained(config(SimpleNamespace(**{UNTRAINED: True})))
    assert not is_untrained(config())
    assert not is_untrained(SimpleNamespace(speculative_config=None))


def test_an_untrained_draft_does_not_run_where_it_proposes_nothing() -> None:
    served, ran = ServedVersion(), []
    first = ProposalHooks(runner=runners.FIRST, served=served, guard=guard())
    second = ProposalHooks(runner=runners.SECOND, served=served, guard=guard())
    proposer = SimpleNamespace(_last_draft_probs="old")
    speculator = SimpleNamespace(draft_tokens=torch.zeros(4, 3, dtype=torch.int64))
    metadata = SimpleNamespace(batch_size=lambda: 2)

    def original(*_: Any, **__: Any) -> str:
        ran.append(1)
        return "drafts"

    def of_first(num: int) -> Any:
        tokens = torch.zeros(2, dtype=torch.int64)
        given = {"num_speculative_tokens": num, "common_attn_metadata": metadata, "next_token_ids": tokens}
        return first.propose(original, proposer, **given)

    def of_second(num: int) -> Any:
        return second.propose(original, speculator, SimpleNamespace(num_reqs=2), num_speculative_tokens=num)

    assert (of_first(0).shape, proposer._last_draft_probs) == ((2, 0), None)
    assert of_second(0).tolist() == [[-1, -1, -1]] * 2
    assert speculator.draft_tokens[2:].tolist() == [[0, 0, 0]] * 2
    assert not ran
    assert [of_first(3), of_second(3)] == ["drafts", "drafts"]
    served.written = 1
    assert [of_first(0), of_second(0)] == ["drafts", "drafts"], "a trained draft keeps up with the text"
    assert len(ran) == 4
    served.written, served.version, first.is_on = 0, 0, False
    assert of_first(0) == "drafts", "of several ranks, until all can leave it out"
    served.version, first.is_on = 7, True
    assert of_first(0).shape == (2, 0), "what changes on one rank alone does not decide"


def test_a_proposal_that_cannot_be_skipped_is_made() -> None:
    hook = ProposalHooks(runner=runners.FIRST, served=ServedVersion(), guard=guard())

    assert hook.propose(lambda *_, **__: "drafts", SimpleNamespace(), num_speculative_tokens=0) == "drafts"


def test_one_of_several_ranks_that_cannot_skip_a_proposal_ends_its_process() -> None:
    hook = ProposalHooks(runner=runners.FIRST, served=ServedVersion(), guard=or_end)

    def original(*_: Any, **__: Any) -> str:
        return "drafts"

    with pytest.raises(SystemExit, match="cannot be left out"):  # vLLM goes on after an Exception
        hook.propose(original, SimpleNamespace(), num_speculative_tokens=0)
    assert hook.propose(original, SimpleNamespace(), num_speculative_tokens=3) == "drafts"


class Steps(Drafting):
    """Keeps what it is told of steps. Drafting is on in the steps that a test names."""

    def __init__(self, *on: bool) -> None:
        super().__init__(is_untrained=False)
        self._on = list(on)
        self.steps: list[tuple[int, int, bool | None]] = []
        self.pauses = 0

    def allows(self, batch_size: int) -> bool:
        return self._on.pop(0)

    def stepped(self, batch_size: int, tokens: int, *, is_drafted: bool | None) -> None:
        self.steps.append((batch_size, tokens, is_drafted))

    def pause(self) -> None:
        self.pauses += 1


def test_a_step_is_of_a_kind_if_it_proposes_as_it_verifies_and_reads_no_prompt() -> None:
    steps = Steps(True, True, False, False, True, True, True)  # noqa: FBT003 - one by one
    scheduler = Scheduler(steps)
    for _ in range(5):
        scheduler.step(1)
    scheduler.step(1, scheduled_new_reqs=["c"])
    scheduler.step(1, total_num_scheduled_tokens=90)
    scheduler.hooks.pause(lambda *_: None, scheduler, "paused")

    assert steps.steps == [
        *((2, 2, None), (2, 5, True), (2, 5, None), (2, 2, False), (2, 2, None)),
        *((2, 5, None), (2, 5, None)),
    ]
    assert steps.pauses == 1
