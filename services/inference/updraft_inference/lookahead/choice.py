"""The choice itself, as a pure function: for each sequence a drafter and a length that give most tokens a second.

Expected tokens of a step are one a sequence and the survival of every draft that is verified (Leviathan et al. 2023,
equation 1, without its assumption that all drafts are kept equally often). Survival never rises along a chain, so for one
drafter a sequence the best set of r rows takes the likeliest drafts first, across all sequences: unequal lengths come by
themselves.

Tensors: W ways to give each sequence a drafter, B sequences, K positions of a draft, R rows beside the B of plain decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from updraft_inference.engine.port import Drafter

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MARGIN = 1.05
"""Speculation has to promise so much more than none: costs and rates are measured, measurements err, and the best of many
promises is rather one that errs upwards."""


@dataclass(frozen=True, slots=True)
class Option:
    """What one drafter could do for one sequence: `survival[i]` is the probability that its first i + 1 drafts are kept.
    `entry_s`: what it costs besides, in seconds, however many it drafts."""

    drafter: Drafter
    survival: Sequence[float]
    entry_s: float = 0.0


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


def choose(options: Sequence[Sequence[Option]], costs: Costs, *, given: float = 0.0) -> list[Choice]:
    """Choose for every sequence of a batch; `options[i]` are those of sequence i, perhaps none.

    `given` tokens are expected of others in the same step, whose choice is made and whose rows are part of `costs`: what
    is drafted here slows them too.
    """
    batch = len(options)
    width = max((len(option.survival) for mine in options for option in mine), default=0)
    best = _Drafts([Choice()] * batch, MARGIN * (batch + given) / costs.verify[batch])
    if not width:
        return best.choices
    step = _Step(options, costs, width=width, given=given)
    if step.lookups_BK.any():
        best = max(best, step.best(*step.lookups_alone()), key=lambda drafts: drafts.speed)
    if step.depth:
        best = max(best, step.best(*step.with_chains(best.speed)), key=lambda drafts: drafts.speed)
    return best.choices


@dataclass(frozen=True, slots=True)
class _Drafts:
    choices: list[Choice]
    speed: float
    """Expected tokens a second."""


class _Step:
    """The options of all sequences side by side, padded with drafts that are never kept."""

    def __init__(self, options: Sequence[Sequence[Option]], costs: Costs, *, width: int, given: float) -> None:
        self.lookups_BK, self.chains_BK = np.zeros((2, len(options), width))
        self.depth = 0
        """Of the longest chain."""
        self._entry_s = np.zeros(len(options))
        self._costs, self._given = costs, given
        self._verify_s = np.asarray(costs.verify)
        for i, mine in enumerate(options):
            for option in mine:
                is_chain, length = option.drafter is Drafter.EAGLE3, len(option.survival)
                (self.chains_BK if is_chain else self.lookups_BK)[i, :length] = option.survival
                if is_chain:
                    self.depth, self._entry_s[i] = max(self.depth, length), option.entry_s

    def lookups_alone(self) -> tuple[Floats, Flags]:
        """One way, as survivals [W, B, K] and whether they are of chains [W, B]."""
        return self.lookups_BK[None], np.zeros((1, len(self._entry_s)), dtype=bool)

    def with_chains(self, speed: float) -> tuple[Floats, Flags]:
        """Ways with the model's chains up to each length, without lookups and with.

        Each sequence has what gains it more tokens, less what rows and seconds would bring elsewhere at this speed
        (Dinkelbach 1967: at the best rate nothing is worth more than its price).
        """
        batch, width = self.chains_BK.shape
        row = speed * (self._verify_s[2 * batch] - self._verify_s[batch]) / batch
        of_lookup_B = np.maximum(self.lookups_BK - row, 0.0).sum(-1)
        of_chain_WB = np.maximum(self.chains_BK - row, 0.0).cumsum(-1).T[: self.depth] - speed * self._entry_s
        has_chain_B = self.chains_BK[:, 0] > 0
        alone_WB, mixed_WB = has_chain_B & (of_chain_WB >= 0), has_chain_B & (of_chain_WB >= of_lookup_B)
        is_short = np.arange(width) < np.arange(1, self.depth + 1)[:, None, None]
        chains_WBK = np.where(is_short, self.chains_BK, 0.0)
        survivals = (
            np.where(alone_WB[..., None], chains_WBK, 0.0),
            np.where(mixed_WB[..., None], chains_WBK, self.lookups_BK),
        )
        return np.concatenate(survivals), np.concatenate((alone_WB, mixed_WB))

    def best(self, alive_WBK: Floats, is_chain_WB: Flags) -> _Drafts:
        """The best of some ways, each with its best lengths."""
        ways, batch, width = alive_WBK.shape
        alive_WR = alive_WBK.reshape(ways, -1)
        # Stable: of equal ones the earlier draft of a chain comes first.
        order_WR = np.argsort(-alive_WR, axis=-1, kind="stable")
        gains_WR = np.full((ways, batch * width + 1), float(batch + self._given))
        gains_WR[:, 1:] += np.take_along_axis(alive_WR, order_WR, -1).cumsum(-1)
        verify_s = self._verify_s[batch : batch + gains_WR.shape[1]]
        gains_WR = gains_WR[:, : len(verify_s)]
        whole_WB = np.where(is_chain_WB, (alive_WBK > 0).sum(-1), 0)
        rows_W = (gains_WR / (verify_s + self._drafting_s(whole_WB)[:, None])).argmax(-1)
        taken_WR = np.zeros(alive_WR.shape, dtype=bool)
        np.put_along_axis(taken_WR, order_WR, np.arange(batch * width) < rows_W[:, None], -1)
        lengths_WB = taken_WR.reshape(alive_WBK.shape).sum(-1)
        # Whoever got no draft after all costs nothing.
        drafting_s = self._drafting_s(np.where(is_chain_WB, lengths_WB, 0))
        speeds_W = gains_WR[np.arange(ways), rows_W] / (verify_s[rows_W] + drafting_s)
        way = int(speeds_W.argmax())
        drafters = [Drafter.EAGLE3 if is_chain else Drafter.NGRAM for is_chain in is_chain_WB[way]]
        choices = [
            Choice(drafter, n) if n else Choice() for drafter, n in zip(drafters, lengths_WB[way].tolist(), strict=True)
        ]
        return _Drafts(choices, float(speeds_W[way]))

    def _drafting_s(self, lengths_WB: npt.NDArray[np.int_]) -> Floats:
        """Seconds of each way in the draft model, for its chains of so many tokens; 0: none."""
        is_made_WB = lengths_WB > 0
        chains = zip(is_made_WB.sum(-1).tolist(), lengths_WB.max(-1).tolist(), strict=True)
        seconds = [self._costs.chain(num, longest) if num else 0.0 for num, longest in chains]
        entries_s: Floats = np.where(is_made_WB, self._entry_s, 0.0).sum(-1)
        return entries_s + seconds
