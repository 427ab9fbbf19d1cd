"""`python -m tests.cluster.traffic URL FILE MODEL PROMPTS`: requests without end, a line of JSON for each as it ends.

Runs inside the node's namespaces, where a Service is reached as a pod reaches it: a connection for each request, so that
kube-proxy spreads them over the pods.
"""

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from typing import TextIO

import httpx

_AT_ONCE = 3
_TIMEOUT_S = 180.0

_DRAFTING = {"tour": {"updraft": {"drafter": "eagle3", "lookahead": 3}}}
"""Fields of requests to our own engine. Left to itself it may well draft nothing: a step of so small a model is cheap."""


def main() -> None:
    """Send until killed."""
    url, file, model, prompts = sys.argv[1:]
    with Path(file).open("a", buffering=1) as told:
        asyncio.run(_send(url, told, model, prompts))


async def _send(url: str, told: TextIO, model: str, prompts: str) -> None:
    numbers = itertools.count()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(_AT_ONCE):
            tasks.create_task(_client(url, told, model, prompts, numbers))


async def _client(url: str, told: TextIO, model: str, prompts: str, numbers: "itertools.count[int]") -> None:
    while True:
        began = time.time()
        try:
            async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
                body = {
                    "model": model,
                    "prompt": f"{prompts} {next(numbers) % 6}",
                    "max_tokens": 40,
                    "temperature": 0,
                    "ignore_eos": True,
                    **_DRAFTING.get(model, {}),
                }
                answer = await client.post("/v1/completions", json=body)
                usage = answer.json()["usage"]
                version = usage["updraft"]["draft_version"] if model in _DRAFTING else 0
                said = {"status": answer.status_code, "version": version}
        except (httpx.HTTPError, ValueError, KeyError) as error:
            said = {"status": 0, "error": f"{type(error).__name__}: {error}"}
            await asyncio.sleep(0.2)
        told.write(json.dumps({"began": began, "ended": time.time(), **said}) + "\n")


if __name__ == "__main__":
    main()
