"""Translates a request of the port to SGLang's /generate, and its finish reason back. Pure."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import Drafter, EngineInfo, FinishReason, GenerationRequest, check_limits
from updraft_inference.sglang_engine.server import ServerInfo

_ALL = -1
"""SGLang's `top_k` that disables filtering."""


def check(request: GenerationRequest, info: EngineInfo, server: ServerInfo) -> None:
    """Raises InvalidInput for a request that this server cannot serve: options that it would ignore silently, or tokens that
    would crash it."""
    check_limits(request, info)
    if request.drafter not in {None, Drafter.EAGLE3}:
        raise InvalidInput(f"drafter {request.drafter} is not available: SGLang uses eagle3 for all requests")
    if request.lookahead is not None and request.lookahead < server.num_steps:
        raise InvalidInput(
            f"lookahead {request.lookahead} is not available: SGLang drafts"
            f" {'up to ' if server.is_adaptive else ''}{server.num_steps} tokens per step for all requests"
        )
    if request.sampling.min_p:
        raise InvalidInput("min_p is not available: SGLang ignores it when it verifies drafts")
    if request.top_logprobs is not None:
        raise InvalidInput("logprobs are not available with SGLang")
    if not all(0 <= token < info.vocab_size for token, _ in request.sampling.logit_bias):
        raise InvalidInput(f"logit_bias names a token outside the vocabulary of {info.vocab_size}")


def body(request: GenerationRequest, rid: str) -> dict[str, Any]:
    """The body of POST /generate; `rid` is the id of the request at the server.

    A seed only has an effect with --enable-deterministic-inference. SGLang applies penalties up to the start of a
    verify step, not within it. `extra_key` separates the prefix caches of clients.
    """
    sampling = request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": request.max_tokens,
        "ignore_eos": request.ignore_eos,
        "temperature": max(0.0, sampling.temperature),
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or _ALL,
        "skip_special_tokens": False,
        "custom_params": {"updraft": asdict(request.capture)},
    }
    if sampling.has_penalties:
        params["repetition_penalty"] = sampling.repetition_penalty
        params["presence_penalty"] = sampling.presence_penalty
        params["frequency_penalty"] = sampling.frequency_penalty
    if sampling.logit_bias:
        params["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if request.json_schema is not None:
        params["json_schema"] = request.json_schema
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed % 2**31
    content = {"rid": rid, "input_ids": list(request.prompt_ids), "sampling_params": params}
    return {**content, "extra_key": request.client} if request.client else content


def reason(finish: Mapping[str, Any]) -> FinishReason:
    return {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}.get(
        str(finish.get("type")), FinishReason.CANCELLED
    )
