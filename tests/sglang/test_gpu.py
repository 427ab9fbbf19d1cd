"""The adapter and its plugin beside a stock SGLang on GPUs: real kernels, CUDA graphs on, SmolLM2.

They run where there is a GPU, and TEST_SGLANG_PYTHON names the interpreter of an environment with SGLang for it. What
capture and swaps cost there: `make bench-sglang ARGS=--gpu`.
"""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.contract.engine_contract import asking, whole
from tests.sglang.devices import GPU, PYTHON_VARIABLE, num_gpus
from tests.sglang.models import smollm2
from tests.sglang.server import Server
from tests.support.tiny_target import save_draft
from transformers import LlamaForCausalLM

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_draft import checkpoint
from updraft_draft.network import initial_network
from updraft_draft.target_weights import read_head
from updraft_inference.engine import CaptureParams, DraftCheckpoint, TopK
from updraft_inference.launch import program, sglang_arguments
from updraft_inference.sglang_engine.engine import SglangEngine, SglangOptions, opened
from updraft_inference.sglang_engine.server import SglangServer
from updraft_inference.tap import initial_draft, plugin_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(num_gpus() == 0, reason="there is no GPU"),
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} is not set"),
]

STEPS = 3
DRAFT_VOCAB = 8192
TOLERANCE = 2e-2
"""Of float32 through other kernels, over 30 layers; states are of the order of 1 to 10."""


@asynccontextmanager
async def serving(tp_size: int) -> AsyncIterator[tuple[SglangEngine, Path]]:
    """An engine over a server with its CUDA graphs, and the folder of its first draft."""
    with tempfile.TemporaryDirectory(prefix="updraft-") as name:
        folder, model = Path(name), smollm2()
        socket, first = (
            folder / "s",
            initial_draft.write(model, folder / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB)),
        )
        server = Server(
            model,
            folder / "server.log",
            arguments=[*sglang_arguments.speculation(first, STEPS), "--dtype", "float32", "--tp-size", str(tp_size)],
            plugins=[plugin_folder.write(folder / "plugin")],
            variables={program.SGLANG.socket_variable: str(socket)},
            device=GPU,
        )
        options = SglangOptions(model=model, socket=socket, note=folder / "note")
        with server:
            async with SglangServer(server.url) as client, opened(options, client, lambda _: None) as engine:
                yield engine, first


def draft(folder: Path, first: Path, version: int) -> DraftCheckpoint:
    """An untrained one with the vocabulary of the first."""
    head, (_, tensors) = read_head(smollm2()), checkpoint.load(first)
    config, token_ids = head.draft(draft_vocab_size=DRAFT_VOCAB), torch.arange(DRAFT_VOCAB) + tensors["d2t"]
    network = initial_network(
        config, head.embedding.float(), head.rows(token_ids), head.final_norm, token_ids, seed=version
    )
    path = folder / str(version)
    return DraftCheckpoint(version=version, folder=path, tensors_digest=save_draft(network, path))


@pytest.mark.parametrize("tp_size", [1, 2])
async def test_swaps_are_proved_by_the_hashes_of_the_gpus_and_change_no_token(tp_size: int, tmp_path: Path) -> None:
    if num_gpus() < tp_size:
        pytest.skip(f"there are fewer than {tp_size} GPUs")
    async with serving(tp_size) as (engine, first):
        assert engine.capture_problem == ""
        plain, _ = await whole(engine, asking("plain", max_tokens=64))
        for version in (1, 2):
            one = draft(tmp_path, first, version)
            assert (await engine.swap(one)).loaded.tensors_digest == one.tensors_digest
            assert (await engine.rehash()).tensors_digest == one.tensors_digest
            tokens, _ = await whole(engine, asking(f"after-{version}", max_tokens=64))
            assert tokens == plain


async def test_what_is_captured_under_cuda_graphs_is_what_transformers_computes() -> None:
    options = CaptureParams(payload=True, prompt_rows=100)
    async with serving(1) as (engine, _):
        asked = replace(asking("captured", max_tokens=64, num_prompt=40), capture=options)
        tokens, finished = await whole(engine, asked)

    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.tensor([[*asked.prompt_ids, *tokens]]), output_hidden_states=True)
    hidden = finished.hidden
    assert hidden is not None
    assert not hidden.missing_rows
    taps = read_head(smollm2()).config.aux_layers
    aux = torch.cat([out.hidden_states[tap][0] for tap in taps], -1)
    torch.testing.assert_close(
        hidden.aux, aux[hidden.first_position :][: len(hidden.aux)], atol=TOLERANCE, rtol=TOLERANCE
    )
    assert isinstance(hidden.teacher, TopK)
    start = hidden.first_position + hidden.first_teacher_row
    log_sum_exp = out.logits[0].logsumexp(-1)[start:][: len(hidden.teacher)]
    torch.testing.assert_close(hidden.teacher.log_sum_exp, log_sum_exp, atol=TOLERANCE, rtol=TOLERANCE)
