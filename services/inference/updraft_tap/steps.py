"""One verify step of a batch: the rows that are copied on the device, and the message that they become. Pure.

`collect_step_rows` runs before sampling, on tensors that the engine changes or reuses afterwards, and returns copies. The
number of accepted draft tokens is known only after sampling, and reading it would make the GPU wait. So all rows of a request
are copied, and `StepMessage.message` drops the unneeded ones on the channel's thread.

A request has one row for its root and one for each of its draft tokens; requests may have different numbers of draft tokens.

Tensors: N rows of logits, M rows of states, C rows of the captured requests, S captured requests, P rows of those with payload,
V vocabulary, H width of the auxiliary states, K tokens of the teacher.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from updraft_tap.distribution import chosen, joined_rows, judged, log_probs
from updraft_tap.policy import CapturedRequests

TEACHER = ("ids", "log_probs", "log_sum_exp")

VERSION_ATTRIBUTE = "updraft_version"
"""The attribute of a step's result with the version of the draft that proposed tokens in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """Where the rows of the captured requests are: the first row of each in the logits and in the states, and how many."""

    captured: CapturedRequests
    logit_rows: tuple[int, ...]
    state_rows: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def all(self) -> list[int]:
        """Rows of the logits of all captured requests."""
        return _ranges(self.logit_rows, self.widths)

    @property
    def states(self) -> list[int]:
        """Rows of the states of all captured requests."""
        return _ranges(self.state_rows, self.widths)

    @property
    def of_payload(self) -> list[int]:
        """Those of the requests with payload, as rows of the captured ones."""
        starts = [sum(self.widths[:i]) for i in self.captured.payload]
        return _ranges(starts, [self.widths[i] for i in self.captured.payload])

    @property
    def states_of_payload(self) -> list[int]:
        """Rows of the states of the requests with payload."""
        payload = self.captured.payload
        return _ranges([self.state_rows[i] for i in payload], [self.widths[i] for i in payload])


def even_rows(captured: CapturedRequests, width: int) -> StepRows:
    """The rows of a batch in which each request has `width` rows, one request after the other."""
    firsts = tuple(place * width for place in captured.places)
    return StepRows(captured=captured, logit_rows=firsts, state_rows=firsts, widths=(width,) * len(firsts))


def collect_step_rows(
    rows: StepRows, *, tokens_M: Tensor, positions_S: Tensor, logits_NV: Tensor, states: Sequence[Tensor], top_k: int
) -> dict[str, Tensor]:
    """Copies: tokens [C], positions [S], log_p [C]; with payload, aux, ids, log_probs, log_sum_exp of P rows.

    `tokens_M` has the token that each row of `states` read, and `positions_S` the position of each captured root. `states` are
    the auxiliary ones, [M, H] in all, in one tensor or in several side by side.
    """
    wanted = rows.all
    if max(wanted, default=-1) >= len(logits_NV):
        raise ValueError(
            f"{len(rows.widths)} requests of {max(rows.widths)} rows do not fit {len(logits_NV)} rows of logits"
        )
    tokens_C = chosen(tokens_M, rows.states).to(torch.int64, copy=True)
    taken = {"tokens": tokens_C, "positions": positions_S.clone()}
    payload = rows.of_payload
    if max(rows.widths, default=1) == 1 and not payload:
        return {**taken, "log_p": torch.zeros_like(tokens_C, dtype=torch.float32)}
    # The row before a draft token judges it. Nothing uses the last row's entry, which reads another request's root.
    logits_CV, next_C = chosen(logits_NV, wanted), tokens_C.roll(-1)
    if not payload:
        return {**taken, "log_p": log_probs(logits_CV, next_C)}
    taken["log_p"], top = judged(logits_CV, next_C, top_k)
    taken["aux"] = joined_rows(states, rows.states_of_payload)
    return taken | {name: chosen(values, payload) for name, values in zip(TEACHER, top, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    """The message of a step; `versions` are the drafts that proposed the tokens of each captured request."""

    rows: StepRows
    versions: tuple[int, ...]

    def message(self, taken: Mapping[str, Tensor], duration_us: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of the `steps` message, from the rows of `collect_step_rows` and accept_lens [S], on the CPU."""
        requests: list[dict[str, Any]] = []
        rows: list[int] = []
        for request, first_row in self._requests(taken):
            if first_row is not None:
                rows += range(first_row, first_row + request["rows"] + request["counterfactual_rows"])
            requests.append(request)
        header = {
            "kind": "steps",
            "batch_size": self.rows.captured.batch_size,
            "duration_us": duration_us,
            "requests": requests,
        }
        return header, {name: chosen(taken[name], rows) for name in ("aux", *TEACHER) if name in taken}

    def _requests(self, taken: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Any], int | None]]:
        """The header entry of each request, and the start of its rows in the tensors of P."""
        captured, start, first_row = self.rows.captured, 0, 0
        tokens, log_p = taken["tokens"].tolist(), taken["log_p"].tolist()
        columns = [taken[name].tolist() for name in ("positions", "accept_lens")]
        for rid, options, width, version, position, accept_len in zip(
            captured.rids, captured.options, self.rows.widths, self.versions, *columns, strict=True
        ):
            accepted = accept_len - 1
            if not 0 <= accepted < width:
                raise ValueError(f"{accepted} of {width - 1} draft tokens were accepted")
            request = {
                "rid": rid,
                "version": version,
                "probability": options.probability,
                "position": position,
                "accepted": accepted,
                "drafts": tokens[start + 1 : start + width],
                "log_p": log_p[start : start + width - 1],
                "rows": accepted + 1 if options.payload else 0,
                "counterfactual_rows": min(options.counterfactual_rows, width - 1 - accepted) if options.payload else 0,
            }
            yield request, first_row if options.payload else None
            start += width
            first_row += width if options.payload else 0


def _ranges(starts: Sequence[int], counts: Sequence[int]) -> list[int]:
    return [row for start, count in zip(starts, counts, strict=True) for row in range(start, start + count)]
