"""The EAGLE-3 proposer: the draft reads the target's states of accepted tokens, then drafts a chain on its own states.

Its cache mirrors the target's: row t holds (state at t, token t + 1). Rows that the draft wrote from its own states are
overwritten by the target's states once the tokens are accepted.
"""

import math
from itertools import accumulate

import torch
from torch import Tensor

from updraft_draft.network import DraftNetwork
from updraft_inference.torch_engine.drafting.chain import Chain, Prediction, Vocabulary
from updraft_inference.torch_engine.drafting.mixture import Mixture
from updraft_inference.torch_engine.model.draft import PackedDraft, PackedWeights
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.sequence import Sequence
from updraft_kernels.loader import Kernels

MAX_PENDING_ROWS = 48
"""Once a sequence has more unread rows, all sequences read theirs except the last row, with which drafting begins. One forward
for all costs little; one per sequence costs as much each."""

MAX_ROWS_TOGETHER, MAX_ROWS_PADDED = 64, 8
"""Longest backlog that attends together with others: without padding, and where others are padded to it."""


class NotFiniteError(RuntimeError):
    """The draft's states of `sequences` are not finite."""

    def __init__(self, sequences: list[Sequence]) -> None:
        super().__init__("the draft's states are not finite")
        self.sequences = sequences


class EagleProposer:
    """A draft network with the cache of its one layer. Not thread-safe: the engine thread owns it."""

    def __init__(
        self, network: DraftNetwork, *, num_slots: int, num_positions: int, library: Kernels | None = None
    ) -> None:
        self.network = network
        shape = CacheShape(
            num_layers=1,
            num_slots=num_slots,
            num_positions=num_positions,
            num_kv_heads=network.config.num_kv_heads,
            head_dim=network.config.head_dim,
        )
        self._cache = SlotCache(shape, like=network.embedding)
        self._vocabulary = Vocabulary(network.token_ids, network.config.vocab_size)
        self._served = PackedDraft(network, library)

    def exchange(self, weights: PackedWeights) -> None:
        """Serve these weights and the network's vocabulary, which belong together. The network holds both by now."""
        self._served.exchange(weights)
        if not self._vocabulary.is_of(self.network):
            self._vocabulary = Vocabulary(self.network.token_ids, self.network.config.vocab_size)

    def is_current(self) -> bool:
        """Whether the weights that draft, and the tokens that they stand for, are those of the network."""
        return self._vocabulary.is_of(self.network) and self._served.is_current()

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Copy the draft's rows of the first `length` positions of one slot into another."""
        self._cache.copy_prefix(source, slot, length)

    def forget(self, sequence: Sequence) -> None:
        """Drop all state of a sequence that will not draft again."""
        # The slot is wiped because a mask hides by a weight of 0, and 0 times a number that is not finite is not 0.
        self._cache.wipe(sequence.slot)
        sequence.num_computed_draft_tokens = 0
        sequence.pending_aux.clear()

    def observe(self, sequence: Sequence, aux_RA: Tensor) -> None:
        """Keep the states until drafting needs them."""
        sequence.pending_aux.append(aux_RA.clone())  # a view would keep all rows of the step alive

    def keep_up(self, sequences: list[Sequence]) -> None:
        """Read where states pile up. RuntimeError as in `propose`."""
        pending = {sequence: sequence.num_pending for sequence in sequences}
        if max(pending.values(), default=0) > MAX_PENDING_ROWS:
            behind = sorted((sequence for sequence in sequences if pending[sequence] > 1), key=lambda s: s.slot)
            self._read(behind, [pending[sequence] - 1 for sequence in behind])

    def finish(self, sequence: Sequence) -> None:
        """Read what is pending, for later requests with the same beginning. RuntimeError as in `propose`."""
        # A row also reads the token after it, which the last one does not have yet.
        num = min(len(sequence.ids) - 1 - sequence.num_computed_draft_tokens, sequence.num_pending)
        if num > 0:
            self._read([sequence], [num])

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence], k: int, mixture: Mixture | None = None) -> list[Proposal]:
        """Draft `k` tokens for each sequence, ordered by slot.

        RuntimeError: drafting failed. The sequences then go on without the draft model and are to be forgotten.
        """
        mixture = mixture or Mixture()
        state_BD = self._read(sequences, [sequence.num_pending for sequence in sequences])
        slots = [s.slot for s in sequences]
        chains = [Chain(sequence, self._vocabulary) for sequence in sequences]
        for j in range(k):
            for chain, prediction in zip(chains, self._predictions(state_BD), strict=True):
                chain.extend(prediction, mixture)
            if j < k - 1:
                ids_B = torch.tensor([chain.ids[-1] for chain in chains], device=state_BD.device)
                positions = [s.num_computed_draft_tokens + j for s in sequences]
                batch = self._cache.batch(slots, positions, [1] * len(slots))
                state_BD = self._served.forward(state_BD, ids_B, [batch], self._cache)
        return [chain.proposal(mixture) for chain in chains]

    @torch.inference_mode()
    def _read(self, sequences: list[Sequence], counts: list[int]) -> Tensor:
        """Feed so many pending states of each sequence, at least one, in one forward.

        Returns the draft's state after the last, [B, D].
        """
        rows = dict(zip(sequences, counts, strict=True))
        most = MAX_ROWS_PADDED if self._served.pads else MAX_ROWS_TOGETHER
        together = [s for s in sequences if rows[s] <= most]
        groups = [group for group in (together, *([s] for s in sequences if s not in together)) if group]
        fed = [sequence for group in groups for sequence in group]
        pending = [torch.cat(sequence.pending_aux) for sequence in fed]
        aux_RA = torch.cat([aux[: rows[s]] for s, aux in zip(fed, pending, strict=True)])
        ids = [token for s in fed for token in s.ids[s.num_computed_draft_tokens + 1 :][: rows[s]]]
        batches = [
            self._cache.batch(
                [s.slot for s in group], [s.num_computed_draft_tokens for s in group], [rows[s] for s in group]
            )
            for group in groups
        ]
        ids_R = torch.tensor(ids, device=aux_RA.device)
        state_RD = self._served.forward(self._served.fuse(aux_RA), ids_R, batches, self._cache)
        for s, aux in zip(fed, pending, strict=True):
            s.num_computed_draft_tokens += rows[s]
            s.pending_aux = [aux[rows[s] :].clone()] if len(aux) > rows[s] else []
        ends = dict(zip(fed, accumulate(rows[s] for s in fed), strict=True))
        last = state_RD[[ends[sequence] - 1 for sequence in sequences]]
        # Each row attends to all before it, so one that is not finite shows in the last one.
        are_finite = last.isfinite().all(-1).tolist()
        if not all(are_finite):
            raise NotFiniteError([s for s, is_finite in zip(sequences, are_finite, strict=True) if not is_finite])
        return last

    def _predictions(self, state_BD: Tensor) -> list[Prediction]:
        """For the next place of each chain."""
        logits_BV, top = self._served.head(state_BD)
        log_sums = top.log_sum_R.tolist()
        if not all(map(math.isfinite, log_sums)):
            raise RuntimeError("the draft's distribution is not finite")
        tops = zip(logits_BV, top.choice_R.tolist(), top.best_R.tolist(), log_sums, strict=True)
        return [Prediction(*each) for each in tops]
