"""The EAGLE-3 drafter: feeds the draft with the target's states of confirmed tokens, then drafts a chain on its own states.

Its cache mirrors the target's: row t holds (state at t, token t + 1). Rows that the draft wrote from its own states are
overwritten by the target's states once the tokens are confirmed.
"""

import math
from itertools import accumulate

import torch
from torch import Tensor

from updraft_draft.acceptance import draw
from updraft_draft.network import DraftNetwork
from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.model.draft import PackedWeights, ServedDraft
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.sampling import noise
from updraft_inference.torch_engine.sequence import Proposal, Sequence
from updraft_kernels.loader import Kernels

MAX_PENDING_ROWS = 48
"""Once a sequence is more behind, all read what they are behind but its last row, which drafting begins with: together it costs
little, and each by itself as much again."""

MAX_ROWS_TOGETHER, MAX_ROWS_PADDED = 64, 8
"""Longest backlog that attends together with others, what was pending and a step's rows more; and where others are padded to
it."""


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
        self._token_ids = network.token_ids
        self._served = ServedDraft(network, library)

    def exchange(self, weights: PackedWeights) -> None:
        """The network holds other weights: these."""
        self._served.exchange(weights)

    def is_current(self) -> bool:
        """What drafts is what the network holds."""
        return self._served.is_current()

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Copy what the draft holds of the first `length` positions of one slot into another one."""
        self._cache.copy_prefix(source, slot, length)

    def forget(self, sequence: Sequence) -> None:
        """Wipe the slot of a sequence that will not draft again. What is not finite would reach others through the mask:
        it hides by a weight of 0, and 0 times that is not 0."""
        self._cache.wipe(sequence.slot)
        sequence.num_computed_draft_tokens = 0
        sequence.pending_aux.clear()

    def observe(self, sequence: Sequence, aux: Tensor) -> None:
        """Take the states [rows, A] of newly confirmed positions, at least one. They are read when drafting needs them."""
        sequence.pending_aux.append(aux.clone())  # a view would keep what the whole step has read

    def keep_up(self, sequences: list[Sequence]) -> dict[Sequence, int]:
        """Read on where states pile up: of all with two unread rows or more. -> Rows read. RuntimeError as of `propose`."""
        pending = {each: each.num_pending for each in sequences}
        if max(pending.values(), default=0) <= MAX_PENDING_ROWS:
            return {}
        behind = sorted((each for each in sequences if pending[each] > 1), key=lambda each: each.slot)
        return self._read_on({each: pending[each] - 1 for each in behind})

    def catch_up(self, sequences: list[Sequence]) -> dict[Sequence, int]:
        """Read what is pending of sequences that end, for the next ones that begin alike. -> Rows read. RuntimeError as of
        `propose`."""
        # A row also reads the token after it, which the last one does not have yet.
        known = {each: len(each.ids) - 1 - each.num_computed_draft_tokens for each in sequences}
        return self._read_on({each: min(known[each], each.num_pending) for each in sequences})

    def _read_on(self, rows: dict[Sequence, int]) -> dict[Sequence, int]:
        rows = {sequence: num for sequence, num in rows.items() if num > 0}
        if rows:
            self._read(list(rows), list(rows.values()))
        return rows

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence], k: int) -> list[Proposal]:
        """Draft `k` tokens for each sequence, ordered by slot. RuntimeError, torch's or ours, where the network fails:
        nothing of these sequences may be read then but by `forget`."""
        state_BD = self._read(sequences, [sequence.num_pending for sequence in sequences])
        slots = [s.slot for s in sequences]
        chains: list[_Chain] = [_Chain() for _ in sequences]
        for j in range(k):
            ids = self._choose(sequences, chains, self._served.logits(state_BD))
            if j < k - 1:
                positions = [s.num_computed_draft_tokens + j for s in sequences]
                batch = self._cache.batch(slots, positions, [1] * len(slots))
                state_BD = self._served.forward(state_BD, ids, [batch], self._cache)
        return [chain.proposal(self.network.config.vocab_size, self._token_ids) for chain in chains]

    @torch.inference_mode()
    def _read(self, sequences: list[Sequence], counts: list[int]) -> Tensor:
        """Feed so many pending states of each, at least one, in one forward. -> The draft's state after the last, [B, D]."""
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
        # Each row sees all before it: one that was not finite would show in the last one.
        are_finite = last.isfinite().all(-1).tolist()
        if not all(are_finite):
            raise NotFiniteError([each for each, is_finite in zip(sequences, are_finite, strict=True) if not is_finite])
        return last

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
            assert sequence.generator is not None
            return draw(q, sequence.generator)
        exponential_noise = noise.exponential_noise(
            seed, sequence.num_output + num_ahead, self.network.config.vocab_size
        )
        return noise.first(q, exponential_noise[self._token_ids.cpu()])


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
