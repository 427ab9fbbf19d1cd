"""A growing chain: at each place it takes a looked-up token, or else the draft model's.

The model's token is the likeliest for a greedy request, and drawn from q for a sampled one. Where it is drawn, the choice
between the two is made before and does not depend on it. A token then has the distribution that verification is told: q, or a
point mass for a looked-up one, so speculative sampling stays lossless (`updraft_draft.acceptance`).

Tensors: V draft vocabulary; k tokens of a chain.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import Tensor

from updraft_draft.acceptance import draw
from updraft_draft.network import DraftNetwork
from updraft_inference.torch_engine.drafting.mixture import Mixture
from updraft_inference.torch_engine.proposal import CHAIN_ALONE, Offer, Place, Proposal
from updraft_inference.torch_engine.sampling import noise
from updraft_inference.torch_engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Prediction:
    """The draft model's prediction for one place. `index`: its likeliest token, whose logit is `best`; `log_sum`: logsumexp of
    all logits."""

    logits_V: Tensor
    index: int
    best: float
    log_sum: float

    def log_prob(self, index: int) -> float:
        """log q at temperature 1."""
        logit = self.best if index == self.index else float(self.logits_V[index])
        return logit - self.log_sum

    def at(self, temperature: float) -> Tensor:
        """q at this temperature, float32 [V], on the CPU."""
        return (self.logits_V.float() / temperature).softmax(-1).cpu()


class Vocabulary:
    """The tokens that a draft model can propose, for a target with `target_size` tokens. `token_ids`: int64 [V], ascending."""

    def __init__(self, token_ids: Tensor, target_size: int) -> None:
        self.token_ids, self.target_size = token_ids.cpu(), target_size
        self._ids: list[int] = self.token_ids.tolist()  # a tensor is slow at single tokens

    def is_of(self, network: DraftNetwork) -> bool:
        """Whether these are the network's tokens."""
        token_ids = network.token_ids.cpu()
        return torch.equal(self.token_ids, token_ids) and self._ids == token_ids.tolist()

    def token_id(self, index: int) -> int:
        """The target's token."""
        return self._ids[index]

    def index(self, token_id: int) -> int | None:
        """Draft index of a token of the target; None if the draft model cannot propose it."""
        index = bisect_left(self._ids, token_id)
        return index if index < len(self._ids) and self._ids[index] == token_id else None


@dataclass(slots=True)
class Chain:
    """The draft of one sequence."""

    sequence: Sequence
    vocabulary: Vocabulary
    ids: list[int] = field(default_factory=list)
    _log_probs: list[float] = field(default_factory=list)
    _q: list[Tensor | None] = field(default_factory=list)
    """The distribution that each token was drawn from; None for a point mass."""
    _places: dict[int, Place] = field(default_factory=dict)

    @property
    def _generator(self) -> torch.Generator | None:
        """Draws the model's tokens from q. With a seed, noise decides instead, and it decides for the target too."""
        return self.sequence.generator if self.sequence.request.sampling.seed is None else None

    def extend(self, prediction: Prediction, mixture: Mixture) -> None:
        """Take a token for the next place."""
        sampling, index, q_V = self.sequence.request.sampling, prediction.index, None
        if self.sequence.generator is not None:
            q_V = prediction.at(sampling.temperature)
        if q_V is not None and sampling.seed is not None:
            index = self._winner(q_V, sampling.seed)
        looked_up = self._looked_up(prediction, index, q_V, mixture)
        if looked_up is not None:
            self._add(looked_up, 0.0, None)
            return
        if q_V is not None and self._generator is not None:
            index = draw(q_V, self._generator)
        self._add(self.vocabulary.token_id(index), prediction.log_prob(index), q_V)

    def proposal(self, mixture: Mixture) -> Proposal:
        """The finished chain, with q spread over the target's vocabulary."""
        q = None if self.sequence.generator is None else torch.zeros(len(self.ids), self.vocabulary.target_size)
        for row, token, q_V in zip([] if q is None else q, self.ids, self._q, strict=False):
            if q_V is None:
                row[token] = 1.0
            else:
                row[self.vocabulary.token_ids] = q_V
        return Proposal(
            drafter=mixture.drafter(self.sequence),
            ids=self.ids,
            log_probs=self._log_probs,
            q=q,
            source=CHAIN_ALONE,
            places=self._places,
        )

    def _looked_up(self, prediction: Prediction, index: int, q_V: Tensor | None, mixture: Mixture) -> int | None:
        """The token that lookup offers, if it is another one than the model's, at `index`, and is taken."""
        own_id, matches = self.vocabulary.token_id(index), mixture.matches(self.sequence, self.ids)
        if all(match.ids == [own_id] for match in matches):
            return None

        def q(index: int) -> float:
            return math.exp(prediction.log_prob(index)) if q_V is None else float(q_V[index])

        offers = [Offer(own_id, CHAIN_ALONE, q(index))]
        for (token_id,), source in matches:
            known = self.vocabulary.index(token_id)
            offers.append(Offer(token_id, source, 0.0 if known is None else q(known)))
        place = Place(offers, is_sampled=q_V is not None, is_drawn=self._generator is not None)
        place.taken = mixture.take(self.sequence, place)
        self._places[len(self.ids)] = place
        return offers[place.taken].token_id if place.taken else None

    def _add(self, token_id: int, log_prob: float, q_V: Tensor | None) -> None:
        self.ids.append(token_id)
        self._log_probs.append(log_prob)
        self._q.append(q_V)

    def _winner(self, q_V: Tensor, seed: int) -> int:
        """The token that wins by the noise that the target will use: both agree as often as their distributions allow."""
        position, known = self.sequence.num_output + len(self.ids), self.sequence.drafted_noise
        if position not in known:
            known[position] = noise.exponential_noise(seed, position, self.vocabulary.target_size)
        return noise.first(q_V, known[position][self.vocabulary.token_ids])
