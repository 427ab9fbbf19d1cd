"""The whole loop on a stock vLLM with the agent beside it: traffic to the server's own port, traces, a draft, and its swap.

One story: vLLM drafts nothing with the untrained draft, the trainer learns from what the plugin saw, and by vLLM's own counters
the draft that the agent swapped in is accepted. Then the agent is killed and comes again.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.processes import scrape
from tests.support.redis_server import RedisServer
from tests.support.registry import RegistryProcess
from tests.support.trainer import FAST, Trainer
from tests.support.wait import wait_until
from tests.vllm import build, drafts
from tests.vllm.agent import Agent, prepare
from tests.vllm.server import Server, serving

from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

DRAFT_VOCAB = 2048
NUM_TOKENS = 48
LEARNS_S = 2400.0
"""Minutes on two cores of one's own; many times that beside other tests."""
TRAINS_S = 10.0
"""A pause in the traffic. While vLLM answers, and for a second after, its engine and its worker each keep a core busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    server: Server
    agent: Agent
    registry: RegistryProcess
    prompts: list[list[int]]

    def asked(self) -> tuple[list[list[int]], float]:
        """All prompts once: the answers, and by vLLM's own counters how many tokens a verify step gave."""
        before = self.server.drafted()
        answers = [self.server.greedy(prompt, NUM_TOKENS) for prompt in self.prompts]
        return answers, self.server.drafted().since(before).acceptance_length


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Setting]:
    folder, model = tmp_path_factory.mktemp("learning"), model_folder(cache_folder(os.environ))
    socket = Path(redis_server.url.removeprefix("unix://")).with_name("tap.sock")  # Unix sockets have short names
    prepare(model, plugin=folder / "plugin", seed=folder / "seed", draft_vocab=DRAFT_VOCAB)
    variables = {
        "PYTHONPATH": str(folder / "plugin"),
        "UPDRAFT_VLLM_SOCKET": str(socket),
        "UPDRAFT_VLLM_DRAFTING": "trained",  # also if drafting does not pay on this machine
    }
    with ExitStack() as stack:
        registry = stack.enter_context(RegistryProcess(folder))
        agent = stack.enter_context(Agent(folder, model, socket, redis_server, registry, seed=folder / "seed"))
        wait_until(lambda: bool(scrape(agent.port)), what="the agent's metrics")
        server = stack.enter_context(serving(model, folder / "seed", folder / "server", variables=variables))
        fast: dict[str, Any] = {name.removeprefix("UPDRAFT_TRAINER_"): value for name, value in FAST.items()}
        fast |= {"DRAFT_VOCAB_SIZE": str(DRAFT_VOCAB), "CHECKPOINT_SECONDS": "30"}
        stack.enter_context(Trainer(folder, model, redis_server.url, registry.port, **fast))
        wait_until(lambda: agent.metric("registry_connected") == 1, what="the agent is in the fleet")
        yield Setting(server=server, agent=agent, registry=registry, prompts=drafts.prompts(model))


def test_a_draft_learnt_from_the_servers_own_traffic_is_swapped_in_and_accepted(setting: Setting) -> None:
    agent, before = setting.agent, setting.server.drafted()
    said, accepted = setting.asked()
    assert setting.server.drafted() == before, "the first draft knows nothing, so no step drafts"

    def is_learnt() -> bool:
        nonlocal accepted
        answers, accepted = setting.asked()
        assert answers == said, "no draft changes a token"
        is_accepted = agent.metric("draft_version") >= 1 and accepted > 1.3
        if not is_accepted:
            time.sleep(TRAINS_S)
        return is_accepted

    wait_until(is_learnt, timeout_s=LEARNS_S, what="a draft that is accepted")

    steps = setting.server.drafted().since(before).steps
    wait_until(lambda: agent.metric("verify_steps_total") >= steps, what="all of vLLM's steps are counted")
    assert agent.metric("verify_steps_total") == steps
    assert agent.metric("captured_traces_total") > 0
    assert agent.metric("swaps_total") >= 1

    agent.send(signal.SIGKILL)
    agent.wait()
    assert setting.asked()[0] == said, "serving goes on"
    agent.start()
    wait_until(lambda: agent.metric("registry_connected") == 1, what="the agent is in the fleet again")
    again, accepted = setting.asked()
    assert again == said
    assert accepted > 1.3, "the server kept its draft"
    wait_until(
        lambda: setting.asked()[0] == said and agent.metric("verify_steps_total") > 0,
        timeout_s=LEARNS_S,
        what="steps are counted again",
    )
    assert agent.terminate() == 0
