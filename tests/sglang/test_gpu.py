"""The plugin in a stock SGLang on GPUs: real kernels, CUDA graphs on, SmolLM2.

They run where there is a GPU, and TEST_SGLANG_PYTHON names the interpreter of an environment with SGLang for it. What
capture and swaps cost there: `make bench-sglang ARGS=--gpu`.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.sglang.agent import beside, greedy, load
from tests.sglang.devices import GPU, PYTHON_VARIABLE, num_gpus
from tests.sglang.models import smollm2
from tests.sglang.server import Server
from tests.support.tiny_target import save_draft
from transformers import LlamaForCausalLM

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_draft import checkpoint
from updraft_draft.network import initial_network
from updraft_draft.target_weights import read_head
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.launch import sglang_arguments
from updraft_inference.sidecar.sglang.draft_swap import ServedDraft
from updraft_inference.sidecar.sglang.server import SglangServer
from updraft_inference.tap import initial_draft, plugin_folder
from updraft_inference.tap.server_kind import SGLANG

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(num_gpus() == 0, reason="there is no GPU"),
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} is not set"),
]

STEPS = 3
DRAFT_VOCAB = 8192
PROMPT = [100 + 7 * position for position in range(40)]
TOLERANCE = 2e-2
"""Of float32 through other kernels, over 30 layers; states are of the order of 1 to 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    server: Server
    folder: Path
    first: Path
    """The folder of its first draft."""

    @property
    def socket(self) -> Path:
        return self.folder / "s"


@contextmanager
def serving(tp_size: int) -> Iterator[Setting]:
    """A server with its CUDA graphs."""
    with tempfile.TemporaryDirectory(prefix="updraft-") as name:
        folder, model = Path(name), smollm2()
        first = initial_draft.write(model, folder / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB))
        server = Server(
            model,
            folder / "server.log",
            arguments=[*sglang_arguments.speculation(first, STEPS), "--dtype", "float32", "--tp-size", str(tp_size)],
            plugins=[plugin_folder.write(folder / "plugin")],
            variables={SGLANG.socket_variable: str(folder / "s")},
            device=GPU,
        )
        with server:
            yield Setting(server=server, folder=folder, first=first)


def draft(folder: Path, first: Path, version: int) -> DraftCheckpoint:
    """An untrained one with the vocabulary of the first."""
    head, (_, tensors) = read_head(smollm2()), checkpoint.load(first)
    config, token_ids = head.draft(draft_vocab_size=DRAFT_VOCAB), torch.arange(DRAFT_VOCAB) + tensors["d2t"]
    network = initial_network(
        config, head.embedding.float(), head.rows(token_ids), head.final_norm, token_ids, seed=version
    )
    path = folder / str(version)
    return DraftCheckpoint(version=version, folder=path, tensors_digest=save_draft(network, path))


async def test_swaps_are_proved_between_steps_and_change_no_token(tmp_path: Path) -> None:
    with serving(1) as setting:
        async with beside(setting.socket) as agent:
            plain = await greedy(setting.server, PROMPT, 64)
            for version in (1, 2):
                one = draft(tmp_path, setting.first, version)
                assert (await load(agent, one.folder, version))["refusal"] == ""
                assert await greedy(setting.server, PROMPT, 64) == plain


async def test_swaps_of_two_ranks_are_proved_by_the_hashes_of_the_gpus_and_change_no_token(tmp_path: Path) -> None:
    if num_gpus() < 2:
        pytest.skip("there are fewer than 2 GPUs")
    with serving(2) as setting:
        async with SglangServer(setting.server.url) as client:
            served = await ServedDraft.open(client, await client.info(), setting.folder / "note")
            plain = await greedy(setting.server, PROMPT, 64)
            for version in (1, 2):
                one = draft(tmp_path, setting.first, version)
                assert (await served.swap(one)).loaded.tensors_digest == one.tensors_digest
                assert (await served.rehash()).tensors_digest == one.tensors_digest
                assert await greedy(setting.server, PROMPT, 64) == plain


async def test_what_is_captured_under_cuda_graphs_is_what_transformers_computes() -> None:
    with serving(1) as setting:
        async with beside(setting.socket) as agent:
            tokens = await greedy(setting.server, PROMPT, 64)
            await agent.settle()
            (seen,) = agent.seen.values()

    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.tensor([[*PROMPT, *tokens]]), output_hidden_states=True)
    taps = read_head(smollm2()).config.aux_layers
    aux = torch.cat([out.hidden_states[tap][0] for tap in taps], -1)
    log_sum_exp = out.logits[0].logsumexp(-1)
    assert {position for position, _ in seen.rows} >= set(range(len(PROMPT) + len(tokens) - 1))
    for position, row in seen.rows:
        torch.testing.assert_close(row, aux[position], atol=TOLERANCE, rtol=TOLERANCE)
    for position, teacher in seen.teachers:
        torch.testing.assert_close(teacher.log_sum_exp, log_sum_exp[position], atol=TOLERANCE, rtol=TOLERANCE)
