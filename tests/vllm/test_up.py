"""`updraft up --engine vllm` on a stock vLLM: it answers on vLLM's own port, learns, and ends in order."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from click.testing import CliRunner
from tests.support.wait import wait_until
from tests.vllm import build, models
from tests.vllm.server import START_S, cpu_environment, serving

from updraft_chassis.errors import Unavailable
from updraft_cli.__main__ import cli
from updraft_cli.cmd.status.gather import gather
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.scrape import scrape
from updraft_cli.local.stack import Stack

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(START_S + 900), pytest.mark.lasts(240)]

SETTINGS = {
    "UPDRAFT_INFERENCE_DTYPE": "float32",
    "UPDRAFT_INFERENCE_VLLM_ARGS": "--max-model-len 512 --max-num-seqs 4",
    "UPDRAFT_TRAINER_NICENESS": "0",
    "UPDRAFT_TRAINER_DRAFT_VOCAB_SIZE": "128",
}
PROMPT = [40 + position % 50 for position in range(64)]


@contextmanager
def running(folder: Path, **settings: str) -> Iterator[Stack]:
    """The whole stack on a tiny target for the length of the block."""
    config = StackConfig(
        model=models.write_target(folder / "target"),
        data=folder / "data",
        port=0,
        registry_port=0,
        trainer_threads=1,
        engine="vllm",
        vllm_python=build.python(),
        settings={**SETTINGS, **settings},
    )
    with pytest.MonkeyPatch.context() as variables:
        for name, value in cpu_environment().items():
            variables.setenv(name, value)
        with Stack(config) as stack:
            yield stack


def answered(stack: Stack, num_tokens: int) -> int:
    """Ask vLLM itself for greedy tokens; return how many came."""
    body = {"model": "target", "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{stack.addresses.inference_url}/v1/completions", json=body, timeout=300)
    assert answer.is_success, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def sampled(stack: Stack) -> float:
    """Samples that the trainer has stored."""
    metrics = scrape(stack.addresses.metrics_urls["trainer"])
    return (metrics.total("updraft_trainer_samples_admitted_total") if metrics else None) or 0.0


def test_vllm_answers_on_its_own_port_teaches_and_ends_after_its_last_request(short_tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:
        with running(short_tmp_path) as stack:
            inference = psutil.Process(stack.child("inference").pid)
            family = [inference, *inference.children(recursive=True)]
            assert any("vllm.entrypoints" in " ".join(each.cmdline()) for each in family)
            assert answered(stack, 32) == 32

            def is_learnt_from() -> bool:
                answered(stack, 32)
                return sampled(stack) >= 1

            wait_until(is_learnt_from, timeout_s=300, what="a sample from vLLM's own traffic")
            assert checked(stack.addresses.inference_url) == (0, ["Nothing is missing."])
            status = gather(stack.folder.read_state(), None)
            assert status.serving is not None, "updraft status finds the agent"
            assert status.serving.output_tokens
            last = threads.submit(answered, stack, 200)
            wait_until(lambda: _num_running(stack) > 0 or last.done(), what="a request that runs")
        assert last.result() == 200
        assert not psutil.wait_procs(family, timeout=30)[1]
        assert "did not stop in time" not in (stack.folder.logs / "inference.log").read_text()


def test_a_server_that_ends_at_its_start_is_told_with_its_last_words(short_tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable, match=r"(?s)vLLM server ended with status 2.*--no-such-argument"),
        running(short_tmp_path, UPDRAFT_INFERENCE_VLLM_ARGS="--no-such-argument"),
    ):
        pass


def test_a_server_without_the_plugin_lacks_it_and_nothing_else(tmp_path: Path) -> None:
    target = models.write_target(tmp_path / "target")
    draft = models.write_draft(target, tmp_path / "draft", quality=0.5)
    with serving(target, draft, tmp_path / "server") as server:
        status, lines = checked(server.url)

    assert status == 1
    assert [line for line in lines if line.startswith("missing")] == ["missing: Updraft's plugin is not loaded"]


def checked(url: str) -> tuple[int, list[str]]:
    """The exit status of `updraft attach --check`, and what it says after the server's name."""
    done = CliRunner(env={"UPDRAFT_API_KEY": None}).invoke(cli, ["attach", "--engine", "vllm", "--check", url])
    first, *lines = done.output.splitlines()
    assert first == f"vLLM 0.32.0 at {url}"
    return done.exit_code, lines


def _num_running(stack: Stack) -> float:
    metrics = scrape(f"{stack.addresses.inference_url}/metrics")
    return (metrics.total("vllm:num_requests_running") if metrics else None) or 0.0
