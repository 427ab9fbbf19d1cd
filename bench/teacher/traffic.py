"""Real requests to a real target, and the traces of them that differ in their teacher alone.

Top-k teachers are computed as an engine computes its logits, from the same last hidden states and the target's head; like
those of an engine that shows logits of what it samples, their rows begin with the prompt's last one.
"""

import asyncio
import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_cli.prompts import domain_prompts
from updraft_draft import tensors
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.agent.trace import Ended, Origin, trace
from updraft_inference.engine import CaptureParams, Drafter, FinishedRequest, GenerationRequest, SamplingParams
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

DOMAINS = ("code", "math", "chat")
MAX_PROMPT_TOKENS = 192
PROMPT_ROWS = 64
STREAMS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Traces with exact (bfloat16) hidden states, to learn from and to measure on."""

    learnt: list[trace_pb2.Trace]
    held_out: list[trace_pb2.Trace]


def traffic(model: Path, *, num_learnt: int, num_held_out: int, tokens: int, seed: int, keep: Path | None) -> Traffic:
    """Serve `num_learnt` and `num_held_out` prompts of each domain; what `keep` holds is not served again."""
    parts = []
    for name, count in (("learnt", num_learnt), ("held_out", num_held_out)):
        file = None if keep is None else keep / f"{name}-{count}-{tokens}-{seed}.traces"
        if file is None or not file.exists():
            prompts = _prompts(model, count, seed, is_held_out=name == "held_out")
            found = asyncio.run(served(model, prompts, tokens=tokens))
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"".join(struct.pack("<I", one.ByteSize()) + one.SerializeToString() for one in found))
        else:
            found = _read(file)
        parts.append(found)
    return Traffic(learnt=parts[0], held_out=parts[1])


def with_hidden(whole: trace_pb2.Trace, encoding: trace_pb2.TensorEncoding.ValueType) -> trace_pb2.Trace:
    """The same trace with last hidden states in this encoding; the auxiliary ones are in float8, as served by default."""
    changed = _with_aux(whole)
    changed.payload.last_hidden.CopyFrom(tensors.encode(tensors.decode(whole.payload.last_hidden), encoding))
    return changed


def with_top_k(whole: trace_pb2.Trace, head: Tensor, k: int) -> trace_pb2.Trace:
    """The same trace with the k likeliest tokens of each row from the prompt's last one on."""
    changed = _with_aux(whole)
    changed.payload.first_teacher_row = len(whole.prompt_ids) - 1 - whole.payload.first_position
    logits = F.linear(tensors.decode(whole.payload.last_hidden)[changed.payload.first_teacher_row :], head).float()
    log_sum_exp = logits.logsumexp(-1)
    likeliest = (logits - log_sum_exp[:, None]).topk(k)
    changed.payload.top_k.CopyFrom(
        trace_pb2.TopK(
            k=k,
            ids=likeliest.indices.flatten().tolist(),
            log_probs=likeliest.values.flatten().tolist(),
            log_sum_exp=log_sum_exp.tolist(),
        )
    )
    return changed


def _with_aux(whole: trace_pb2.Trace) -> trace_pb2.Trace:
    changed = trace_pb2.Trace()
    changed.CopyFrom(whole)
    changed.payload.ClearField("teacher")
    aux = tensors.decode(whole.payload.aux_hidden)
    changed.payload.aux_hidden.CopyFrom(tensors.encode(aux, trace_pb2.TENSOR_ENCODING_FP8_E4M3))
    return changed


async def served(model: Path, prompts: Mapping[str, tuple[int, ...]], *, tokens: int) -> list[trace_pb2.Trace]:
    """Greedy answers to prompts of up to MAX_PROMPT_TOKENS, as traces by name with exact hidden states."""
    finished: list[FinishedRequest] = []
    limits = Limits(num_slots=STREAMS, max_context=MAX_PROMPT_TOKENS + tokens, max_lookahead=3)
    async with TorchEngine.open(model, EngineOptions(limits=limits), finished.append) as engine:

        async def ask(name: str, prompt: tuple[int, ...]) -> None:
            request = GenerationRequest(
                request_id=name,
                prompt_ids=prompt,
                max_tokens=tokens,
                sampling=SamplingParams(temperature=0),
                drafter=Drafter.NGRAM,
                capture=CaptureParams(payload=True, prompt_rows=PROMPT_ROWS),
            )
            async for _ in engine.generate(request):
                pass

        await asyncio.gather(*(ask(name, prompt) for name, prompt in prompts.items()))
        origin = Origin(
            speculator="bench",
            pod="bench",
            engine=engine.info.engine,
            target_fingerprint=engine.info.target_fingerprint,
            tokenizer_fingerprint=engine.info.tokenizer_fingerprint,
        )
    encode = partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_BF16)
    return [_trace(one, origin, encode) for one in sorted(finished, key=lambda one: one.request.request_id)]


def _trace(one: FinishedRequest, origin: Origin, encode: Callable[[Tensor], trace_pb2.Tensor]) -> trace_pb2.Trace:
    trace_id = hashlib.sha256(one.request.request_id.encode()).digest()[:16]
    plan = CapturePlan(trace_id=trace_id, is_captured=True, has_payload=True, payload_probability=1.0)
    return trace(Ended(finished=one, plan=plan, finished_s=0.0), origin, encode)


def _prompts(model: Path, count: int, seed: int, *, is_held_out: bool) -> dict[str, tuple[int, ...]]:
    tokenizer, template = Tokenizer.open(model), ChatTemplate.open(model)
    assert template is not None, "the demo's model has a chat template"
    prompts = {}
    for domain in DOMAINS:
        for n, text in enumerate(domain_prompts(domain, count, seed=seed, held_out=is_held_out)):
            chat = template.render([{"role": "user", "content": text}])
            prompts[f"{domain}-{n:03}"] = tokenizer.encode(chat, add_special_tokens=False)[-MAX_PROMPT_TOKENS:]
    return prompts


def _read(file: Path) -> list[trace_pb2.Trace]:
    data, found = memoryview(file.read_bytes()), []
    while data:
        (size,) = struct.unpack_from("<I", data)
        found.append(trace_pb2.Trace.FromString(bytes(data[4 : 4 + size])))
        data = data[4 + size :]
    return found


def num_output_tokens(traces: Sequence[trace_pb2.Trace]) -> int:
    """Output tokens of all of them."""
    return sum(len(one.output_ids) for one in traces)
