"""Acceptance length lost by rounding a draft's weights and inputs to 8 bits: `python -m bench.serving.rounding DRAFT...`.

Held-out requests of bench/learning are walked twice, with products in bfloat16 and with the engine's own in int8, and compared
request by request. A draft is the folder of a checkpoint.
"""

import argparse
from pathlib import Path

import torch
from bench import harness
from bench.learning import figures
from bench.learning.learning import open_recorder
from bench.learning.recorder import NUM_HELD_OUT
from bench.learning.replay import LOOKAHEAD
from torch import Tensor, nn

from updraft_cli import output
from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import read_head
from updraft_inference.torch_engine.model.linear import Int8Linear
from updraft_kernels.loader import Kernels, load_kernels
from updraft_trainer.publishing.estimate import num_tokens, verify_steps


class Int8Module(nn.Module):
    """A product as the engine computes it, inside a network."""

    def __init__(self, weight: Tensor, library: Kernels) -> None:
        super().__init__()
        self._product = Int8Linear(weight.to(torch.bfloat16), library)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.to(torch.bfloat16).flatten(0, -2)
        return self._product(flat).view(*x.shape[:-1], -1)


def rounded(network: DraftNetwork, library: Kernels) -> DraftNetwork:
    """A copy whose products are the engine's."""
    copy = network.copy()
    for parent in list(copy.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Module(child.weight, library))
    return copy


def main() -> None:
    """Print a line for each draft and kind of request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafts", nargs="+", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["math", "sql"])
    parser.add_argument("--held-out", type=int, default=NUM_HELD_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    library = load_kernels()
    if library is None or not library.has_int8:
        parser.exit(1, "this CPU does not multiply in int8\n")
    target, recorder = read_head(harness.model()), open_recorder()
    table = output.table("draft", "kind", ">requests", ">bfloat16", ">int8", ">int8 over bfloat16 (90 %)")
    for folder in arguments.drafts:
        network = checkpoint.build(*checkpoint.load(folder), target.embedding)
        for kind in arguments.kinds:
            samples = recorder.samples(kind, arguments.held_out, held_out=True)
            tokens = [num_tokens(sample) for sample in samples]
            plain, small = (
                verify_steps(each, samples, lookahead=LOOKAHEAD) for each in (network, rounded(network, library))
            )
            table.add_row(
                folder.name,
                kind,
                str(len(samples)),
                f"{sum(tokens) / sum(plain):.3f}",
                f"{sum(tokens) / sum(small):.3f}",
                str(figures.relative([small], [plain])),
            )
    output.console().print(table)


if __name__ == "__main__":
    main()
