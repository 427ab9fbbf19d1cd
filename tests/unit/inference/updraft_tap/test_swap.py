"""A swap, on an engine that holds its weights in a dictionary."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_draft import CONFIG, write_tiny_draft
from tests.support.wait import wait_until
from torch import Tensor

from updraft_tap import weights
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.swap import Swap
from updraft_tap.weights import ServedVersion


class Engine:
    """Holds weights by the names of an engine; `spoil` changes what is read back."""

    def __init__(self, *, is_read_at_rest: bool) -> None:
        self.config = SimpleNamespace(**json.loads(CONFIG.to_json()))
        self.aux_size = 24
        self.dtype = torch.bfloat16
        self.is_read_at_rest = is_read_at_rest
        self.held: dict[str, Tensor] = {}
        self.spoil = 0.0
        self.may_prepare = threading.Event()
        self.may_prepare.set()
        self.fails = False

    def prepare(self, prepared: Mapping[str, Tensor], d2t: Tensor) -> Sequence[Callable[[], None]]:
        assert self.may_prepare.wait(30)
        tensors = {**prepared, "d2t": d2t}

        def write(name: str) -> None:
            if self.fails and name == "d2t":
                raise RuntimeError("out of memory")
            self.held[name] = tensors[name]

        return [lambda name=name: write(name) for name in tensors]  # type: ignore[misc]  # a default binds the name

    def readers(self) -> Mapping[str, Callable[[], Tensor]]:
        return {name: lambda name=name: self._read(name) for name in self.held}  # type: ignore[misc]

    def _read(self, name: str) -> Tensor:
        held = self.held[name]
        return held + self.spoil if held.is_floating_point() else held


class Served:
    """An engine, its swap, and the answers."""

    def __init__(self, *, is_read_at_rest: bool) -> None:
        self.engine = Engine(is_read_at_rest=is_read_at_rest)
        self.version = ServedVersion()
        self.answers: list[dict[str, Any]] = []
        self.swap = Swap(draft=self.engine, between=BetweenSteps(), served=self.version, reply=self.answers.append)

    def load(self, folder: Path, version: int = 7) -> dict[str, Any]:
        before = len(self.answers)
        self.swap.load({"kind": "load", "folder": str(folder), "version": version, "digest": f"sha256:{version}"})
        wait_until(lambda: len(self.answers) > before)
        wait_until(lambda: not self.swap._busy.locked())
        return self.answers[-1]


@pytest.fixture(params=[True, False], ids=["read at rest", "read at any time"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    one = Served(is_read_at_rest=request.param)
    yield one
    one.engine.may_prepare.set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_draft(tmp_path / "v7")


def test_a_draft_is_served_and_proved_by_what_the_engine_holds(served: Served, folder: Path) -> None:
    answer = served.load(folder)

    tensors = load_file(folder / "model.safetensors")
    joined = weights.joined(tensors, torch.bfloat16)
    assert answer["refusal"] == ""
    assert answer["held"] == weights.digest({**joined, "d2t": tensors["d2t"]})
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    assert (served.version.version, served.version.digest) == (7, "sha256:7")
    assert served.engine.held.keys() == joined.keys() | {"d2t"}


@pytest.mark.parametrize("problem", ["missing", "not finite", "another size", "token that is none", "int weights"])
def test_a_draft_that_is_refused_leaves_the_one_before(served: Served, folder: Path, problem: str) -> None:
    served.load(folder)
    before = dict(served.engine.held)
    spoil(folder, problem)

    answer = served.load(folder, 8)

    assert answer["refusal"] != ""
    assert answer["served"] == {"version": 7, "digest": "sha256:7"}
    assert all(served.engine.held[name] is tensor for name, tensor in before.items())


def spoil(folder: Path, problem: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    if problem == "not finite":
        tensors["norm.weight"][0] = torch.nan
    elif problem == "another size":
        tensors["norm.weight"] = torch.ones(9)
    elif problem == "token that is none":
        tensors["d2t"] += 100
    elif problem == "int weights":
        tensors["norm.weight"] = tensors["norm.weight"].int()
    save_file(tensors, folder / "model.safetensors")
    if problem == "missing":
        (folder / "config.json").unlink()


def test_a_message_that_is_none_is_refused(served: Served) -> None:
    served.swap.load({"kind": "load"})
    wait_until(lambda: bool(served.answers))

    (answer,) = served.answers
    assert (answer["version"], answer["refusal"].startswith("a load needs a folder")) == (None, True)


def test_what_the_engine_holds_otherwise_is_no_success(served: Served, folder: Path) -> None:
    served.engine.spoil = 1.0

    answer = served.load(folder)

    assert "but the engine holds sha256:" in answer["refusal"]
    assert served.version.digest == ""


def test_a_write_that_fails_in_the_middle_says_so_and_forgets_the_digest(served: Served, folder: Path) -> None:
    served.load(folder)
    served.engine.fails = True

    answer = served.load(folder, 8)

    assert "loaded only in part; load another one: out of memory" in answer["refusal"]
    assert (served.version.version, served.version.digest) == (7, "")


def test_a_second_draft_is_refused_while_one_is_being_loaded(served: Served, folder: Path) -> None:
    served.engine.may_prepare.clear()
    served.swap.load({"kind": "load", "folder": str(folder), "version": 7, "digest": "sha256:7"})
    served.swap.load({"kind": "load", "folder": str(folder), "version": 8, "digest": "sha256:8"})
    served.engine.may_prepare.set()
    wait_until(lambda: len(served.answers) == 2)

    assert [(one["version"], one["refusal"]) for one in served.answers] == [
        (8, "another draft is being loaded"),
        (7, ""),
    ]


def test_the_digest_covers_names_types_shapes_and_values_and_forgives_the_sign_of_zero() -> None:
    one = {"a": torch.tensor([1.0, 0.0, 1e-40]), "d2t": torch.tensor([3])}
    others = [
        {"b": one["a"], "d2t": one["d2t"]},
        {**one, "a": one["a"].double()},
        {**one, "a": one["a"][None]},
        {**one, "a": torch.tensor([1.0, 0.0, 1e-30])},
        {**one, "d2t": torch.tensor([4])},
    ]

    assert weights.digest(one) == weights.digest({**one, "a": torch.tensor([1.0, -0.0, 0.0])})
    assert len({weights.digest(other) for other in [one, *others]}) == len(others) + 1


def test_joined_weights_are_in_the_engines_order(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")

    joined = weights.joined(tensors, torch.float32)

    q, k, v = (tensors[f"midlayer.self_attn.{part}_proj.weight"].float() for part in "qkv")
    gate, up = (tensors[f"midlayer.mlp.{part}_proj.weight"].float() for part in ("gate", "up"))
    assert torch.equal(joined["layers.0.self_attn.qkv_proj.weight"], torch.cat([q, k, v]))
    assert torch.equal(joined["layers.0.mlp.gate_up_proj.weight"], torch.cat([gate, up]))
