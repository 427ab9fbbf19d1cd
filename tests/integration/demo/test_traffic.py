"""Traffic and report points against the real HTTP surface, with a scripted engine behind it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from tests.support.fake_engine import FakeEngine
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.ports import free_port
from tests.support.wait import LONG_S, until

from updraft_chassis.clock import SystemClock
from updraft_cli.demo.chat import ChatServer, Question
from updraft_cli.demo.plan import MAX_TOKENS, Arm, Probing, SegmentName, fixed_arms, make_plan, timed_arms
from updraft_cli.demo.probe import Probe, probe_questions, rotated, ways
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.traffic import Traffic, endless_prompts
from updraft_cli.prompts import num_prompts
from updraft_inference.engine import Drafter, FinishedRequest


@pytest.fixture
def finished() -> list[FinishedRequest]:
    return []


@pytest.fixture
async def pod(tmp_path: Path, finished: list[FinishedRequest]) -> AsyncIterator[RunningPod]:
    engine = FakeEngine(num_slots=8, max_context=4096)
    async with running_pod(tmp_path, engine) as running:
        sink = engine.on_finished

        def listen(ended: FinishedRequest) -> None:
            finished.append(ended)
            sink(ended)

        engine.on_finished = listen
        yield running


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=LONG_S) as client:
        yield client


@pytest.fixture
def server(pod: RunningPod, http: httpx.AsyncClient) -> ChatServer:
    return ChatServer(http=http, url=pod.url, model=MODEL)


SMALL = Probing(num_prompts=6, batch=6, num_timed=4, max_tokens=64)


@pytest.fixture
def recording() -> Recording:
    plan = replace(make_plan(minutes=9, streams=4, seed=0), probing=SMALL)
    made = Recording(plan=plan, clock=SystemClock())
    made.begin(SegmentName.FIRST, "code")
    return made


async def test_an_answer_tells_what_the_draft_did(server: ChatServer) -> None:
    answer = await server.ask(
        Question(prompt=3, text="hello", max_tokens=7, options={"drafter": "ngram", "lookahead": 1})
    )
    assert answer.error == ""
    assert (answer.prompt, answer.output_tokens, answer.verify_steps) == (3, 7, 4)
    assert (answer.drafter, answer.accepted, answer.proposed) == ("ngram", 2, 4)
    assert len(answer.gaps_s) == answer.verify_steps
    assert 0 < answer.first_token_s <= answer.duration_s


async def test_a_refused_request_is_an_answer_with_an_error(server: ChatServer) -> None:
    answer = await server.ask(Question(prompt=0, text="hello", max_tokens=100_000))
    assert answer.error.startswith("HTTP 400: ")
    assert "100000" in answer.error


async def test_a_server_that_is_away_is_an_answer_with_an_error(http: httpx.AsyncClient) -> None:
    nobody = ChatServer(http=http, url=f"http://127.0.0.1:{free_port()}", model=MODEL)
    answer = await nobody.ask(Question(prompt=0, text="hello", max_tokens=1))
    assert "connection" in answer.error.lower()


async def test_traffic_flows_for_its_time_and_no_request_is_cut(
    server: ChatServer, recording: Recording, finished: list[FinishedRequest]
) -> None:
    await Traffic(server, recording).flow("code", 0.3)
    assert len(recording.requests) == len(finished) >= 2
    assert all(request.output_tokens == MAX_TOKENS and not request.error for request in recording.requests)
    assert len({request.prompt for request in recording.requests}) == len(recording.requests)
    part = recording.part(SegmentName.FIRST)
    assert part is not None
    assert part.live_s >= 0.3


async def test_a_domain_that_returns_goes_on_with_other_prompts(server: ChatServer, recording: Recording) -> None:
    traffic = Traffic(server, recording)
    for domain in ("code", "math", "code"):
        await traffic.flow(domain, 0.05)
    asked = [request.prompt for request in recording.requests]
    assert max(asked.count(number) for number in asked) <= 2  # once a domain


def test_prompts_start_again_when_all_were_asked() -> None:
    prompts = endless_prompts("chat", 0)
    first = [next(prompts) for _ in range(num_prompts("chat"))]
    assert next(prompts) == first[0]
    assert len({text for _, text in first}) == len(first)


async def test_a_report_point_asks_every_arm_the_same(
    server: ChatServer, recording: Recording, finished: list[FinishedRequest]
) -> None:
    segment = recording.plan.segments[0]
    await Probe(ways(server, None), recording).measure(segment, segment.num_points - 1)
    point = recording.points[0]
    assert point.is_end
    assert set(point.arms) == set(Arm)
    assert all(arm.timed is not None and arm.tokens_per_second for arm in point.arms.values())
    asked = {
        arm: [answer.prompt for answer in result.timed.answers] for arm, result in point.arms.items() if result.timed
    }
    assert all(prompts == [0, 1, 2, 3] for prompts in asked.values())
    assert point.arms[Arm.NONE].acceptance_length == 1.0
    assert (point.arms[Arm.NGRAM].acceptance_length or 0) > 1.5
    assert {ended.request.drafter for ended in finished} == {None, Drafter.NONE, Drafter.NGRAM, Drafter.EAGLE3}
    assert not any(ended.request.capture.payload for ended in finished)


async def test_acceptance_is_asked_all_at_once_and_speed_one_at_a_time(
    pod: RunningPod, server: ChatServer, recording: Recording, finished: list[FinishedRequest]
) -> None:
    segment = recording.plan.segments[0]
    pod.engine.go.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(Probe(ways(server, None), recording).measure(segment, segment.num_points - 1))
        await until(lambda: pod.engine.load.running == SMALL.num_prompts, what="all prompts of the acceptance probe")
        pod.engine.go.set()
    num_alone = SMALL.num_timed * len(timed_arms(segment.name))
    assert len(finished) == num_alone + SMALL.num_prompts * len(fixed_arms(segment.name, is_end=True))
    assert {step.batch_size for ended in finished[-num_alone:] for step in ended.steps} == {1}


async def test_a_frozen_draft_is_asked_in_its_own_process(
    server: ChatServer, recording: Recording, http: httpx.AsyncClient
) -> None:
    recording.end()
    recording.begin(SegmentName.SHIFTED, "math")
    away = ChatServer(http=http, url=f"http://127.0.0.1:{free_port()}", model=MODEL)
    await Probe(ways(server, away), recording).measure(recording.plan.segments[1], 0)
    arms = recording.points[0].arms
    frozen, adaptive = arms[Arm.FROZEN].fixed, arms[Arm.ADAPTIVE].fixed
    assert frozen is not None
    assert adaptive is not None
    assert (frozen.failed, adaptive.failed) == (SMALL.num_prompts, 0)
    assert arms[Arm.FROZEN].acceptance_length is None


async def test_a_report_point_asks_further_prompts_only_while_the_error_is_too_large(
    server: ChatServer, recording: Recording
) -> None:
    recording.plan = replace(recording.plan, probing=replace(SMALL, num_prompts=8, batch=2))
    segment = recording.plan.segments[0]
    await Probe(ways(server, None), recording).measure(segment, 0)
    exact = recording.points[0].arms[Arm.ADAPTIVE].fixed
    assert exact is not None
    assert (exact.requests, exact.acceptance_error_percent) == (2, 0.0), (
        "the fake engine accepts the same of every prompt"
    )


def test_a_draft_frozen_before_there_was_one_is_no_draft(http: httpx.AsyncClient) -> None:
    serving = ChatServer(http=http, url="http://127.0.0.1:1", model=MODEL)
    assert ways(serving, None)[Arm.FROZEN] == ways(serving, None)[Arm.NONE]


def test_held_out_prompts_are_the_same_at_every_point_and_never_captured() -> None:
    plan = make_plan(minutes=9, streams=4, seed=0)
    questions = probe_questions(plan, "math")
    assert questions == probe_questions(plan, "math")
    assert len(questions) == plan.probing.num_prompts
    assert not any(question.is_captured for question in questions)


def test_arms_take_turns_in_going_first() -> None:
    arms = [Arm.NONE, Arm.NGRAM, Arm.ADAPTIVE]
    assert [rotated(arms, turn)[0] for turn in range(4)] == [Arm.NONE, Arm.NGRAM, Arm.ADAPTIVE, Arm.NONE]
