"""The EAGLE-3 draft: one decoder layer over the target's auxiliary states and the next token (arXiv 2503.01840).

Row t reads the target's state at position t and the token at t + 1, and predicts the token at t + 2. The next draft step
reads the layer's own output instead of the target's state. `unroll` does this for all rows at once, for training
("training-time test", section 3.2 of the paper) and for exact offline evaluation. The embedding is shared with the target and
is neither trained nor stored. Parameter names are those of the checkpoint, so a state dict is the file's content.

Tensors: B sequences, T rows, A auxiliary width, D hidden, V draft vocabulary, H heads, K key-value heads, E head size.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from updraft_draft.chain_attention import chain_attention
from updraft_draft.config import DraftConfig
from updraft_draft.layers import gated, rms_norm, rotary_table, rotate
from updraft_draft.layout import Layout

_FIRST_POSITIONS = 1024

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Returns a function that computes the same as the given one, such as `torch.compile`."""


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself."""
    return function


class QueryKeyValue(NamedTuple):
    """q [B, T, H, E], k and v [B, T, K, E] of new rows."""

    q: Tensor
    k: Tensor
    v: Tensor


class _Attention(nn.Module):
    def __init__(self, c: DraftConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        kv = c.num_kv_heads * c.head_dim
        self.q_proj = nn.Linear(2 * c.hidden_size, c.num_heads * c.head_dim, bias=False, dtype=dtype)
        self.k_proj = nn.Linear(2 * c.hidden_size, kv, bias=False, dtype=dtype)
        self.v_proj = nn.Linear(2 * c.hidden_size, kv, bias=False, dtype=dtype)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False, dtype=dtype)


class _Mlp(nn.Module):
    def __init__(self, c: DraftConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False, dtype=dtype)

    def features(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., I]."""
        return gated(self.gate_proj(x), self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.features(x))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class Norm(nn.Module):
    def __init__(self, size: int, eps: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # CUDA's would compute all that follows in float32
            return rms_norm(x, self.weight, self.eps)


class _Layer(nn.Module):
    def __init__(self, c: DraftConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.hidden_norm = Norm(c.hidden_size, c.rms_norm_eps, dtype)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps, dtype)
        self.self_attn = _Attention(c, dtype)
        self.mlp = _Mlp(c, dtype)


class DraftNetwork(nn.Module):
    """The draft's trainable tensors and fixed vocabulary, on an embedding [vocab, D] that it shares with the target."""

    d2t: Tensor
    t2d: Tensor

    def __init__(
        self,
        config: DraftConfig,
        embedding: Tensor,
        token_ids: Tensor,
        *,
        num_positions: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`token_ids` int64 [V], ascending: the target's tokens that the draft can propose. `num_positions` that will be used
        may exceed the draft's maximum by some; None: as many as texts turn out to have. `dtype` of the weights; None: torch's
        default."""
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.aux_size, config.hidden_size, bias=False, dtype=dtype)
        self.midlayer = _Layer(config, dtype)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False, dtype=dtype)
        self.register_buffer("d2t", token_ids - torch.arange(len(token_ids)))
        known = torch.zeros(config.vocab_size, dtype=torch.bool)
        known[token_ids] = True
        self.register_buffer("t2d", known)
        self._embedding = [embedding.detach()]  # in a list: neither a parameter nor in the state dict
        self._num_positions = num_positions
        self._rotary = self._new_table(num_positions or _FIRST_POSITIONS)

    @property
    def token_ids(self) -> Tensor:
        """The target's token for each draft token, int64 [V]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def embedding(self) -> Tensor:
        """The target's embedding, [vocab, D]."""
        return self._embedding[0]

    @property
    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, each [positions, E]."""
        return self._table(self._num_positions or self.config.max_position)

    def copy(self) -> Self:
        """A copy that further training does not change; embedding and frozen parameters are shared."""
        shared = [self._embedding, self._rotary, *(p for p in self.parameters() if not p.requires_grad)]
        return copy.deepcopy(self, {id(one): one for one in shared})

    def widened(self) -> Self:
        """A copy with weights in float32, whose values are the same; the embedding is shared."""
        return copy.deepcopy(self, {id(one): one for one in (self._embedding, self._rotary)}).float()

    def share(self, embedding: Tensor) -> None:
        """Replace the embedding, which may have another dtype or device."""
        self._embedding = [embedding.detach()]
        self._rotary = [table.to(embedding) for table in self._rotary]

    @torch.no_grad()
    def change_vocabulary(self, token_ids: Tensor, head_rows: Tensor) -> None:
        """Propose these tokens of the target, int64 [V], ascending, as many as before.

        Tokens that stay keep their rows of the draft's head. New ones have that of `head_rows` [V, D], see `TargetHead.rows`.
        """
        token_ids, rows = token_ids.to(self.d2t.device), head_rows.to(self.lm_head.weight, copy=True)
        stays = self.t2d[token_ids]
        rows[stays] = self.lm_head.weight[torch.searchsorted(self.token_ids, token_ids[stays])]
        self.lm_head.weight.copy_(rows)
        self.d2t.copy_(token_ids - torch.arange(len(token_ids), device=token_ids.device))
        self.t2d.zero_()
        self.t2d[token_ids] = True

    def fuse(self, aux_BTA: Tensor) -> Tensor:
        """Map the target's auxiliary states to the draft's first input, [B, T, D]."""
        return self.fc(aux_BTA)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def rotary(self, positions: Tensor, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions, each [..., 1, E]. `end` is above all of them; without it the device is asked."""
        if end is None and self._num_positions is None:
            end = int(positions.max()) + 1 if positions.numel() else 0
        needed = self._num_positions or max(_FIRST_POSITIONS, 1 << (end - 1).bit_length() if end else 0)
        cos, sin = (table[positions].unsqueeze(-2) for table in self._table(needed))
        return cos, sin

    def _table(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least so many positions: a model may know millions, of which training uses some thousands.

        Copies of this network in other threads may replace the table at any time. If two do at once, the shorter table may
        stay, which costs another computation and nothing else.
        """
        cos, sin = self._rotary
        if len(cos) < num_positions:
            cos, sin = longer = self._new_table(num_positions)
            if len(self._rotary[0]) < num_positions:
                self._rotary[:] = longer
        return cos, sin

    def _new_table(self, num_positions: int) -> list[Tensor]:
        tables = rotary_table(num_positions, self.config.head_dim, self.config.rope)
        return [table.to(self.embedding) for table in tables]

    def rows(
        self,
        x_BTD: Tensor,
        ids_BT: Tensor,
        positions_BT: Tensor,
        end: int | None = None,
        compiled: Compile = uncompiled,
    ) -> QueryKeyValue:
        """Project states and the tokens after them; queries and keys are rotated to `positions_BT`. `end` as for `rotary`."""
        embedded, (cos, sin) = F.embedding(ids_BT, self.embedding), self.rotary(positions_BT, end)
        rows: QueryKeyValue = compiled(DraftNetwork._projected)(self, x_BTD, embedded, cos, sin)
        return rows

    def _projected(self, x_BTD: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor) -> QueryKeyValue:
        c, layer = self.config, self.midlayer
        both = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(x_BTD)], -1)
        attn, lead = layer.self_attn, x_BTD.shape[:-1]
        return QueryKeyValue(
            rotate(attn.q_proj(both).view(*lead, c.num_heads, c.head_dim), cos, sin),
            rotate(attn.k_proj(both).view(*lead, c.num_kv_heads, c.head_dim), cos, sin),
            attn.v_proj(both).view(*lead, c.num_kv_heads, c.head_dim),
        )

    def finish(self, x_BTD: Tensor, attended: Tensor) -> Tensor:
        """Residuals and MLP after attention [B, T, H * E] -> [B, T, D], the input of the next draft step."""
        layer = self.midlayer
        if self.config.norm_before_residual:
            x_BTD = layer.hidden_norm(x_BTD)
        y = x_BTD + layer.self_attn.o_proj(attended)
        return y + layer.mlp(layer.post_attention_layernorm(y))  # type: ignore[no-any-return]  # untyped __call__

    def logits(self, y: Tensor) -> Tensor:
        """Logits over the draft vocabulary, [..., V]."""
        return self.lm_head(self.norm(y))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def unroll(self, aux_BTA: Tensor, ids_BT: Tensor, *, num_steps: int, first_row: int = 0) -> list[Tensor]:
        """States [B, T - first_row, D] of `num_steps` draft steps, starting at every row from `first_row` on.

        `ids_BT` int64 holds the token after each row and `num_steps - 1` more: [B, T + num_steps - 1]. Step j of row t has read
        the tokens up to ids[t + j] and predicts the next one. It attends to the target's rows 0..t and its own j rows, as in
        serving if all earlier drafts were accepted. Rows before `first_row` are context only.
        """
        layout = Layout.of_texts(ids_BT, num_steps=num_steps, first_row=first_row)
        states = self.unroll_packed(aux_BTA.flatten(0, 1), layout)
        B = len(ids_BT)
        return [state.view(B, layout.num_unrolled // B, state.shape[-1]) for state in states]

    def unroll_packed(
        self, aux_NA: Tensor, layout: Layout, *, recompute: bool = False, compiled: Compile = uncompiled
    ) -> list[Tensor]:
        """Like `unroll`, for packed texts: the states [U, D] of each step, in the order of the layout's spans.

        With `recompute`, the backward pass computes each step's inner values again instead of keeping them (gradient
        checkpointing). `compiled` is applied to all that is between attention and attention.
        """
        run: Callable[..., Any] = partial(checkpoint, use_reentrant=False) if recompute else _called
        index = layout.unrolled
        state, k, v = run(self._first_step, aux_NA, layout, index, compiled)
        states, own = [state], list[Tensor]()
        for j in range(1, layout.ids.shape[-1]):
            ids, positions = layout.ids[index, j], layout.positions[index] + j
            state, *of_step = run(self._next_step, compiled, layout, (ids, positions), states[-1], k, v, *own)
            states.append(state)
            own += of_step
        return states

    def _first_step(
        self, aux_NA: Tensor, layout: Layout, index: Tensor, compiled: Compile
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The unrolled states, and keys and values of all rows."""
        x = self.fuse(aux_NA)
        rows = self.rows(x, layout.ids[:, 0], layout.positions, layout.limit, compiled)
        attended = chain_attention(rows.q.index_select(0, index), rows.k, rows.v, layout.spans)
        return compiled(DraftNetwork.finish)(self, x.index_select(0, index), attended), rows.k, rows.v

    def _next_step(
        self, compiled: Compile, layout: Layout, tokens: tuple[Tensor, Tensor], x: Tensor, *kv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The states after one more step, and the keys and values of that step. `tokens`: that each state reads next, and their
        positions. `kv`: keys and values of all rows and of earlier steps, in turn."""
        (ids, positions), (k, v, *own) = tokens, kv
        rows = self.rows(x, ids, positions, layout.limit, compiled)
        chain = [*zip(own[::2], own[1::2], strict=True), (rows.k, rows.v)]
        attended = chain_attention(rows.q, k, v, layout.spans, chain)
        return compiled(DraftNetwork.finish)(self, x, attended), rows.k, rows.v


def _called(function: Callable[..., tuple[Tensor, ...]], *arguments: object) -> tuple[Tensor, ...]:
    return function(*arguments)


def initial_network(
    config: DraftConfig,
    embedding: Tensor,
    head_rows: Tensor,
    final_norm: Tensor,
    token_ids: Tensor,
    *,
    seed: int = 0,
) -> DraftNetwork:
    """An untrained draft with the target's head and final norm, so that only the states have to be learned.

    `head_rows` [V, D] are those of `token_ids`, see `TargetHead.rows`.
    The layer's weights are normal with standard deviation 0.5 / sqrt(fan in), drawn from `seed`.
    """
    network = DraftNetwork(config, embedding, token_ids)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.5 * module.in_features**-0.5, generator=generator)
        if config.hidden_size == config.target_hidden_size:
            network.lm_head.weight.copy_(head_rows)
            network.norm.weight.copy_(final_norm)
    return network
