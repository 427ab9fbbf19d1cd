"""The served draft, on a stand-in for vLLM's model whose layers are packed for a kernel, as on a CPU, or are not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from updraft_tap import weights
from updraft_vllm import draft
from updraft_vllm.draft import VllmDraft

VOCAB, PADDED, WIDTH, AUX = 10, 16, 40, 120


class Packing:
    """As vLLM packs a weight on a CPU: a function holds it, and the parameter is freed."""

    def __init__(self) -> None:
        self.products: list[int] = []

    def process_weights_after_loading(self, layer: Any) -> None:
        held = layer.weight.detach().clone()
        layer.cpu_linear = lambda x, *_: x @ held.t()
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = layer.cpu_linear(x, layer.weight, bias)
        self.products.append(len(x) * product.numel() // len(product) * x.shape[1])
        return product


class Layer(nn.Module):
    def __init__(self, outputs: int, inputs: int, packing: Packing | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.input_size, self.output_size = inputs, outputs
        self.quant_method = packing
        if packing is not None:
            packing.process_weights_after_loading(self)


class Model(nn.Module):
    def __init__(self, packing: Packing | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(draft_vocab_size=VOCAB)
        self.model = nn.Module()
        self.model.fc = Layer(WIDTH, AUX, packing)
        self.model.norm = nn.LayerNorm(WIDTH, bias=False)
        self.model.fc_input_size = AUX  # type: ignore[assignment]  # as vLLM's
        self.lm_head = Layer(PADDED, WIDTH, packing)
        self.draft_id_to_target_id = nn.Parameter(torch.zeros(VOCAB, dtype=torch.int64), requires_grad=False)


def new_weights() -> tuple[dict[str, Tensor], Tensor]:
    shapes = {"fc.weight": (WIDTH, AUX), "norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}, torch.arange(VOCAB)


def held(one: VllmDraft) -> dict[str, Tensor]:
    return {name: torch.cat([piece() for piece in pieces], -1) for name, pieces in one.readers().items()}


@pytest.fixture(params=[True, False], ids=["packed", "not packed"])
def packing(request: pytest.FixtureRequest) -> Packing | None:
    return Packing() if request.param else None


def served(packing: Packing | None) -> VllmDraft:
    return VllmDraft(Model(packing), Model(packing), dtype=torch.float32, is_compiled=False)


def test_what_is_written_is_what_is_held_and_what_was_kept_is_put_back(packing: Packing | None) -> None:
    one = served(packing)
    before, kept = held(one), one.kept()
    prepared, d2t = new_weights()

    for write in one.prepare(prepared, d2t):
        write()
    after = held(one)
    for write in kept:
        write()
    back = held(one)

    assert all(torch.equal(after[name], value) for name, value in {**prepared, "d2t": d2t}.items())
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], value) for name, value in before.items())


def test_weights_of_the_target_are_watched_also_where_some_are_packed(packing: Packing | None) -> None:
    one = served(packing)
    before = weights.sampled(one.target())

    assert weights.sampled(one.target()) == before
    with torch.no_grad():
        one.target()["model.norm.weight"][0] += 1
    assert weights.sampled(one.target()) != before


def test_a_packed_weight_is_read_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing()
    one = served(packing)
    whole = held(one)
    monkeypatch.setattr(draft, "_PRODUCTS", 20 * WIDTH * AUX)
    packing.products.clear()

    in_pieces = held(one)

    assert all(torch.equal(in_pieces[name], value) for name, value in whole.items())
    assert max(packing.products) == 20 * WIDTH * AUX
    assert len(packing.products) == AUX // 20 + 1  # the head is small


def test_a_piece_has_some_columns_even_if_they_are_many_products(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing()
    monkeypatch.setattr(draft, "_PRODUCTS", 1)

    held(served(packing))

    assert len(packing.products) == -(-AUX // 16) + -(-WIDTH // 16)
