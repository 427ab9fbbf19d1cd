"""Which slots of the KV cache a request's tokens have: `req_to_token[request, position]`.

Functions write into the tensor that SGLang hands them; such a tensor may be longer than what is written.
"""

import ctypes

import torch
from torch import Tensor


def assign_req_to_token_pool_cpu(
    requests: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, _: int
) -> None:
    """Give the positions from start to end of each request the next of `slots`."""
    rows = _rows(requests, req_to_token, starts, ends)
    sizes = [len(row) for row in rows]
    for row, given in zip(rows, torch.split(slots[: sum(sizes)], sizes), strict=True):
        row.copy_(given)


def assign_extend_cache_locs_cpu(
    requests: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, out: Tensor, _: int
) -> None:
    """Read them back, one request after the other."""
    slots = torch.cat(_rows(requests, req_to_token, starts, ends))
    out[: len(slots)] = slots


def assign_draft_cache_locs_contiguous_cpu(  # noqa: PLR0917 - the signature is SGLang's
    requests: Tensor, req_to_token: Tensor, lengths: Tensor, out: Tensor, pool_len: int, topk: int, num_steps: int
) -> None:
    """The slots behind each request's text, for the draft's tokens."""
    assign_extend_cache_locs_cpu(requests, req_to_token, lengths, lengths + topk * num_steps, out, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, requests: Tensor, _lengths: Tensor, topk: int, _num_steps: int, _pool_len: int
) -> Tensor:
    """A table of slots with a row for each branch. A chain is one branch, and its tokens stand behind the text already."""
    refuse_trees(topk)
    return req_to_token[requests]


def fill_accept_out_cache_loc_cpu(accepted: Tensor, slots: Tensor, out: Tensor) -> None:
    """The slots of the accepted rows, closed up; -1 is no row."""
    rows = accepted[accepted >= 0].long()
    out[: len(rows)] = slots[rows]


def copy_all_layer_kv_cache_cpu(addresses: Tensor, row_bytes: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Move rows within each layer's cache, given by its address; all are read before one is written."""
    if not targets.numel():
        return
    num_rows = 1 + max(int(targets.max()), int(sources.max()))
    for address, size in zip(addresses.tolist(), row_bytes.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (num_rows * size)).from_address(address)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(num_rows, size)
        rows[targets] = rows[sources]


def refuse_trees(topk: int) -> None:
    """Raise unless the draft is a chain."""
    if topk != 1:
        raise NotImplementedError(f"the CPU stand-in for SGLang's kernels drafts chains only, not trees (topk {topk})")


def _rows(requests: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor) -> list[Tensor]:
    spans = zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True)
    return [req_to_token[request, start:end] for request, start, end in spans]
