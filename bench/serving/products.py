"""Which matrix product is the fastest on this CPU, for a decode step, a verify step and a prompt?

`python -m bench.serving.products`: one layer's products of SmolLM2 with random weights in bfloat16, on one thread. Arms take
turns; times are medians over those of torch's product in float32, and of the engine's choice in milliseconds. The weights of
several layers follow each other, so that no arm finds its own in the cache.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from bench import harness
from torch import Tensor

from updraft_cli import output
from updraft_inference.torch_engine.model.linear import Linear, linear
from updraft_kernels.loader import load_kernels

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""Outputs and inputs: queries, keys and values; attention's output; gate and up; down."""
LAYERS = 12
ROWS = (1, 2, 4, 8, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arms = _arms()
    names = [name for name in arms if name != "float32"]
    table = output.table("rows", *(f">{name} / float32" for name in names), ">the engine's, ms a layer")
    with torch.inference_mode():
        for num_rows in ROWS:
            seconds = {
                name: statistics.median(times) for name, times in _times(arms, num_rows, arguments.rounds).items()
            }
            ratios = (f"{seconds[name] / seconds['float32']:.2f}" for name in names)
            table.add_row(str(num_rows), *ratios, f"{1e3 * seconds['the engine'] / LAYERS:.2f}")
    output.console().print(table)


def _arms() -> dict[str, list[list[Linear]]]:
    """The maps of each layer, by arm."""
    generator = torch.Generator().manual_seed(0)
    weights = [[torch.randn(*shape, generator=generator).bfloat16() for shape in SHAPES] for _ in range(LAYERS)]
    library = load_kernels()
    return {
        "float32": [[Linear(one.float()) for one in layer] for layer in weights],
        "torch in bfloat16": [[Linear(one) for one in layer] for layer in weights],
        "the engine": [[linear(one, library=library) for one in layer] for layer in weights],
    }


def _times(arms: dict[str, list[list[Linear]]], num_rows: int, rounds: int) -> dict[str, list[float]]:
    inputs = [torch.randn(num_rows, shape[1]).bfloat16() for shape in SHAPES]
    wide = [one.float() for one in inputs]
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(-1, rounds):
        for name in harness.in_turn(list(arms), max(0, round_)):
            started_s = time.perf_counter()
            for layer in arms[name]:
                _multiply(layer, wide if name == "float32" else inputs)
            if round_ >= 0:
                times[name].append(time.perf_counter() - started_s)
    return times


def _multiply(layer: Sequence[Linear], inputs: Sequence[Tensor]) -> None:
    for one, x in zip(layer, inputs, strict=True):
        one(x)


if __name__ == "__main__":
    main()
