"""Servers of the OpenAI API in separate processes, of which one computes at a time.

An idle server still wakes up, and OpenMP threads spin for a while after their work, so SIGSTOP stops servers without a turn.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from bench.harness import concurrently
from bench.serving.figures import Stream
from tests.support.processes import process_group
from tests.support.wait import until
from tests.vllm import build

from updraft_chassis.ports import free_port
from updraft_inference.torch_engine import openmp

MODEL = "target"
NUM_SLOTS = 8
MAX_CONTEXT = 1024

_START_S = 600.0
_ANSWER_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A process group that serves at `http`."""

    http: httpx.AsyncClient
    process: subprocess.Popen[bytes]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Continue the process for the length of the block."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    async def run(
        self, prompts: Sequence[tuple[int, ...]], *, batch: int, tokens: int, more: Mapping[str, object]
    ) -> list[Stream]:
        """Continue all prompts greedily, `batch` at a time; `more` goes into each request's body."""
        return await concurrently(prompts, batch, lambda _, prompt: self.stream(prompt, tokens, more))

    async def stream(self, prompt: tuple[int, ...], tokens: int, more: Mapping[str, object]) -> Stream:
        """Continue one prompt greedily."""
        body = {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        first_s, last_s, last = 0.0, 0.0, ""
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):  # only the last one is parsed: the client must not cost the server time
                    last_s, last = time.perf_counter(), line
                    first_s = first_s or last_s
        num_tokens = int(json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"])
        assert num_tokens == tokens, f"{num_tokens} of {tokens} tokens came"
        return Stream(first_s, last_s, num_tokens)


@asynccontextmanager
async def updraft(model: Path, folder: Path, *, threads: int, lookahead: int) -> AsyncIterator[Server]:
    """Our own server, without a registry and without a draft."""
    port = free_port()
    variables = {
        "MODEL": str(model),
        "SERVED_MODEL_NAME": MODEL,
        "PORT": str(port),
        "NUM_THREADS": str(threads),
        "NUM_SLOTS": str(NUM_SLOTS),
        "MAX_CONTEXT": str(MAX_CONTEXT),
        "LOOKAHEAD": str(lookahead),
        "REMEMBERED_TOKENS": "0",  # prompts repeat between rounds, so it would look up its own answers
        "DATA_DIR": str(folder / "updraft"),
    }
    named = {f"UPDRAFT_INFERENCE_{name}": value for name, value in variables.items()}
    command = [sys.executable, "-m", "updraft_inference"]
    async with _serving(command, named, port, "/readyz", folder / "updraft.log") as server:
        yield server


@asynccontextmanager
async def vllm(
    model: Path, log: Path, *, threads: int, options: Sequence[str] = (), more: Mapping[str, str] | None = None
) -> AsyncIterator[Server]:
    """Stock vLLM with its defaults but for `options`, without a draft. It first compiles for about two minutes, unless eager.

    `more` are further variables of its environment.
    """
    port = free_port()
    command = [
        *(str(build.python()), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", str(MAX_CONTEXT), "--max-num-seqs", str(NUM_SLOTS)),
        *options,
    ]
    variables = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **(more or {}),
    }
    async with _serving(command, variables, port, "/health", log) as server:
        yield server


@asynccontextmanager
async def _serving(
    command: Sequence[str], variables: Mapping[str, str], port: int, ready: str, log: Path
) -> AsyncIterator[Server]:
    """Start a server, wait until it is ready, and stop it until its turn. It is gone after the block."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("UPDRAFT_", "PYTHON"))}
    inherited.pop(openmp.VARIABLE, None)  # our engine sets it for itself
    with process_group(command, log, environment={**inherited, **variables}) as process:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_ANSWER_S) as http:

            async def is_settled() -> bool:
                with suppress(httpx.TransportError):
                    if (await http.get(ready)).is_success:
                        return True
                return process.poll() is not None

            await until(is_settled, timeout_s=_START_S, what=f"{command[2]} is ready")
            assert process.poll() is None, f"{command[2]} ended:\n{_tail(log)}"
            os.killpg(process.pid, signal.SIGSTOP)
            yield Server(http=http, process=process)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]
