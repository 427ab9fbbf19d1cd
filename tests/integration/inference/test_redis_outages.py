"""Redis absent, killed and restarted under load: requests never notice, drops are counted, capture comes back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.inference import RunningPod, running_pod
from tests.support.redis_server import RedisServer
from tests.support.wait import until

from updraft.trace.v1 import trace_pb2
from updraft_chassis import streams

KEY = "updraft:{default:default:0}:samples:v1"


async def traces(url: str) -> list[trace_pb2.Trace]:
    async with streams.connect(url) as client:
        rows: Any = await client.xrange(KEY)
        return [trace_pb2.Trace.FromString(fields[b"t"]) for _, fields in rows]


async def complete(pod: RunningPod, *, times: int = 1, headers: Sequence[tuple[str, str]] = ()) -> None:
    for _ in range(times):
        body = {"model": "tiny", "prompt": "p", "max_tokens": 4, "updraft": {"domain": "letters"}}
        answer = await pod.http.post("/v1/completions", json=body, headers=list(headers))
        assert answer.status_code == 200


async def test_a_request_becomes_a_trace_with_its_payload(tmp_path: Path, redis_url: str) -> None:
    async with running_pod(tmp_path, redis_url=redis_url, pod_name="pod-1", capture_prompt_rows=1) as pod:
        await complete(pod)

        async def is_there() -> bool:
            return len(await traces(redis_url)) == 1

        await until(is_there)

    (trace,) = await traces(redis_url)
    assert (trace.header.pod, trace.header.domain) == ("pod-1", "letters")
    assert list(trace.prompt_ids) == [ord("p")]
    assert len(trace.output_ids) == 4
    assert trace.payload.first_position == 0
    assert trace.payload.aux_hidden.rows == 4
    assert trace.payload.last_hidden.encoding == trace_pb2.TENSOR_ENCODING_FP8_E4M3


async def test_nothing_of_a_request_that_opts_out_leaves_the_pod(tmp_path: Path, redis_url: str) -> None:
    async with running_pod(tmp_path, redis_url=redis_url) as pod:
        await complete(pod, headers=[("X-Updraft-Capture", "Off")])
        await complete(pod, headers=[("X-Updraft-Capture", "on"), ("X-Updraft-Capture", "off")])
        await complete(pod)

        async def is_counted() -> bool:
            dropped = await pod.metric('updraft_inference_capture_dropped_traces_total{reason="opted_out"}')
            return dropped == 2 and bool(await traces(redis_url))

        await until(is_counted)

    assert len(await traces(redis_url)) == 1


@pytest.mark.attack(
    boundary="client",
    attack="a misspelt opt-out header",
    outcome="400, rather than a trace that nobody wanted",
)
async def test_what_a_request_permits_is_in_its_trace_and_a_misspelt_wish_is_refused(
    tmp_path: Path, redis_url: str
) -> None:
    async with running_pod(tmp_path, redis_url=redis_url, capture_region="eu") as pod:
        await complete(pod, headers=[("X-Updraft-Capture", "no-train"), ("X-Updraft-Capture", "No-Retain")])
        schema = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
        body = {"model": "tiny", "prompt": "p", "max_tokens": 4, "response_format": schema}
        assert (await pod.http.post("/v1/completions", json=body)).status_code == 200
        refused = await pod.http.post("/v1/completions", json=body, headers={"X-Updraft-Capture": "no-traning"})
        await complete(pod)

        async def are_there() -> bool:
            return len(await traces(redis_url)) == 3

        await until(are_there)

    assert refused.status_code == 400
    assert "expected on, off, no-train or no-retain, got 'no-traning'" in refused.json()["error"]["message"]
    denied, constrained, free = await traces(redis_url)
    assert denied.header.policy == trace_pb2.Policy(train=False, retain=False, region="eu")
    assert constrained.header.policy == trace_pb2.Policy(train=True, retain=True, region="eu")
    assert [trace.header.sampling.constrained for trace in (denied, constrained, free)] == [False, True, False]
    assert [trace.HasField("payload") for trace in (denied, constrained, free)] == [False, False, True]
    assert {trace.header.quantization for trace in (denied, constrained, free)} == {""}


async def test_a_pod_spreads_its_traces_over_the_shards(tmp_path: Path, redis_url: str) -> None:
    keys = streams.keys("default", "default", 3)

    async def shards() -> list[list[bytes]]:
        async with streams.connect(redis_url) as client:
            rows: list[Any] = [await client.xrange(key) for key in keys]
        return [[trace_pb2.Trace.FromString(fields[b"t"]).header.trace_id for _, fields in of] for of in rows]

    async def are_there() -> bool:
        return sum(map(len, await shards())) == 8

    async with running_pod(tmp_path, redis_url=redis_url, stream_shards=3) as pod:
        await complete(pod, times=8)
        await until(are_there)

    for shard, trace_ids in enumerate(await shards()):
        assert {streams.shard_of(trace_id, 3) for trace_id in trace_ids} <= {shard}


async def test_a_pod_that_is_told_to_captures_rows_after_rejections(tmp_path: Path, redis_url: str) -> None:
    async with running_pod(
        tmp_path, redis_url=redis_url, capture_counterfactual_rows=1, capture_evaluation_fraction=0.0
    ) as pod:
        body = {"model": "tiny", "prompt": "p", "max_tokens": 7, "updraft": {"drafter": "eagle3", "lookahead": 2}}
        assert (await pod.http.post("/v1/completions", json=body)).status_code == 200

        async def is_there() -> bool:
            return len(await traces(redis_url)) == 1

        await until(is_there)

    (trace,) = await traces(redis_url)
    rejecting = [index for index, step in enumerate(trace.steps) if step.accepted < len(step.draft_ids)]
    assert [one.step for one in trace.payload.counterfactuals] == rejecting
    assert {one.aux_hidden.rows for one in trace.payload.counterfactuals} == {1}


async def test_requests_go_on_without_redis_and_capture_begins_when_it_comes(
    tmp_path: Path, short_tmp_path: Path
) -> None:
    server = RedisServer(short_tmp_path)
    async with running_pod(tmp_path, redis_url=server.url, capture_queue_entries=2) as pod:
        await complete(pod, times=8)

        async def is_dropping() -> bool:
            await complete(pod)
            name = 'updraft_inference_capture_dropped_traces_total{reason="redis_unavailable"}'
            return await pod.metric(name) > 0

        await until(is_dropping)
        with server:
            await _captured_again(pod, server)


async def test_a_redis_killed_under_load_costs_traces_and_nothing_else(tmp_path: Path, short_tmp_path: Path) -> None:
    server = RedisServer(short_tmp_path)
    with server:
        async with running_pod(tmp_path, redis_url=server.url, capture_queue_entries=2) as pod:
            await _captured_again(pod, server)
            for _ in range(2):
                server.kill()
                await complete(pod, times=10)
                server.start()
                await _captured_again(pod, server)


async def test_a_redis_that_fills_up_costs_counted_traces_and_nothing_else(
    tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running_pod(tmp_path, redis_url=redis_url, capture_queue_entries=2) as pod,
        streams.connect(redis_url) as client,
    ):
        await complete(pod)
        await until(lambda: _num_traces(client, 1))
        await client.config_set("maxmemory", 1)
        try:
            await complete(pod, times=8)
            name = 'updraft_inference_capture_dropped_traces_total{reason="redis_unavailable"}'

            async def is_dropping() -> bool:
                await complete(pod)
                return await pod.metric(name) > 0

            await until(is_dropping)
        finally:
            await client.config_set("maxmemory", 0)
        await until(lambda: _num_traces(client, 3), what="the traces that waited")
    assert "Redis has reached its maxmemory" in str([vars(record) for record in caplog.records])


async def _num_traces(client: streams.Client, at_least: int) -> bool:
    return int(await client.xlen(KEY)) >= at_least


async def _captured_again(pod: RunningPod, server: RedisServer) -> None:
    async def is_captured() -> bool:
        await complete(pod)
        return bool(await traces(server.url))

    await until(is_captured, what="a trace in Redis")
