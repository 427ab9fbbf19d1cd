"""vLLM with the plugin keeps the promises of tracing. Without Updraft, it is a stock server that ran before."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
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
from tests.support.tap_agent import Agent, Seen, listening
from tests.support.text_reference import read_target
from tests.support.wait import until
from tests.vllm import build, server
from tests.vllm.models import write_draft, write_target
from tests.vllm.server import Server, serving
from transformers import LlamaForCausalLM

from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import VLLM

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

ROLES = {"scheduler", "worker"}
EVERYTHING = {"payload": 1.0, "prompt_rows": 1000, "counterfactual_rows": LOOKAHEAD}
OPT_OUT = {"vllm_xargs": {"updraft_capture": "off"}}

assert server.LOOKAHEAD == LOOKAHEAD


Setting = PluggedServer[Server]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("tracing")
    target = write_target(folder / "target")
    for version, quality in ((1, 0.7), (2, 0.3)):
        write_draft(target, folder / str(version), quality=quality)
    options = ("--skip-tokenizer-init", "--max-num-seqs", "8")
    with serving(target, folder / "1", folder / "stock", options=options) as stock:
        plain = {ask: tuple(stock.greedy(ask.prompt, ask.tokens)) for ask in (*ASKS, LONG)}
    variables = {
        "PYTHONPATH": str(plugin_folder.write(folder / "plugin", VLLM)),
        "UPDRAFT_VLLM_SOCKET": str(tap_socket),
        "UPDRAFT_VLLM_TOP_K": "8",
    }
    with serving(target, folder / "1", folder / "plugged", options=options, variables=variables) as plugged:
        yield Setting(server=plugged, folder=folder, socket=tap_socket, plain=plain)


class Vllm:
    """The server as an agent sees it."""

    def __init__(self, agent: Agent, http: httpx.AsyncClient) -> None:
        self._agent = agent
        self._http = http
        self._settling = asyncio.Lock()
        """Who waits for replies counts them, so one waits at a time."""

    @property
    def num_dropped(self) -> int:
        return self._agent.dropped

    async def answers(self, asks: Sequence[Ask], *, is_captured: bool = True) -> list[Answer]:
        said = await self._said(asks, {} if is_captured else OPT_OUT)
        async with self._settling:
            await self._agent.settle()
        return [self._answer(rid, output) for rid, output in said]

    async def outputs(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        return [output for _, output in await self._said(asks, {})]

    async def swap(self, folder: Path, version: int) -> str:
        before = len(self._agent.loaded)
        load = {"folder": str(folder), "version": version, "digest": f"sha256:{version}"}
        self._agent.send("worker", {"kind": "load", **load})
        await until(lambda: len(self._agent.loaded) > before, what="the answer to a load")
        return str(self._agent.loaded[-1]["refusal"])

    def stall(self) -> None:
        self._agent.may_read.clear()

    async def replace_agent(self) -> None:
        self._agent.hang_up()
        policies = len(self._agent.policies)
        await until(lambda: len(self._agent.policies) >= policies + len(ROLES), what="both processes again")

    async def _said(self, asks: Sequence[Ask], more: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
        """The id and the output of each request."""
        return list(await asyncio.gather(*(self._complete(ask, more) for ask in asks)))

    async def _complete(self, ask: Ask, more: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
        response = await self._http.post("/v1/completions", json={**server.greedy_body(ask.prompt, ask.tokens), **more})
        assert response.is_success, response.text
        body = response.json()
        return body["id"], tuple(body["choices"][0]["token_ids"])

    def _answer(self, rid: str, output: tuple[int, ...]) -> Answer:
        """vLLM gives each request an id of its own, which begins with that of the answer."""
        seen = [seen for own, seen in self._agent.seen.items() if own.startswith(rid)]
        ((header, tensors),) = [end for own, end in self._agent.finished.items() if own.startswith(rid)]
        sums = header["counters"]
        counts = Counts(
            steps=sum(one["steps"] for one in sums),
            proposed=sum(one["proposed"] for one in sums),
            accepted=sum(sum(one["accepted"]) for one in sums),
        )
        is_told = bool(seen or tensors or header["sampling"])
        return Answer(output=output, counts=counts, told=(seen or [Seen()])[0] if is_told else None)


class TestVllm(AgentContract):
    @pytest.fixture
    async def engine(self, setting: Setting) -> AsyncIterator[Vllm]:
        async with (
            listening(setting.socket, EVERYTHING, roles=ROLES) as agent,
            httpx.AsyncClient(base_url=setting.server.url, timeout=300) as http,
        ):
            yield Vllm(agent, http)

    @pytest.fixture
    def plain(self, setting: Setting) -> Mapping[Ask, tuple[int, ...]]:
        return setting.plain

    @pytest.fixture
    def target(self, setting: Setting) -> LlamaForCausalLM:
        return read_target(setting.folder / "target")

    @pytest.fixture
    def drafts(self, setting: Setting) -> list[Path]:
        return [setting.folder / "1", setting.folder / "2"]
