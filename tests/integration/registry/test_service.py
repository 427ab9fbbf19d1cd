"""The Registry service over a real connection."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.checkpoints import draft, evaluation
from tests.support.registry import CALL_S, Registry, fetch, publish, send, state

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import transfer
from updraft_chassis import rpc
from updraft_chassis.errors import Conflict, InvalidInput, NotFound

TRAINER = pb.SOURCE_TRAINER

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub


async def test_a_published_version_is_decided_on_before_the_answer(stub: "RegistryAsyncStub") -> None:
    first = await publish(stub, draft(1))
    assert (first.version.version, first.version.phase, first.existed) == (1, pb.PHASE_STABLE, False)
    better = await publish(stub, draft(2), source=TRAINER, evaluation=evaluation(baseline=1))
    assert (better.version.version, better.version.phase) == (2, pb.PHASE_STABLE)
    worse = await publish(stub, draft(3), source=TRAINER, evaluation=evaluation(baseline=2, gain=0.8))
    assert worse.version.phase == pb.PHASE_REJECTED
    assert "below the required gain of 1 %" in worse.version.reason
    now = await state(stub)
    assert (now.stable, now.previous, now.latest) == (2, 1, 3)


async def test_a_trainers_sentence_is_part_of_the_state_and_of_the_watch_before_any_version_exists(
    stub: "RegistryAsyncStub",
) -> None:
    async def say(message: str) -> None:
        await stub.ReportTraining(pb.ReportTrainingRequest(speculator="default", message=message), timeout=CALL_S)

    await say("the draft waits for 8 held-out requests, has 3")
    listed = await stub.List(pb.ListRequest(), timeout=CALL_S)
    assert [(one.speculator, one.trainer_message) for one in listed.speculators] == [
        ("default", "the draft waits for 8 held-out requests, has 3")
    ]
    watched = aiter(stub.Watch(pb.WatchRequest(speculator="default"), timeout=CALL_S))
    assert (await anext(watched)).state.trainer_message == "the draft waits for 8 held-out requests, has 3"
    await say("version 1 was published")
    assert (await anext(watched)).state.trainer_message == "version 1 was published"
    with pytest.raises(InvalidInput, match="a message is one line of text"), rpc.errors():
        await say("two\nlines")


@pytest.mark.attack(boundary="text", attack="a trainer's sentence with control characters", outcome="refused")
@pytest.mark.parametrize(
    ("learning", "why"),
    [
        pytest.param(pb.Learning(device="a\x1b[2J"), "a name of a device is one line of text", id="escapes in a name"),
        pytest.param(
            pb.Learning(phases=[pb.PhaseShare(phase="a\nb")]), "a name of a phase is one line", id="two lines"
        ),
        pytest.param(pb.Learning(phases=[pb.PhaseShare()] * 33), "33 phases of training; at most 32", id="many phases"),
        pytest.param(pb.Learning(tokens_per_second=math.inf), "are from 0 to 1e", id="infinite speed"),
        pytest.param(pb.Learning(flops_utilization=math.nan), "are from 0 to 1e", id="no number"),
        pytest.param(pb.Learning(phases=[pb.PhaseShare(share=-0.1)]), "are from 0 to 1e", id="negative share"),
        pytest.param(pb.Learning(lag_seconds=math.inf), "are from 0 to 1e", id="infinite lag"),
        pytest.param(pb.Learning(loss=math.nan), "loss and held-out acceptance lengths are finite", id="no loss"),
        pytest.param(
            pb.Learning(kinds=[pb.TrafficKind(name="a\x1b[2J")]), "a name of a kind of traffic", id="escapes in a kind"
        ),
        pytest.param(
            pb.Learning(shifts=[pb.TrafficShift(after="a\nb")]), "a name of a kind of traffic", id="lines in a shift"
        ),
        pytest.param(pb.Learning(kinds=[pb.TrafficKind()] * 41), "41 kinds of traffic; at most 40", id="many kinds"),
        pytest.param(pb.Learning(shifts=[pb.TrafficShift()] * 9), "9 shifts of traffic; at most 8", id="many shifts"),
        pytest.param(pb.Learning(phases=[pb.PhaseShare(phase="a" * 81)]), "81 characters", id="long phase"),
        pytest.param(pb.Learning(kinds=[pb.TrafficKind(name="a" * 81)]), "81 characters; at most 80", id="long name"),
        pytest.param(
            pb.Learning(kinds=[pb.TrafficKind(samples=1, last_day=2)]),
            "more requests of its last hour",
            id="more than all",
        ),
        pytest.param(
            pb.Learning(held_out_length=pb.Estimate(change_percent=1e300)), "lengths are finite", id="endless digits"
        ),
        pytest.param(
            pb.Learning(held_out_length=pb.Estimate(low_percent=math.nan)), "lengths are finite", id="no bound"
        ),
        pytest.param(
            pb.Learning(shifts=[pb.TrafficShift(unix_ms=2**62)]), "the year 9999", id="a shift without a date"
        ),
        pytest.param(pb.Learning(last_save_unix_ms=2**62), "the year 9999", id="a state saved without a date"),
        pytest.param(pb.Learning(estimate_due_unix_ms=-1), "the year 9999", id="an estimate before all dates"),
    ],
)
async def test_progress_that_no_terminal_could_show_is_refused(
    stub: "RegistryAsyncStub", learning: pb.Learning, why: str
) -> None:
    request = pb.ReportTrainingRequest(speculator="default", message="trains", learning=learning)
    with pytest.raises(InvalidInput, match=why), rpc.errors():
        await stub.ReportTraining(request, timeout=CALL_S)


async def test_a_version_is_fetched_as_it_was_published_and_from_any_offset(stub: "RegistryAsyncStub") -> None:
    large = draft(fc=bytes(3_200_000))
    await publish(stub, large)
    assert await fetch(stub, 1) == large.data
    assert await fetch(stub, 1, offset=1_500_000) == large.data[1_500_000:]
    assert await fetch(stub, 1, offset=len(large.data)) == b""
    with pytest.raises(InvalidInput, match="is beyond the end"):
        await fetch(stub, 1, offset=len(large.data) + 1)
    with pytest.raises(NotFound, match="default has no version 2; its newest is 1"):
        await fetch(stub, 2)


async def test_the_same_digest_again_needs_no_upload(stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1))
    again = await send(stub, [pb.PublishRequest(manifest=draft(1).manifest())])
    assert (again.version.version, again.existed) == (1, True)


async def test_a_manifest_is_kept_as_it_was_sent(stub: "RegistryAsyncStub") -> None:
    provenance = pb.Provenance(samples=5, first_trace_id="a", last_trace_id="b", step=7, code_version="0.1.0")
    manifest = draft(1).manifest(evaluation=evaluation(), provenance=provenance)
    published = await publish(stub, draft(1), evaluation=evaluation(), provenance=provenance)
    assert published.version.manifest == manifest
    got = await stub.Get(pb.GetRequest(speculator="default", version=1), timeout=CALL_S)
    assert got.version == published.version


async def test_a_list_shows_versions_newest_first_page_by_page(stub: "RegistryAsyncStub") -> None:
    for seed in (1, 2, 3):
        await publish(stub, draft(seed))
    first = await stub.List(pb.ListRequest(page_size=2), timeout=CALL_S)
    assert [v.version for v in first.versions] == [3, 2]
    assert [s.speculator for s in first.speculators] == ["default"]
    assert not first.versions[0].manifest.tensors
    assert first.versions[0].manifest.config_json == draft(3).manifest().config_json, "its sizes"
    rest = await stub.List(pb.ListRequest(page_size=2, page_token=first.next_page_token, full=True), timeout=CALL_S)
    assert [v.version for v in rest.versions] == [1]
    assert rest.versions[0].manifest == draft(1).manifest()
    assert rest.next_page_token == ""


async def test_a_page_ends_where_a_message_would(stub: "RegistryAsyncStub") -> None:
    large = json.dumps({"padding": "x" * 1_000_000})
    for seed in range(1, 6):
        await publish(stub, draft(seed), config_json=large)
    request, listed = pb.ListRequest(full=True), list[int]()
    while not listed or request.page_token:
        page = await stub.List(request, timeout=CALL_S)
        listed += [version.version for version in page.versions]
        request.page_token = page.next_page_token
    assert listed == [5, 4, 3, 2, 1]
    with pytest.raises(InvalidInput, match="a manifest of"):
        await publish(stub, draft(6), config_json=json.dumps({"padding": "x" * 1_100_000}))


async def test_a_speculator_that_nobody_knows_is_an_empty_list_with_a_default_policy(stub: "RegistryAsyncStub") -> None:
    answer = await stub.List(pb.ListRequest(speculator="new"), timeout=CALL_S)
    assert not answer.versions
    assert answer.speculators[0].policy.offline_gate.min_samples == 8
    assert answer.speculators[0].message == "nothing is published yet"


async def test_pin_and_unpin_are_told_and_remembered(stub: "RegistryAsyncStub") -> None:
    for seed in (1, 2):
        await publish(stub, draft(seed))
    forward = await stub.Pin(pb.PinRequest(speculator="default", version=2, reason="try it"), timeout=CALL_S)
    assert (forward.state.stable, forward.state.previous, forward.state.pinned) == (2, 1, 2)
    none = await stub.Pin(pb.PinRequest(speculator="default", version=0), timeout=CALL_S)
    assert (none.state.stable, none.state.HasField("pinned"), none.state.pinned) == (0, True, 0)
    held = await publish(stub, draft(3), source=TRAINER, evaluation=evaluation(baseline=0))
    assert (held.version.phase, held.version.reason) == (pb.PHASE_HELD, "no draft is pinned")
    free = await stub.Unpin(pb.UnpinRequest(speculator="default"), timeout=CALL_S)
    assert (free.state.stable, free.state.HasField("pinned")) == (1, False), "version 2 was pinned, and never won"
    history = await stub.History(pb.HistoryRequest(speculator="default"), timeout=CALL_S)
    events = [(t.version, t.reason) for t in history.transitions]
    assert events[0] == (3, "compared with no draft but version 1 serves; the trainer evaluates again")
    assert (2, "version 2 is pinned: try it") in events
    assert (1, "the first version needs no evaluation") in events


async def test_a_promotion_goes_on_where_a_pin_would_hold(stub: "RegistryAsyncStub") -> None:
    for seed in (1, 2):
        await publish(stub, draft(seed))
    promoted = await stub.Promote(
        pb.PromoteRequest(speculator="default", version=2, reason="it is fine"), timeout=CALL_S
    )
    assert (promoted.state.stable, promoted.state.previous) == (2, 1)
    newer = await publish(stub, draft(3), source=TRAINER, evaluation=evaluation(baseline=2))
    assert newer.version.phase == pb.PHASE_STABLE
    with pytest.raises(NotFound, match="default has no version 9"), rpc.errors():
        await stub.Promote(pb.PromoteRequest(speculator="default", version=9), timeout=CALL_S)


async def test_a_rejection_goes_back_and_lasts(stub: "RegistryAsyncStub") -> None:
    for seed in (1, 2):
        await publish(stub, draft(seed))
    await stub.Promote(pb.PromoteRequest(speculator="default", version=2), timeout=CALL_S)
    rejected = await stub.Reject(
        pb.RejectRequest(speculator="default", version=2, reason="it stutters"), timeout=CALL_S
    )
    assert rejected.state.stable == 1
    again = await publish(stub, draft(2))
    assert (again.version.phase, again.version.reason) == (pb.PHASE_REJECTED, "rejected: it stutters")
    with pytest.raises(Conflict, match="version 2 of default is Rejected and never serves again"), rpc.errors():
        await stub.Promote(pb.PromoteRequest(speculator="default", version=2), timeout=CALL_S)
    history = await stub.History(pb.HistoryRequest(speculator="default", version=1, limit=1), timeout=CALL_S)
    assert history.transitions[0].reason == "version 2 was rejected: the last winner serves"


async def test_a_pause_holds_and_a_resume_tries_the_newest(stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1))
    paused = await stub.Pause(pb.PauseRequest(speculator="default", reason="lunch"), timeout=CALL_S)
    assert paused.state.paused
    assert paused.state.message == "version 1 is stable; the rollout is paused: lunch"
    held = await publish(stub, draft(2), source=TRAINER, evaluation=evaluation(baseline=1))
    assert held.version.phase == pb.PHASE_HELD
    resumed = await stub.Resume(pb.ResumeRequest(speculator="default"), timeout=CALL_S)
    assert (resumed.state.stable, resumed.state.paused) == (2, False)


async def test_a_policy_is_followed_and_told_back(stub: "RegistryAsyncStub") -> None:
    strict = pb.RolloutPolicy(
        offline_gate=pb.OfflineGate(min_samples=50, min_gain_percent=1.0, confidence=0.8), progress_deadline_seconds=60
    )
    answer = await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=strict), timeout=CALL_S)
    assert answer.state.policy.offline_gate == strict.offline_gate
    assert answer.state.policy.progress_deadline_seconds == 60
    assert answer.state.policy.strategy == pb.STRATEGY_IMMEDIATE
    rejected = await publish(stub, draft(1), source=TRAINER, evaluation=evaluation())
    assert rejected.version.reason == "evaluated on 12 requests, at least 50 are required"
    canary = pb.RolloutPolicy(strategy=pb.STRATEGY_CANARY, progress_deadline_seconds=60)
    with pytest.raises(InvalidInput, match="expected at least 240"), rpc.errors():
        await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=canary), timeout=CALL_S)


async def test_a_watch_tells_the_state_at_once_and_at_every_change(stub: "RegistryAsyncStub") -> None:
    call = stub.Watch(pb.WatchRequest(speculator="default"), timeout=CALL_S)
    states = [(await anext(aiter(call))).state.stable]
    await publish(stub, draft(1))
    async for response in call:
        states.append(response.state.stable)
        if response.state.stable == 1:
            break
    call.cancel()
    assert states[0] == 0


@pytest.mark.attack(boundary="evidence", attack="publishing a rejected draft again", outcome="it is never tried again")
async def test_a_rejected_digest_is_never_tried_again(stub: "RegistryAsyncStub") -> None:
    rejected = await publish(stub, draft(1), source=TRAINER)
    again = await publish(stub, draft(1), source=pb.SOURCE_IMPORTED)
    assert again.existed
    assert again.version == rejected.version
    with pytest.raises(Conflict, match="version 1 of default is Rejected and never serves again"), rpc.errors():
        await stub.Pin(pb.PinRequest(speculator="default", version=1), timeout=CALL_S)


async def test_many_publish_at_once_and_each_gets_its_number(stub: "RegistryAsyncStub") -> None:
    answers = await asyncio.gather(*(publish(stub, draft(seed)) for seed in range(8)))
    assert sorted(answer.version.version for answer in answers) == list(range(1, 9))
    listed = await stub.List(pb.ListRequest(speculator="default"), timeout=CALL_S)
    assert [version.phase for version in listed.versions].count(pb.PHASE_STABLE) == 1


async def test_metrics_tell_versions_and_bytes(registry: Registry, stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1))
    await publish(stub, draft(1))
    await fetch(stub, 1)
    size = len(draft(1).data)
    assert registry.metric('updraft_registry_version{role="stable",speculator="default"}') == 1
    assert registry.metric('updraft_registry_published_versions_total{result="new",speculator="default"}') == 1
    assert registry.metric('updraft_registry_published_versions_total{result="existed",speculator="default"}') == 1
    assert registry.metric("updraft_registry_published_bytes_total") == size
    assert registry.metric('updraft_registry_fetched_bytes_total{encoding="identity"}') == size
    name = 'updraft_registry_transitions_total{actor="gate",phase="Stable",speculator="default"}'
    assert registry.metric(name) == 1


@pytest.mark.parametrize("name", ["../../etc", "", "A", "a" * 64])
async def test_a_name_that_is_none_is_refused_everywhere(stub: "RegistryAsyncStub", name: str) -> None:
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: stub.Get(pb.GetRequest(speculator=name, version=1), timeout=CALL_S),
        lambda: stub.Pin(pb.PinRequest(speculator=name), timeout=CALL_S),
        lambda: stub.SetPolicy(pb.SetPolicyRequest(speculator=name), timeout=CALL_S),
        lambda: stub.History(pb.HistoryRequest(speculator=name), timeout=CALL_S),
        lambda: publish(stub, draft(1), speculator=name),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="is not a valid speculator name"), rpc.errors():
            await call()


async def test_what_the_chassis_uploads_it_downloads_again(stub: "RegistryAsyncStub", tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(draft(fc=bytes(3_200_000)).data)
    manifest = draft(fc=bytes(3_200_000)).manifest()
    first = await transfer.upload(stub, manifest, weights)
    assert (first.version.version, first.existed) == (1, False)
    again = await transfer.upload(stub, manifest, weights)
    assert (again.version, again.existed) == (first.version, True)
    folder = await transfer.download(stub, "default", 1, tmp_path / "drafts", digest=manifest.digest)
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert (folder / "config.json").read_text() == manifest.config_json
