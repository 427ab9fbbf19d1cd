"""A whole pod in the test's own loop: the real composition on a free port, around an engine of the test's choice."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import AsyncOpenAI
from tests.support.fake_engine import FakeEngine
from tests.support.ports import free_port
from tests.support.tiny_tokenizer import TEMPLATE, write_tokenizer
from tests.support.wait import LONG_S, until

from updraft_chassis.lifecycle import Stop
from updraft_inference import composition
from updraft_inference.composition import OpenEngine
from updraft_inference.engine import FinishedSink
from updraft_inference.settings import InferenceSettings

MODEL = "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningPod:
    """Clients and levers. `stop` is what SIGTERM does."""

    url: str
    stop: Stop
    http: httpx.AsyncClient
    openai: AsyncOpenAI
    engine: FakeEngine

    async def complete(self, prompt: str = "p", *, max_tokens: int = 8, **more: object) -> httpx.Response:
        """POST a completion as plain JSON."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, **more}
        return await self.http.post("/v1/completions", json=body)

    async def metric(self, name: str) -> float:
        """The value of one line of /metrics; 0 if it is not there."""
        page = (await self.http.get("/metrics")).text
        values = [line.rpartition(" ")[2] for line in page.splitlines() if line.rpartition(" ")[0] == name]
        return float(values[0]) if values else 0.0

    async def counts(self, name: str, value: float) -> None:
        """Wait until a line of /metrics says `value`: what is counted at an end is counted a little after it."""

        async def is_said() -> bool:
            try:
                return await self.metric(name) == value
            except httpx.TransportError:  # the pod hung up on a connection that a slow test left idle
                return False

        await until(is_said, what=f"{name} {value:g}")


@asynccontextmanager
async def running_pod(
    folder: Path,
    engine: FakeEngine | None = None,
    /,
    *,
    open_engine: OpenEngine | None = None,
    template: str | None = TEMPLATE,
    believes: ssl.SSLContext | None = None,
    **values: object,
) -> AsyncIterator[RunningPod]:
    """Serve `folder`/tiny until the block ends; `values` are settings (also `engine`). `open_engine` replaces the fake.

    Its client `http` believes `believes`, if its settings have a certificate.
    """
    fake = engine or FakeEngine()
    port = free_port()
    defaults = {"port": port, "data_dir": folder / "data", "drain_seconds": 2.0, "report_seconds": 0.05}
    settings = InferenceSettings(
        model=write_tokenizer(folder / MODEL, template=template),
        **{**defaults, **values},  # type: ignore[arg-type]  # by name
    )

    @asynccontextmanager
    async def open_fake(_: InferenceSettings, sink: FinishedSink) -> AsyncIterator[FakeEngine]:
        fake.on_finished = sink
        yield fake

    url, stop = f"{'http' if believes is None else 'https'}://127.0.0.1:{port}", Stop()
    tls = believes if believes is not None else False
    async with (
        asyncio.TaskGroup() as tasks,
        httpx.AsyncClient(base_url=url, timeout=LONG_S, verify=tls) as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LONG_S) as openai,
    ):
        serving = tasks.create_task(composition.serve(settings, stop, open_engine or open_fake))
        await until(lambda: serving.done() or _is_ready(http), what="the pod's readiness")
        yield RunningPod(url=url, stop=stop, http=http, openai=openai, engine=fake)
        stop.request()


async def _is_ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/readyz")).status_code == 200
    except httpx.TransportError:
        return False
