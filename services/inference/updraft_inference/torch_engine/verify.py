"""From the target's logits of a verify forward to the tokens each sequence gains."""

from dataclasses import dataclass

import torch
from torch import Tensor

from updraft_draft.acceptance import accept_sampled, filtered_probs
from updraft_inference.torch_engine.sequence import Proposal, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one sequence: how many drafts were kept, the target's token after them, log p of every draft."""

    accepted: int
    next_id: int
    target_log_probs: list[float]


@torch.inference_mode()
def judge(sequences: list[Sequence], proposals: list[Proposal], logits_RV: Tensor) -> list[Verdict]:
    """Verify every sequence's drafts. A sequence has one row more than drafts; row i is the target's word on draft i."""
    choices = logits_RV.argmax(-1).tolist()
    log_probs = _draft_log_probs(proposals, logits_RV)
    verdicts, start = [], 0
    for i, (sequence, proposal) in enumerate(zip(sequences, proposals, strict=True)):
        rows = slice(start, start + len(proposal.ids) + 1)
        start = rows.stop
        if sequence.generator is None:
            accepted = _leading_matches(choices[rows], proposal.ids)
            next_id = choices[rows][accepted]
        else:
            accepted, next_id = _sample(sequence, proposal, logits_RV[rows], sequence.generator)
        verdicts.append(Verdict(accepted=accepted, next_id=next_id, target_log_probs=log_probs[i]))
    return verdicts


def _leading_matches(choice: list[int], drafts: list[int]) -> int:
    """`updraft_draft.acceptance.accept_greedy` of one sequence, on lists that are on the CPU already."""
    count = 0
    while count < len(drafts) and choice[count] == drafts[count]:
        count += 1
    return count


def _sample(sequence: Sequence, proposal: Proposal, logits_TV: Tensor, generator: torch.Generator) -> tuple[int, int]:
    sampling = sequence.request.sampling
    # On the CPU, where the request's generator is.
    p = filtered_probs(logits_TV, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p).cpu()
    outcome = accept_sampled(p, proposal.ids, proposal.q, generator)
    return outcome.count, outcome.next_id


def _draft_log_probs(proposals: list[Proposal], logits_RV: Tensor) -> list[list[float]]:
    """log p of each draft under the target at temperature 1."""
    places, start = [], 0
    for proposal in proposals:
        places += [(start + j, token) for j, token in enumerate(proposal.ids)]
        start += len(proposal.ids) + 1
    if not places:
        return [[] for _ in proposals]
    row, token = torch.tensor(places, device=logits_RV.device).T
    rows = logits_RV[row].float()
    values = iter((rows.gather(-1, token[:, None])[:, 0] - rows.logsumexp(-1)).tolist())
    return [[next(values) for _ in proposal.ids] for proposal in proposals]
