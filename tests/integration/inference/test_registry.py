"""A pod with the torch engine, and the real registry: directives, swaps under load, and a registry that goes away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.ports import free_port
from tests.support.publishing import pin, publish
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft
from tests.support.wait import LONG_S, until

from updraft.registry.v1 import registry_pb2
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis import rpc
from updraft_chassis.lifecycle import Stop
from updraft_inference.process import open_engine
from updraft_registry.process import serve as serve_registry
from updraft_registry.settings import RegistrySettings
from updraft_rollouts.terms import Strategy


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_tiny_target(tmp_path / MODEL)


@pytest.fixture
def port() -> int:
    return free_port()


@asynccontextmanager
async def registry(folder: Path, port: int) -> AsyncIterator[None]:
    """The real one, at the same address each time."""
    stop = Stop()
    settings = RegistrySettings(port=port, metrics_port=0, data_dir=folder / "registry", strategy=Strategy.IMMEDIATE)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve_registry(settings, stop))
        yield
        stop.request()


@asynccontextmanager
async def pod(folder: Path, port: int, *, redis_url: str = "") -> AsyncIterator[RunningPod]:
    async with running_pod(
        folder,
        open_engine=open_engine,
        registry_address=f"127.0.0.1:{port}",
        redis_url=redis_url,
        dtype="float32",
        num_slots=2,
        max_context=256,
        num_threads=1,
    ) as running:
        yield running


async def serves(pod: RunningPod, version: int) -> bool:
    return await pod.metric("updraft_inference_draft_version") == version


async def is_connected(pod: RunningPod, *, expected: bool = True) -> bool:
    return bool(await pod.metric("updraft_inference_registry_connected")) is expected


async def greedy(pod: RunningPod, prompt: str = "hello") -> tuple[str, dict[str, object]]:
    """Of the model's drafts: left to itself the engine may well draft nothing, a step of so small a model is cheap."""
    updraft = {"drafter": "eagle3", "lookahead": 3}
    answer = await pod.complete(prompt, max_tokens=48, temperature=0, ignore_eos=True, updraft=updraft)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.json()["usage"]["updraft"]


async def test_a_published_draft_is_fetched_and_swapped_in_while_requests_run(
    target: Path, tmp_path: Path, port: int
) -> None:
    async with registry(tmp_path, port), pod(tmp_path, port) as running:
        plain, usage = await greedy(running)
        assert usage["draft_version"] == 0

        async def load() -> None:
            while not await serves(running, 2):
                assert (await greedy(running))[0] == plain

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(load())
            first = await publish(target, f"127.0.0.1:{port}", seed=1)
            await until(partial(serves, running, first), what="the first draft's service")
            second = await publish(target, f"127.0.0.1:{port}", seed=2)
            await pin(f"127.0.0.1:{port}", second)

        text, usage = await greedy(running)
        assert (first, second) == (1, 2)
        assert (text, usage["drafter"], usage["draft_version"]) == (plain, "eagle3", 2)
        assert await running.metric('updraft_inference_swaps_total{outcome="swapped"}') >= 2


async def test_the_registry_hears_what_the_engine_itself_holds(target: Path, tmp_path: Path, port: int) -> None:
    async with registry(tmp_path, port), pod(tmp_path, port) as running:
        version = await publish(target, f"127.0.0.1:{port}", seed=1)
        await until(partial(serves, running, version))
        await greedy(running)

        async def is_known() -> bool:
            async with rpc.channel(f"127.0.0.1:{port}") as channel:
                listed = await RegistryStub(channel).List(registry_pb2.ListRequest(), timeout=LONG_S)
            state = listed.speculators[0]
            counted = [traffic for traffic in state.traffic if traffic.version == version]
            return state.pods.serving_stable == 1 and bool(counted) and counted[0].verify_steps > 0

        await until(is_known, what="the pod's report")


async def test_a_pod_captures_to_its_grant_and_keeps_it_while_the_registry_is_away(
    target: Path, tmp_path: Path, port: int, redis_url: str
) -> None:
    async def is_granted(running: RunningPod) -> bool:
        return await running.metric("updraft_inference_capture_granted_tokens_per_second") == 4000.0

    async with pod(tmp_path, port, redis_url=redis_url) as running:
        async with registry(tmp_path, port), rpc.channel(f"127.0.0.1:{port}") as channel:
            demand = registry_pb2.ReportTrainingRequest(
                speculator="default", message="waits", demand_tokens_per_second=4000.0
            )
            await until(partial(is_connected, running))
            await RegistryStub(channel).ReportTraining(demand, timeout=LONG_S)
            await until(partial(is_granted, running), what="the grant")
            await greedy(running)
        await until(partial(is_connected, running, expected=False))
        assert await is_granted(running)
        await greedy(running)

        async def is_captured() -> bool:
            return await running.metric("updraft_inference_captured_tokens_total") >= 2 * 48

        await until(is_captured, what="captured tokens")


async def test_pods_serve_on_without_the_registry_and_come_back_to_it(target: Path, tmp_path: Path, port: int) -> None:
    async with pod(tmp_path, port) as running:
        assert (await greedy(running))[1]["draft_version"] == 0
        async with registry(tmp_path, port):
            await until(partial(is_connected, running), what="the connection")
            version = await publish(target, f"127.0.0.1:{port}", seed=1)
            await until(partial(serves, running, version))

        await until(partial(is_connected, running, expected=False))
        assert (await greedy(running))[1]["draft_version"] == version
        async with registry(tmp_path, port):
            await until(partial(is_connected, running), what="the connection, again")
            await publish(target, f"127.0.0.1:{port}", seed=2)
            await pin(f"127.0.0.1:{port}", 2)
            await until(partial(serves, running, 2))


async def test_a_pod_restarted_while_the_registry_is_down_keeps_its_draft(
    target: Path, tmp_path: Path, port: int
) -> None:
    async with registry(tmp_path, port), pod(tmp_path, port) as running:
        version = await publish(target, f"127.0.0.1:{port}", seed=1)
        await until(partial(serves, running, version))

    async with pod(tmp_path, port) as again:
        assert (await greedy(again))[1]["draft_version"] == version


async def test_a_fixed_draft_needs_no_registry(target: Path, tmp_path: Path) -> None:
    save_draft(make_draft(target, seed=1), tmp_path / "mine")

    async with running_pod(
        tmp_path, open_engine=open_engine, draft_path=tmp_path / "mine", dtype="float32", max_context=128, num_threads=1
    ) as running:
        assert (await greedy(running))[1]["draft_version"] == 1


async def test_a_request_that_names_no_drafter_is_drafted_for_by_the_model_and_by_lookup(
    target: Path, tmp_path: Path
) -> None:
    save_draft(make_draft(target, seed=1), tmp_path / "mine")

    async with running_pod(
        tmp_path, open_engine=open_engine, draft_path=tmp_path / "mine", dtype="float32", max_context=256, num_threads=1
    ) as running:
        plain = (await greedy(running))[0]
        # A request that names its lookahead is always drafted for, whatever drafting costs on this machine.
        answer = await running.complete(
            "hello", max_tokens=48, temperature=0, ignore_eos=True, updraft={"lookahead": 2}
        )
        assert answer.json()["choices"][0]["text"] == plain
        assert await running.metric('updraft_inference_verify_steps_total{drafter="hybrid"}') > 0
