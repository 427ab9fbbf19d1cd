"""A stock vLLM with Updraft's plugin, as the parts of this benchmark start it."""

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.serving import servers
from bench.serving.servers import Server

from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import VLLM

LOOKAHEAD = 3
SOCKET = "s"
"""In the folder of a server. Short, because the path of a socket is."""
ROLES = ("scheduler", "worker")
ROWS: dict[str, Any] = {"payload": 1.0, "prompt_rows": 512, "counterfactual_rows": 2}
"""The policy that every request gives rows that does not opt out."""
NO_ROWS: dict[str, Any] = {"payload": 0, "prompt_rows": 0, "counterfactual_rows": 0}


def speculation(draft: Path) -> tuple[str, ...]:
    """Arguments. Eager, because vLLM compiles the weights of a draft in otherwise, so that none can be swapped on a CPU."""
    what = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": LOOKAHEAD}
    return "--enforce-eager", "--speculative-config", json.dumps(what)


@asynccontextmanager
async def plugged(
    model: Path,
    draft: Path,
    folder: Path,
    *,
    threads: int,
    options: Sequence[str] = (),
    more: Callable[[Path], Mapping[str, str]] = lambda plugin: {},
) -> AsyncIterator[Server]:
    """It looks for its agent at SOCKET in `folder`, which is made and has all that it writes.

    `more` gives further variables of its environment, from the folder of the plugin.
    """
    plugin = plugin_folder.write(folder / "plugin", VLLM)
    variables = {
        "PYTHONPATH": str(plugin),
        "UPDRAFT_VLLM_SOCKET": str(folder / SOCKET),
        "UPDRAFT_VLLM_DRAFTING": "always",  # as the server without the plugin, also with an untrained draft
        **more(plugin),
    }
    every = (*speculation(draft), *options)
    async with servers.vllm(model, folder / "plugged.log", threads=threads, options=every, more=variables) as server:
        yield server
