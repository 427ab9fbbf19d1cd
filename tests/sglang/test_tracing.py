"""SGLang with the plugin keeps the promises of tracing, on its stand-in kernels. Without Updraft, it is a stock server that
ran before."""

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
from tests.sglang.models import cycle_draft, write_mixing_target
from tests.sglang.server import Server, eagle3
from tests.support.tap_agent import Agent, Seen, listening
from tests.support.text_reference import read_target
from tests.support.tiny_target import save_draft
from tests.support.wait import until
from transformers import LlamaForCausalLM

from updraft_inference.tap import plugin_folder

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(150)]

ROLES = {"scheduler", "worker"}
EVERYTHING = {"payload": 1.0, "prompt_rows": 1000, "counterfactual_rows": LOOKAHEAD}
OPT_OUT = {"custom_params": {"updraft_capture": "off"}}


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
        arguments=arguments,
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

    def __init__(self, agent: Agent, http: httpx.AsyncClient) -> None:
        self._agent = agent
        self._http = http
        self._rids = map("tracing-{}.".format, count())
        self._settling = asyncio.Lock()
        """Who waits for replies counts them, so one waits at a time."""

    @property
    def num_dropped(self) -> int:
        return self._agent.dropped

    async def answers(self, asks: Sequence[Ask], *, is_captured: bool = True) -> list[Answer]:
        said = await self._said(asks, {} if is_captured else OPT_OUT)
        async with self._settling:
            await self._agent.settle()
        return [self._answer(rid, body) for rid, body in said]

    async def outputs(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        return [_output(body) for _, body in await self._said(asks, {})]

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
        await until(lambda: len(self._agent.policies) >= policies + len(ROLES), what="both roles again")

    async def _said(self, asks: Sequence[Ask], more: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
        """The id and the answer of each request."""
        return list(await asyncio.gather(*(self._generate(next(self._rids), ask, more) for ask in asks)))

    async def _generate(self, rid: str, ask: Ask, more: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        response = await self._http.post("/generate", json={"rid": rid, **_body(ask, more)})
        assert response.is_success, response.text
        return rid, response.json()

    def _answer(self, rid: str, body: Mapping[str, Any]) -> Answer:
        """The plugin gives each request an id of its own, which begins with SGLang's. SGLang counts in its answers too."""
        seen = [seen for own, seen in self._agent.seen.items() if own.startswith(rid)]
        ((header, tensors),) = [end for own, end in self._agent.finished.items() if own.startswith(rid)]
        sums, meta = header["counters"], body["meta_info"]
        counts = Counts(
            steps=sum(one["steps"] for one in sums),
            proposed=sum(one["proposed"] for one in sums),
            accepted=sum(sum(one["accepted"]) for one in sums),
        )
        assert counts == Counts(
            steps=meta.get("spec_verify_ct", 0),
            proposed=meta.get("spec_num_proposed_drafts", 0),
            accepted=meta.get("spec_num_correct_drafts", 0),
        )
        if tensors:
            assert tuple(tensors["tokens"][header["prompt_tokens"] :].tolist()) == _output(body)
        is_told = bool(seen or tensors or header["sampling"])
        return Answer(output=_output(body), counts=counts, told=(seen or [Seen()])[0] if is_told else None)


class TestSglang(AgentContract):
    @pytest.fixture
    async def engine(self, setting: Setting) -> AsyncIterator[Sglang]:
        async with (
            listening(setting.socket, EVERYTHING, roles=ROLES) as agent,
            httpx.AsyncClient(base_url=setting.server.url, timeout=300) as http,
        ):
            yield Sglang(agent, http)

    @pytest.fixture
    def plain(self, setting: Setting) -> Mapping[Ask, tuple[int, ...]]:
        return setting.plain

    @pytest.fixture
    def target(self, setting: Setting) -> LlamaForCausalLM:
        return read_target(setting.folder / "target")

    @pytest.fixture
    def drafts(self, setting: Setting) -> list[Path]:
        return [setting.folder / "1", setting.folder / "2"]
