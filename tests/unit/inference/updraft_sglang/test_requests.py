"""The hooks around the scheduler, on a stand-in that has the attributes that are read."""

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.tap_channel import Collected

from updraft_sglang.marks import sealed
from updraft_sglang.requests import RequestHooks
from updraft_sglang.selection import Selection
from updraft_tap import wire
from updraft_tap.http.terms import Terms
from updraft_tap.policy import Policy
from updraft_tap.steps import VERSION_ATTRIBUTE
from updraft_tap.weights import ServedVersion

SHARED = "of the server"
TERMS = Terms(domain="sql")


def params(terms: Terms | None = TERMS, **more: Any) -> Any:
    same = {"top_p": 0.9, "min_p": 0.0, "sampling_seed": None, "max_new_tokens": 9, "presence_penalty": 0.0}
    rest = dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag"))
    fields = {**same, **rest, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 0.5, "top_k": 1 << 30}
    return SimpleNamespace(**{**fields, "custom_params": sealed(None, terms, SHARED), **more})


class Request(SimpleNamespace):
    """SGLang's Req."""

    def finished(self) -> bool:
        return self.finished_reason is not None

    @property
    def output_ids_through_stop(self) -> Any:
        return self.output_ids[: self.finished_len]


def request(rid: str = "a", **more: Any) -> Request:
    fields: dict[str, Any] = {
        "rid": rid,
        "sampling_params": params(),
        "origin_input_ids": array("q", [1, 2]),
        "output_ids": array("q", [7, 8, 9]),
        "finished_len": None,
        "finished_reason": None,
        "finished_output": None,
        "is_retracted": False,
        "retraction_count": 1,
        "cached_tokens": 1,
        "mm_inputs": None,
        "session_params": None,
        "input_embeds": None,
        "lora_id": None,
    }
    return Request(**{**fields, **more})


class Scheduler:
    """SGLang's loop, as the hooks go around it."""

    def __init__(self, payload: float = 0.0) -> None:
        self.channel = Collected()
        self.selection = Selection(SHARED)
        self.selection.policy = Policy(payload=payload)
        self.hooks = RequestHooks(channel=self.channel, selection=self.selection, served=ServedVersion())  # type: ignore[arg-type]  # stands for it
        self.hooks.is_active = True

    def add(self, *requests: Request) -> None:
        for one in requests:
            assert self.hooks.add(lambda *_: "added", self, one) == "added"

    def step(self, *requests: Request, accepted: tuple[int, ...] = (), version: int | None = 3, width: int = 4) -> None:
        """A verify step; SGLang learns what was accepted while it processes the result."""
        result = SimpleNamespace(
            speculative_output_stride=None, speculative_num_draft_tokens=width, num_non_draft_tokens_per_req=1
        )
        if version is not None:
            setattr(result, VERSION_ATTRIBUTE, version)
        batch = SimpleNamespace(reqs=list(requests))

        def learn(_: Any, result: Any, batch: Any) -> str:
            result.num_correct_drafts_per_req_cpu = list(accepted)
            return "tokens"

        def process(_: Any, batch: Any, result: Any) -> None:
            assert self.hooks.judge(learn, "processor", result, batch) == "tokens"

        self.hooks.step(process, self, batch, result)

    def finish(self, *requests: Request, kind: str = "stop", skip: Request | None = None) -> None:
        """Their last outputs leave the scheduler."""

        def stream(_: Any, reqs: list[Request], __: Any, skip_req: Any = None) -> None:
            for one in reqs:
                one.finished_output = True

        for one in requests:
            one.finished_reason = SimpleNamespace(to_json=lambda: {"type": kind})
        self.hooks.stream(stream, "streamer", list(requests), False, skip)  # noqa: FBT003 - SGLang's

    def ends(self) -> list[dict[str, Any]]:
        assert self.channel.errors == []
        return [item.message()[0] for item in self.channel.items]


def test_every_request_is_counted_and_one_with_payload_brings_its_tokens() -> None:
    for payload in (0.0, 1.0):
        scheduler, one = Scheduler(payload), request(finished_len=2)
        scheduler.add(one)
        scheduler.step(one, accepted=(1,), version=2)
        scheduler.step(one, accepted=(3,), version=3)
        scheduler.finish(one)

        (header,) = scheduler.ends()
        tensors = scheduler.channel.items[0].message()[1]

        assert [counter.pop("us") >= 0 for counter in header["counters"]] == [True, True]
        assert header["counters"] == [
            {"version": 2, "steps": 1, "proposed": 3, "accepted": [1, 0, 0], "proposed_by_position": [1, 1, 1]},
            {"version": 3, "steps": 1, "proposed": 3, "accepted": [1, 1, 1], "proposed_by_position": [1, 1, 1]},
        ]
        assert (header["finish"], header["prompt_tokens"], header["output_tokens"]) == ("stopped", 2, 2)
        assert (header["preemptions"], header["constrained"], header["duration_us"] > 0) == (1, False, True)
        assert (header["domain"], header["permitted"], header["asked"]) == ("sql", True, True)
        assert header["cached_tokens"] == (1 if payload else 0)
        if payload:
            assert tensors["tokens"].tolist() == [1, 2, 7, 8]
            assert (header["probability"], header["sampling"]["temperature"], header["sampling"]["top_k"]) == (
                1,
                0.5,
                0,
            )
        else:
            assert (header["probability"], header["sampling"], tensors) == (0.0, None, {})


@pytest.mark.parametrize("sampling", [params(Terms(permitted=False)), params(None)])
def test_a_request_that_opted_out_or_was_not_asked_is_counted_alone(sampling: Any) -> None:
    scheduler, one = Scheduler(1.0), request(sampling_params=sampling)
    scheduler.add(one)
    scheduler.step(one, accepted=(2,))
    scheduler.finish(one)

    (header,) = scheduler.ends()

    assert (header["permitted"], header["sampling"], header["counters"][0]["steps"]) == (False, None, 1)


def test_a_request_ends_once_though_it_is_still_in_the_batch_that_overlaps_its_end() -> None:
    scheduler, one, other = Scheduler(), request(), request("b")
    scheduler.add(one, other)
    scheduler.step(one, other, accepted=(0, 1))
    scheduler.finish(one, kind="length")
    scheduler.step(one, other, accepted=(3, 1))
    scheduler.finish(one, other, skip=other)

    ends = scheduler.ends()

    assert [(end["rid"][:2], end["finish"], end["counters"][0]["steps"]) for end in ends] == [
        ("a-", "length_capped", 1)
    ]


@pytest.mark.parametrize("kind", ["stop", "length", "abort"])
def test_every_known_end_has_a_word_of_the_wire(kind: str) -> None:
    scheduler, one = Scheduler(), request()
    scheduler.add(one)
    scheduler.finish(one, kind=kind)

    (header,) = scheduler.ends()

    assert header["finish"] in wire.FINISHES


def test_an_end_that_is_new_in_sglang_is_reported_as_it_is() -> None:
    scheduler, one = Scheduler(), request()
    scheduler.add(one)
    scheduler.finish(one, kind="evaporated")

    (header,) = scheduler.ends()

    assert header["finish"] == "evaporated"


def test_a_request_that_is_aborted_while_it_waits_has_ended() -> None:
    scheduler, one = Scheduler(), request(output_ids=array("q"), is_retracted=True)
    scheduler.add(one)
    assert scheduler.hooks.abort(lambda *_: "sent", scheduler, "abort", one) == "sent"

    (header,) = scheduler.ends()

    assert (header["finish"], header["output_tokens"], header["counters"]) == ("aborted", 0, [])


@pytest.mark.parametrize("what", [{"rid": "HEALTH_CHECK_7"}, {"sampling_params": params(max_new_tokens=0)}])
def test_what_generates_for_nobody_is_not_reported(what: dict[str, Any]) -> None:
    scheduler, one = Scheduler(), request(**what)
    scheduler.add(one)
    scheduler.finish(one)

    assert scheduler.ends() == []


def test_steps_without_drafts_are_not_judged_and_unknown_drafts_have_no_version() -> None:
    scheduler, one = Scheduler(), request()
    scheduler.add(one)
    scheduler.step(one, accepted=(0,), width=1)
    scheduler.step(one, accepted=(1,), version=None)
    scheduler.finish(one)

    (header,) = scheduler.ends()

    assert [(counter["version"], counter["steps"]) for counter in header["counters"]] == [(None, 1)]


def test_another_agent_gets_none_of_the_steps_before_it() -> None:
    scheduler, one = Scheduler(), request()
    scheduler.add(one)
    scheduler.step(one, accepted=(1,), version=3)
    scheduler.hooks.forget()
    scheduler.step(one, accepted=(1,), version=4)
    scheduler.finish(one)

    (header,) = scheduler.ends()

    assert [(counter["version"], counter["steps"]) for counter in header["counters"]] == [(4, 1)]


def test_a_pause_of_the_scheduler_is_no_time_of_a_step() -> None:
    scheduler, one = Scheduler(), request()
    scheduler.add(one)
    scheduler.step(one, accepted=(1,))
    assert scheduler.hooks.resume(lambda _, received: received, scheduler, "continue") == "continue"
    scheduler.step(one, accepted=(1,))
    scheduler.finish(one)

    (header,) = scheduler.ends()

    assert header["counters"][0]["us"] == 0, "no step was timed"


def test_greedy_sampling_and_grammars_are_told_in_the_words_of_the_wire() -> None:
    scheduler, one = Scheduler(1.0), request(sampling_params=params(top_k=1, temperature=1.0, json_schema="{}"))
    scheduler.add(one)
    scheduler.finish(one)

    (header,) = scheduler.ends()

    assert (header["sampling"]["temperature"], header["sampling"]["top_k"], header["constrained"]) == (0.0, 0, True)


def test_a_hook_that_keeps_raising_ends_capture_and_says_so() -> None:
    scheduler = Scheduler()
    for _ in range(4):
        scheduler.hooks.add(lambda *_: None, scheduler, "no request")

    assert len(scheduler.channel.errors) == 3
    assert list(scheduler.hooks.guard.unhooked) == ["add"]
    assert "the hook add raised 3 times and is unhooked" in scheduler.channel.ends[0]


def test_a_rank_that_is_not_the_first_counts_nothing() -> None:
    scheduler, one = Scheduler(1.0), request()
    scheduler.hooks.is_active = False
    scheduler.add(one)
    scheduler.step(one, accepted=(1,))
    scheduler.finish(one)

    assert (scheduler.ends(), "a" in scheduler.selection) == ([], False)
