"""Attention over SGLang's KV cache, one request at a time in float32: what a request gets depends on no other request.

Tensors: N tokens, S slots of one request, H heads, K key-value heads, E head size. `req_to_token[request, position]` is the
slot of a token in the cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TAIL = "float logit_cap, bool is_cross_attn, int sliding_window_size, Tensor? encoder_lens, Tensor? sinks"
_DECODE = (
    "decode_attention_cpu(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, float k_scale, float v_scale,"
    " Tensor(c!) output, Tensor? key, Tensor? value, Tensor loc, Tensor attn_logits, Tensor req_to_token,"
    f" Tensor req_pool_indices, Tensor seq_lens, float sm_scale, {_TAIL}) -> ()"
)
_EXTEND = (
    "extend_attention_cpu(Tensor q_extend, Tensor? k_extend, Tensor? v_extend, Tensor(a!) o_extend, Tensor k_buffer,"
    " Tensor v_buffer, float k_scale, float v_scale, Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens,"
    " Tensor extend_seq_lens, Tensor extend_start_loc, int max_len_extend, float sm_scale,"
    f" {_TAIL}, Tensor? tree_mask, bool is_causal) -> ()"
)


def _decode(  # noqa: PLR0917 - the signature is SGLang's
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: float,
    v_scale: float,
    output: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    loc: Tensor,
    _: Tensor,
    req_to_token: Tensor,
    requests: Tensor,
    lengths: Tensor,
    scale: float,
    *special: object,
) -> None:
    """The last token of each request reads all of it. `lengths` count that token, whose key is stored first if given."""
    _refuse(k_scale != 1, v_scale != 1, *special)
    if key is not None and value is not None:
        k_cache[loc] = key.view(-1, *k_cache.shape[1:]).to(k_cache.dtype)
        v_cache[loc] = value.view(-1, *v_cache.shape[1:]).to(v_cache.dtype)
    for row, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist(), strict=True)):
        slots = req_to_token[request, :length].long()
        output[row : row + 1] = _attend(query[row : row + 1], k_cache[slots], v_cache[slots], scale, None)


def _extend(  # noqa: PLR0917 - the signature is SGLang's
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: Tensor,
    requests: Tensor,
    lengths: Tensor,
    new_lengths: Tensor,
    starts: Tensor,
    _: int,
    scale: float,
    *rest: object,
) -> None:
    """Several new tokens of each request at once; SGLang has stored their keys already, `lengths` count them.

    `tree_mask` (NGRAM) holds for each request a square: which of the new tokens each of them comes after.
    """
    *special, tree_mask, is_causal = rest
    _refuse(k_scale != 1, v_scale != 1, not is_causal, *special)
    squares = 0
    shapes = zip(requests.tolist(), lengths.tolist(), new_lengths.tolist(), starts.tolist(), strict=True)
    for request, length, num_new, start in shapes:
        visible = torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new)
        if isinstance(tree_mask, Tensor):
            square = tree_mask[squares : squares + num_new**2].view(num_new, num_new)
            visible[:, length - num_new :] = square.bool()
            squares += num_new**2
        slots = req_to_token[request, :length].long()
        new = slice(start, start + num_new)
        output[new] = _attend(query[new], k_cache[slots], v_cache[slots], scale, visible)


def _attend(q_NHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, scale: float, visible_NS: Tensor | None) -> Tensor:  # noqa: N803 - shapes
    q, k, v = (tensor.float().transpose(0, 1)[None] for tensor in (q_NHE, k_SKE, v_SKE))
    attended = F.scaled_dot_product_attention(q, k, v, visible_NS, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1).to(q_NHE.dtype)


def _refuse(*special: object) -> None:
    """What plain attention leaves at None, 0 or False."""
    if any(isinstance(value, Tensor) or value for value in special):
        raise NotImplementedError("the CPU stand-in for SGLang's kernels knows plain causal attention only")


# Kept, for what it registers goes with it; untyped in torch.
_library: Any = torch.library.Library("sgl_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(_DECODE)
_library.define(_EXTEND)
_library.impl("decode_attention_cpu", _decode, "CPU")
_library.impl("extend_attention_cpu", _extend, "CPU")
