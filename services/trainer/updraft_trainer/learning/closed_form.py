"""First weights without a gradient step: ridge regressions on a few recorded answers.

The draft's state after step j at row t should be the target's last hidden state at row t + 1 + j, before the weight of its
final norm. `fc` is fitted to that from the auxiliary states. The residual is fitted from what attention reads of its own row,
the normed embedding and the normed state, with the rank that the key-value heads allow. The residual of both is fitted from
the MLP's random features, which are not linear (an extreme learning machine: Huang et al. 2006). Samples are read one by one.

Where the teacher shows likeliest tokens, the last hidden states are estimated first. Many states have the same logits: the
first estimate is the smallest of them, and the next ones are nearest to what a regression on other samples predicts.

Queries and keys are equal and read only the embedding, so that attention begins on its own row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from updraft_draft.network import DraftNetwork
from updraft_draft.precision import autocast
from updraft_trainer.data.sample import FIRST_TRAINABLE, Sample, checked
from updraft_trainer.data.teacher import DraftVocabulary, LastHidden, Teacher
from updraft_trainer.learning.ridge import Rows, Sums, regression

ROUNDS = 2
"""Passes for the attention: the states that later draft steps read depend on it."""

STATE_ROUNDS = 2
"""How often predictions improve the estimates of last hidden states: ADR 0105."""

FOLDS = 2
"""Parts of the samples, each predicted from the others: with few rows, a regression only repeats the rows it was fitted to."""

KEY_SCALE = 3.5 * 2**0.5
"""Scale of queries and keys over their usual standard deviation: the own row's score is about 24 above the others'."""

MAX_SCALE = 100.0
"""Auxiliary states that many times larger than those of most samples are not fitted: they would outweigh all others."""

MLP_SCALE = 0.1
"""Scale of the MLP's last matrix if it is not fitted, because there are fewer rows than features: with few more rows
than features a fit gains little already."""

MAX_ROWS = 1024
"""Rows of auxiliary states in float32 at a time: 64 MB for a target of D 4096."""

MAX_WORK = 1e12
"""Rows times inputs squared, of the first regression and of the MLP's: 3,725 rows at D 4096. Without it, the fits of a wide
target would take hours of a core. Estimates of states repeat the first regression, in halves, `STATE_ROUNDS` times."""


def fit(
    network: DraftNetwork,
    samples: Sequence[Sample],
    vocabulary: DraftVocabulary,
    *,
    num_steps: int,
    check: Callable[[], None] = lambda: None,
) -> bool:
    """Replace the layer's weights and `fc` of `network`, whose head and norm are the target's already.

    `vocabulary` is the network's. False if a fit is impossible, because no sample tells the target's last hidden states or its
    logits, or their values are out of range; the network is then of no use. `check` is called before each part of the work, and
    may end it by an exception.
    """
    lessons = _comparable([sample for sample in samples if _tells_states(sample.teacher)])
    lessons = _affordable(lessons, (network.config.aux_size + network.config.hidden_size) ** 2)
    if not lessons:
        return False
    try:
        _fit(network, with_states(network, lessons, vocabulary, check), num_steps, check)
    except RuntimeError:  # torch.linalg's error is one
        return False
    return all(bool(p.isfinite().all()) for p in network.parameters())


def _tells_states(teacher: Teacher) -> bool:
    return isinstance(teacher, LastHidden) or teacher.log_sum_exp is not None


def _comparable(samples: Sequence[Sample]) -> list[Sample]:
    scales = [float(sample.aux.decoded().abs().max()) for sample in samples]
    limit = MAX_SCALE * sorted(scales)[len(scales) // 2] if scales else 0.0
    return [sample for sample, scale in zip(samples, scales, strict=True) if scale <= limit]


def _affordable(samples: Sequence[Sample], work: int) -> list[Sample]:
    """The first samples, at least one, whose outputs `MAX_WORK` allows, at so much work for each."""
    totals = accumulate(len(sample.ids) - sample.first_output for sample in samples)
    num = sum(total * work <= MAX_WORK for total in totals)
    return list(samples[: max(1, num)])


@torch.no_grad()
def _fit(network: DraftNetwork, samples: Sequence[Sample], num_steps: int, check: Callable[[], None]) -> None:
    c, layer = network.config, network.midlayer
    layer.self_attn.o_proj.weight.zero_()
    num_rows = _num_rows(samples, num_steps)
    device = network.fc.weight.device
    of_mlp = _affordable(samples, num_steps * c.intermediate_size**2)
    fits_mlp = sum(_num_rows(of_mlp, num_steps)) >= c.intermediate_size
    layer.mlp.down_proj.weight.mul_(0.0 if fits_mlp else MLP_SCALE)
    _set_attention(network)
    whole = _first_weights(network, samples, check)
    network.fc.weight.copy_(whole[: c.aux_size].T)
    del whole  # 0.3 GB at D 4096
    for _ in range(ROUNDS):
        missing = chain.from_iterable(_missing(network, sample, num_steps) for sample in checked(samples, check))
        rows = regression(missing, sum(num_rows), 2 * c.hidden_size, c.hidden_size, device)
        check()
        values, outputs = rows.solve_low_rank(c.num_kv_heads * c.head_dim)
        layer.self_attn.v_proj.weight.copy_(values.T)
        layer.self_attn.o_proj.weight.copy_(_per_query_head(network, outputs).T)
    if fits_mlp:
        missing = chain.from_iterable(_after_attention(network, sample, num_steps) for sample in checked(of_mlp, check))
        sums = Sums.of(missing, c.intermediate_size, c.hidden_size, device)
        check()
        layer.mlp.down_proj.weight.copy_(sums.solve().T)


@torch.no_grad()
def with_states(
    network: DraftNetwork,
    samples: Sequence[Sample],
    vocabulary: DraftVocabulary,
    check: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """The samples with last hidden states, estimated where the teacher shows likeliest tokens (expectation-maximisation:
    Dempster, Laird and Rubin 1977). Arguments as for `fit`."""
    found, weight = list(samples), network.norm.weight.float()
    vocabulary = vocabulary.to(weight.device)
    estimated = [number for number, sample in enumerate(samples) if not isinstance(sample.teacher, LastHidden)]
    for round_ in range(1 + STATE_ROUNDS if estimated else 0):
        for fold in range(FOLDS):
            others = [sample for number, sample in enumerate(found) if number % FOLDS != fold]
            whole = _first_weights(network, others, check) if round_ and others else None
            for number in (each for each in estimated if each % FOLDS == fold):
                check()
                sample, teacher = found[number], samples[number].teacher
                assert not isinstance(teacher, LastHidden)
                expected = (
                    weight.new_zeros(len(teacher), len(weight)) if whole is None else _predicted(network, sample, whole)
                )
                states = teacher.estimate_states(vocabulary, weight, expected) * weight
                found[number] = replace(sample, teacher=LastHidden(states.bfloat16()))  # half the memory of float32
    return found


def _predicted(network: DraftNetwork, sample: Sample, whole: Tensor) -> Tensor:
    """The states [R, D] of the teacher's rows, before the norm's weight: predictions where there are some, else as they are."""
    assert isinstance(sample.teacher, LastHidden)
    states = sample.teacher.states.float() / network.norm.weight
    predictions = torch.cat([states[:0], *(inputs @ whole for inputs, _ in _first_step(network, sample))])
    return torch.cat([states[: len(states) - len(predictions)], predictions])


def _first_weights(network: DraftNetwork, samples: Sequence[Sample], check: Callable[[], None]) -> Tensor:
    """[A + D, D] of the first step, from auxiliary states and the normed embedding."""
    c = network.config
    first = chain.from_iterable(_first_step(network, sample) for sample in checked(samples, check))
    num_rows = _num_rows(samples, 1)[0]
    device = network.fc.weight.device
    return regression(first, num_rows, c.aux_size + c.hidden_size, c.hidden_size, device).solve()


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


def _first_step(network: DraftNetwork, sample: Sample) -> Iterator[Rows]:
    """Inputs of the first step and the states that it should have, a few rows at a time."""
    aux, (rows, target) = sample.aux.decoded(), _targets(network, sample, 0)
    for first in range(0, len(target), MAX_ROWS):
        part = target[first : first + MAX_ROWS]
        chosen = slice(rows.start + first, rows.start + first + len(part))
        embedded = network.midlayer.input_layernorm(network.embedding[sample.ids[1:][chosen]].float())
        yield torch.cat([aux[chosen].float(), embedded], -1), part


def _missing(network: DraftNetwork, sample: Sample, num_steps: int) -> Iterator[Rows]:
    """For each step, the inputs of attention's own row, and what the state still lacks there."""
    layer, aux = network.midlayer, sample.aux.decoded().float()
    ids = _next_ids(sample, num_steps)
    states = [network.fuse(aux), *_states(network, sample, num_steps - 1)]
    for j, state in enumerate(states):
        rows, target = _targets(network, sample, j)
        embedded = layer.input_layernorm(network.embedding[ids[j : j + len(aux)]].float())[rows]
        normed = layer.hidden_norm(state[rows])
        residual = normed if network.config.norm_before_residual else state[rows]
        yield torch.cat([embedded, normed], -1), target - residual


def _after_attention(network: DraftNetwork, sample: Sample, num_steps: int) -> Iterator[Rows]:
    """For each step, the MLP's features, and what its state still lacks while the MLP adds nothing to it."""
    mlp = network.midlayer.mlp
    for j, state in enumerate(_states(network, sample, num_steps)):
        rows, target = _targets(network, sample, j)
        normed = network.midlayer.post_attention_layernorm(state[rows])
        with autocast(normed.device):
            features = mlp.features(normed)
        yield features, target - state[rows]


def _states(network: DraftNetwork, sample: Sample, num_steps: int) -> list[Tensor]:
    """The states [R, D] of so many steps from every row."""
    if not num_steps:
        return []
    aux, ids = sample.aux.decoded().float(), _next_ids(sample, num_steps)
    with autocast(aux.device):  # as in serving, and in a third of the time
        unrolled = network.unroll(aux[None], ids[None, : len(aux) + num_steps - 1], num_steps=num_steps)
    return [state[0].float() for state in unrolled]


def _next_ids(sample: Sample, num_steps: int) -> Tensor:
    return torch.cat([sample.ids[1:], torch.zeros(num_steps, dtype=torch.long)])


def _num_rows(samples: Sequence[Sample], num_steps: int) -> list[int]:
    """Rows of each step."""
    return [sum(_num_targets(sample, j) for sample in samples) for j in range(num_steps)]


def _num_targets(sample: Sample, j: int) -> int:
    return max(0, len(sample.ids) - _first_target(sample, j))


def _targets(network: DraftNetwork, sample: Sample, j: int) -> tuple[slice, Tensor]:
    """Rows whose step j predicts an output token, and the states [N, D] that they should have."""
    first = _first_target(sample, j)
    assert isinstance(sample.teacher, LastHidden)
    states = sample.teacher.states[first - 1 - sample.first_teacher_row :].float()
    start = first - 2 - j
    return slice(start, start + len(states)), states / network.norm.weight


def _first_target(sample: Sample, j: int) -> int:
    """The first output token that step j predicts."""
    return max(sample.first_output, sample.first_teacher_row + 1, FIRST_TRAINABLE + j)
