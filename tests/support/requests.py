"""Ended requests for tests that need no engine."""

import torch

from updraft_inference.engine import (
    Counterfactual,
    Drafter,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    HiddenStates,
    VerifyStep,
)


def step(start: int, accepted: int, *, k: int = 2, version: int = 1, duration_s: float = 0.01) -> VerifyStep:
    """A step of `k` drafts from `version` (0: n-gram)."""
    return VerifyStep(
        start=start,
        accepted=accepted,
        draft_ids=tuple(range(k)),
        draft_log_probs=(-0.5,) * k,
        target_log_probs=(-0.25,) * k,
        batch_size=1,
        duration_s=duration_s,
        drafter=(Drafter.EAGLE3 if version else Drafter.NGRAM) if k else Drafter.NONE,
        draft_version=version if k else 0,
    )


def ended(
    *steps: VerifyStep, num_output: int | None = None, rows: int = 0, rejected_rows: int = 0, name: str = "a"
) -> FinishedRequest:
    """A request of three prompt tokens that ended by its limit; with hidden states if `rows`.

    `rejected_rows` of them stand after a rejection in the first step.
    """
    if num_output is None:
        num_output = 1 + sum(step.emitted for step in steps)
    hidden = None
    if rows:
        aux, last = torch.ones(rows, 12), torch.full((rows, 4), 2.0)
        rejected = Counterfactual(step=0, aux=3 * aux[:rejected_rows], teacher=2 * last[:rejected_rows])
        hidden = HiddenStates(
            first_position=1, aux=aux, teacher=last, counterfactuals=(rejected,) if rejected_rows else ()
        )
    return FinishedRequest(
        request=GenerationRequest(request_id=name, prompt_ids=(1, 2, 3), max_tokens=max(1, num_output)),
        output_ids=tuple(range(num_output)),
        steps=steps,
        reason=FinishReason.LENGTH,
        time_to_first_token_s=0.05,
        duration_s=0.5,
        hidden=hidden,
    )
