"""Copies tensors from the device to the channel's thread without delaying the scheduler.

On CUDA they are copied into pinned memory on their own stream, and the thread waits for an event. PyTorch reuses the
pinned blocks. On a CPU they are passed on as they are, because they are already copies.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Mark = float | torch.cuda.Event
Build = Callable[[dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]
"""Makes a message of rows that have come from the device: its header and its tensors."""


class Staged:
    def __init__(self, tensors: Mapping[str, Tensor], stream: torch.cuda.Stream | None) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = dict(tensors)
        if stream is not None:
            self._copy(stream)
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def _copy(self, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for name, tensor in self._tensors.items():
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copy.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
                self._tensors[name] = copy
            self._event = _event(blocking=True)
            self._event.record(stream)

    def wait(self) -> dict[str, Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


@dataclass(frozen=True, slots=True)
class StagedMessage:
    """Rows on their way from the device. `build` is called on the channel's thread."""

    staged: Staged
    build: Build

    @property
    def num_bytes(self) -> int:
        return self.staged.num_bytes

    def message(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self.build(self.staged.wait())


def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for the copies; None if none is needed. Raises ValueError for other devices."""
    if device.type == "cuda":
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch
    if device.type == "cpu":
        return None
    raise ValueError(f"capture supports CPU and CUDA devices, not {device.type}")


def mark(stream: torch.cuda.Stream | None) -> Mark:
    """This moment, either in the work submitted to the GPU so far or on the clock."""
    if stream is None:
        return time.perf_counter()
    event = _event(enable_timing=True)
    event.record(torch.cuda.current_stream(stream.device))
    return event


def elapsed_us(start: Mark, end: Mark) -> int:
    """Microseconds between two marks. On a GPU the time begins when it reaches the first one."""
    if isinstance(start, float) and isinstance(end, float):
        return round(1e6 * (end - start))
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return round(1e3 * float(start.elapsed_time(end)))


def _event(**options: bool) -> torch.cuda.Event:
    return torch.cuda.Event(**options)  # type: ignore[no-untyped-call]  # torch
