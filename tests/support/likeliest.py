"""Traces of the made-up target as an engine sends them that shows its likeliest tokens instead of last hidden states."""

from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_draft.precision import linear, product_dtype
from updraft_draft.tensors import decode


def show_likeliest(trace: trace_pb2.Trace, head: Tensor, *, k: int) -> trace_pb2.Trace:
    """Change the teacher: the k likeliest tokens of the prompt's last row and those after it, and no log q of drafts."""
    payload = trace.payload
    payload.first_teacher_row = len(trace.prompt_ids) - 1 - payload.first_position
    for step in trace.steps:
        del step.draft_log_probs[:]
    _show(payload, decode(payload.last_hidden)[payload.first_teacher_row :], head, k)
    for one in payload.counterfactuals:
        _show(one, decode(one.last_hidden), head, k)
    return trace


def _show(message: trace_pb2.Payload | trace_pb2.Counterfactual, last: Tensor, head: Tensor, k: int) -> None:
    logits = linear(last, head.to(product_dtype(head.device))).float()
    log_sum_exp = logits.logsumexp(-1)
    likeliest = (logits - log_sum_exp[:, None]).topk(k)
    message.top_k.CopyFrom(
        trace_pb2.TopK(
            k=k,
            ids=likeliest.indices.flatten().tolist(),
            log_probs=likeliest.values.flatten().tolist(),
            log_sum_exp=log_sum_exp.tolist(),
        )
    )
