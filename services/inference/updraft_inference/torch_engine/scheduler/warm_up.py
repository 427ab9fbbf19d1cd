"""The cost of forwards on this machine, measured before the first request. Serving corrects it; see `lookahead.cost`."""

import logging
import math
import time

import torch

from updraft_inference.torch_engine.drafting.lookahead.cost import GRID
from updraft_inference.torch_engine.model.kv_cache import SlotCache
from updraft_inference.torch_engine.model.target import Target

logger = logging.getLogger(__name__)

_ROUNDS = 3
_MIN_SIZES = 3
_BUDGET_S = 2.0
"""After it no further size is measured."""


def cost_curve(target: Target, cache: SlotCache, *, most: int, drafted: int) -> dict[int, float]:
    """Seconds of a forward with logits for each number of rows of `GRID` up to `most`, at least one.

    Rows are spread over as few sequences as have `drafted` rows each, or belong to one prompt where there are not so many
    slots. Of several rounds the fastest counts, because neighbours only ever slow a forward down. Writes to the cache.
    """
    sizes = [rows for rows in GRID if rows == 1 or rows <= min(most, cache.num_positions)]
    _seconds(target, cache, sizes[-1], drafted)  # touches memory for the first time
    curve: dict[int, float] = {}
    until = time.perf_counter() + _BUDGET_S
    for rows in _coarse_first(sizes) * _ROUNDS:
        if len(curve) < _MIN_SIZES or time.perf_counter() < until:
            curve[rows] = min(_seconds(target, cache, rows, drafted), curve.get(rows, math.inf))
    logger.info(
        "Measured the cost of a step",
        extra={"milliseconds_by_rows": {rows: round(1e3 * seconds, 2) for rows, seconds in sorted(curve.items())}},
    )
    return curve


def _coarse_first(sizes: list[int]) -> list[int]:
    """Both ends first, then the sizes between them, ever finer."""
    order, step = [sizes[0], sizes[-1]], len(sizes)
    while step > 1:
        step = (step + 1) // 2
        order += sizes[::step]
    return list(dict.fromkeys(order))


def _seconds(target: Target, cache: SlotCache, rows: int, drafted: int) -> float:
    device = target.embedding.device
    ids = torch.arange(rows, device=device) % target.config.vocab_size
    num = math.ceil(rows / drafted)
    counts = [rows] if num > cache.num_slots else [rows // num + (i < rows % num) for i in range(num)]
    started = time.perf_counter()
    output = target.forward(ids, [cache.batch(list(range(len(counts))), [0] * len(counts), counts)], cache)
    int(target.logits(output.last).argmax(-1)[0])  # waits until a device has finished
    return time.perf_counter() - started
