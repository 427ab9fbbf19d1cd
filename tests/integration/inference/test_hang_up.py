"""A client that leaves frees its slot, whatever it was waiting for."""

import asyncio
from pathlib import Path

import pytest
from tests.support.fake_engine import FakeEngine
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.wait import until


async def leave(pod: RunningPod, body: dict[str, object]) -> None:
    """Send a request, wait until it is in the engine, and close the connection."""
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(pod.http.post("/v1/completions", json=body))
        await until(lambda: pod.engine.load.running + pod.engine.load.queued > 0)
        asking.cancel()


@pytest.mark.parametrize("stream", [False, True], ids=["whole answer", "stream"])
async def test_before_the_first_token(tmp_path: Path, *, stream: bool) -> None:
    async with running_pod(tmp_path) as pod:
        pod.engine.go.clear()
        await leave(pod, {"model": MODEL, "prompt": "p", "stream": stream})

        await until(lambda: pod.engine.load.running == 0, what="the slot's freedom")
        pod.engine.go.set()
        assert (await pod.complete()).status_code == 200
        await pod.counts("updraft_inference_hang_ups_total", 1)
        await pod.counts('updraft_inference_requests_total{finish="cancelled"}', 1)


async def test_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    async with running_pod(tmp_path, FakeEngine(step_s=0.01, max_context=10_000)) as pod:
        body = {"model": MODEL, "prompt": "p", "max_tokens": 9000, "stream": True}
        async with pod.http.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break

        await until(lambda: pod.engine.load.running == 0, what="the slot's freedom")
        await pod.counts("updraft_inference_hang_ups_total", 1)


async def test_while_it_waits_in_the_queue(tmp_path: Path) -> None:
    async with running_pod(tmp_path, FakeEngine(num_slots=1, max_queued=1)) as pod:
        pod.engine.go.clear()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(pod.complete())
            await until(lambda: pod.engine.load.running == 1)
            waiting = tasks.create_task(pod.complete())
            await until(lambda: pod.engine.load.queued == 1)
            waiting.cancel()
            await until(lambda: pod.engine.load.queued == 0, what="the queue's emptiness")
            pod.engine.go.set()
        assert running.result().status_code == 200


async def test_a_client_that_trickles_its_body_and_leaves_is_no_error(tmp_path: Path) -> None:
    async with running_pod(tmp_path) as pod:
        host, port = pod.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await pod.counts("updraft_inference_hang_ups_total", 1)
