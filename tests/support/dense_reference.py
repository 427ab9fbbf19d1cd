"""The trainer's loss by its formula: each text and each branch alone, with a whole mask and all logits, in float64.

It shares the draft's layers with the trainer, but neither attention, nor packing, nor losses.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead
from updraft_draft.tensors import decoded
from updraft_trainer.data.sample import Counterfactual, Sample
from updraft_trainer.data.teacher import LastHidden, Teacher, TopK
from updraft_trainer.learning.learner import Hyperparameters

Loss = Callable[[Tensor, Tensor], Tensor]

LEAST = -20.0
"""The bound of reverse KL."""


def exact_copy(network: DraftNetwork) -> DraftNetwork:
    """The network in float64."""
    copied = network.copy()
    copied.lm_head = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    weight = network.lm_head.weight
    copied.lm_head.weight = torch.nn.Parameter(weight.detach().double(), requires_grad=weight.requires_grad)
    copied.double()
    copied.share(network.embedding.double())
    return copied


def loss(
    network: DraftNetwork,
    target: TargetHead,
    samples: Sequence[Sample],
    branches: Sequence[Sequence[Counterfactual]],
    hyper: Hyperparameters,
    counts: Sequence[float],
) -> Tensor:
    """The loss of a batch, float64 []. `branches` of each sample, and what it counts."""
    known, num_steps, text_loss = network.t2d, hyper.ttt_steps, _text_loss(hyper)
    kinds: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in range(num_steps)] for _ in range(2)]
    for sample, cuts, count in zip(samples, branches, counts, strict=True):
        tokens, teacher = sample.trainable(known)
        states = unroll(network, sample.aux.decoded(), sample.ids[1:], num_steps)
        weights = count * (1.0 + hyper.correction_weight * sample.corrections[tokens].double())
        log_p = _log_p(teacher, network, target)
        for j, state in enumerate(states):
            rows = tokens - 2 - j
            kept = rows >= 0
            log_q = network.logits(state[rows[kept]]).log_softmax(-1)
            kinds[0][j].append((text_loss(log_q, log_p[kept]), weights[kept]))
        for one in cuts:
            aux = decoded([sample.aux[: one.start], one.aux])
            states = unroll(network, aux, torch.cat([sample.ids[1 : one.start], one.ids]), num_steps)
            good = one.teacher.is_trainable(known)
            log_p = _log_p(one.teacher.at(good), network, target)
            for j, state in enumerate(states):
                rows = torch.arange(one.start - 1, one.start - 1 + len(one.ids))[good] - j
                kept = rows >= 0
                log_q = network.logits(state[rows[kept]]).log_softmax(-1)
                kinds[1][j].append((_forward_kl(log_q, log_p[kept]), torch.full((int(kept.sum()),), count).double()))
    total = torch.zeros((), dtype=torch.float64)
    for steps, scale in zip(kinds, (1.0, hyper.discard_weight), strict=True):
        for j, parts in enumerate(steps):
            weights = torch.cat([torch.empty(0), *(part[1] for part in parts)])
            if len(weights):
                total = total + scale * hyper.step_decay**j * torch.cat([a * b for a, b in parts]).sum() / weights.sum()
    return total


def unroll(network: DraftNetwork, aux: Tensor, following: Tensor, num_steps: int) -> list[Tensor]:
    """States [T, D] of each step of one text; `following`: the tokens after its first, padded with zeros."""
    num_rows, c = len(aux), network.config
    ids = torch.cat([following, torch.zeros(num_rows + num_steps, dtype=torch.long)])
    positions, heads = torch.arange(num_rows), c.num_heads // c.num_kv_heads
    x = network.fuse(aux.to(network.fc.weight.dtype))
    text = x, x  # keys and values, from the first step on
    own, states = list[tuple[Tensor, Tensor]](), list[Tensor]()
    for j in range(num_steps):
        rows = network.rows(x, ids[j : j + num_rows], positions + j)
        q, k, v = rows.q, rows.k.repeat_interleave(heads, 1), rows.v.repeat_interleave(heads, 1)
        text = text if j else (k, v)
        own += [(k, v)] if j else []
        scores = torch.einsum("the,she->hts", q, text[0])
        scores = scores.masked_fill(torch.ones(num_rows, num_rows, dtype=torch.bool).triu(1), float("-inf"))
        of_own = [torch.einsum("the,the->ht", q, key).unsqueeze(-1) for key, _ in own]
        weights = (torch.cat([scores, *of_own], -1) * c.head_dim**-0.5).softmax(-1)
        out = torch.einsum("hts,she->the", weights[..., :num_rows], text[1])
        for n, (_, value) in enumerate(own):
            out = out + weights[..., num_rows + n].T.unsqueeze(-1) * value
        x = network.finish(x, out.flatten(1))
        states.append(x)
    return states


def _log_p(teacher: Teacher, network: DraftNetwork, target: TargetHead) -> Tensor:
    if isinstance(teacher, LastHidden):
        return (teacher.states.double() @ target.head[network.token_ids].double().T).log_softmax(-1)
    assert isinstance(teacher, TopK)
    log_p = torch.full((len(teacher), target.config.vocab_size), -110.0, dtype=torch.float64)
    log_p.scatter_(1, teacher.ids, teacher.log_probs.double())
    log_p = log_p[:, network.token_ids]
    named = log_p > -100
    return torch.where(named, log_p - log_p.masked_fill(~named, float("-inf")).logsumexp(-1, keepdim=True), log_p)


def _forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _text_loss(hyper: Hyperparameters) -> Loss:
    def loss(log_q: Tensor, log_p: Tensor) -> Tensor:
        refused = 1.0 - torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
        losses = {
            "forward_kl": _forward_kl(log_q, log_p),
            "reverse_kl": (log_q.exp() * (log_q - log_p.clamp(min=LEAST))).sum(-1),
            "acceptance": refused,
        }
        return losses[hyper.loss] + hyper.acceptance_weight * refused

    return loss
