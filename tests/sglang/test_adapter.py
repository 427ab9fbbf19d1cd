"""The adapter against a real SGLang: it keeps the promises of the port, as far as an engine can whose drafter is fixed."""

import asyncio
import logging
import statistics
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contract.engine_contract import EngineContract, asking, whole
from tests.sglang.attaching import NUM_STEPS, Setting, attached, started
from tests.sglang.models import continuation, cycle_draft
from tests.support.ports import free_port
from tests.support.processes import Process, scrape
from tests.support.tiny_target import save_draft
from tests.support.wait import LONG_S, until

from updraft_chassis.errors import Conflict, InvalidInput, Unavailable
from updraft_inference.engine import (
    CaptureParams,
    DraftCheckpoint,
    Drafter,
    Engine,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
)
from updraft_inference.sglang_engine.engine import SglangEngine
from updraft_inference.sglang_engine.server import SglangServer, StreamEvent
from updraft_sglang.weights import LOADER

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(300)]

logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    with started() as setting:
        yield setting


@pytest.fixture(scope="module")
def drafts(setting: Setting) -> list[DraftCheckpoint]:
    """A poor one and a good one."""
    return [setting.saved(version, quality) for version, quality in ((1, 0.3), (2, 1.0))]


@pytest.fixture
def heard() -> list[FinishedRequest]:
    return []


@pytest.fixture
async def engine(setting: Setting, heard: list[FinishedRequest]) -> AsyncIterator[SglangEngine]:
    async with attached(setting, heard) as engine:
        assert engine.capture_problem == ""
        yield engine


class TestSglangEngine(EngineContract):
    @pytest.fixture
    def corrupt(self, setting: Setting, tmp_path: Path) -> DraftCheckpoint:
        digest = save_draft(cycle_draft(setting.target), tmp_path / "3")
        tensors = load_file(tmp_path / "3" / "model.safetensors")
        tensors["fc.weight"][0, 0] += 1
        save_file(tensors, tmp_path / "3" / "model.safetensors")
        return DraftCheckpoint(version=3, folder=tmp_path / "3", tensors_digest=digest)

    async def test_greedy_output_is_the_same_with_any_drafter_and_lookahead(
        self, engine: Engine, drafts: list[DraftCheckpoint]
    ) -> None:
        """With any draft, for a request cannot choose another drafter."""
        plain, _ = await whole(engine, asking("seed", max_tokens=40))
        for draft in drafts:
            await engine.swap(draft)

            tokens, _ = await whole(engine, asking(f"v{draft.version}", max_tokens=40))

            assert tokens == plain
        with pytest.raises(InvalidInput):
            await anext(engine.generate(asking("none", drafter=Drafter.NONE)))

    async def test_steps_cover_the_output_without_gaps(self, engine: Engine, drafts: list[DraftCheckpoint]) -> None:
        """Log-probabilities of drafts are not to be had."""
        await engine.swap(drafts[1])

        _, finished = await whole(engine, asking("a", max_tokens=30, drafter=Drafter.EAGLE3))

        position = 1
        for step in finished.steps:
            assert step.start == position
            assert (len(step.draft_ids), len(step.target_log_probs), step.draft_log_probs) == (NUM_STEPS, NUM_STEPS, ())
            assert step.draft_ids[: step.accepted] == finished.output_ids[position:][: step.accepted]
            position += step.emitted
        assert position >= len(finished.output_ids)
        assert finished.uncaptured is None
        assert any(step.accepted == NUM_STEPS for step in finished.steps), "the good draft is accepted"

    async def test_a_swap_in_mid_request_neither_ends_nor_changes_it(
        self, engine: Engine, drafts: list[DraftCheckpoint]
    ) -> None:
        plain, _ = await whole(engine, asking("plain", max_tokens=100))
        versions: list[int] = []

        for _ in range(5):  # the server waits for no reader, and may be through before the swap begins
            await engine.swap(drafts[0])
            tokens: list[int] = []
            async for delta in engine.generate(asking("swapped", max_tokens=100)):
                if not tokens:
                    await engine.swap(drafts[1])
                tokens += delta.token_ids
                versions = [step.draft_version for step in delta.finished.steps] if delta.finished else []
            assert tokens == plain
            assert versions == sorted(versions)
            if set(versions) == {1, 2}:
                break

        assert set(versions) == {1, 2}


class Tapped(SglangServer):
    """Keeps what the server says of each ended request."""

    def __init__(self, url: str, admin: str) -> None:
        super().__init__(url, admin_key=admin)
        self.metas: dict[str, Mapping[str, Any]] = {}

    @asynccontextmanager
    async def generate(self, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[StreamEvent]]:
        async with super().generate(body) as events:
            yield self._kept(events)

    async def _kept(self, events: AsyncIterator[StreamEvent]) -> AsyncIterator[StreamEvent]:
        async for event in events:
            if event.finish is not None:
                self.metas[str(event.meta["id"]).rpartition("-")[0]] = event.meta
            yield event


def counted(finished: FinishedRequest) -> tuple[int, int]:
    """Verify steps and accepted draft tokens, by our count."""
    rest = finished.uncaptured
    steps = len(finished.steps) + (0 if rest is None else rest.verify_steps)
    accepted = sum(step.accepted for step in finished.steps) + (0 if rest is None else sum(rest.accepted))
    return steps, accepted


def said(meta: Mapping[str, Any]) -> tuple[int, int]:
    """The same, by the server's."""
    return meta.get("spec_verify_ct", 0), meta.get("spec_num_correct_drafts", 0)


def mixed(num: int) -> list[GenerationRequest]:
    """Of all lengths, with end tokens and without, some captured."""
    return [
        asking(
            f"m{i}",
            num_prompt=1 + 7 * i % 40,
            max_tokens=1 + 11 * i % 80,
            ignore_eos=i % 3 > 0,
            capture=CaptureParams(payload=i % 4 == 0, prompt_rows=8, counterfactual_rows=i % 3),
        )
        for i in range(num)
    ]


async def test_steps_and_accepted_drafts_are_the_servers_own_also_across_swaps(
    setting: Setting, heard: list[FinishedRequest], drafts: list[DraftCheckpoint]
) -> None:
    async with (
        Tapped(setting.server.url, setting.admin) as server,
        attached(setting, heard, server, max_queued=64) as engine,
        asyncio.TaskGroup() as tasks,
    ):
        running = [tasks.create_task(whole(engine, request)) for request in mixed(40)]
        for swap in range(6):
            await engine.swap(drafts[swap % 2])
            await until(lambda num=6 * (swap + 1): len(heard) >= num, what="requests")  # type: ignore[misc]

    assert len(running) == len(heard)
    assert {end.request.request_id: counted(end) for end in heard} == {
        name: said(meta) for name, meta in server.metas.items()
    }
    assert all(end.uncaptured is None for end in heard)
    assert {step.draft_version for end in heard for step in end.steps} >= {1, 2}


async def test_without_the_plugin_the_sums_are_exact_by_version(
    setting: Setting, heard: list[FinishedRequest], drafts: list[DraftCheckpoint]
) -> None:
    """The plugin looks for the socket at another place."""
    async with (
        Tapped(setting.server.url, setting.admin) as server,
        attached(setting, heard, server, socket=setting.folder / "elsewhere", hello_s=0.0) as engine,
    ):
        for draft in drafts:
            await engine.swap(draft)
            await whole(engine, asking(f"v{draft.version}", max_tokens=50))

    assert [end.steps for end in heard] == [(), ()]
    assert [counted(end) for end in heard] == [said(server.metas[f"v{version}"]) for version in (1, 2)]
    assert [end.uncaptured.draft_version for end in heard if end.uncaptured] == [1, 2]
    assert [sum(end.uncaptured.proposed) for end in heard if end.uncaptured] == [
        server.metas[f"v{version}"]["spec_num_proposed_drafts"] for version in (1, 2)
    ]


async def test_an_agent_that_is_cut_off_and_comes_back_finds_the_draft_that_serves(
    setting: Setting, heard: list[FinishedRequest], drafts: list[DraftCheckpoint]
) -> None:
    async with attached(setting, heard) as engine:
        before = (await engine.swap(drafts[1])).loaded
    label = setting.server.http.get("/model_info").json()["weight_version"]
    async with attached(setting, heard, drafts=setting.folder / "drafts") as engine:
        assert engine.loaded == before
        assert setting.server.http.get("/model_info").json()["weight_version"] == label == "v2"
    async with attached(setting, heard, drafts=setting.folder / "nowhere") as engine:
        assert engine.loaded.version == 0
        assert setting.server.http.get("/model_info").json()["weight_version"] == "v0"


async def test_twenty_swaps_under_load_change_nothing_and_pause_shortly(
    setting: Setting, heard: list[FinishedRequest], drafts: list[DraftCheckpoint]
) -> None:
    async with attached(setting, heard, max_queued=64) as engine:
        target_before = await engine_checksums(setting)
        plain, _ = await whole(engine, asking("plain", max_tokens=100))
        pauses: list[float] = []
        is_over, all_run = asyncio.Event(), asyncio.Barrier(9)

        async def stream(name: str) -> None:
            for number in count():
                tokens, _ = await whole(engine, asking(f"{name}-{number}", max_tokens=100))
                assert tokens == plain
                if not number:  # the first ones of a server wait for what it compiles, swap or not
                    await all_run.wait()
                if is_over.is_set():
                    break

        async with asyncio.TaskGroup() as tasks:
            for name in map(str, range(8)):
                tasks.create_task(stream(name))
            await all_run.wait()
            for swap in range(20):
                swapped = await engine.swap(drafts[swap % 2])
                pauses.append(swapped.pause_s)
                assert swapped.loaded.tensors_digest == drafts[swap % 2].tensors_digest
            is_over.set()

        assert await engine_checksums(setting) == target_before, "the target is never touched"
    median, p95 = 1000 * statistics.median(pauses), 1000 * statistics.quantiles(pauses, n=20)[-1]
    logger.info(
        "Swap pauses: median %.0f ms, 95th percentile %.0f ms, of %s", median, p95, [round(1e3 * p) for p in pauses]
    )
    assert median < 1000, "of a machine that may be busy; the figures are logged"


async def engine_checksums(setting: Setting) -> Mapping[str, str]:
    async with SglangServer(setting.server.url, admin_key=setting.admin) as server:
        (rank,) = await server.checksums("target")
        return rank.hashes


async def test_somebodys_own_pause_holds_up_a_swap_and_nothing_else(
    setting: Setting, heard: list[FinishedRequest], drafts: list[DraftCheckpoint]
) -> None:
    async with (
        attached(setting, heard) as engine,
        SglangServer(setting.server.url, admin_key=setting.admin) as somebody,
    ):
        await somebody.pause()
        with pytest.raises(Unavailable, match="paused"):
            await engine.swap(drafts[0])
        await somebody.begin_update()
        await somebody.resume()
        with pytest.raises(Unavailable, match="another weight update"):
            await engine.swap(drafts[0])
        await somebody.end_update()

        assert await somebody.why_unhealthy() == ""
        await engine.swap(drafts[0])
        await whole(engine, asking("a"))


async def test_what_the_loader_refuses_is_told_and_the_server_lives(
    setting: Setting, engine: SglangEngine, drafts: list[DraftCheckpoint]
) -> None:
    """A folder that the server does not see."""
    await engine.swap(drafts[1])
    text = torch.tensor(list(b"/not-there"), dtype=torch.uint8)
    named = [("folder", text), ("version", torch.tensor([1])), ("digest", text)]
    async with SglangServer(setting.server.url, admin_key=setting.admin) as server:
        await server.pause()
        await server.begin_update()
        with pytest.raises(Conflict, match="/not-there"):
            await server.update(named, load_format=LOADER, label="v1", tp_size=1)
        await server.end_update()
        await server.resume()

    assert (await engine.rehash()).tensors_digest == drafts[1].tensors_digest
    await whole(engine, asking("a"))


def test_the_process_serves_beside_the_server_and_ends_alone(setting: Setting, tmp_path: Path) -> None:
    port = free_port()
    variables = {
        "UPDRAFT_INFERENCE_MODEL": str(setting.target),
        "UPDRAFT_INFERENCE_ENGINE": "sglang",
        "UPDRAFT_INFERENCE_ATTACH": setting.server.url,
        "UPDRAFT_INFERENCE_SGLANG_ADMIN_KEY_FILE": str(setting.key_file),
        "UPDRAFT_INFERENCE_SGLANG_SOCKET": str(setting.socket),
        "UPDRAFT_INFERENCE_DATA_DIR": str(tmp_path),
        "UPDRAFT_INFERENCE_PORT": str(port),
    }
    body = {"model": "target", "prompt": "hello", "max_tokens": 50, "temperature": 0, "ignore_eos": True}
    with (
        Process("updraft_inference", variables, tmp_path / "log") as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LONG_S) as http,
    ):
        process.wait_for_log('"message": "Ready"', timeout_s=3 * LONG_S)
        answer = http.post("/v1/completions", json=body)
        assert answer.is_success, answer.text
        counted = scrape(port)
        status = process.terminate()

    assert answer.json()["choices"][0]["text"].encode() == bytes(continuation("hello", 50))
    assert counted["updraft_inference_output_tokens_total"] == 50
    assert counted["updraft_inference_uncaptured_steps_total"] == 0
    assert counted['updraft_inference_verify_steps_total{drafter="eagle3"}'] > 0
    assert status == 0
    assert setting.admin not in process.log()
    assert setting.server.http.get("/ready").is_success, "the server is not ours to end"


async def test_cancelled_requests_count_what_the_server_counted(setting: Setting, heard: list[FinishedRequest]) -> None:
    async with Tapped(setting.server.url, setting.admin) as server, attached(setting, heard, server) as engine:
        for name in "abc":
            running = engine.generate(asking(name, max_tokens=100))
            for _ in range(5):
                await anext(running)
            await running.aclose()
        await until(lambda: len(heard) == 3, what="the ends")

    assert {end.reason for end in heard} == {FinishReason.CANCELLED}
    assert {end.request.request_id: counted(end) for end in heard} == {
        name: said(meta) for name, meta in server.metas.items()
    }
