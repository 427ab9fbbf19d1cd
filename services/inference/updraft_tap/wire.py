"""Messages between the plugin in an engine and the agent, over a Unix socket: a JSON header and the bytes of tensors. Pure.

    frame   = length of header (u32, little endian), length of the rest (u64), header, tensors in order
    header  = {"kind": ..., "tensors": [[name, dtype, shape], ...], ...}

From the plugin:

hello    Once per connection: protocol, id (random per connecting role of a process), server (the same in all processes of
         one), tap (version of this package), engine: {name, version}, pid, ranks: {tensor, pipeline, data} (how many), role
         (scheduler or worker; a process that is both makes two connections), loader (of a worker: the role to which loads
         are sent, the scheduler if it leads several ranks), device, hooks: {function: why it is not in place,
         "" if it is}, unhooked: {hook: why it no longer runs}, steps (draft tokens per verify step), aux_size, vocab_size,
         dtype, quantization (the server's name for that of the target's weights, or ""), version and digest (of the draft
         loaded last; 0 and "" for the one that the server started with; digest "unknown" if the served draft is not known),
         problem (why nothing is captured; "" if it works), unasked (why requests are counted and not captured; "" if they
         are).
steps    One verify step of a batch: number (of the message), dropped (messages so far), batch_size, duration_us, requests:
         [{rid, probability, version (that drafted), position, accepted, drafts, log_p, rows, counterfactual_rows}].
         `position` is that of the first row in prompt ++ output; `rows` + `counterfactual_rows` of the tensors belong to the
         request, in order.
prefill  A forward over (a chunk of) prompts: number, dropped, requests: [{rid, probability, position, cached, rows,
         teacher_rows}]. The last `teacher_rows` (0 or 1) of the request's `rows` (0: none were requested) have a teacher.
         `cached` positions before the first chunk came from a cache; 0 in later chunks. A preempted request is sent again,
         with its output after its prompt.

finished A request ended: rid, finish (one of FINISHES), prompt_tokens, output_tokens, preemptions, duration_us (since it
         arrived), constrained (a grammar masked its tokens), counters: [{version (that drafted; null if that is not known),
         steps, proposed, proposed_by_position, accepted (by position), us (that the steps took; 0 if no step was timed)}],
         sampling (of a request with payload, else null), domain, tenant (SHA-256 of the tenant's name, in hexadecimal; "" for
         none), retention_s and region (the policy of its key; 0 and "" for none), permitted (its sender permits capture),
         train (false: for evaluation only), opted_in (its sender asked for capture), asked (false: it bypassed the
         middleware), probability. With payload, the tensor tokens has its prompt and
         its output, int32. Each process says the `probability` with which its own policy chose a request; they may differ
         while the policy changes. The first `cached_tokens` of its prompt came from the server's prefix cache.
loaded   The answer to a load: version, refusal ("" if it is served), served: {version, digest} (not from a server that cannot
         swap). Of a draft that is served: held (digest of what the engine holds), target (digest of samples of the target,
         the same before and after; "" if they could not be compared), pause_us (how long the engine stood still). Of one
         that was read and refused: needs_restart (for its shape: a server that starts with it serves it), target_changed
         (because loading it changed weights of the target). If the engine later loses the draft, another hello reports it.

speedup  What drafting is worth, measured in random slices of steps: version (of the draft), loads: [[smallest batch size,
         ratio, low, high], ...], with batch size 0 for all steps. From the scheduler, when a number may have changed.

policy   The policy that is in effect from now on, in reply to one. It comes after every message that the process made before,
         so it also says that these are there, or are in its dropped. Messages of two processes have no common order: rows
         of a request may come after its end.

From the agent:

answer   In reply to a hello: refusal, a sentence, or "". A refusal ends the connection.
policy   payload (fraction of requests that give rows), prompt_rows, counterfactual_rows, opt_in (true: only requests whose
         senders opted in do). Before the first policy, none do.
load     folder, version, digest: serve the draft in that folder. Sent to the loader that the worker's hello names.

Tensors of steps and prefill: aux [N, aux_size], and the teacher of rows that have one: ids int32 [M, k], log_probs float32
[M, k], log_sum_exp float32 [M]. In steps M = N. Not Protobuf, because the engine's image determines its runtime version.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch

PROTOCOL = 7
MAX_FRAME = 1 << 30

FINISHES = {
    "stopped": "at the end of the text or at a stop word of the client",
    "length_capped": "at max_tokens or at the end of the context",
    "repetition": "the model repeated itself",
    "aborted": "the client disconnected, or the server aborted it",
    "ignored": "its prompt is longer than the context",
    "error": "an error in the server",
}
"""How a request may end. The agent logs other words, and counts such an answer as cut off."""

_LENGTHS = struct.Struct("<IQ")
_JSON = json.JSONEncoder(separators=(",", ":"))
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "i32": torch.int32, "i64": torch.int64}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class FrameError(Exception):
    """The data is not a valid message of this protocol."""


def encode(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> list[bytes | memoryview]:
    """The frame in parts, without copying the tensors, which must be on the CPU."""
    flat = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
    described = [[name, NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in flat.items()]
    head = _JSON.encode({**header, "tensors": described}).encode()
    bodies = [tensor.view(-1).view(torch.uint8).numpy().data for tensor in flat.values() if tensor.numel()]
    return [_LENGTHS.pack(len(head), sum(body.nbytes for body in bodies)), head, *bodies]


def answer(refusal: str = "") -> bytes:
    """The agent's answer to a hello."""
    return b"".join(encode({"kind": "answer", "refusal": refusal}))


PREFIX_SIZE = _LENGTHS.size


def lengths(prefix: bytes) -> tuple[int, int]:
    """Bytes of the header and of the tensors after these PREFIX_SIZE bytes. Raises FrameError if there are fewer or the
    sizes are absurd."""
    if len(prefix) < PREFIX_SIZE:
        raise FrameError("the stream ends before a frame")
    head, body = _LENGTHS.unpack(prefix)
    if head + body > MAX_FRAME:
        raise FrameError(f"the frame is too large: {head + body} bytes")
    return head, body


def decode(head: bytes | bytearray, body: bytes | bytearray) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors, which share `body`, or a copy if it is read-only. Raises FrameError if they do not match."""
    try:
        header = json.loads(head)
        memory, tensors, at = body if isinstance(body, bytearray) else bytearray(body), {}, 0
        for name, dtype, shape in header["tensors"]:
            count = 1
            for size in shape:
                count *= size
            num_bytes = count * _DTYPES[dtype].itemsize
            if min(shape, default=1) < 0 or at + num_bytes > len(memory):
                raise FrameError(f"the tensor {name} does not fit its frame")
            values = torch.frombuffer(memory, dtype=_DTYPES[dtype], count=count, offset=at) if count else torch.empty(0)
            tensors[name] = values.to(_DTYPES[dtype]).view(shape)
            at += num_bytes
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FrameError(str(error)) from error
    return header, tensors
