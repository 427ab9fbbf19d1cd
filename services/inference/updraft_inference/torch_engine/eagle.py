"""The EAGLE-3 drafter: feeds the draft with the target's states of confirmed tokens, then drafts a chain on its own states.

Its cache mirrors the target's: row t holds (state at t, token t + 1). Rows that the draft wrote from its own states are
overwritten by the target's states once the tokens are confirmed.
"""

import math
from itertools import accumulate

import torch
from torch import Tensor

from updraft_draft.layers import grouped_attention
from updraft_draft.network import DraftNetwork
from updraft_inference.engine.port import Drafter
from updraft_inference.torch_engine import seeded
from updraft_inference.torch_engine.draft import Packed, ServedDraft
from updraft_inference.torch_engine.kv_cache import Batch, CacheShape, SlotCache
from updraft_inference.torch_engine.sequence import Proposal, Sequence

MAX_PENDING_ROWS = 64
"""A sequence that does not draft now is fed at least this often, so that its states do not pile up."""

MAX_ROWS_TOGETHER = 8
"""Longest backlog that attends together with others, who are padded to it."""


class EagleDrafter:
    """A draft network with the cache of its one layer. Not thread-safe: the engine thread owns it."""

    def __init__(self, network: DraftNetwork, *, num_slots: int, num_positions: int) -> None:
        self.network = network
        shape = CacheShape(
            num_layers=1,
            num_slots=num_slots,
            num_positions=num_positions,
            num_kv_heads=network.config.num_kv_heads,
            head_dim=network.config.head_dim,
        )
        self._cache = SlotCache(shape, like=network.embedding)
        self._token_ids = network.token_ids
        self._served = ServedDraft(network)

    def exchange(self, weights: Packed) -> None:
        """The network holds other weights: these."""
        self._served.exchange(weights)

    def is_current(self) -> bool:
        """What drafts is what the network holds."""
        return self._served.is_current()

    def take_over(self, source: int, slot: int, length: int) -> None:
        """Copy what the draft holds of the first `length` positions of one slot into another one."""
        self._cache.take_over(source, slot, length)

    def forget(self, sequence: Sequence) -> None:
        """Wipe the slot of a sequence that will not draft again. What is not finite would reach others through the mask:
        it hides by a weight of 0, and 0 times that is not 0."""
        self._cache.wipe(sequence.slot)
        sequence.num_draft_read = 0
        sequence.pending_aux.clear()

    def observe(self, sequence: Sequence, aux: Tensor) -> None:
        """Take the states [rows, A] of newly confirmed positions, at least one. They are read when drafting needs them.
        RuntimeError as of `propose`."""
        # Only what came before: its next tokens are known, and drafting always finds an unread row.
        if _num_pending(sequence) > MAX_PENDING_ROWS:
            self._read([sequence])
        sequence.pending_aux.append(aux.clone())  # a view would keep what the whole step has read

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence], k: int) -> list[Proposal]:
        """Draft `k` tokens for each sequence, ordered by slot. RuntimeError, torch's or ours, where the network fails:
        nothing of these sequences may be read then but by `forget`."""
        state_BD = self._read(sequences)
        slots = [s.slot for s in sequences]
        chains: list[_Chain] = [_Chain() for _ in sequences]
        for j in range(k):
            ids = self._choose(sequences, chains, self._served.logits(state_BD))
            if j < k - 1:
                positions = [s.num_draft_read + j for s in sequences]
                state_BD = self._forward(state_BD, ids, [self._cache.batch(slots, positions, [1] * len(slots))])
        return [chain.proposal(self.network.config.vocab_size, self._token_ids) for chain in chains]

    @torch.inference_mode()
    def _read(self, sequences: list[Sequence]) -> Tensor:
        """Feed all pending states in one forward; return the draft's state after the last one of each, [B, D]."""
        together = [s for s in sequences if _num_pending(s) <= MAX_ROWS_TOGETHER]
        groups = [group for group in (together, *([s] for s in sequences if s not in together)) if group]
        fed = [sequence for group in groups for sequence in group]
        counts = [_num_pending(sequence) for sequence in fed]
        aux_RA = torch.cat([rows for sequence in fed for rows in sequence.pending_aux])
        ids = [token for s, n in zip(fed, counts, strict=True) for token in s.ids[s.num_draft_read + 1 :][:n]]
        batches = [
            self._cache.batch(
                [s.slot for s in group], [s.num_draft_read for s in group], [_num_pending(s) for s in group]
            )
            for group in groups
        ]
        state_RD = self._forward(self._served.fuse(aux_RA), torch.tensor(ids, device=aux_RA.device), batches)
        for sequence, n in zip(fed, counts, strict=True):
            sequence.num_draft_read += n
            sequence.pending_aux.clear()
        ends = dict(zip(fed, accumulate(counts), strict=True))
        last = state_RD[[ends[sequence] - 1 for sequence in sequences]]
        # Each row sees all before it: one that was not finite would show in the last one.
        if not bool(last.isfinite().all()):
            raise RuntimeError("the draft's states are not finite")
        return last

    def _forward(self, x_RD: Tensor, ids_R: Tensor, batches: list[Batch]) -> Tensor:
        rows = self._served.rows(x_RD, ids_R, torch.cat([batch.positions_R for batch in batches]))
        self._cache.write(0, torch.cat([batch.rows_R for batch in batches]), rows.k, rows.v)
        attended = [
            batch.collect(grouped_attention(batch.spread(own), *self._cache.read(0, batch), batch.mask_BTS))
            for batch, own in zip(batches, torch.split(rows.q, [len(b.rows_R) for b in batches]), strict=True)
        ]
        return self._served.finish(x_RD, torch.cat(attended))

    def _choose(self, sequences: list[Sequence], chains: list["_Chain"], logits_BV: Tensor) -> Tensor:
        """One more draft for each: the likeliest for greedy requests, drawn from q for sampled ones. -> target ids [B]."""
        log_q = logits_BV.float().log_softmax(-1)
        choice = log_q.argmax(-1)
        for i, (sequence, chain) in enumerate(zip(sequences, chains, strict=True)):
            if sequence.generator is not None:
                q = (logits_BV[i].float() / sequence.request.sampling.temperature).softmax(-1).cpu()
                choice[i] = self._draw(q, sequence, len(chain.ids))
                chain.q.append(q)
        ids = self._token_ids[choice]
        picked = log_q.gather(-1, choice[:, None])[:, 0].tolist()
        if not all(map(math.isfinite, picked)):
            raise RuntimeError("the draft's distribution is not finite")
        for chain, token, log_prob in zip(chains, ids.tolist(), picked, strict=True):
            chain.ids.append(token)
            chain.log_probs.append(log_prob)
        return ids

    def _draw(self, q: Tensor, sequence: Sequence, num_ahead: int) -> int:
        """A draft drawn from q [draft vocabulary]; with a seed by the noise that the target will choose by: they then agree
        as often as their distributions allow."""
        seed = sequence.request.sampling.seed
        if seed is None:
            return int(torch.multinomial(q, 1, generator=sequence.generator))
        clocks = seeded.clocks(seed, sequence.num_output + num_ahead, self.network.config.vocab_size)
        return seeded.first(q, clocks[self._token_ids.cpu()])


def _num_pending(sequence: Sequence) -> int:
    return sum(map(len, sequence.pending_aux))


class _Chain:
    """One sequence's drafts while they grow."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.q: list[Tensor] = []

    def proposal(self, vocab_size: int, token_ids: Tensor) -> Proposal:
        """The finished chain, its q spread over the target's vocabulary."""
        q = None
        if self.q:
            q = torch.zeros(len(self.q), vocab_size)
            q[:, token_ids.cpu()] = torch.stack(self.q)
        return Proposal(drafter=Drafter.EAGLE3, ids=self.ids, log_probs=self.log_probs, q=q)
