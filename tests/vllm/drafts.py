"""Drafts as the trainer makes them, from what another engine said.

The judge of that engine's tokens is transformers in float32: one forward over what was said gives the hidden states to learn
from, and the token that it would have picked at every place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.support.traces import TraceMaker
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from updraft.trace.v1 import trace_pb2
from updraft_draft import vocabulary
from updraft_draft.target_weights import read_head
from updraft_draft.tensors import encode
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.learning.learner import Hyperparameters, Learner

NUM_STEPS = 40
"""Enough to learn a few answers by heart."""

_DRAFT_VOCAB = 4096
_QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Tom has 3 apples and buys 9 more. How many?",
    "Write a SQL query that counts users per country.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceAnswer:
    """What transformers makes of one answer."""

    picks: list[int]
    """Its own greedy token at each place of the answer, given all that was said before."""
    sample: Sample
    """The answer as intake reads it from a trace, with the hidden states of transformers."""


def prompts(model: Path) -> list[list[int]]:
    """A few questions to a chat model of SmolLM2's template, as token ids."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in _QUESTIONS)
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def new_learner(model: Path, traffic: Iterable[Sequence[int]]) -> Learner:
    """A learner with first weights, and a vocabulary of this traffic."""
    head = read_head(model)
    counts = vocabulary.count((torch.tensor(ids) for ids in traffic), head.config.vocab_size)
    token_ids = vocabulary.choose(counts, always=head.config.eos_token_ids, size=_DRAFT_VOCAB)
    return Learner(head, head.draft(draft_vocab_size=len(token_ids)), token_ids, Hyperparameters())


def read_answers(model: Path, said: Iterable[tuple[list[int], list[int]]]) -> list[ReferenceAnswer]:
    """Compute the reference of each prompt and answer."""
    maker = TraceMaker(model)
    aux_layers = read_head(model).config.aux_layers
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers: list[ReferenceAnswer] = []
    for prompt, answer in said:
        with torch.no_grad():
            result = target(torch.tensor([prompt + answer])[:, :-1], output_hidden_states=True)
        aux = torch.cat([result.hidden_states[layer][0] for layer in aux_layers], -1)
        trace = _trace(maker, len(answers), prompt, answer)
        trace.payload.aux_hidden.CopyFrom(_encoded(aux))
        trace.payload.last_hidden.CopyFrom(_encoded(result.hidden_states[-1][0]))
        picks = result.logits[0, len(prompt) - 1 :].argmax(-1).tolist()
        answers.append(ReferenceAnswer(picks=picks, sample=read_sample(trace.SerializeToString(), maker.expected)))
    return answers


def _trace(maker: TraceMaker, number: int, prompt: list[int], answer: list[int]) -> trace_pb2.Trace:
    header = maker.trace(number, payload=False).header
    return trace_pb2.Trace(header=header, prompt_ids=prompt, output_ids=answer)


def _encoded(rows: Tensor) -> trace_pb2.Tensor:
    return encode(rows, trace_pb2.TENSOR_ENCODING_BF16)
