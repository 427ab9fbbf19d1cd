"""Which drafts the target accepts. Row 0 of a request is its last token; children are linked lists, and -1 ends a list."""

import torch
from torch import Tensor

from sgl_kernel.slots import refuse_trees

_QLEN_ONLY = 1
"""SGLang's mask of new tokens against new tokens, without the text before: the one that it uses on a CPU."""


def build_tree_kernel_efficient_cpu(  # noqa: PLR0917 - the signature is SGLang's
    _parents: object,
    _selected: Tensor,
    lengths: Tensor,
    mask: Tensor,
    positions: Tensor,
    rows: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    topk: int,
    depth: int,
    width: int,
    mask_mode: int,
) -> None:
    """Describe a chain of `depth` drafts behind each request's last token."""
    refuse_trees(topk)
    if width != depth + 1 or mask_mode != _QLEN_ONLY:
        raise NotImplementedError(f"a chain of {depth} drafts in {width} rows with mask mode {mask_mode}")
    batch_size = len(lengths)
    places = torch.arange(width)
    positions.copy_((lengths[:, None] + places).flatten())
    rows.copy_(torch.arange(batch_size * width).view(batch_size, width))
    first_child.copy_(torch.where(places < depth, places + 1, -1).expand(batch_size, -1))
    next_sibling.fill_(-1)
    square = torch.ones(width, width, dtype=torch.bool).tril().flatten()
    mask[: batch_size * width**2] = square.repeat(batch_size)


def verify_tree_greedy_cpu(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Go down from row 0 while a child is what the target would say. (SGLang spells these names so.)

    Along the way `predicts` gets the target's tokens, which are the accepted draft tokens and the bonus; elsewhere it stays.
    """
    for request in range(len(candidates)):
        drafts, said = candidates[request].tolist(), target_predict[request].tolist()
        children, siblings = retrive_next_token[request].tolist(), retrive_next_sibling[request].tolist()
        path = [0]
        while len(path) < accept_index.shape[1]:
            child = children[path[-1]]
            while child >= 0 and drafts[child] != said[path[-1]]:
                child = siblings[child]
            if child < 0:
                break
            path.append(child)
        rows = retrive_index[request, path]
        accept_index[request, : len(path)] = rows.to(accept_index.dtype)
        accept_token_num[request] = len(path) - 1
        predicts[rows] = target_predict[request, path].to(predicts.dtype)


def fill_bonus_tokens_cpu(accepted_tokens: Tensor, num_accepted: Tensor, bonus: Tensor, width: int) -> None:
    """The last of each request's accepted tokens."""
    last = num_accepted.long()[:, None] - 1
    bonus.copy_(accepted_tokens.view(-1, width).gather(1, last)[:, 0])


def rotate_input_ids_cpu(*_: object) -> None:
    """Imported by SGLang in any case, called by multi-layer EAGLE only."""
    raise NotImplementedError("the CPU stand-in for SGLang's kernels knows no multi-layer EAGLE")
