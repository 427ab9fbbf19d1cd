"""Bias, penalties and grammar, applied to the target's logits before a token is chosen. Pure.

The order is vLLM's: logit bias, repetition penalty, frequency and presence penalty, grammar; temperature and filters come
later (`updraft_draft.acceptance.filtered_probs`). Row i of a verify forward counts the drafts before it as output, because
verification reaches row i only if they are accepted. So each row is what plain decoding would have sampled from, and
speculation stays lossless.

Tensors: T verified rows (one more than drafts), V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import GenerationRequest, SamplingParams

_REPETITION = (0.01, 100.0)
"""Outside of it, logits overflow float32."""


def check_sampling(request: GenerationRequest, vocab_size: int) -> None:
    """InvalidInput for parameters that are out of range for this vocabulary."""
    sampling, (least, most) = request.sampling, _REPETITION
    if not least <= sampling.repetition_penalty <= most:
        raise InvalidInput(f"repetition_penalty is {sampling.repetition_penalty:g}; it must be {least:g} to {most:g}")
    unknown = [token for token, _ in sampling.logit_bias if not 0 <= token < vocab_size]
    if unknown:
        raise InvalidInput(f"logit_bias names token {unknown[0]}, which is outside the vocabulary of {vocab_size}")
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= vocab_size:
        raise InvalidInput(f"top_logprobs is {request.top_logprobs}; it must be 0 to the vocabulary's {vocab_size}")


def processed(
    logits_TV: Tensor,
    sampling: SamplingParams,
    *,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    draft_ids: Sequence[int],
    allowed_TV: Tensor | None = None,
) -> Tensor:
    """The logits that the request samples from, float32 [T, V], T = len(draft_ids) + 1; -inf where `allowed_TV` is false."""
    logits = logits_TV.float()
    if sampling.logit_bias:
        ids, values = zip(*sampling.logit_bias, strict=True)
        at = torch.tensor(ids, device=logits.device)
        logits = logits.index_add(-1, at, torch.tensor(values, device=logits.device).expand(len(logits), -1))
    if sampling.has_penalties:
        logits = _penalised(
            logits, sampling, _counts(prompt_ids, logits), _output_counts(output_ids, draft_ids, logits)
        )
    return logits if allowed_TV is None else logits.masked_fill(~allowed_TV, float("-inf"))


def _penalised(logits_TV: Tensor, sampling: SamplingParams, prompt_V: Tensor, output_TV: Tensor) -> Tensor:
    """`prompt_V` counts the tokens of the prompt, `output_TV` those of the output before each row."""
    repetition = sampling.repetition_penalty
    if repetition != 1.0:
        scaled = torch.where(logits_TV > 0, logits_TV / repetition, logits_TV * repetition)
        logits_TV = torch.where((prompt_V > 0) | (output_TV > 0), scaled, logits_TV)
    return logits_TV - sampling.frequency_penalty * output_TV - sampling.presence_penalty * (output_TV > 0)


def _output_counts(output_ids: Sequence[int], draft_ids: Sequence[int], like_TV: Tensor) -> Tensor:
    """Occurrences in output and drafts before each row, float32 [T, V]."""
    counts = torch.zeros_like(like_TV)
    counts[0] = _counts(output_ids, like_TV)
    for row, token in enumerate(draft_ids, start=1):
        counts[row, token] = 1
    return counts.cumsum(0)


def _counts(ids: Sequence[int], like_TV: Tensor) -> Tensor:
    """Occurrences of each token, float32 [V]."""
    at = torch.tensor(list(ids), dtype=torch.long, device=like_TV.device)
    return torch.bincount(at, minlength=like_TV.shape[-1]).float()
