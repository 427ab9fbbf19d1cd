"""How long do the matrix products of a forward take, by the AMX kernel and by oneDNN? `python -m bench.serving.products` runs
all of SmolLM2's in the order of a step, for each number of rows. See `torch_engine/model/linear.py`, ADR 0025.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from itertools import product
from statistics import quantiles

import torch
from torch import Tensor

from updraft_cli import output
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_draft.config import TargetConfig
from updraft_inference.torch_engine.model.linear import AmxLinear, Linear, OneDnnLinear
from updraft_kernels.loader import load_kernels

ROWS = (1, 4, 8, 16, 32, 64, 128, 256)


def shapes(config: TargetConfig) -> list[tuple[int, int]]:
    """[out, in] of every product, in the order of a step."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = [(heads + 2 * kv_heads, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner)]
    return [*layer * config.num_layers, (config.vocab_size, hidden)]


def seconds(products: Sequence[Linear], inputs: dict[int, Tensor], sizes: Sequence[tuple[int, int]]) -> float:
    """Seconds of all products."""
    started = time.perf_counter()
    for each, (_, of) in zip(products, sizes, strict=True):
        each(inputs[of])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = load_kernels()
    if library is None or not library.has_amx:
        sys.exit("this CPU has no AMX, or the package no kernels for it: oneDNN computes the products")
    sizes = shapes(TargetConfig.from_folder(model_folder(cache_folder(os.environ))))
    weights = [torch.randn(size, dtype=torch.bfloat16) for size in sizes]
    arms: dict[str, Sequence[Linear]] = {
        "tiles": [AmxLinear(each, None, library) for each in weights],
        "oneDNN": [OneDnnLinear(each) for each in weights],
    }
    table = output.table(">rows", ">tiles, ms", ">oneDNN, ms", ">ratio (quartiles)")
    for rows in ROWS:
        inputs = {of: torch.randn(rows, of, dtype=torch.bfloat16) for _, of in sizes}
        took: dict[str, list[float]] = {arm: [] for arm in arms}
        with torch.inference_mode():
            for _, (arm, products) in product(range(arguments.rounds + 1), arms.items()):
                took[arm].append(1e3 * seconds(products, inputs, sizes))
        ours, theirs = (each[1:] for each in took.values())  # the first round warms up
        low, middle, high = quantiles([b / a for a, b in zip(ours, theirs, strict=True)])
        of_ours, of_theirs = (quantiles(each)[1] for each in (ours, theirs))
        table.add_row(str(rows), f"{of_ours:.1f}", f"{of_theirs:.1f}", f"{middle:.2f} ({low:.2f} to {high:.2f})")
    output.console().print(table)


if __name__ == "__main__":
    main()
