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
def judge(sequences: list[Sequence], proposals: list[Proposal], logits_BTV: Tensor) -> list[Verdict]:
    """Verify every sequence's drafts. Row i of a sequence's logits is the target's word on its i-th draft."""
    choices = logits_BTV.argmax(-1).tolist()
    log_probs = _draft_log_probs(proposals, logits_BTV)
    verdicts = []
    for i, (sequence, proposal) in enumerate(zip(sequences, proposals, strict=True)):
        if sequence.generator is None:
            accepted = _leading_matches(choices[i], proposal.ids)
            next_id = choices[i][accepted]
        else:
            accepted, next_id = _sample(sequence, proposal, logits_BTV[i], sequence.generator)
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
    rows = logits_TV[: len(proposal.ids) + 1]
    # On the CPU, where the request's generator is.
    p = filtered_probs(rows, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p).cpu()
    outcome = accept_sampled(p, proposal.ids, proposal.q, generator)
    return outcome.count, outcome.next_id


def _draft_log_probs(proposals: list[Proposal], logits_BTV: Tensor) -> list[list[float]]:
    """log p of each draft under the target at temperature 1."""
    places = [(i, j, token) for i, p in enumerate(proposals) for j, token in enumerate(p.ids)]
    result: list[list[float]] = [[] for _ in proposals]
    if not places:
        return result
    row, column, token = torch.tensor(places, device=logits_BTV.device).T
    rows = logits_BTV[row, column]
    values = rows.gather(-1, token[:, None])[:, 0].float() - rows.float().logsumexp(-1)
    for (i, _, _), value in zip(places, values.tolist(), strict=True):
        result[i].append(value)
    return result
