"""What forwards cost here, measured before the first request: the curve that lookahead and prefill are planned with."""

import logging
import math
import time
from statistics import median

import torch

from updraft_inference.torch_engine.drafting.lookahead.cost import GRID
from updraft_inference.torch_engine.model.kv_cache import SlotCache
from updraft_inference.torch_engine.model.target import Target

logger = logging.getLogger(__name__)

_ROUNDS = 3
_LEAST = 3
_BUDGET_S = 2.0
"""Then no further size is measured, and what serving shows has to do."""


def cost_curve(target: Target, cache: SlotCache, *, most: int, drafted: int) -> dict[int, float]:
    """Seconds of a forward with logits over each number of rows of the grid up to `most`, at least one.

    They are of as few sequences as have `drafted` rows each, or of one where there are not so many slots: a prompt. The
    cache is written to.
    """
    sizes = [rows for rows in GRID if rows == 1 or rows <= min(most, cache.num_positions)]
    _seconds(target, cache, sizes[-1], drafted)  # memory is touched for the first time
    measured: dict[int, list[float]] = {}
    until = time.perf_counter() + _BUDGET_S
    for rows in _coarse_first(sizes) * _ROUNDS:
        if len(measured) < _LEAST or time.perf_counter() < until:
            measured.setdefault(rows, []).append(_seconds(target, cache, rows, drafted))
    curve = {rows: median(seconds) for rows, seconds in sorted(measured.items())}
    logger.info(
        "Learned what a step costs here",
        extra={"milliseconds_by_rows": {rows: round(1e3 * seconds, 2) for rows, seconds in curve.items()}},
    )
    return curve


def _coarse_first(sizes: list[int]) -> list[int]:
    """Both ends, then what is between them, ever finer."""
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
    forward = target.forward(ids, [cache.batch(list(range(len(counts))), [0] * len(counts), counts)], cache)
    int(target.logits(forward.last).argmax(-1)[0])  # until a device has done its work
    return time.perf_counter() - started
