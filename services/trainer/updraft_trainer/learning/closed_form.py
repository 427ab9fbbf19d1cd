"""First weights without a gradient step: ridge regressions on a few recorded answers.

The draft's state after step j at row t should be the target's last hidden state at row t + 1 + j, before the weight of its
final norm. `fc` is fitted to that from the auxiliary states. What is then missing is fitted from what attention reads of its
own row, the normed embedding and the normed state, with the rank that the key-value heads allow. Both are functions of sums
of products, so samples are read one at a time.

Queries and keys are equal and read only the embedding, so that attention begins on its own row; the MLP begins small.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from updraft_draft.network import DraftNetwork
from updraft_trainer.data.sample import FIRST_TRAINABLE, Sample
from updraft_trainer.data.teacher import LastHidden

RIDGE = 0.1
"""Relative to each input's sum of squares, so that inputs of any scale count alike."""

ROUNDS = 2
"""Passes for the attention: the states that later draft steps read depend on it."""

KEY_SCALE = 3.5 * 2**0.5
"""Scale of queries and keys over their usual standard deviation: the own row's score is about 24 above the others'."""

MAX_SCALE = 100.0
"""Auxiliary states that many times larger than those of most samples are not fitted: they would outweigh all others."""

MLP_SCALE = 0.1

MAX_WORK = 1e12
"""Rows times inputs squared: about half a minute of one core. Without it, a few long answers of a wide target would take an
hour, because the sums of D 4096 have 16,384 inputs."""


class _Sums:
    """X'X and X'Y of a ridge regression, in float32."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        self._xx = torch.zeros(num_inputs, num_inputs)
        self._xy = torch.zeros(num_inputs, num_outputs)

    def add(self, x_NI: Tensor, y_NO: Tensor) -> None:
        self._xx.addmm_(x_NI.T, x_NI)
        self._xy.addmm_(x_NI.T, y_NO)

    def solve(self) -> Tensor:
        """[inputs, outputs]"""
        diagonal = self._xx.diagonal()
        ridge = RIDGE * (diagonal + 1e-6 * diagonal.mean())
        diagonal.add_(ridge)  # in place: at D 4096 a copy takes 1 GB
        factor = torch.linalg.cholesky(self._xx)
        diagonal.sub_(ridge)
        return torch.cholesky_solve(self._xy, factor)

    def solve_low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors [inputs, rank] and [rank, outputs] of the solution whose predictions lose least."""
        whole = self.solve()
        _, vectors = torch.linalg.eigh(whole.T @ self._xx @ whole)
        top = vectors[:, -rank:]
        return whole @ top, top.T


def fit(network: DraftNetwork, samples: Sequence[Sample], *, num_steps: int) -> bool:
    """Replace the layer's weights and `fc` of `network`, whose head and norm are the target's already.

    False if that is impossible, because no sample has the target's last hidden states or their values are out of range;
    the network is then of no use.
    """
    lessons = _comparable([sample for sample in samples if isinstance(sample.teacher, LastHidden)])
    lessons = _affordable(lessons, network.config.aux_size + network.config.hidden_size)
    if not lessons:
        return False
    try:
        _fit(network, lessons, num_steps)
    except RuntimeError:  # torch.linalg's error is one
        return False
    return all(bool(p.isfinite().all()) for p in network.parameters())


def _comparable(samples: Sequence[Sample]) -> list[Sample]:
    scales = [float(sample.aux.abs().max()) for sample in samples]
    limit = MAX_SCALE * sorted(scales)[len(scales) // 2] if scales else 0.0
    return [sample for sample, scale in zip(samples, scales, strict=True) if scale <= limit]


def _affordable(samples: Sequence[Sample], num_inputs: int) -> list[Sample]:
    """The first samples, at least one, whose outputs `MAX_WORK` allows."""
    totals = accumulate(len(sample.ids) - sample.first_output for sample in samples)
    num = sum(total * num_inputs**2 <= MAX_WORK for total in totals)
    return list(samples[: max(1, num)])


@torch.no_grad()
def _fit(network: DraftNetwork, samples: Sequence[Sample], num_steps: int) -> None:
    c, layer = network.config, network.midlayer
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.mul_(MLP_SCALE)
    _set_attention(network)
    sums = _Sums(c.aux_size + c.hidden_size, c.hidden_size)
    for sample in samples:
        rows, target = _targets(network, sample, 0)
        embedded = layer.input_layernorm(network.embedding[sample.ids[1:]].float())[rows]
        sums.add(torch.cat([sample.aux[rows].float(), embedded], -1), target)
    network.fc.weight.copy_(sums.solve()[: c.aux_size].T)
    rank = c.num_kv_heads * c.head_dim
    for _ in range(ROUNDS):
        sums = _Sums(2 * c.hidden_size, c.hidden_size)
        for sample in samples:
            for inputs, missing in _missing(network, sample, num_steps):
                sums.add(inputs, missing)
        values, outputs = sums.solve_low_rank(rank)
        layer.self_attn.v_proj.weight.copy_(values.T)
        layer.self_attn.o_proj.weight.copy_(_per_query_head(network, outputs).T)


def _set_attention(network: DraftNetwork) -> None:
    c, attn = network.config, network.midlayer.self_attn
    keys = attn.k_proj.weight.mul_(KEY_SCALE)
    keys[:, c.hidden_size :] = 0
    groups = keys.view(c.num_kv_heads, 1, c.head_dim, -1).expand(-1, c.num_heads // c.num_kv_heads, -1, -1)
    attn.q_proj.weight.copy_(groups.reshape(c.num_heads * c.head_dim, -1))


def _per_query_head(network: DraftNetwork, outputs: Tensor) -> Tensor:
    """Each head of a group passes on an equal part of the group's values: [K * E, D] -> [H * E, D]."""
    c = network.config
    group = c.num_heads // c.num_kv_heads
    parts = outputs.view(c.num_kv_heads, 1, c.head_dim, -1).expand(-1, group, -1, -1)
    return parts.reshape(c.num_heads * c.head_dim, -1) / group


def _missing(network: DraftNetwork, sample: Sample, num_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step, the inputs of attention's own row, and what the state still lacks there."""
    layer = network.midlayer
    padding = torch.zeros(num_steps, dtype=torch.long)
    ids = torch.cat([sample.ids[1:], padding])
    aux = sample.aux.float()
    states = [network.fuse(aux)]
    states += [s[0] for s in network.unroll(aux[None], ids[None, : len(aux) + num_steps - 1], num_steps=num_steps)[:-1]]
    for j, state in enumerate(states):
        rows, target = _targets(network, sample, j)
        embedded = layer.input_layernorm(network.embedding[ids[j : j + len(aux)]].float())[rows]
        normed = layer.hidden_norm(state[rows])
        residual = normed if network.config.norm_before_residual else state[rows]
        yield torch.cat([embedded, normed], -1), target - residual


def _targets(network: DraftNetwork, sample: Sample, j: int) -> tuple[slice, Tensor]:
    """Rows whose step j predicts an output token, and the states [N, D] that they should have."""
    first = max(sample.first_output, sample.first_teacher_row + 1, FIRST_TRAINABLE + j)
    assert isinstance(sample.teacher, LastHidden)
    states = sample.teacher.states[first - 1 - sample.first_teacher_row :].float()
    start = first - 2 - j
    return slice(start, start + len(states)), states / network.norm.weight
