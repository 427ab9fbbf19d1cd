"""The hooks around the scheduler, on a stand-in that has the attributes that are read."""

from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.tap_channel import Collected

from updraft_tap.hooks import RAISES
from updraft_tap.http.terms import Terms, marked
from updraft_tap.policy import Policy
from updraft_tap.steps import VERSION_ATTRIBUTE
from updraft_vllm.requests import RequestHooks

TERMS = Terms(domain="sql")


def request(rid: str = "a", **more: Any) -> Any:
    sampling = dict.fromkeys(
        ("top_p", "top_k", "min_p", "seed", "max_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty")
    )
    return SimpleNamespace(
        request_id=rid,
        sampling_params=SimpleNamespace(temperature=0.5, extra_args=marked(None, TERMS), **sampling),
        num_prompt_tokens=2,
        output_token_ids=[7, 8],
        all_token_ids=[1, 2, 7, 8],
        num_preemptions=1,
        arrival_time=0.0,
        use_structured_output=False,
        status=SimpleNamespace(name="FINISHED_STOPPED"),
        is_finished=lambda: False,
        **{"lora_request": None, "prompt_embeds": None, "mm_features": [], **more},
    )


class Scheduler:
    """One request that is scheduled with three drafts."""

    def __init__(self) -> None:
        self.channel = Collected()
        self.hooks = RequestHooks(channel=self.channel)  # type: ignore[arg-type]  # stands for it
        self.requests: dict[str, Any] = {"a": request()}
        self.updates = 0

    def update(
        self,
        tokens: list[int],
        *,
        invalid: int = 0,
        version: int | None = 3,
        cached: int | None = None,
        without: str = "",
    ) -> None:
        output = SimpleNamespace(sampled_token_ids=[tokens], req_id_to_index={"a": 0})
        if version is not None:
            setattr(output, VERSION_ATTRIBUTE, version)
        scheduled = SimpleNamespace(
            num_scheduled_tokens={"a": 4},
            scheduled_new_reqs=[SimpleNamespace(req_id="a", num_computed_tokens=cached)] if cached is not None else [],
            scheduled_spec_decode_tokens={"a": [4, 5, 6]},
            num_invalid_spec_tokens={"a": invalid} if invalid else None,
        )
        if without:
            delattr(scheduled, without)

        def original(*_: Any) -> None:
            self.updates += 1

        self.hooks.update(original, self, scheduled, output)

    def end(self) -> list[tuple[dict[str, Any], list[int]]]:
        self.hooks.free(lambda *_: None, self, self.requests.pop("a"))
        assert self.channel.errors == []
        found = [item.message() for item in self.channel.items]
        return [(header, tensors["tokens"].tolist() if tensors else []) for header, tensors in found]


def test_every_request_is_counted_and_one_with_payload_brings_its_tokens() -> None:
    for policy in (Policy(), Policy(payload=1.0)):
        scheduler = Scheduler()
        scheduler.hooks.policy = policy
        scheduler.hooks.add(lambda *_: None, scheduler, scheduler.requests["a"])
        scheduler.update([4, 9], version=2)
        scheduler.update([4, 5, 6, 9], invalid=1, version=3)
        scheduler.update([])

        ((header, tokens),) = scheduler.end()

        assert [one.pop("us") >= 0 for one in header["counters"]] == [True, True]
        assert header["counters"] == [
            {"version": None, "steps": 1, "proposed": 3, "accepted": [1, 0, 0], "proposed_by_position": [1, 1, 1]},
            {"version": 2, "steps": 1, "proposed": 2, "accepted": [1, 1], "proposed_by_position": [1, 1]},
        ]
        assert (header["duration_us"] > 0, header["constrained"]) == (True, False)
        assert (header["finish"], header["prompt_tokens"], header["output_tokens"]) == ("stopped", 2, 2)
        assert header["preemptions"] == 1
        assert (header["domain"], header["permitted"]) == ("sql", True)
        if policy.payload:
            assert (header["sampling"]["temperature"], tokens) == (0.5, [1, 2, 7, 8])
        else:
            assert (header["sampling"], tokens) == (None, [])


def test_a_captured_request_says_how_much_of_its_prompt_was_cached_when_it_first_ran() -> None:
    scheduler = Scheduler()
    scheduler.hooks.policy = Policy(payload=1.0)
    scheduler.hooks.add(lambda *_: None, scheduler, scheduler.requests["a"])
    scheduler.update([4, 9], cached=1)
    scheduler.update([4, 9])
    scheduler.update([4, 9], cached=3)  # it was preempted, and finds its own tokens

    ((header, _),) = scheduler.end()

    assert header["cached_tokens"] == 1


def test_a_vllm_that_does_not_say_what_was_cached_is_captured_as_before() -> None:
    scheduler = Scheduler()
    scheduler.hooks.policy = Policy(payload=1.0)
    scheduler.hooks.add(lambda *_: None, scheduler, scheduler.requests["a"])
    for _ in range(RAISES + 1):
        scheduler.update([4, 9], without="scheduled_new_reqs")

    ((header, tokens),) = scheduler.end()

    assert sum(one["steps"] for one in header["counters"]) == RAISES + 1
    assert (header["cached_tokens"], tokens) == (0, [1, 2, 7, 8])


def test_a_request_that_opted_out_is_counted_alone() -> None:
    scheduler = Scheduler()
    scheduler.hooks.policy = Policy(payload=1.0)
    scheduler.requests["a"].sampling_params.extra_args = marked({"updraft_capture": "off"}, TERMS)
    scheduler.hooks.add(lambda *_: None, scheduler, scheduler.requests["a"])
    scheduler.update([4, 9])

    ((header, tokens),) = scheduler.end()

    assert (header["counters"][0]["steps"], header["sampling"], tokens) == (1, None, [])
    assert (header["permitted"], header["asked"], header["domain"]) == (False, True, "sql")


def test_a_request_that_came_by_no_middleware_says_that_it_was_not_asked() -> None:
    scheduler = Scheduler()
    scheduler.hooks.policy = Policy(payload=1.0)
    scheduler.requests["a"].sampling_params.extra_args = None
    scheduler.hooks.add(lambda *_: None, scheduler, scheduler.requests["a"])

    ((header, tokens),) = scheduler.end()

    assert (header["permitted"], header["asked"], header["probability"], tokens) == (False, False, 0.0, [])


@pytest.mark.parametrize(
    "more", [{"lora_request": object()}, {"prompt_embeds": object()}, {"mm_features": [object()]}], ids=" ".join
)
def test_a_request_of_more_than_text_or_of_an_adapter_is_counted_alone(more: dict[str, Any]) -> None:
    scheduler = Scheduler()
    scheduler.hooks.policy = Policy(payload=1.0)
    scheduler.requests["a"] = request(**more)
    scheduler.hooks.add(lambda *_: None, scheduler, scheduler.requests["a"])
    scheduler.update([4, 9])

    ((header, tokens),) = scheduler.end()

    assert (header["counters"][0]["steps"], header["permitted"], header["sampling"], tokens) == (1, True, None, [])


def test_a_captured_request_says_with_what_probability_it_was_chosen_however_the_policy_changes() -> None:
    scheduler = Scheduler()
    scheduler.hooks.policy = Policy(payload=0.999)
    scheduler.hooks.add(lambda *_: None, scheduler, scheduler.requests["a"])
    scheduler.hooks.policy = Policy(payload=0.1)

    ((header, tokens),) = scheduler.end()

    assert (header["probability"], tokens) == (0.999, [1, 2, 7, 8])


def test_another_agent_gets_none_of_the_steps_before_it() -> None:
    scheduler = Scheduler()
    scheduler.update([4, 9], version=3)
    scheduler.hooks.forget()
    scheduler.update([4, 9], version=4)
    scheduler.update([4, 9], version=4)

    ((header, _),) = scheduler.end()

    assert [(one["version"], one["steps"]) for one in header["counters"]] == [(None, 1), (4, 1)]


def test_a_pause_of_the_scheduler_is_no_time_of_a_step() -> None:
    scheduler = Scheduler()
    scheduler.update([4, 9], version=3)
    assert scheduler.hooks.pause(lambda _, state: f"it is {state}", scheduler, "paused") == "it is paused"
    scheduler.update([4, 9], version=3)

    ((header, _),) = scheduler.end()

    assert [(one["steps"], one["us"]) for one in header["counters"]] == [(1, 0), (1, 0)]


@pytest.mark.parametrize("gone", ["aborted", "finished"])
def test_a_step_of_a_request_that_is_gone_is_not_counted(gone: str) -> None:
    scheduler = Scheduler()
    if gone == "aborted":
        scheduler.requests = {}
    else:
        scheduler.requests["a"].is_finished = lambda: True
    scheduler.update([4, 9])

    assert scheduler.updates == 1
    assert len(scheduler.hooks._counters) == 0


def test_without_an_agent_nothing_is_counted_or_kept() -> None:
    scheduler = Scheduler()
    scheduler.channel.is_open = False
    scheduler.update([4, 9])

    assert scheduler.end() == []
    assert len(scheduler.hooks._counters) == 0


def test_a_request_that_ended_leaves_no_counters_though_its_last_step_comes_later() -> None:
    scheduler = Scheduler()
    scheduler.update([4, 9])
    ended = scheduler.requests["a"]
    assert len(scheduler.end()) == 1
    ended.is_finished = lambda: True
    scheduler.requests["a"] = ended  # vLLM keeps it until a KV connector has sent its blocks
    scheduler.update([4, 9])

    assert len(scheduler.hooks._counters) == 0


@pytest.mark.parametrize("change", ["another agent", "no agent"])
def test_only_the_agent_that_chose_a_request_gets_its_tokens(change: str) -> None:
    scheduler = Scheduler()
    scheduler.hooks.policy = Policy(payload=1.0)
    scheduler.channel.is_open = change != "no agent"
    scheduler.hooks.add(lambda *_: None, scheduler, scheduler.requests["a"])
    scheduler.channel.is_open = True
    if change == "another agent":
        scheduler.hooks.forget()
        scheduler.hooks.policy = Policy(payload=1.0)
    scheduler.update([4, 9])

    ((header, tokens),) = scheduler.end()

    assert (header["counters"][0]["steps"], header["sampling"], tokens) == (1, None, [])


def test_a_hook_that_raises_three_times_is_unhooked_and_vllm_goes_on() -> None:
    scheduler = Scheduler()
    for _ in range(5):
        scheduler.update(None)  # type: ignore[arg-type]  # another vLLM's
        scheduler.requests["a"].is_finished = None

    assert scheduler.updates == 5
    assert len(scheduler.channel.errors) == 3
    assert "the hook counters raised 3 times and is unhooked" in scheduler.channel.ends[0]
