"""Rejection sampling: from the target's logits of a verify forward to the new tokens of each sequence.

Requests that leave the logits unchanged share one argmax. Those with bias, penalties or a grammar use processed rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from updraft_draft.acceptance import accept_sampled, filtered_probs
from updraft_inference.engine import SamplingParams, TokenLogprob
from updraft_inference.torch_engine.model.ops import TopScores, TorchOps
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sampling import noise
from updraft_inference.torch_engine.sampling.logits import processed
from updraft_inference.torch_engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """The result for one sequence: the number of accepted draft tokens, the target's token after them, and log p of each.

    `logprobs`: of the new tokens, if requested. `is_finite`: the target's logits are finite in all rows, also in those after a
    rejected draft token, because their keys and values would reach later rows.
    """

    accepted: int
    bonus_id: int
    target_log_probs: list[float]
    logprobs: tuple[TokenLogprob, ...] = ()
    is_finite: bool = True


FINITE = VerifyResult(accepted=0, bonus_id=0, target_log_probs=[])
NOT_FINITE = VerifyResult(accepted=0, bonus_id=0, target_log_probs=[], is_finite=False)


@torch.inference_mode()
def verify(
    sequences: list[Sequence], proposals: list[Proposal], logits_RV: Tensor, operations: TorchOps
) -> list[VerifyResult]:
    """Verify every sequence's drafts. A sequence has one more row than drafts; row i predicts draft i."""
    is_of_draft = [n < len(proposal.ids) for proposal in proposals for n in range(len(proposal.ids) + 1)]
    top_scores = operations.top_scores(logits_RV, is_of_draft)
    choices, is_finite = top_scores.choice_R.tolist(), top_scores.best_R.isfinite().tolist()
    log_probs = _draft_log_probs(proposals, is_of_draft, logits_RV, top_scores)
    results, start = [], 0
    for i, (sequence, proposal) in enumerate(zip(sequences, proposals, strict=True)):
        rows = slice(start, start + len(proposal.ids) + 1)
        start = rows.stop
        if not all(is_finite[rows]):
            results.append(NOT_FINITE)
            continue
        if sequence.changes_logits:
            accepted, bonus_id = _choose(sequence, proposal, _processed(sequence, proposal, logits_RV[rows]), None)
        else:
            accepted, bonus_id = _choose(sequence, proposal, logits_RV[rows], choices[rows])
        token_ids = [*proposal.ids[:accepted], bonus_id]
        token_rows = logits_RV[rows.start : rows.start + accepted + 1]
        logprobs = _logprobs(token_rows, token_ids, sequence.request.top_logprobs)
        results.append(
            VerifyResult(accepted=accepted, bonus_id=bonus_id, target_log_probs=log_probs[i], logprobs=logprobs)
        )
    return results


def _choose(sequence: Sequence, proposal: Proposal, rows_TV: Tensor, likeliest: list[int] | None) -> tuple[int, int]:
    """Number of accepted draft tokens, and the token after them. `likeliest`: the argmax of each row, if known."""
    if sequence.generator is None:
        choices = rows_TV.argmax(-1).tolist() if likeliest is None else likeliest
        return _matching(choices.__getitem__, proposal.ids)
    sampling, position = sequence.request.sampling, sequence.num_output
    p, seed = _Filtered(rows_TV, sampling), sampling.seed
    if seed is not None:
        return _matching(lambda row: noise.draw(p[row], seed, position + row, sequence.drafted_noise), proposal.ids)
    outcome = accept_sampled(p, proposal.ids, proposal.q, sequence.generator)
    return outcome.count, outcome.bonus_id


class _Filtered:
    """The distribution of each row, computed on access. Rows after a rejection are never computed; each is as expensive as all
    the sampling of a plain step."""

    def __init__(self, rows_TV: Tensor, sampling: SamplingParams) -> None:
        self._rows_TV = rows_TV
        self._sampling = sampling

    def __getitem__(self, row: int) -> Tensor:
        sampling = self._sampling
        probs = filtered_probs(
            self._rows_TV[row : row + 1],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        return probs[0].cpu()  # the request's generator is there


def _processed(sequence: Sequence, proposal: Proposal, rows_TV: Tensor) -> Tensor:
    request, output_ids = sequence.request, sequence.ids[sequence.num_prompt :]
    allowed = None
    if sequence.grammar is not None:
        allowed = sequence.grammar.allowed(output_ids, proposal.ids).to(rows_TV.device)
    return processed(
        rows_TV,
        request.sampling,
        prompt_ids=request.prompt_ids,
        output_ids=output_ids,
        draft_ids=proposal.ids,
        allowed_TV=allowed,
    )


def _logprobs(rows_TV: Tensor, token_ids: list[int], num_top: int | None) -> tuple[TokenLogprob, ...]:
    """From the raw logits, one row per token."""
    if num_top is None:
        return ()
    log_probs = rows_TV.float().log_softmax(-1)
    own = log_probs.gather(-1, torch.tensor(token_ids, device=rows_TV.device)[:, None])[:, 0].tolist()
    values, ids = (top.tolist() for top in log_probs.topk(num_top, -1))
    return tuple(
        TokenLogprob(token_id=token, log_prob=log_prob, top=tuple(zip(top_ids, top, strict=True)))
        for token, log_prob, top_ids, top in zip(token_ids, own, ids, values, strict=True)
    )


def _matching(choose: Callable[[int], int], drafts: list[int]) -> tuple[int, int]:
    """Number of draft tokens that equal the target's choices, and its next choice. No later row is evaluated."""
    for row, draft in enumerate(drafts):
        choice = choose(row)
        if choice != draft:
            return row, choice
    return len(drafts), choose(len(drafts))


def _draft_log_probs(
    proposals: list[Proposal], is_of_draft: list[bool], logits_RV: Tensor, top_scores: TopScores
) -> list[list[float]]:
    """log p of each draft under the target at temperature 1."""
    rows = [row for row, is_one in enumerate(is_of_draft) if is_one]
    if not rows:
        return [[] for _ in proposals]
    tokens = [token for proposal in proposals for token in proposal.ids]
    at = torch.tensor([rows, tokens], device=logits_RV.device)
    values = iter((logits_RV[at[0], at[1]].float() - top_scores.log_sum_R[at[0]]).tolist())
    return [[next(values) for _ in proposal.ids] for proposal in proposals]
