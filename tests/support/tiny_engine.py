"""A stand-in for an engine with a draft that is swapped (see `updraft_tap.swap.Draft`)."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import torch
from tests.support.tiny_draft import CONFIG
from torch import Tensor


class Engine:
    """Holds weights by the names of an engine; `spoil` changes what is read back of the draft that was loaded last."""

    def __init__(self, *, is_read_at_rest: bool) -> None:
        self.config = SimpleNamespace(**json.loads(CONFIG.to_json()))
        self.aux_size = 24
        self.dtype = torch.bfloat16
        self.is_read_at_rest = is_read_at_rest
        self.held: dict[str, Tensor] = {}
        self.spoil = 0.0
        self.may_prepare = threading.Event()
        self.may_prepare.set()
        self.fails = 0
        """How many writes of the map fail."""
        self.pieces = 0
        self.on_write: Callable[[], None] = lambda: None
        self.on_prepare: Callable[[], None] = lambda: None
        self.targets = {"shared embed_tokens.weight": torch.randn(24, 8), "model.norm.weight": torch.ones(8)}
        self.on_read: Callable[[], None] = lambda: None

    def part(self, prepared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All of it, as the only rank holds it."""
        return prepared

    def prepare(self, prepared: Mapping[str, Tensor], d2t: Tensor) -> Sequence[Callable[[], None]]:
        assert self.may_prepare.wait(30)
        self.on_prepare()
        tensors = {**prepared, "d2t": d2t}

        def write(name: str) -> None:
            if self.fails and name == "d2t":
                self.fails -= 1
                raise RuntimeError("out of memory")
            self.held[name] = tensors[name]
            self.on_write()

        return [lambda name=name: write(name) for name in tensors]  # type: ignore[misc]  # a default binds the name

    def kept(self) -> Sequence[Callable[[], None]]:
        before = dict(self.held)

        def write() -> None:
            if self.fails:
                self.fails -= 1
                raise RuntimeError("out of memory")
            self.held, self.spoil = dict(before), 0.0

        return [write]

    def readers(self) -> Mapping[str, Sequence[Callable[[], Tensor]]]:
        return {
            name: [lambda half=half: self._read(half) for half in tensor.chunk(2, -1)]  # type: ignore[misc]
            for name, tensor in self.held.items()
        }

    def target(self) -> Mapping[str, Tensor]:
        return self.targets

    def _read(self, half: Tensor) -> Tensor:
        self.pieces += 1
        self.on_read()
        return half + self.spoil if half.is_floating_point() else half
