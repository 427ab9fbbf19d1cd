"""A vLLM of two tensor-parallel ranks on this CPU: it serves as without Updraft, and the agent counts, and says why nothing is
learnt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.sglang.models import cycle
from tests.support.redis_server import RedisServer
from tests.support.registry import RegistryProcess
from tests.support.tiny_target import DRAFT_VOCAB
from tests.support.wait import wait_until
from tests.vllm import build
from tests.vllm.agent import Agent, prepare
from tests.vllm.models import write_draft, write_target
from tests.vllm.server import START_S, Server, serving

from updraft_cli.__main__ import cli

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(START_S + 300), pytest.mark.lasts(60)]

WHY = "Updraft supports only one rank of vLLM, but tensor parallelism is 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    server: Server
    agent: Agent


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path, redis_server: RedisServer) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("ranks")
    target = write_target(folder / "target")
    draft = write_draft(target, folder / "draft", quality=0.7)
    prepare(target, plugin=folder / "plugin", seed=folder / "seed", draft_vocab=DRAFT_VOCAB)
    variables = {"PYTHONPATH": str(folder / "plugin"), "UPDRAFT_VLLM_SOCKET": str(tap_socket)}
    with (
        RegistryProcess(folder) as registry,
        Agent(folder, target, tap_socket, redis_server, registry, seed=draft) as agent,
        serving(
            target, draft, folder / "server", options=("--tensor-parallel-size", "2"), variables=variables
        ) as server,
    ):
        yield Setting(server=server, agent=agent)


def test_two_ranks_serve_with_their_draft_and_the_agent_counts_and_says_why_it_does_not_learn(setting: Setting) -> None:
    prompt = cycle()[:5]
    said = setting.server.greedy(prompt, 40)

    setting.agent.wait_for_log(WHY)

    def is_counted() -> bool:
        assert setting.server.greedy(prompt, 40) == said
        return setting.agent.metric("verify_steps_total") > 0

    wait_until(is_counted, what="a request that is counted")
    counted = setting.agent.metric("requests_total")
    for _ in range(3):
        assert setting.server.greedy(prompt, 40) == said
    wait_until(lambda: setting.agent.metric("requests_total") == counted + 3, what="the counts of three more")
    assert "another vLLM server" not in setting.server.log
    assert setting.server.drafted().acceptance_length > 1.2, "the draft that the server started with"
    assert setting.agent.metric("captured_traces_total") == 0
    setting.agent.kill()
    assert setting.server.greedy(prompt, 40) == said


def test_the_check_of_a_running_server_names_its_ranks(setting: Setting) -> None:
    done = CliRunner(env={"UPDRAFT_API_KEY": None}).invoke(
        cli, ["attach", "--engine", "vllm", "--check", setting.server.url]
    )
    assert done.exit_code == 1
    assert "missing: tensor parallelism of 2 is not supported" in done.output
