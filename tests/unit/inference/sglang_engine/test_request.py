"""Requests to a server that fails in ways that a real one does not on demand."""

from contextlib import aclosing
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.contract.engine_contract import asking, whole
from tests.support.sglang_server import FakeSglang
from tests.support.wait import until

from updraft_chassis.errors import Exhausted, InvalidInput, Unavailable
from updraft_inference.agent.counters import folded, usage
from updraft_inference.engine import (
    CaptureParams,
    DraftCheckpoint,
    Drafter,
    FinishedRequest,
    FinishReason,
    SamplingParams,
)
from updraft_inference.metrics import Metrics
from updraft_inference.sglang_engine.engine import SglangEngine


class TestRequests:
    @pytest.mark.parametrize("streams_all", [True, False])
    async def test_tokens_come_once_however_the_server_streams(
        self, fake: FakeSglang, engine: SglangEngine, heard: list[FinishedRequest], *, streams_all: bool
    ) -> None:
        fake.streams_all = streams_all

        tokens, finished = await whole(engine, asking("a", max_tokens=9))

        assert tuple(tokens) == finished.output_ids
        assert len(tokens) == 9
        assert finished.reason is FinishReason.LENGTH
        assert heard == [finished]

    async def test_a_request_is_told_to_the_server_as_it_is(self, fake: FakeSglang, engine: SglangEngine) -> None:
        capture = CaptureParams(payload=True, prompt_rows=3, counterfactual_rows=2)
        sampling = SamplingParams(temperature=0.7, top_p=0.9, top_k=0, seed=5)

        await whole(engine, asking("a", sampling=sampling, capture=capture, ignore_eos=False))

        (body,) = fake.bodies
        params = body["sampling_params"]
        assert (body["input_ids"], body["stream"]) == (list(range(3, 12)), True)
        assert params["custom_params"] == {
            "updraft": {"payload": True, "prompt_rows": 3, "counterfactual_rows": 2},
        }
        assert {name: params[name] for name in ("temperature", "top_p", "top_k", "sampling_seed", "ignore_eos")} == {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "sampling_seed": 5,
            "ignore_eos": False,
        }

    async def test_no_two_requests_have_one_name_at_the_server_nor_begin_with_anothers(
        self, fake: FakeSglang, engine: SglangEngine
    ) -> None:
        """SGLang aborts, two seconds after an answer, what has its name by then, and all whose names begin with that."""
        for name in ("a", "a", "a-", "ab"):
            await whole(engine, asking(name))

        rids = [body["rid"] for body in fake.bodies]
        assert all(not one.startswith(other) for one in rids for other in rids if one is not other)

    async def test_prefixes_of_clients_are_kept_apart_where_there_are_several(
        self, fake: FakeSglang, engine: SglangEngine
    ) -> None:
        for client in ("one", "other", ""):
            await whole(engine, asking(f"of {client}", client=client))

        assert [body.get("extra_key") for body in fake.bodies] == ["one", "other", None]

    async def test_what_changes_the_answer_is_told_to_the_server(self, fake: FakeSglang, engine: SglangEngine) -> None:
        sampling = SamplingParams(
            repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias=((7, -100.0),)
        )

        await whole(engine, asking("a", sampling=sampling, json_schema='{"type":"object"}'))
        await whole(engine, asking("b"))

        changed, plain = (body["sampling_params"] for body in fake.bodies)
        fields = {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "logit_bias": {"7": -100.0},
            "json_schema": '{"type":"object"}',
        }
        assert fields.items() <= changed.items()
        assert not fields.keys() & plain.keys()

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"sampling": SamplingParams(min_p=0.1)}, "min_p is not available"),
            ({"top_logprobs": 0}, "logprobs are not available"),
            ({"sampling": SamplingParams(logit_bias=((10**6, 1.0),))}, "outside the vocabulary"),
        ],
    )
    async def test_what_the_server_would_leave_out_is_refused(
        self, fake: FakeSglang, engine: SglangEngine, more: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(InvalidInput, match=words):
            await anext(engine.generate(asking("a", **more)))
        assert not fake.bodies

    async def test_without_a_plugin_the_servers_sums_are_counted_and_no_step_is_invented(
        self, engine: SglangEngine, drafts: list[DraftCheckpoint]
    ) -> None:
        await engine.swap(drafts[1])

        _, finished = await whole(engine, asking("a", max_tokens=10))

        assert finished.steps == ()
        assert finished.hidden is None
        served = usage(finished)
        assert (served.drafter, served.draft_version) == (Drafter.EAGLE3, 2)
        assert (served.verify_steps, served.accepted, served.proposed) == (6, 3, 18)
        tally = folded({}, finished)[2]
        assert (tally.verify_steps, tally.tokens) == (6, 9)
        assert (list(tally.proposed_by_position), list(tally.accepted_by_position)) == ([6, 6, 6], [3])
        assert tally.requests_served == 1
        registry = CollectorRegistry()
        Metrics(registry).observe(finished)
        assert registry.get_sample_value("updraft_inference_uncaptured_steps_total") == 6
        of_drafter = {"drafter": "eagle3"}
        assert registry.get_sample_value("updraft_inference_verify_steps_total", of_drafter) == 6
        assert registry.get_sample_value("updraft_inference_inter_token_latency_seconds_count") == 9
        for position, (proposed, accepted) in enumerate([(6, 3), (6, None), (6, None)], 1):
            at = of_drafter | {"position": str(position)}
            assert registry.get_sample_value("updraft_inference_proposed_tokens_total", at) == proposed
            assert registry.get_sample_value("updraft_inference_accepted_tokens_total", at) == accepted

    @pytest.mark.parametrize("more", [{"drafter": Drafter.NONE}, {"drafter": Drafter.NGRAM}, {"lookahead": 2}])
    async def test_what_is_fixed_for_the_whole_server_cannot_be_asked_for(
        self, engine: SglangEngine, more: dict[str, Any]
    ) -> None:
        with pytest.raises(InvalidInput, match="for all requests"):
            await anext(engine.generate(asking("a", **more)))

    async def test_what_the_server_has_anyway_may_be_asked_for(self, engine: SglangEngine) -> None:
        await whole(engine, asking("a", drafter=Drafter.EAGLE3, lookahead=3))

    async def test_a_full_queue_refuses(self, fake: FakeSglang, engine: SglangEngine) -> None:
        fake.may_step.clear()
        running = [engine.generate(asking(str(i))) for i in range(4)]
        for deltas in running:
            await anext(deltas)

        with pytest.raises(Exhausted):
            await anext(engine.generate(asking("too many")))

        assert (engine.load.running, engine.load.queued) == (2, 2)
        for deltas in running:
            await deltas.aclose()

    async def test_leaving_early_aborts_at_the_server_and_is_recorded(
        self, fake: FakeSglang, engine: SglangEngine, heard: list[FinishedRequest]
    ) -> None:
        fake.may_step.clear()
        async with aclosing(engine.generate(asking("a"))) as deltas:
            await anext(deltas)

        await until(lambda: len(heard) == 1, what="the end")
        assert fake.aborted == {fake.bodies[0]["rid"]}
        assert (heard[0].reason, heard[0].output_ids) == (FinishReason.CANCELLED, (3,))
        assert engine.load.running == 0

    async def test_leaving_a_server_that_refuses_the_abort_hangs_up(
        self, fake: FakeSglang, engine: SglangEngine, heard: list[FinishedRequest]
    ) -> None:
        fake.may_step.clear()
        fake.refusals["/abort_request"] = ["no"]
        async with aclosing(engine.generate(asking("a"))) as deltas:
            await anext(deltas)

        await until(lambda: len(heard) == 1, what="the end")
        assert heard[0].reason is FinishReason.CANCELLED
        fake.may_step.set()

    async def test_a_request_that_nobody_reads_is_recorded_though_the_server_breaks_off(
        self, fake: FakeSglang, engine: SglangEngine, heard: list[FinishedRequest]
    ) -> None:
        fake.may_step.clear()
        fake.breaks_off = True
        async with aclosing(engine.generate(asking("a"))) as deltas:
            await anext(deltas)

        await until(lambda: len(heard) == 1, what="the end")
        assert (heard[0].reason, heard[0].output_ids) == (FinishReason.CANCELLED, (3,))

    @pytest.mark.parametrize(
        ("event", "error"),
        [
            ({"error": {"message": "too long", "code": 400}}, InvalidInput),
            ({"error": "no reason"}, Unavailable),
            ({"meta_info": {"finish_reason": {"type": "abort", "status_code": 503, "message": "full"}}}, Exhausted),
            ({"meta_info": {"finish_reason": {"type": "abort", "status_code": 500, "message": "?"}}}, Unavailable),
            ({"meta_info": {"finish_reason": 5}}, Unavailable),
            (
                {"output_ids": [3], "meta_info": {"completion_tokens": 9, "finish_reason": {"type": "length"}}},
                Unavailable,
            ),
        ],
    )
    async def test_what_the_server_says_in_its_stream_becomes_an_error(
        self, fake: FakeSglang, engine: SglangEngine, event: dict[str, Any], error: type[Exception]
    ) -> None:
        fake.last_event = event

        with pytest.raises(error):
            await whole(engine, asking("a"))
        assert engine.load.running == 0

    async def test_sums_that_a_later_release_gives_otherwise_cost_no_request(
        self, fake: FakeSglang, engine: SglangEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        meta = {"finish_reason": {"type": "length"}, "completion_tokens": 2, "weight_versions": [{"v": 1}]}
        fake.last_event = {"output_ids": [3, 4], "meta_info": meta}

        tokens, finished = await whole(engine, asking("a"))

        assert (tokens, finished.uncaptured) == ([3, 4], None)
        assert "totals of SGLang cannot be read" in caplog.text
        fake.last_event = None
        await whole(engine, asking("b"))

    async def test_a_server_that_breaks_off_is_told(self, fake: FakeSglang, engine: SglangEngine) -> None:
        fake.breaks_off = True

        with pytest.raises(Unavailable):
            await whole(engine, asking("a"))
