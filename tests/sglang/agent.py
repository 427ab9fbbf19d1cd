"""An agent of a test beside a real server: the policy that it sends, the drafts that it has loaded, and greedy requests."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.sglang.server import Server
from tests.support.tap_agent import Agent, listening
from tests.support.wait import until

ROLES = ("scheduler", "worker")
EVERYTHING = {"payload": 1.0, "prompt_rows": 1000, "counterfactual_rows": 0}


@asynccontextmanager
async def beside(socket: Path) -> AsyncIterator[Agent]:
    """One that asks for the rows of every request."""
    async with listening(socket, EVERYTHING, roles=ROLES) as agent:
        yield agent


async def load(agent: Agent, folder: Path, version: int) -> dict[str, Any]:
    """The answer to a load."""
    before = len(agent.loaded)
    agent.send("worker", {"kind": "load", "folder": str(folder), "version": version, "digest": f"sha256:{version}"})
    await until(lambda: len(agent.loaded) > before, what="the answer to a load")
    return agent.loaded[-1]


async def greedy(server: Server, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens that the server picks after a prompt, past any end token."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = await asyncio.to_thread(server.post, "/generate", input_ids=list(prompt), sampling_params=sampling)
    return list(body["output_ids"])
