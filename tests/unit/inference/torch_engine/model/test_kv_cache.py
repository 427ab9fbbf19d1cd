"""A cache takes memory as it is written."""

import os
from pathlib import Path

import torch

from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_positions_take_no_memory_before_they_are_written() -> None:
    shape = CacheShape(num_layers=4, num_slots=8, num_positions=2048, num_kv_heads=4, head_dim=64)
    before = resident_bytes()
    cache = SlotCache(shape, like=torch.zeros(1, dtype=torch.bfloat16))
    keys, _ = cache.of_layer(3)
    assert keys.nbytes == 8 * 2048 * 4 * 64 * 2
    assert not keys.any()
    cache.write(3, torch.tensor([5]), torch.ones(1, 4, 64).bfloat16(), torch.ones(1, 4, 64).bfloat16())
    assert resident_bytes() - before < keys.nbytes
    assert torch.equal(keys[0, 5], torch.ones(4, 64).bfloat16())
