"""The end of a pod: no new requests, the running ones finish, and a deadline holds."""

import asyncio
from pathlib import Path

import httpx
import pytest
from tests.support.fake_engine import FakeEngine
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.wait import until

from updraft_chassis import streams

BODY = {"model": MODEL, "prompt": "p", "max_tokens": 100, "stream": True}


async def is_not_ready(pod: RunningPod) -> bool:
    return (await pod.http.get("/readyz")).text == "draining\n"


async def test_running_requests_end_while_new_ones_are_sent_elsewhere(tmp_path: Path) -> None:
    async with (
        running_pod(tmp_path, FakeEngine(step_s=0.02), drain_seconds=60) as pod,
        pod.http.stream("POST", "/v1/completions", json=BODY) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        pod.engine.go.clear()
        pod.stop.request()
        await until(lambda: is_not_ready(pod))

        refused = await pod.complete()
        assert (await pod.http.get("/readyz")).status_code == 503
        assert (await pod.http.get("/healthz")).status_code == 200
        pod.engine.go.set()
        rest = [line async for line in lines]

    assert refused.status_code == 503
    assert "shutting down" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"]
    assert rest[-2] == "data: [DONE]"


async def test_requests_that_do_not_end_in_time_are_cut_off(tmp_path: Path) -> None:
    async with (
        running_pod(tmp_path, FakeEngine(step_s=0.02), drain_seconds=0.05) as pod,
        pod.http.stream("POST", "/v1/completions", json=BODY) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        pod.engine.go.clear()
        pod.stop.request()
        with pytest.raises(httpx.TransportError):
            _ = [line async for line in lines]
        await until(lambda: pod.engine.load.running == 0)


async def test_what_was_captured_is_flushed(tmp_path: Path, redis_url: str) -> None:
    async with running_pod(tmp_path, redis_url=redis_url, speculator="drain") as pod:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(pod.complete())
        pod.stop.request()

    async with streams.connect(redis_url) as client:
        assert await client.xlen("updraft:{default:drain:0}:samples:v1") == 4
