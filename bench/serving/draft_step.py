"""The cost of a drafted token, as a share of a target step: `python -m bench.serving.draft_step`.

Each round runs a step of the target and then a chain of each arm, as `EagleProposer` does: one read of the confirmed token, and
then per drafted token the head, the choice and the layer. The target evicts the draft from the caches in between, as in
serving. A trainer learns beside, as `updraft up` runs it. Ratios are taken within a round. Weights are random, which changes
no time. Set GOMP_SPINCOUNT=4000, as a pod does.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench import harness
from bench.serving import beside
from bench.serving.plan import FULL
from torch import Tensor

from updraft_cli import output
from updraft_draft.network import DraftNetwork, initial_network
from updraft_draft.target_weights import read_head
from updraft_inference.torch_engine.model.draft import PackedDraft
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.model.target import Target
from updraft_kernels.loader import Kernels, load_kernels

BAR = 0.08
DRAFT_VOCAB = 8192
CHAIN = 3
WARM_UP_ROUNDS = 5
INT8, BFLOAT16 = "int8", "bfloat16"
SPANS = TARGET, READ, HEAD, CHOICE, LAYER, TOKEN = "target", "read", "head", "choice", "layer", "token"
"""Spans of a round; a token is a head, a choice and a layer."""


class Unrounded(Kernels):
    """The kernels without products in int8."""

    @property
    def has_int8(self) -> bool:
        return False


@dataclass(slots=True)
class Times:
    """Seconds of each span, by name."""

    clock: Callable[[], float]
    spans: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        started = self.clock()
        yield
        self.spans.setdefault(name, []).append(self.clock() - started)


@dataclass(frozen=True, slots=True)
class Model:
    """The target and its cache."""

    target: Target
    cache: SlotCache

    def step(self, batch: int, position: int) -> Tensor:
        """Decode one token of each sequence; returns the auxiliary states."""
        rows = self.cache.batch(list(range(batch)), [position] * batch, [1] * batch)
        out = self.target.forward(torch.full((batch,), 7), [rows], self.cache)
        self.target.operations.top_scores(self.target.logits(out.last), [True] * batch).choice_R.tolist()
        return out.aux


@dataclass(frozen=True, slots=True)
class Arm:
    """A draft and its cache."""

    draft: PackedDraft
    cache: SlotCache
    token_ids: Tensor

    def run(self, aux: Tensor, position: int, times: Times) -> None:
        """Read one row of each sequence and draft a chain for each."""
        batch = len(aux)
        slots, ones = list(range(batch)), [1] * batch
        with times.of(READ):
            rows = self.cache.batch(slots, [position] * batch, ones)
            state = self.draft.forward(self.draft.fuse(aux), torch.full((batch,), 7), [rows], self.cache)
        for j in range(CHAIN):
            with times.of(TOKEN):
                with times.of(HEAD):
                    logits, top = self.draft.head(state)
                with times.of(CHOICE):
                    ids = self.token_ids[top.choice_R]
                    (logits.gather(-1, top.choice_R[:, None])[:, 0] - top.log_sum_R).tolist()
                    ids.tolist()
                with times.of(LAYER):
                    rows = self.cache.batch(slots, [position + 1 + j] * batch, ones)
                    state = self.draft.forward(state, ids, [rows], self.cache)


def measure(
    model: Model, arms: dict[str, Arm], clock: Callable[[], float], *, batch: int, position: int, rounds: int
) -> dict[str, Times]:
    """The times of each arm, which take turns; each has those of the target steps before its chains too."""
    times = {name: Times(clock) for name in arms}
    for round_ in range(WARM_UP_ROUNDS + rounds):
        if round_ == WARM_UP_ROUNDS:
            times = {name: Times(clock) for name in arms}
        for name in harness.in_turn(tuple(arms), round_):
            with times[name].of(TARGET):
                aux = model.step(batch, position)
            arms[name].run(aux, position, times[name])
    return times


def shares(times: Times) -> list[float]:
    """For each round, the mean drafted token over the target's step."""
    tokens = torch.tensor(times.spans[TOKEN]).view(-1, CHAIN).mean(1)
    return (tokens / torch.tensor(times.spans[TARGET])).tolist()


def network_of(folder: Path, target: Target, *, draft_vocab: int) -> DraftNetwork:
    """An untrained draft of the target, in its dtype."""
    head = read_head(folder)
    token_ids = torch.arange(draft_vocab)
    config = head.draft(draft_vocab_size=draft_vocab)
    network = initial_network(config, head.embedding.float(), head.rows(token_ids), head.final_norm, token_ids)
    network = network.to(target.embedding.dtype)
    network.share(target.embedding)
    return network


def show(batch: int, times: dict[str, Times]) -> None:
    """A table of medians in milliseconds, with the share of a target step and its quartiles."""
    columns = (f">{span} ms" for span in SPANS)
    table = output.table("sequences", "products", *columns, ">token/target", ">quartiles", f">bar: {BAR:.0%}")
    for name, of_arm in times.items():
        low, middle, high = statistics.quantiles(shares(of_arm), n=4)
        table.add_row(
            str(batch),
            name,
            *(f"{1e3 * statistics.median(of_arm.spans[span]):.2f}" for span in SPANS),
            f"{100 * middle:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f} %",
            "met" if middle <= BAR else "missed",
        )
    output.console().print(table)


def arms_of(network: DraftNetwork, library: Kernels | None, *, num_slots: int, num_positions: int) -> dict[str, Arm]:
    """Products in bfloat16, and in int8 where this CPU has them."""
    c = network.config
    shape = CacheShape(
        num_layers=1,
        num_slots=num_slots,
        num_positions=num_positions,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
    )
    libraries: dict[str, Kernels | None] = {BFLOAT16: library}
    if library is not None and library.has_int8:
        libraries = {BFLOAT16: Unrounded(Path(library._name), library.variant), INT8: library}  # noqa: SLF001 - ctypes' own
    return {
        name: Arm(PackedDraft(network, own), SlotCache(shape, like=network.embedding), network.token_ids)
        for name, own in libraries.items()
    }


def main() -> None:
    """Measure each batch size and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--position", type=int, default=256, help="tokens that each sequence has")
    parser.add_argument("--draft-vocab", type=int, default=DRAFT_VOCAB)
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread, which a busy machine changes little"
    )
    parser.add_argument("--no-trainer", action="store_true", help="nothing trains beside")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.processor_time else arguments.threads)
    clock = time.thread_time if arguments.processor_time else time.perf_counter
    folder, num_positions = harness.model(), arguments.position + CHAIN + 1
    library = load_kernels()
    target = Target.open(
        folder, dtype=torch.bfloat16, device=torch.device("cpu"), num_positions=num_positions, library=library
    )
    c = target.config
    shape = CacheShape(
        num_layers=c.num_layers,
        num_slots=max(arguments.batch),
        num_positions=num_positions,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
    )
    model = Model(target, SlotCache(shape, like=target.embedding))
    network = network_of(folder, target, draft_vocab=arguments.draft_vocab)
    arms = arms_of(network, library, num_slots=max(arguments.batch), num_positions=num_positions)
    with nullcontext() if arguments.no_trainer else beside.trainer(folder, FULL.narrow), torch.inference_mode():
        for batch in arguments.batch:
            show(batch, measure(model, arms, clock, batch=batch, position=arguments.position, rounds=arguments.rounds))


if __name__ == "__main__":
    main()
