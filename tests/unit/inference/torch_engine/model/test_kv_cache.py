"""A cache takes memory as it is written."""

import os
from pathlib import Path

import torch

from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


SHAPE = CacheShape(num_layers=4, num_slots=8, num_positions=2048, num_kv_heads=4, head_dim=64)


def test_a_wipe_takes_no_memory_for_positions_that_were_never_written() -> None:
    cache = SlotCache(SHAPE, like=torch.zeros(1, dtype=torch.bfloat16))
    keys, values = cache.of_layer(3)
    ones = torch.ones(2, 4, 64).bfloat16()
    cache.write(3, cache.batch([1], [3], [2]).rows_R, ones, ones)
    cache.copy_prefix(1, 2, 5)
    before = resident_bytes()
    for slot in range(SHAPE.num_slots):
        cache.wipe(slot)
    assert resident_bytes() - before < keys.nbytes // 4
    assert not keys.any()
    assert not values.any()


def test_positions_take_no_memory_before_they_are_written() -> None:
    before = resident_bytes()
    cache = SlotCache(SHAPE, like=torch.zeros(1, dtype=torch.bfloat16))
    keys, _ = cache.of_layer(3)
    assert keys.nbytes == 8 * 2048 * 4 * 64 * 2
    assert not keys.any()
    cache.write(3, torch.tensor([5]), torch.ones(1, 4, 64).bfloat16(), torch.ones(1, 4, 64).bfloat16())
    assert resident_bytes() - before < keys.nbytes
    assert torch.equal(keys[0, 5], torch.ones(4, 64).bfloat16())
