"""The state of vLLM's two model runners that the hooks read, in one shape."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from updraft_vllm.layout import Batch, Scheduled


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step whose forward has run and whose tokens are not sampled yet.

    Row i of `tokens` [M], `positions` [M] and each of `states` belongs to the same scheduled token.
    """

    batch: Batch
    tokens: Tensor
    positions: Tensor
    states: Sequence[Tensor]
    logits: Tensor | None
    """None if the runner computes them later, within sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """How to read one of the runners. `sample` is the name of its function that decides what is accepted."""

    sample: str
    sample_parameters: tuple[str, ...]
    read_step: Callable[[Any, Any, Callable[[str], bool]], Step]
    """From the runner, the scheduler's output, and whether a request reads its first chunk."""
    accept_lens: Callable[[Any], Tensor]
    """[B], the draft tokens accepted and one more, from what `sample` returned."""
    draft_model: Callable[[Any], Any]
    propose: str
    """The function in which the draft proposes."""
    propose_parameters: tuple[str, ...]
    propose_nothing: Callable[[Any, Sequence[Any], Mapping[str, Any]], Tensor]
    """The result of `propose` for no draft tokens, from the object and the arguments that it is called with."""


def first_step(runner: Any, scheduler_output: Any, is_first: Callable[[str], bool]) -> Step:
    """The step of v1/worker/gpu_model_runner.py, which has the batch in arrays of its own."""
    state, inputs = runner.execute_model_state, runner.input_batch
    tokens, drafts = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_spec_decode_tokens

    def read(place: int) -> Scheduled:
        rid = inputs.req_ids[place]
        return Scheduled(
            rid=rid,
            tokens=int(tokens[rid]),
            drafts=len(drafts.get(rid, ())),
            computed=int(inputs.num_computed_tokens_cpu[place]),
            prompt_tokens=int(inputs.num_prompt_tokens[place]),
            known_tokens=int(inputs.num_tokens_no_spec[place]),
            is_first=is_first(rid),
        )

    rids = inputs.req_ids
    return Step(
        batch=Batch(
            rids=rids,
            tokens=[tokens[rid] for rid in rids],
            drafts=[len(drafts.get(rid, ())) for rid in rids],
            read=read,
        ),
        tokens=runner.input_ids.gpu,
        positions=runner.positions,
        states=state.aux_hidden_states,
        logits=state.logits,
    )


def second_step(runner: Any, _: Any, is_first: Callable[[str], bool]) -> Step:
    """The step of v1/worker/gpu/model_runner.py, which passes the batch in its state."""
    state = runner.execute_model_state
    inputs, requests = state.input_batch, runner.req_states
    rids, tokens = inputs.req_ids, inputs.num_scheduled_tokens[: len(inputs.req_ids)].tolist()
    drafts = [0] * len(rids)
    if inputs.num_draft_tokens_per_req is not None:
        drafts = inputs.num_draft_tokens_per_req[: len(rids)].tolist()

    def read(place: int) -> Scheduled:
        return Scheduled(
            rid=rids[place],
            tokens=tokens[place],
            drafts=drafts[place],
            computed=int(inputs.num_computed_tokens_np[place]),
            prompt_tokens=int(requests.prompt_len.np[inputs.idx_mapping_np[place]]),
            known_tokens=int(inputs.prefill_len_np[place]),
            is_first=is_first(rids[place]),
        )

    return Step(
        batch=Batch(rids=rids, tokens=tokens, drafts=drafts, read=read),
        tokens=inputs.input_ids,
        positions=inputs.positions,
        states=state.aux_hidden_states,
        logits=None,
    )


def _first_accept_lens(result: Any) -> Tensor:
    rejected = -1  # vLLM's placeholder
    lens: Tensor = (result.sampled_token_ids != rejected).sum(-1)
    return lens


def _second_accept_lens(result: Any) -> Tensor:
    _, num_sampled, _ = result
    lens: Tensor = num_sampled
    return lens


def _first_nothing(proposer: Any, _: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    proposer._last_draft_probs = None  # noqa: SLF001 - else the runner would take those of an earlier step
    batch_size = kwargs["common_attn_metadata"].batch_size()
    return torch.empty(batch_size, 0, dtype=torch.int64, device=kwargs["next_token_ids"].device)


def _second_nothing(speculator: Any, args: Sequence[Any], _: Mapping[str, Any]) -> Tensor:
    batch = args[0]
    nothing: Tensor = speculator.draft_tokens[: batch.num_reqs].fill_(-1)  # vLLM's placeholder
    return nothing


FIRST = Runner(
    sample="_sample",
    sample_parameters=("self", "logits", "spec_decode_metadata"),
    read_step=first_step,
    accept_lens=_first_accept_lens,
    draft_model=lambda runner: runner.drafter.model,
    propose="vllm.v1.spec_decode.llm_base_proposer.SpecDecodeBaseProposer.propose",
    propose_parameters=("self", "num_speculative_tokens"),
    propose_nothing=_first_nothing,
)
SECOND = Runner(
    sample="sample",
    sample_parameters=("self", "hidden_states", "input_batch", "grammar_output"),
    read_step=second_step,
    accept_lens=_second_accept_lens,
    draft_model=lambda runner: runner.speculator.model,
    propose="vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator.TargetDependentARSpeculator.propose",
    propose_parameters=("self", "input_batch"),
    propose_nothing=_second_nothing,
)
