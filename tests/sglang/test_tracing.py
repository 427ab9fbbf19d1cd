"""SGLang with the plugin keeps the promises of tracing, on its stand-in kernels. Without Updraft, it is a stock server that
ran before. It counts in its answers, and its requests say themselves what is captured of them."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.contract.engines.tracing_contract import (
    ASKS,
    LONG,
    LOOKAHEAD,
    AgentContract,
    Answer,
    Ask,
    Counts,
    PluggedServer,
)
from tests.sglang import swapping
from tests.sglang.models import cycle_draft, write_mixing_target
from tests.sglang.server import Server, eagle3
from tests.support.tap_agent import Agent, Seen, listening
from tests.support.text_reference import read_target
from tests.support.tiny_target import save_draft
from tests.support.wait import until
from transformers import LlamaForCausalLM

from updraft_inference.tap import plugin_folder

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(150)]

EVERYTHING = {"payload": True, "prompt_rows": 1000, "counterfactual_rows": LOOKAHEAD}


Setting = PluggedServer[Server]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("tracing")
    target = write_mixing_target(folder / "target")
    for version, quality in ((1, 0.7), (2, 0.3)):
        save_draft(cycle_draft(target, quality=quality), folder / str(version))
    arguments = [*eagle3(folder / "1", num_steps=LOOKAHEAD), "--skip-tokenizer-init", "--disable-radix-cache"]
    with Server(target, folder / "stock.log", arguments=arguments) as stock:
        plain = {ask: _output(stock.post("/generate", **_body(ask, {}))) for ask in (*ASKS, LONG)}
    plugged = Server(
        target,
        folder / "plugged.log",
        arguments=[*arguments, "--custom-weight-loader", swapping.LOADER],
        plugins=[plugin_folder.write(folder / "plugin")],
        variables={"UPDRAFT_SGLANG_SOCKET": str(tap_socket), "UPDRAFT_SGLANG_TOP_K": "8"},
    )
    with plugged:
        yield Setting(server=plugged, folder=folder, socket=tap_socket, plain=plain)


def _body(ask: Ask, more: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": ask.tokens, "ignore_eos": True, **more}
    return {"input_ids": list(ask.prompt), "sampling_params": sampling}


def _output(body: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(body["output_ids"])


class Sglang:
    """The server as an agent sees it."""

    def __init__(self, server: Server, agent: Agent, http: httpx.AsyncClient) -> None:
        self._server = server
        self._agent = agent
        self._http = http
        self._rids = map("tracing-{}".format, count())

    @property
    def num_dropped(self) -> int:
        return self._agent.dropped

    async def answers(self, asks: Sequence[Ask], *, is_captured: bool = True) -> list[Answer]:
        more = {"custom_params": {"updraft": EVERYTHING}} if is_captured else {}
        said = await self._said(asks, more)
        if is_captured:
            await until(lambda: all(self._is_whole(*one) for one in said), what="all steps")
        return [
            Answer(output=_output(body), counts=_counts(body), told=self._agent.seen.get(rid)) for rid, body in said
        ]

    async def outputs(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        return [_output(body) for _, body in await self._said(asks, {"custom_params": {"updraft": EVERYTHING}})]

    async def swap(self, folder: Path, version: int) -> str:
        response = await asyncio.to_thread(swapping.swap, self._server, folder, version)
        return "" if response.is_success else str(response.json()["message"])

    def stall(self) -> None:
        self._agent.may_read.clear()

    async def replace_agent(self) -> None:
        hellos = len(self._agent.hellos)
        self._agent.hang_up()
        await until(lambda: len(self._agent.hellos) > hellos, what="the server again")
        await self.attached()

    async def attached(self) -> None:
        """Wait until the server captures: it does a moment after its hello, and says nothing of it."""

        async def is_captured() -> bool:
            ((rid, _),) = await self._said(ASKS[:1], {"custom_params": {"updraft": EVERYTHING}})
            return rid in self._agent.seen

        await until(is_captured, what="captured requests")

    async def _said(self, asks: Sequence[Ask], more: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
        """The id and the answer of each request."""
        return list(await asyncio.gather(*(self._generate(next(self._rids), ask, more) for ask in asks)))

    async def _generate(self, rid: str, ask: Ask, more: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        response = await self._http.post("/generate", json={"rid": rid, **_body(ask, more)})
        assert response.is_success, response.text
        return rid, response.json()

    def _is_whole(self, rid: str, body: Mapping[str, Any]) -> bool:
        return len(self._agent.seen.get(rid, Seen()).steps) >= _counts(body).steps


def _counts(body: Mapping[str, Any]) -> Counts:
    meta = body["meta_info"]
    return Counts(
        steps=meta.get("spec_verify_ct", 0),
        proposed=meta.get("spec_num_proposed_drafts", 0),
        accepted=meta.get("spec_num_correct_drafts", 0),
    )


class TestSglang(AgentContract):
    @pytest.fixture
    async def engine(self, setting: Setting) -> AsyncIterator[Sglang]:
        async with (
            listening(setting.socket) as agent,
            httpx.AsyncClient(base_url=setting.server.url, timeout=300) as http,
        ):
            engine = Sglang(setting.server, agent, http)
            await engine.attached()
            yield engine

    @pytest.fixture
    def plain(self, setting: Setting) -> Mapping[Ask, tuple[int, ...]]:
        return setting.plain

    @pytest.fixture
    def target(self, setting: Setting) -> LlamaForCausalLM:
        return read_target(setting.folder / "target")

    @pytest.fixture
    def drafts(self, setting: Setting) -> list[Path]:
        return [setting.folder / "1", setting.folder / "2"]
