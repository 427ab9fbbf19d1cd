"""Records the run that two pictures show: `python -m tools.pictures.record` (two minutes) writes recorded.json.

The built-in engine answers a held-out SQL question with SmolLM2-135M-Instruct. It drafts with version 1, a draft in closed form
of 16 recorded requests; after 24 steps version 2, of 48 requests, is swapped in. Requests come from `bench.learning`.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench import harness
from bench.learning.learning import open_recorder

from updraft_artifacts.digests import tensors_digest
from updraft_cli.prompts import domain_prompts
from updraft_draft import checkpoint
from updraft_draft.target_weights import read_head
from updraft_inference.engine import DraftCheckpoint, Drafter, FinishedRequest, GenerationRequest, SamplingParams
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.publish import snapshot

RECORDED = Path(__file__).with_name("recorded.json")
KIND, VOCABULARY, LOOKAHEAD, TOKENS, SEED = "sql", 8192, 3, 120, 0
FEW, MANY = 16, 48
"""Requests that the versions learned from."""
SWAP_AFTER = 24
"""Steps of the request."""


def main() -> None:
    """Run once and write the file."""
    torch.set_num_threads(1)
    recorder = open_recorder()
    recorder.record([KIND], MANY, 0)
    samples = recorder.samples(KIND, MANY, held_out=False)
    with tempfile.TemporaryDirectory() as folder:
        drafts = [draft(samples[:FEW], Path(folder), 1), draft(samples, Path(folder), 2)]
        RECORDED.write_text(json.dumps(asyncio.run(run(drafts)), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RECORDED}")


def draft(samples: Sequence[Sample], folder: Path, version: int) -> DraftCheckpoint:
    """A draft in closed form of these requests, on disk as a pod has it."""
    target = read_head(harness.model())
    token_ids = choose_vocabulary(samples, target, size=VOCABULARY)
    learner = Learner(target, target.draft(draft_vocab_size=len(token_ids)), token_ids, Hyperparameters(), seed=SEED)
    network = learner.closed_form(samples)
    assert network is not None  # recorded requests have hidden states
    network = snapshot(network)
    checkpoint.save(network, folder / str(version))
    digest = tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(network)))
    return DraftCheckpoint(version=version, folder=folder / str(version), tensors_digest=digest)


async def run(drafts: Sequence[DraftCheckpoint]) -> dict[str, Any]:
    """Answer the question, and swap meanwhile."""
    model = harness.model()
    tokenizer, template = Tokenizer.open(model), ChatTemplate.open(model)
    assert template is not None  # SmolLM2 has one
    (question,) = domain_prompts(KIND, 1, held_out=True)
    prompt = tokenizer.encode(template.render([{"role": "user", "content": question}]), add_special_tokens=False)
    options = EngineOptions(limits=Limits(num_slots=1, max_context=1024, max_lookahead=LOOKAHEAD), dtype=torch.bfloat16)
    async with TorchEngine.open(model, options) as engine:
        await engine.swap(drafts[0])
        await _answer(engine, prompt, drafts[0])  # warm up
        finished, ended_s, swap = await _answer(engine, prompt, drafts[1])
    steps = [
        {
            "version": step.draft_version,
            "drafts": [tokenizer.decode([token]) for token in step.draft_ids],
            "accepted": step.accepted,
            "bonus": tokenizer.decode(list(finished.output_ids[step.start + step.accepted :][:1])),
            "ended_ms": round(1e3 * (at_s - ended_s[0]), 2),
        }
        for step, at_s in zip(finished.steps, ended_s[-len(finished.steps) :], strict=True)
        if step.draft_ids  # none are left to draft in the last step
    ]
    return {
        "question": question,
        "steps": steps,
        "swap": {name: round(1e3 * (s - ended_s[0]), 2) for name, s in swap.items()},
    }


async def _answer(
    engine: TorchEngine, prompt: tuple[int, ...], draft: DraftCheckpoint
) -> tuple[FinishedRequest, list[float], dict[str, float]]:
    """The finished request, when each of its deltas came, and when the swap to `draft` began and ended."""
    request = GenerationRequest(
        request_id="picture",
        prompt_ids=prompt,
        max_tokens=TOKENS,
        sampling=SamplingParams(temperature=0.0),
        drafter=Drafter.EAGLE3,
        lookahead=LOOKAHEAD,
    )
    ended_s: list[float] = []
    swap: dict[str, float] = {}

    async def exchange() -> None:
        began_s = time.perf_counter()
        swapped = await engine.swap(draft)
        swap.update(began=began_s, ended=time.perf_counter(), pause=ended_s[0] + swapped.pause_s)

    async with asyncio.TaskGroup() as tasks:
        async for delta in engine.generate(request):
            ended_s.append(time.perf_counter())
            if len(ended_s) == SWAP_AFTER:
                tasks.create_task(exchange())
            finished = delta.finished
    assert finished is not None
    return finished, ended_s, swap


if __name__ == "__main__":
    main()
