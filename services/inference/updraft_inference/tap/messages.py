"""The content of the plugin's messages `steps`, `prefill` and `speedup`. Pure. Rows are views of the message's tensors.

Raises KeyError, TypeError, ValueError, IndexError or OverflowError for a message that is none.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from updraft_inference.engine import TopK
from updraft_inference.tap.trace_builder import Rows, StepPart
from updraft_tap.drafting.speedup import Speedup

MAX_COUNT = 1 << 48
"""More than any count of a request, and small enough that sums over requests never exceed 64 bits."""


def steps(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, StepPart]]:
    """Each request's part of a verify step, by its id."""
    at = 0
    for request in header["requests"]:
        rows, rejected = int(request["rows"]), int(request["counterfactual_rows"])
        position, accepted = int(request["position"]), int(request["accepted"])
        step = StepPart(
            position=position,
            accepted=accepted,
            draft_ids=tuple(map(_whole, request["drafts"])),
            target_log_probs=tuple(map(float, request["log_p"])),
            batch_size=_whole(header["batch_size"]),
            duration_s=int(header["duration_us"]) / 1e6,
            version=_whole(request["version"]),
            rows=_rows(tensors, position, at, at, rows, rows) if rows else None,
            rejected=_rows(tensors, position + accepted + 1, at + rows, at + rows, rejected, rejected)
            if rejected
            else None,
        )
        at += rows + rejected
        yield str(request["rid"]), step


def prefills(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Rows]]:
    """Each request's rows of a forward over prompts, by its id."""
    at = taught = 0
    for request in header["requests"]:
        num, num_teacher = int(request["rows"]), int(request["teacher_rows"])
        rows = _rows(tensors, int(request["position"]), at, taught, num, num_teacher)
        at, taught = at + num, taught + num_teacher
        yield str(request["rid"]), rows


def speedups(header: Mapping[str, Any]) -> dict[int, Speedup]:
    """Those of a message `speedup`, by the smallest batch size of the load."""
    return {count(batch_size): Speedup(*map(_finite, bounds)) for batch_size, *bounds in header["loads"]}


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is no ratio of speeds")
    return number


def count(value: object, *, limit: int = MAX_COUNT) -> int:
    """A number below the limit. Raises ValueError if it is negative or not an integer."""
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f"{str(value)[:50]} is no count")
    return value


def _whole(value: Any) -> int:
    """A number that a trace has room for. Raises ValueError if it is none."""
    number = int(value)
    if not 0 <= number < 1 << 32:
        raise ValueError(f"{number} is not from 0 to 2^32")
    return number


def _rows(tensors: Mapping[str, Tensor], position: int, at: int, teacher_at: int, num: int, num_teacher: int) -> Rows:
    """Raises ValueError if there are too few."""
    aux = tensors["aux"][at : at + num]
    taught = slice(teacher_at, teacher_at + num_teacher)
    teacher = TopK(
        ids=tensors["ids"][taught], log_probs=tensors["log_probs"][taught], log_sum_exp=tensors["log_sum_exp"][taught]
    )
    if len(aux) != num or len(teacher) != num_teacher or len(teacher.log_sum_exp) != num_teacher:
        raise ValueError("fewer rows than announced")
    return Rows(position=position, aux=aux, teacher=teacher)
