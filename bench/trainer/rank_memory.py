"""Memory of a rank: replicated, with a divided optimizer, and with FSDP2. `python -m bench.trainer.rank_memory`.

Two steps of two passes each over random rows, on gloo, of a draft with random weights. The average and the last good weights
are kept as the learner keeps them. Gradients of FSDP2 are synchronised in the last pass only.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench import harness
from bench.harness import Measurements
from tests.support.ranks import run_ranks
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils import clip_grad_norm_

from updraft_artifacts.rope import Rope
from updraft_cli import output
from updraft_draft.config import DraftConfig
from updraft_draft.layout import Layout
from updraft_draft.network import DraftNetwork
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.learning.gradients import Share, summed
from updraft_trainer.learning.optimizer import DraftOptimizer

KINDS = ("replicated", "optimizer divided", "FSDP2")
ROWS, UNROLLED, PASSES, STEPS = 64, 3, 2, 2
VOCAB = 2048

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=1536, help="a multiple of 128")
    parser.add_argument("--ranks", type=int, default=2)
    harness.run("rank-memory", parser, measure)


def measure(arguments: argparse.Namespace) -> Measurements:
    peaks = {kind: run_ranks(peak, kind, arguments.hidden, size=arguments.ranks) for kind in KINDS}
    table = output.table(
        f"bytes a trained weight, {arguments.ranks} ranks, D {arguments.hidden}", ">rank 0", ">others, at most"
    )
    for kind, of_ranks in peaks.items():
        table.add_row(kind, f"{of_ranks[0]:.1f}", f"{max(of_ranks[1:]):.1f}")
    return Measurements(
        seed=0, lines=[], samples=[{"kind": kind, "peaks": one} for kind, one in peaks.items()], figures=[table]
    )


def peak(ranks: Ranks, kind: str, hidden: int) -> float:
    """The growth of resident memory from before the draft to its peak in the steps, in bytes for each trained weight."""
    torch.manual_seed(0)
    before = _resident("VmRSS")
    network = DraftNetwork(_config(hidden), torch.randn(VOCAB, hidden).bfloat16(), torch.arange(VOCAB))
    network.lm_head.requires_grad_(requires_grad=False)
    num_weights = sum(one.numel() for one in network.parameters() if one.requires_grad)
    if kind == "FSDP2":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(network, mp_policy=precision, ignored_params=set(network.lm_head.parameters()))
        register_fsdp_forward_method(network, "unroll_packed")
    trained = [one for one in network.parameters() if one.requires_grad]
    keeps_average = kind != "optimizer divided" or ranks.leads
    average = [one.detach().clone() for one in trained] if keeps_average else []
    kept = [average, [one.clone() for one in average]]
    update = _update(kind, trained, ranks)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here on
    for _ in range(STEPS):
        _passes(network, kind)
        update()
        if average:
            torch._foreach_lerp_(average, [one.detach() for one in trained], 0.1)
    assert len(kept) == 2
    return (_resident("VmHWM") - before) / num_weights


def _passes(network: DraftNetwork, kind: str) -> None:
    layout = Layout.of_texts(torch.randint(0, VOCAB, (1, ROWS + UNROLLED - 1)), num_steps=UNROLLED)
    for number in range(PASSES):
        if kind == "FSDP2":
            network.set_requires_gradient_sync(number == PASSES - 1)  # type: ignore[operator]  # fully_shard adds it
        aux = 0.1 * torch.randn(ROWS, network.config.aux_size).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            states = network.unroll_packed(aux, layout)
        torch.stack([state.float().square().mean() for state in states]).sum().backward()  # type: ignore[no-untyped-call]


def _update(kind: str, trained: Sequence[torch.nn.Parameter], ranks: Ranks) -> Step:
    if kind == "FSDP2":
        adamw = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def sharded() -> None:
            clip_grad_norm_(trained, 1.0)
            adamw.step()
            adamw.zero_grad()

        return sharded
    optimizer = DraftOptimizer(trained, ranks, is_sharded=kind == "optimizer divided")

    def ours() -> None:
        loss: Tensor = torch.ones(())
        summed(ranks, trained, Share(loss=loss, num_rows=1, weight=1.0), float(ranks.size))
        clip_grad_norm_(trained, 1.0)
        optimizer.step(1e-4)
        optimizer.zero_grad()

    return ours


def _config(hidden: int) -> DraftConfig:
    return DraftConfig(
        vocab_size=VOCAB,
        draft_vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_heads=hidden // 128,
        num_kv_heads=1,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=Rope(theta=10_000.0),
        max_position=4096,
        target_hidden_size=hidden,
        aux_layers=(1, 2, 3),
    )


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
