"""EAGLE-3 of the package `speculators` in a process and an environment of its own. Runs as a file, not as a module.

Its trainer starts only with a GPU, so this loop does what the trainer's does with a batch: its model and loss under autocast,
backward, clipping, AdamW. Shape, states, vocabulary, weights of the head and unrolled steps are those of our learner; the head
is frozen in both. Attention and loss are the fastest of its own that run on a CPU by default: its fused loss needs Triton. Its
sequence has no padding here, where its own batches are padded to a fixed length.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from bench.trainer.worker import read
from speculators.losses import resolve_loss_config  # type: ignore[import-not-found]  # in its own environment
from speculators.models.eagle3 import (  # type: ignore[import-not-found]  # in its own environment
    Eagle3DraftModel,
    Eagle3SpeculatorConfig,
)
from transformers import LlamaConfig

from updraft_draft.config import DraftConfig
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import LastHidden
from updraft_trainer.learning.learner import Hyperparameters


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", choices=["sdpa", "eager", "simple_flex_attention"], default="eager")
    parser.add_argument("--loss", choices=["eager", "fused"], default="eager")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target, batches = read_head(arguments.target), read(arguments.samples)
    config = target.draft()
    token_ids = choose_vocabulary([one for batch in batches for one in batch], target, size=config.draft_vocab_size)
    model = build(target, config, token_ids, arguments.attention)
    hyper, losses = Hyperparameters(), resolve_loss_config("kl_div", arguments.loss)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=hyper.learning_rate, weight_decay=0.0)
    print("ready", flush=True)
    for line in sys.stdin:
        batch = batches[int(line)]
        started_s = time.perf_counter()
        inputs = packed(batch, model.t2d)
        with torch.autocast("cpu", torch.bfloat16):
            _, loss, _ = model(
                **inputs, ttt_steps=hyper.ttt_steps, ttt_step_loss_decay=hyper.step_decay, loss_config=losses
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hyper.clip_norm)
        optimizer.step()
        seconds = time.perf_counter() - started_s
        tokens = sum(len(sample.ids) - sample.first_output for sample in batch)
        print(json.dumps({"seconds": seconds, "tokens": tokens, "loss": loss.item()}), flush=True)


def build(target: TargetHead, c: DraftConfig, token_ids: torch.Tensor, attention: str) -> Eagle3DraftModel:
    layer = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        attn_implementation=attention,  # type: ignore[call-arg]  # one of those that every config takes
    )
    shape = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=len(token_ids),
        eagle_aux_hidden_state_layer_ids=list(c.aux_layers),
    )
    model = Eagle3DraftModel(shape)
    known = torch.zeros(c.vocab_size, dtype=torch.bool)
    known[token_ids] = True
    model.load_vocab_mappings(known, token_ids - torch.arange(len(token_ids)))
    with torch.no_grad():
        model.embed_tokens.weight.copy_(target.embedding)
        model.lm_head.weight.copy_(target.rows(token_ids))
        model.verifier_lm_head.weight.copy_(target.rows(token_ids))
        model.norm.weight.copy_(target.final_norm)
    model.verifier_norm = torch.nn.Identity()  # recorded states are normed already
    return model.train()


def packed(samples: list[Sample], known: torch.Tensor) -> dict[str, torch.Tensor]:
    """Row t has read the target's state at t and the token at t + 1, and predicts the token at t + 2."""
    parts = [_rows(sample, known) for sample in samples]
    inputs = {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}
    lengths = torch.tensor([len(part["input_ids"]) for part in parts])
    inputs["document_ids"] = torch.repeat_interleave(torch.arange(len(parts)), lengths)[None]
    return inputs


def _rows(sample: Sample, known: torch.Tensor) -> dict[str, torch.Tensor]:
    assert isinstance(sample.teacher, LastHidden)
    num_rows, first = sample.num_rows, sample.first_teacher_row
    states = torch.cat([sample.teacher.states.new_zeros(first, sample.teacher.states.shape[1]), sample.teacher.states])
    predicted = torch.arange(2, num_rows + 1)
    return {
        "input_ids": sample.ids[1:num_rows],
        "hidden_states": sample.aux[:-1].decoded(),
        "verifier_last_hidden_states": states[1:].bfloat16(),
        "loss_mask": known[sample.ids[2 : num_rows + 1]] & (predicted >= max(sample.first_output, first + 1)),
        "position_ids": torch.arange(1, num_rows),
    }


if __name__ == "__main__":
    main()
