"""The weight update by which several ranks get a draft, on a real server of one rank: proved, undone, and kept from others."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.sglang.beside import Setting, started
from tests.sglang.models import continuation
from tests.support.wait import until
from torch import Tensor

from updraft_chassis.errors import Conflict, Corrupt, InvalidInput, Unavailable, UpdraftError
from updraft_draft import checkpoint
from updraft_inference.engine import DraftCheckpoint, LoadedDraft
from updraft_inference.sidecar.sglang.draft_swap import ServedDraft
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_sglang.weights import LOADER, PAYLOAD

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(90)]

TOKENS = 60


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    with started(SGLANG_HEALTH_CHECK_TIMEOUT="1") as setting:
        yield setting


@pytest.fixture
def drafts(setting: Setting) -> list[DraftCheckpoint]:
    """A poor one and a good one."""
    return [setting.saved(version, quality) for version, quality in ((1, 0.3), (2, 1.0))]


@asynccontextmanager
async def opened(setting: Setting, server: SglangServer | None = None) -> AsyncIterator[ServedDraft]:
    """What the server holds, as an agent that starts finds it."""
    async with server or setting.client() as client:
        draft = await ServedDraft.open(client, await client.info(), setting.folder / "swap")
        await draft.adopt(LoadedDraft(), None)
        yield draft


async def says(setting: Setting) -> None:
    """The server goes on, and says what no draft changes."""
    text = await asyncio.to_thread(setting.said, "hello", TOKENS)
    assert text == bytes(continuation("hello", TOKENS)).decode()


async def test_twenty_swaps_under_load_change_no_token_and_never_touch_the_target(
    setting: Setting, drafts: list[DraftCheckpoint]
) -> None:
    is_over = asyncio.Event()

    async def stream() -> None:
        while not is_over.is_set():
            await says(setting)

    async with opened(setting) as served, setting.client() as client, asyncio.TaskGroup() as tasks:
        (before,) = await client.checksums("target")
        for _ in range(4):
            tasks.create_task(stream())
        for swap in range(20):
            draft = drafts[swap % 2]
            loaded = (await served.swap(draft)).loaded
            assert loaded == LoadedDraft(version=draft.version, tensors_digest=draft.tensors_digest)
        is_over.set()
        assert (await client.checksums("target"))[0].hashes == before.hashes
        assert (await asyncio.to_thread(setting.server.http.get, "/model_info")).json()["weight_version"] == "v2"


async def test_an_agent_that_comes_back_keeps_the_draft_that_the_checksums_prove(
    setting: Setting, drafts: list[DraftCheckpoint]
) -> None:
    async with opened(setting) as served:
        loaded = (await served.swap(drafts[1])).loaded
    async with setting.client() as client:
        again = await ServedDraft.open(client, await client.info(), setting.folder / "swap")
        await again.adopt(loaded, setting.folder / "drafts")
        assert again.loaded == loaded
        await again.adopt(loaded, setting.folder / "nowhere")
        assert again.loaded == LoadedDraft(), "the first draft, because the other one is not known here"


async def test_somebodys_own_pause_holds_up_a_swap_and_nothing_else(
    setting: Setting, drafts: list[DraftCheckpoint]
) -> None:
    async with opened(setting) as served, setting.client() as somebody:
        await somebody.pause()
        with pytest.raises(Unavailable, match="paused"):
            await served.swap(drafts[0])
        await somebody.begin_update()
        await somebody.resume()
        with pytest.raises(Unavailable, match="another weight update"):
            await served.swap(drafts[0])
        await somebody.end_update()

        assert await somebody.why_unhealthy() == ""
        await served.swap(drafts[0])
        await says(setting)


async def test_what_was_not_prepared_is_refused_and_the_server_lives(
    setting: Setting, drafts: list[DraftCheckpoint]
) -> None:
    """A folder that the server does not see, and a load without preparation."""
    order = json.dumps({"folder": "/not-there", "version": 1, "digest": "sha256:1"})
    async with opened(setting) as served, setting.client() as server:
        await served.swap(drafts[1])
        await refuses(server, order, "/not-there")
        await server.pause()
        await server.begin_update()
        with pytest.raises(Conflict, match="it has not prepared this draft"):
            await server.update(
                [(PAYLOAD, torch.tensor(list(order.encode()), dtype=torch.uint8))],
                load_format=LOADER,
                label="v1",
                tp_size=1,
            )
        await server.end_update()
        await server.resume()

        assert (await served.rehash()).tensors_digest == drafts[1].tensors_digest
        await says(setting)


async def refuses(server: SglangServer, order: str, reason: str) -> None:
    """Wait until it does."""

    async def is_refused() -> bool:
        try:
            return not await server.prepare(order)
        except Conflict as error:
            return reason in str(error)

    await until(is_refused, what=reason)


class Overtaken(SglangServer):
    """Something happens to a draft's file between the agent's look at it and the server's, and is perhaps undone after that."""

    happen: Callable[[], object] = staticmethod(lambda: None)
    undo: Callable[[], object] = staticmethod(lambda: None)

    async def prepare(self, order: str) -> str:
        happen, self.happen = self.happen, lambda: None  # once
        happen()
        try:
            return await super().prepare(order)
        except Conflict:
            self.undo()
            raise


def changed(change: Callable[[dict[str, Tensor]], None], path: Path) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors["fc.weight"][0, 0] = torch.inf


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()


def other_tokens(tensors: dict[str, Tensor]) -> None:
    tensors["d2t"][-1] += 1


@pytest.mark.parametrize(
    ("happen", "error"),
    [
        pytest.param(partial(changed, infinite), Corrupt("fc.weight holds values that are not finite"), id="infinite"),
        pytest.param(lambda path: os.truncate(path, 5000), Corrupt("is no whole safetensors file"), id="cut off"),
        pytest.param(partial(changed, narrow), InvalidInput("norm.weight"), id="another shape"),
        pytest.param(partial(changed, other_tokens), Corrupt("values in draft.hot_token_id"), id="another vocabulary"),
        pytest.param(
            lambda path: shutil.rmtree(path.parent),
            Unavailable("cannot read the draft in"),
            id="not there, not the draft's fault",
        ),
    ],
)
async def test_a_draft_that_becomes_unsound_before_the_server_reads_it_is_refused(
    setting: Setting, tmp_path: Path, happen: Callable[[Path], object], error: UpdraftError
) -> None:
    good, bad = setting.saved(1, 1.0), setting.saved(2, 0.5)
    weights = bad.folder / checkpoint.WEIGHTS
    server = Overtaken(setting.server.url, admin_key=setting.admin)
    async with opened(setting, server) as served:
        await served.swap(good)
        server.happen = lambda: happen(weights)

        with pytest.raises(type(error), match=str(error)):
            await served.swap(bad)

        assert (await served.rehash()).tensors_digest == good.tensors_digest
        await says(setting)


async def test_a_draft_that_only_the_server_reads_otherwise_is_no_fault_of_the_draft(setting: Setting) -> None:
    good, whole_one = setting.saved(1, 1.0), setting.saved(2, 0.5)
    weights = whole_one.folder / checkpoint.WEIGHTS
    content = weights.read_bytes()
    server = Overtaken(setting.server.url, admin_key=setting.admin)
    async with opened(setting, server) as served:
        await served.swap(good)
        server.happen, server.undo = partial(changed, narrow, weights), partial(weights.write_bytes, content)

        with pytest.raises(Unavailable, match=r"SGLang refuses /weights_checker: .*norm\.weight has shape"):
            await served.swap(whole_one)

        assert (await served.rehash()).tensors_digest == good.tensors_digest
        server.happen = server.undo = lambda: None
        assert (await served.swap(whole_one)).loaded.version == 2


async def test_a_failed_health_check_that_the_server_remembers_is_told_from_somebodys_pause(setting: Setting) -> None:
    draft, http = setting.saved(1, 1.0), setting.server.http
    async with opened(setting) as served, setting.client() as somebody:
        await somebody.pause()
        with pytest.raises(Unavailable, match="the SGLang server was paused by someone else"):
            await served.swap(draft)
        assert (await asyncio.to_thread(http.get, "/health")).status_code == 503
        with pytest.raises(Unavailable, match="unhealthy and generated no token for 3 s"):
            await served.swap(draft)
        await somebody.resume()

        assert (await asyncio.to_thread(http.get, "/ready")).status_code == 503
        assert (await served.swap(draft)).loaded.version == 1
        await says(setting)
        assert (await asyncio.to_thread(http.get, "/health")).status_code == 200
        assert (await asyncio.to_thread(http.get, "/ready")).status_code == 200
