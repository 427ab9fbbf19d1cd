"""How long the plugin holds the engine when a request with rows ends, at a width of 4096.

No target of that width runs here. So a stand-in for vLLM's first runner and its scheduler calls the plugin's own hooks, with
tensors of that width, and does nothing else. Both are in one process, as vLLM's may be on a GPU. The channels are the real
ones. The agent is in this process too and takes turns with the hooks at the interpreter, which costs more than in a server.
"""

import asyncio
import statistics
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench.harness import Line, spread
from bench.tap.plugged import LOOKAHEAD, ROLES
from tests.support.tap_agent import Agent, listening

from updraft_cli import results
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.channel import Channel
from updraft_tap.http.terms import Terms, marked
from updraft_tap.policy import Policy
from updraft_tap.weights import ServedVersion
from updraft_vllm import runners
from updraft_vllm.requests import RequestHooks
from updraft_vllm.rows import RowHooks

HIDDEN, NUM_AUX, VOCAB = 4096, 3, 128_256
STREAMS = 8
PROMPT_TOKENS, STEPS = 512, 24
TOP_K = 64
QUEUE_BYTES = 1 << 30
MOST_MS = 5.0

_PAYLOAD = Policy(payload=1.0, prompt_rows=0, counterfactual_rows=2)
_WIDTH = LOOKAHEAD + 1
_TEXT: Mapping[str, Any] = {"lora_request": None, "prompt_embeds": None, "mm_features": []}


class Engine:
    """Eight streams that verify three draft tokens in each step and accept one; the first one gives rows."""

    def __init__(self, socket: Path) -> None:
        self._channels = [_channel(socket, role) for role in ROLES]
        self._requests = RequestHooks(channel=self._channels[0])
        self._rows = RowHooks(
            channel=self._channels[1],
            between=BetweenSteps(),
            served=ServedVersion(),
            runner=runners.FIRST,
            top_k=TOP_K,
        )
        self._requests.policy = self._rows.policy = _PAYLOAD
        self._scheduler = SimpleNamespace(requests={})
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(STREAMS * _WIDTH, VOCAB, generator=generator).bfloat16()
        states = torch.randn(NUM_AUX, STREAMS * _WIDTH, HIDDEN, generator=generator).bfloat16()
        self._runner = SimpleNamespace(
            device=torch.device("cpu"),
            execute_model_state=None,
            input_ids=SimpleNamespace(gpu=torch.arange(STREAMS * _WIDTH)),
            positions=torch.arange(STREAMS * _WIDTH),
            input_batch=None,
        )
        self._state = SimpleNamespace(logits=self._logits, aux_hidden_states=list(states))
        self._drafts = {rid: list(range(LOOKAHEAD)) for rid in map(str, range(STREAMS))}

    def start(self) -> None:
        """Connect."""
        for channel in self._channels:
            channel.start()

    def stop(self) -> None:
        """Disconnect."""
        for channel in self._channels:
            channel.stop()

    def live(self) -> tuple[list[float], float]:
        """All requests run for some steps, then they end. Returns seconds of the hooks: in each step with rows, and from the
        end on until the next step, without rows, is over."""
        for rid in self._drafts:
            self._begin(rid)
        took = [self._step(number) for number in range(STEPS)]
        started = time.perf_counter()
        for rid in self._drafts:
            self._requests.free(lambda *_: None, self._scheduler, self._scheduler.requests.pop(rid))
        return took, time.perf_counter() - started + self._step(STEPS, finished=self._drafts.keys())

    def _begin(self, rid: str) -> None:
        is_captured = rid == "0"
        known = list(range(PROMPT_TOKENS + 2 * STEPS))
        sampling = SimpleNamespace(extra_args=marked(None, Terms(permitted=is_captured)))
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"):
            setattr(sampling, name, 0)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            setattr(sampling, name, 0.0)
        request = SimpleNamespace(
            request_id=rid,
            sampling_params=sampling,
            num_prompt_tokens=PROMPT_TOKENS,
            output_token_ids=known[PROMPT_TOKENS:],
            all_token_ids=known,
            num_preemptions=0,
            arrival_time=time.time(),
            status=SimpleNamespace(name="FINISHED_LENGTH_CAPPED"),
            is_finished=lambda: False,
            **_TEXT,
        )
        self._scheduler.requests[rid] = request
        self._requests.add(lambda *_: None, self._scheduler, request)

    def _step(self, number: int, finished: Set[str] = frozenset()) -> float:
        scheduled = self._scheduled(number, finished)
        started = time.perf_counter()
        self._rows.execute(self._forward(number), self._runner, scheduled)
        output = self._rows.sample_tokens(self._sampled, self._runner, None)
        self._requests.update(lambda *_: None, self._scheduler, scheduled, output)
        return time.perf_counter() - started

    def _forward(self, number: int) -> Any:
        known = PROMPT_TOKENS + 2 * number

        def forward(runner: Any, _: Any) -> None:
            runner.input_batch = SimpleNamespace(
                req_ids=list(self._drafts),
                num_computed_tokens_cpu=np.full(STREAMS, known),
                num_prompt_tokens=np.full(STREAMS, PROMPT_TOKENS),
                num_tokens_no_spec=np.full(STREAMS, known + 1),
            )
            runner.execute_model_state = self._state

        return forward

    def _sampled(self, runner: Any, _: Any) -> Any:
        ids = torch.tensor([[1, 2, -1, -1]] * STREAMS)
        self._rows.sample(lambda *_: SimpleNamespace(sampled_token_ids=ids), runner, None, None)
        runner.execute_model_state = None
        rids = {rid: place for place, rid in enumerate(self._drafts)}
        return SimpleNamespace(sampled_token_ids=[[1, 2]] * STREAMS, req_id_to_index=rids)

    def _scheduled(self, number: int, finished: Set[str]) -> Any:
        new = [] if number else [self._scheduler.requests[rid] for rid in self._drafts]
        return SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(self._drafts, _WIDTH),
            scheduled_spec_decode_tokens=self._drafts,
            num_invalid_spec_tokens=None,
            finished_req_ids=finished,
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=one.request_id, sampling_params=one.sampling_params, num_computed_tokens=0, **_TEXT
                )
                for one in new
            ],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        )


def _channel(socket: Path, role: str) -> Channel:
    """It says that a policy is in effect, and keeps its own."""

    def take(message: Mapping[str, Any]) -> None:
        if message["kind"] == "policy":
            channel.reply(message)

    channel = Channel(path=str(socket), queue_bytes=QUEUE_BYTES, hello=partial(dict, role=role), take=take)
    return channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """Milliseconds for which the hooks held the engine: in steps with rows, and at the ends of requests with rows."""

    steps_ms: list[float]
    ends_ms: list[float]

    def line(self) -> Line:
        """The bar."""
        name = f"longest hold by the end of a request with rows, width {HIDDEN}"
        return Line(results.at_most(name, max(self.ends_ms), MOST_MS, "ms"), spread(self.ends_ms))

    def figure(self) -> str:
        """The figure beside the bar."""
        return (
            f"At width {HIDDEN} and {VOCAB:,} tokens the hooks hold a step with rows of one request of {STREAMS} for"
            f" {statistics.median(self.steps_ms):.1f} ms on this CPU (quartiles {spread(self.steps_ms)})."
        )


def measured(folder: Path, count: int) -> Holds:
    """So many requests with rows, one after the other."""
    folder.mkdir()
    engine = Engine(folder / "s")
    engine.start()
    try:
        return asyncio.run(_measured(engine, folder / "s", count))
    finally:
        engine.stop()


async def _measured(engine: Engine, socket: Path, count: int) -> Holds:
    holds = Holds(steps_ms=[], ends_ms=[])
    async with listening(socket, roles=ROLES) as agent:
        for number in range(-1, count):  # the first one warms up
            steps_s, end_s = await asyncio.to_thread(engine.live)
            await agent.settle()
            _check(agent)
            if number >= 0:
                holds.steps_ms.extend(1e3 * took for took in steps_s)
                holds.ends_ms.append(1e3 * end_s)
    return holds


def _check(agent: Agent) -> None:
    """Else something else was measured."""
    (rid,) = (rid for rid, (_, tensors) in agent.finished.items() if tensors)
    seen = agent.seen.pop(rid)
    assert (len(seen.steps), len(seen.rows[0][1])) == (STEPS, NUM_AUX * HIDDEN)
    assert agent.dropped == 0
