"""What SGLang's NGRAM speculation imports: its drafts are trees, which come as masks."""

import torch
from torch import Tensor


def reconstruct_indices_from_tree_mask(  # noqa: PLR0917 - the signature is SGLang's
    mask: Tensor,
    lengths: Tensor,
    positions: Tensor,
    rows: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    batch_size: int,
    width: int,
) -> None:
    """Read positions and links back from masks [batch, i, j]: j comes before i in the text of i, or is i."""
    place = torch.arange(width)
    before = mask.view(batch_size, width, width).bool().tril(-1)
    positions.copy_((lengths[:, None] + before.sum(2)).flatten())
    rows.copy_(torch.arange(batch_size * width).view(batch_size, width))
    first_child.copy_(_first(before, place))
    parent = torch.where(before, place, -1).amax(2)
    is_sibling = (parent[:, :, None] == parent[:, None, :]) & (parent >= 0)[:, None, :]
    next_sibling.copy_(_first(is_sibling.tril(-1), place))


def _first(marked: Tensor, place: Tensor) -> Tensor:
    """For each column the first row that is marked in it, or -1."""
    first = torch.where(marked, place[:, None], len(place)).amin(1)
    return torch.where(first < len(place), first, -1)
