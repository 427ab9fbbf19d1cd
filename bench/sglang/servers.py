"""Stock SGLang servers with and without the plugin, of which one computes at a time, and what requests cost them."""

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.tap import arms
from bench.tap.arms import STREAMS, TOKENS, Arm, Requests
from tests.sglang.server import Device, Server

from updraft_inference.launch import sglang_arguments
from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import SGLANG

SOCKET = "s"
"""In the folder of a server. Short, because the path of a socket is."""
STEPS = 3
OPTED_OUT = {"custom_params": {"updraft_capture": "off"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The device of all servers, the target, and the draft, which nobody trained."""

    device: Device
    model: Path
    draft: Path

    def plugged(self, folder: Path, more: Mapping[str, str] | None = None) -> Server:
        """A server that looks for its agent at SOCKET in `folder`, which has all that it writes. `more` are variables."""
        variables = {SGLANG.socket_variable: str(folder / SOCKET), **(more or {})}
        return self._server(folder, folder / "plugged.log", variables)

    def stock(self, folder: Path) -> Server:
        """A server in which the plugin installs no hooks: it has the same files, but no variable."""
        return self._server(folder, folder / "stock.log", {})

    def _server(self, folder: Path, log: Path, variables: Mapping[str, str]) -> Server:
        options = [
            *sglang_arguments.speculation(self.draft, STEPS),
            *("--max-running-requests", str(STREAMS), "--disable-radix-cache"),
        ]
        plugins = [plugin_folder.write(folder / "plugin")]
        return Server(self.model, log, arguments=options, plugins=plugins, variables=variables, device=self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A server without the plugin and one with it, on whose socket an agent may listen."""

    stock: Server
    plugged: Server
    socket: Path

    async def turn(self, arm: Arm, prompts: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        """Tokens per second, and CPU milliseconds per token."""
        return await turn(self.stock if arm is Arm.STOCK else self.plugged, self.socket, arm, prompts)


@contextmanager
def pairs(setup: Setup, folder: Path, count: int) -> Iterator[list[Pair]]:
    """Stopped servers. In every other pair the one with the plugin starts first: equal processes differ, perhaps by that."""
    with ExitStack() as stack:
        found = []
        for place in range(count):
            own = folder / str(place)
            makers = {"stock": setup.stock, "plugged": setup.plugged}
            servers = {}
            for name in sorted(makers, reverse=bool(place % 2)):
                servers[name] = stack.enter_context(makers[name](own))
                os.killpg(servers[name].pid, signal.SIGSTOP)
            found.append(Pair(**servers, socket=own / SOCKET))
        yield found


@contextmanager
def running(on: Server) -> Iterator[None]:
    """Let the server run for the length of the block: an idle one polls, and has only two cores to do it on."""
    os.killpg(on.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(on.pid, signal.SIGSTOP)


async def turn(on: Server, socket: Path, arm: Arm, prompts: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """All prompts at once in one arm: tokens per second, and CPU milliseconds per token."""
    answers = (answered(on, prompt, is_captured=n == 0) for n, prompt in enumerate(prompts))
    return await arms.turn(running(on), socket, arm, Requests(answers=answers, cpu_s=partial(cpu_s, on)))


async def answered(on: Server, prompt: Sequence[int], *, is_captured: bool) -> list[int]:
    """A greedy answer of fixed length."""
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, **({} if is_captured else OPTED_OUT)}
    body = await asyncio.to_thread(on.post, "/generate", input_ids=list(prompt), sampling_params=sampling)
    return list(body["output_ids"])


def cpu_s(running: Server) -> float:
    """CPU seconds of the process that runs the models."""
    times = running.scheduler().cpu_times()
    return times.user + times.system
