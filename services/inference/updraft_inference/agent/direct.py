"""Records requests of an engine one by one, for programs without a stream: `updraft-inference record` and benchmarks."""

import hashlib
from functools import partial

from updraft.trace.v1 import trace_pb2
from updraft_draft import tensors
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.agent.trace import Ended, Origin, trace
from updraft_inference.engine import Engine, FinishedRequest, GenerationRequest

_encode = partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_FP8_E4M3)
"""As capture encodes hidden states by default."""


async def answered(engine: Engine, request: GenerationRequest) -> FinishedRequest:
    """The result of a request, without its deltas."""
    deltas = [delta async for delta in engine.generate(request)]
    finished = deltas[-1].finished
    assert finished is not None, "the last one says how the request ended"
    return finished


def recorded(engine: Engine, finished: FinishedRequest, *, recorder: str) -> trace_pb2.Trace:
    """The trace of a request; its id follows from the request's. `recorder` stands for speculator and pod."""
    request = finished.request
    plan = CapturePlan(
        trace_id=hashlib.sha256(request.request_id.encode()).digest()[:16],
        is_captured=True,
        payload_probability=1.0,
        params=request.capture,
    )
    origin = Origin(
        speculator=recorder,
        pod=recorder,
        engine=engine.info.engine,
        target_fingerprint=engine.info.target_fingerprint,
        tokenizer_fingerprint=engine.info.tokenizer_fingerprint,
        quantization=engine.info.quantization,
    )
    return trace(Ended(finished=finished, plan=plan, finished_s=0.0), origin, _encode)
