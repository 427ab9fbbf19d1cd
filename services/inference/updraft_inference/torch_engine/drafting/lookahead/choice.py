"""The choice itself, as a pure function: for each sequence a drafter and a length that give most tokens a second.

Expected tokens of a step are one a sequence and the survival of every draft that is verified (Leviathan et al. 2023,
equation 1, without its assumption that all drafts are kept equally often). Survival never rises along a chain, so for one
drafter a sequence the best set of r rows takes the likeliest drafts first, across all sequences: unequal lengths come by
themselves.

Tensors: W ways to give each sequence a drafter, L lengths of chains, B sequences, K positions of a draft, R rows for drafts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from updraft_inference.engine import Drafter

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Lengths = npt.NDArray[np.int_]

MARGIN = 1.05
"""Speculation has to promise so much more than none, and the draft model so much more than lookups alone: costs and rates are
measured, measurements err, and the best of many promises is rather one that errs upwards."""


@dataclass(frozen=True, slots=True)
class Option:
    """What one drafter could do for one sequence: `survival[i]` is the probability that its first i + 1 drafts are kept."""

    drafter: Drafter
    survival: Sequence[float]


@dataclass(frozen=True, slots=True)
class Choice:
    """Of one sequence. `length` drafts by `drafter`; none if it is 0."""

    drafter: Drafter = Drafter.NONE
    length: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """verify: seconds to verify 0, 1, 2, ... rows of this batch, up to all that may be drafted. chain(sequences, length):
    seconds to draft with the model, for so many sequences, chains of so many tokens."""

    verify: Sequence[float]
    chain: Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Chosen:
    """For each sequence a choice. With chains of the draft model, `token_s` is what a token would take without them, and all
    tokens of the step are expected to take `saved_s` less than that."""

    choices: list[Choice]
    token_s: float = 0.0
    saved_s: float = 0.0


def choose(options: Sequence[Sequence[Option]], costs: Costs, *, given: float = 0.0) -> Chosen:
    """Choose for every sequence of a batch; `options[i]` are those of sequence i, perhaps none.

    `given` tokens are expected of others in the same step, whose choice is made and whose rows are part of `costs`: what
    is drafted here slows them too.
    """
    batch = len(options)
    width = max((len(option.survival) for mine in options for option in mine), default=0)
    speed = (batch + given) / costs.verify[batch]
    chosen = Chosen([Choice()] * batch)
    if not width:
        return chosen
    row_s = (costs.verify[2 * batch] - costs.verify[batch]) / batch
    lookups_BK, chains_BK = (_table(options, drafter, width) for drafter in (Drafter.NGRAM, Drafter.EAGLE3))
    alive_WBK, is_chain_WB = _ways(lookups_BK, chains_BK, MARGIN * speed * row_s)
    lengths_WB, gains_W = _best_lengths(alive_WBK, is_chain_WB, costs, batch + given)
    drafting_W = _drafting_s(np.where(is_chain_WB, lengths_WB, 0), costs)  # who got no draft after all costs nothing
    speeds_W = gains_W / (np.asarray(costs.verify)[batch + lengths_WB.sum(-1)] + drafting_W)
    least = MARGIN * speed
    if speeds_W[0] > least:
        speed, least = speeds_W[0], MARGIN * speeds_W[0]
        chosen = Chosen(_choices(lengths_WB[0], is_chain_WB[0]))
    best = int(speeds_W.argmax())
    if speeds_W[best] > least:
        saved_s = float(gains_W[best] / speed - gains_W[best] / speeds_W[best])
        chosen = Chosen(_choices(lengths_WB[best], is_chain_WB[best]), token_s=float(1 / speed), saved_s=saved_s)
    return chosen


def _table(options: Sequence[Sequence[Option]], drafter: Drafter, width: int) -> Floats:
    """Survivals [B, K] of one drafter, 0 where it has no draft."""
    table = np.zeros((len(options), width))
    for i, mine in enumerate(options):
        for option in mine:
            if option.drafter is drafter:
                table[i, : len(option.survival)] = option.survival
    return table


def _ways(lookups_BK: Floats, chains_BK: Floats, row: float) -> tuple[Floats, Flags]:
    """Lookups alone, then the model's chains up to each length, without lookups and with: survivals [W, B, K], and whether
    they are of chains [W, B].

    With both, each sequence has what gains it more tokens, less what so many rows are worth: `row` tokens each.
    """
    batch, width = chains_BK.shape
    depth = int((chains_BK > 0).any(0).sum())
    is_short_LK = np.arange(width) < np.arange(1, depth + 1)[:, None]
    chains_LBK = np.where(is_short_LK[:, None], chains_BK, 0.0)
    of_lookup_B = np.maximum(lookups_BK - row, 0.0).sum(-1)
    of_chain_LB = np.maximum(chains_LBK - row, 0.0).sum(-1)
    is_chain_LB = (chains_LBK[..., 0] > 0) & (of_chain_LB >= of_lookup_B)
    alive_WBK = (lookups_BK[None], chains_LBK, np.where(is_chain_LB[..., None], chains_LBK, lookups_BK))
    is_chain_WB = (np.zeros((1, batch), dtype=bool), chains_LBK[..., 0] > 0, is_chain_LB)
    return np.concatenate(alive_WBK), np.concatenate(is_chain_WB)


def _best_lengths(alive_WBK: Floats, is_chain_WB: Flags, costs: Costs, least: float) -> tuple[Lengths, Floats]:
    """Of each way the lengths [W, B] that give most tokens a second, and the tokens [W], of which `least` come anyway."""
    ways, batch, width = alive_WBK.shape
    alive_WR = alive_WBK.reshape(ways, batch * width)
    order_WR = np.argsort(-alive_WR, axis=-1, kind="stable")  # of equal ones the earlier of a chain comes first
    gains_WR = np.full((ways, batch * width + 1), least, dtype=float)
    gains_WR[:, 1:] += np.take_along_axis(alive_WR, order_WR, -1).cumsum(-1)
    verify_s = np.asarray(costs.verify[batch : batch + batch * width + 1])
    drafting_W = _drafting_s(np.where(is_chain_WB, (alive_WBK > 0).sum(-1), 0), costs)
    speeds_WR = gains_WR[:, : len(verify_s)] / (verify_s + drafting_W[:, None])
    is_draft_WR = np.arange(len(verify_s)) <= (alive_WR > 0).sum(-1)[:, None]  # the others only pad
    rows_W = np.where(is_draft_WR, speeds_WR, 0.0).argmax(-1)
    is_taken_WR = np.zeros(alive_WR.shape, dtype=bool)
    np.put_along_axis(is_taken_WR, order_WR, np.arange(batch * width) < rows_W[:, None], -1)
    return is_taken_WR.reshape(alive_WBK.shape).sum(-1), gains_WR[np.arange(ways), rows_W]


def _drafting_s(lengths_WB: Lengths, costs: Costs) -> Floats:
    """Seconds [W] in the draft model, for its chains of so many tokens; 0: none."""
    chains = zip((lengths_WB > 0).sum(-1).tolist(), lengths_WB.max(-1).tolist(), strict=True)
    return np.array([costs.chain(num, longest) if num else 0.0 for num, longest in chains])


def _choices(lengths_B: Lengths, is_chain_B: Flags) -> list[Choice]:
    pairs = zip(lengths_B.tolist(), is_chain_B.tolist(), strict=True)
    return [Choice(Drafter.EAGLE3 if is_chain else Drafter.NGRAM, n) if n else Choice() for n, is_chain in pairs]
