"""One verify step of a batch: the rows that are copied on the device, and the message that they become. Pure.

`collect_step_rows` runs before sampling, on tensors that SGLang changes or reuses afterwards, and returns copies. The number of
accepted draft tokens is known only after sampling, and reading it would make the GPU wait. So all rows of a request are copied,
and `StepMessage.message` drops the unneeded ones on the channel's thread.

Tensors: B requests of the batch, S of them with capture options, P with payload; W rows a request (its root, then its drafts),
V vocabulary, H width of the auxiliary states, K tokens of the teacher.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from updraft_sglang.capture_options import CapturedRequests
from updraft_sglang.distribution import chosen, log_probs, log_sum_exp, teacher

TEACHER = ("ids", "log_probs", "log_sum_exp")


def collect_step_rows(
    captured: CapturedRequests, *, tokens_BW: Tensor, seq_lens_B: Tensor, logits_NV: Tensor, aux_NH: Tensor, top_k: int
) -> dict[str, Tensor]:
    """Copies: tokens [S, W], seq_lens [S], log_p [S, W - 1]; for P, W rows each: aux, ids, log_probs, log_sum_exp."""
    batch_size, width = tokens_BW.shape
    if batch_size != captured.batch_size or logits_NV.shape[0] < batch_size * width:
        raise ValueError(f"{batch_size} requests of {width} rows do not fit {logits_NV.shape[0]} rows of logits")
    num_rows = batch_size * width
    logits_SWV = chosen(logits_NV[:num_rows].view(batch_size, width, -1), captured.places, batch_size)
    tokens_SW = chosen(tokens_BW, captured.places, batch_size).long()
    payload = captured.payload
    taken = {
        "tokens": tokens_SW.clone(),
        "seq_lens": chosen(seq_lens_B, captured.places, batch_size).clone(),
        "log_p": tokens_SW.new_empty((len(tokens_SW), 0), dtype=torch.float32),
    }
    if width == 1 and not payload:
        return taken
    lse_SW = log_sum_exp(logits_SWV.flatten(0, 1)).view(len(tokens_SW), width)
    taken["log_p"] = log_probs(
        logits_SWV[:, :-1].flatten(0, 1), lse_SW[:, :-1].flatten(), tokens_SW[:, 1:].flatten()
    ).view(len(tokens_SW), width - 1)
    if payload:
        top = teacher(
            chosen(logits_SWV, payload, len(captured.places)).flatten(0, 1),
            chosen(lse_SW, payload, len(captured.places)).flatten(),
            top_k,
        )
        aux_BWH = aux_NH[:num_rows].view(batch_size, width, -1)
        taken["aux"] = chosen(aux_BWH, captured.payload_places, batch_size).flatten(0, 1).clone()
        taken |= {name: values.clone() for name, values in zip(TEACHER, top, strict=True)}
    return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    captured: CapturedRequests
    version: int

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
            "version": self.version,
            "batch_size": self.captured.batch_size,
            "duration_us": duration_us,
            "requests": requests,
        }
        return header, {name: taken[name][rows] for name in ("aux", *TEACHER) if name in taken}

    def _requests(self, taken: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Any], int | None]]:
        """The header entry of each request, and the start of its rows in the tensors of P."""
        width, first_row = taken["tokens"].shape[1], 0
        columns = [taken[name].tolist() for name in ("tokens", "seq_lens", "accept_lens", "log_p")]
        for rid, options, tokens, position, accept_len, log_p in zip(
            self.captured.rids, self.captured.options, *columns, strict=True
        ):
            accepted = accept_len - 1
            if not 0 <= accepted < width:
                raise ValueError(f"{accepted} of {width - 1} draft tokens were accepted")
            request = {
                "rid": rid,
                "position": position,
                "accepted": accepted,
                "drafts": tokens[1:],
                "log_p": log_p,
                "rows": accepted + 1 if options.payload else 0,
                "counterfactual_rows": min(options.counterfactual_rows, width - 1 - accepted) if options.payload else 0,
            }
            yield request, first_row if options.payload else None
            first_row += width if options.payload else 0
