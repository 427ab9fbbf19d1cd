"""Requests to a vLLM with the plugin, and checks of what it sent about them; the test is the agent."""

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from tests.sglang.models import cycle
from tests.support import text_reference
from tests.support.tap_agent import Agent, Seen
from tests.support.text_reference import Reference, check_step
from tests.support.wait import until
from tests.vllm.server import LOOKAHEAD, Server

from updraft_tap import checkpoint, weights

WORDS = cycle()
EVERYTHING = {"payload": 1.0, "prompt_rows": 1000, "counterfactual_rows": LOOKAHEAD}

Setting = text_reference.Setting[Server]


def add_plugin(folder: Path, name: str, text: str) -> None:
    """A plugin of the test's own beside Updraft's, whose `register` vLLM calls."""
    (folder / f"{name}.py").write_text(text)
    metadata = folder / f"{name}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}:register\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    prompt: list[int]
    tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    rid: str
    """vLLM gives each request an id of its own, which begins with this one."""
    output: list[int]


async def answers(setting: Setting, asks: list[Ask]) -> list[Answer]:
    """All at once, 8 at a time."""
    slots = asyncio.Semaphore(8)
    async with httpx.AsyncClient(base_url=setting.server.url, timeout=300) as http:

        async def one(ask: Ask) -> Answer:
            async with slots:
                response = await http.post("/v1/completions", json=completion_body(ask))
                assert response.is_success, response.text
                body = response.json()
                return Answer(rid=body["id"], output=body["choices"][0]["token_ids"])

        return list(await asyncio.gather(*map(one, asks)))


def completion_body(ask: Ask) -> dict[str, Any]:
    return {
        "model": "target",
        "prompt": ask.prompt,
        "max_tokens": ask.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **ask.sampling,
    }


def mixed_asks(count: int) -> list[Ask]:
    """Prompts of 1 to 150 tokens, many with a common beginning, and every kind of sampling."""
    rng = random.Random(5)
    stems = [rng.choices(WORDS, k=80) for _ in range(3)]
    asks = []
    for i in range(count):
        own = rng.choices(WORDS, k=rng.randrange(1, 21) if i % 8 else rng.randrange(70, 151))
        prompt = own if i % 8 == 0 else rng.choice(stems)[: rng.randrange(80)] + own
        sampling = rng.choice(({}, {}, {"temperature": 0.8}, {"presence_penalty": 0.7}, {"repetition_penalty": 1.3}))
        asks.append(Ask(prompt=prompt, tokens=rng.randrange(1, 33), sampling=sampling))
    return asks


def of(found: dict[str, Any], answer: Answer, default: Any = None) -> Any:
    """What was found of an answer's request."""
    return next((value for rid, value in found.items() if rid.startswith(answer.rid)), default)


async def ended(agent: Agent, given: list[Answer]) -> None:
    """Rows and ends come from two processes; wait for all of both."""
    await agent.settle()
    assert all(of(agent.finished, answer) is not None for answer in given)
    assert agent.dropped == 0


def check_end(ask: Ask, answer: Answer, agent: Agent, *, captured: bool) -> dict[str, Any]:
    """Prompt, output and sums of a request; return its header."""
    header, tensors = of(agent.finished, answer)
    assert (header["prompt_tokens"], header["output_tokens"]) == (len(ask.prompt), ask.tokens)
    if captured:
        assert tensors["tokens"].tolist() == ask.prompt + answer.output
        assert header["sampling"]["temperature"] == ask.sampling.get("temperature", 0)
    else:
        assert (tensors, header["sampling"], of(agent.seen, answer)) == ({}, None, None)
    return dict(header)


def check_rows(setting: Setting, ask: Ask, answer: Answer, seen: Seen, header: dict[str, Any]) -> None:
    """Steps, positions and rows of a request that was not preempted."""
    steps, start, text = [step for step in seen.steps if step["drafts"]], len(ask.prompt), ask.prompt + answer.output
    sums = header["counters"]
    assert sum(one["steps"] for one in sums) == len(steps)
    assert sum(one["proposed"] for one in sums) == sum(len(step["drafts"]) for step in steps)
    by_position = [sum(step["accepted"] > position for step in steps) for position in range(LOOKAHEAD)]
    assert [
        sum(one["accepted"][i] for one in sums if i < len(one["accepted"])) for i in range(LOOKAHEAD)
    ] == by_position

    known = text[: start + 1]
    for step in seen.steps:
        assert step["position"] == len(known) - 1
        known += step["drafts"][: step["accepted"]]
        known += text[len(known) :][:1]
    assert known[: len(text)] == text

    reference = Reference(setting.target, known)
    for step, rejected in zip(seen.steps, seen.rejected, strict=True):
        check_step(setting.target, known, reference, step, rejected)
    cached = sum(prefill["cached"] for prefill in seen.prefills)
    assert header["cached_tokens"] == cached
    last = seen.steps[-1] if seen.steps else {"position": start - 1, "accepted": 0}
    end = last["position"] + last["accepted"] + 1
    assert [position for position, _ in seen.rows] == list(range(cached, end))
    for position, aux in seen.rows:
        reference.check(position, aux, None)
    assert [position for position, _ in seen.teachers] == list(range(start - 1, end))
    for position, teacher in seen.teachers:
        reference.check(position, None, teacher)


def steps_of(sums: dict[str, Any]) -> int:
    return int(sums["steps"])


def accepted_of(sums: dict[str, Any]) -> int:
    return sum(sums["accepted"])


async def swap(agent: Agent, folder: Path, version: int, loader: str = "worker") -> dict[str, Any]:
    """The server's answer to this draft; `loader` is the role that takes it."""
    before = len(agent.loaded)
    agent.send(loader, {"kind": "load", "folder": str(folder), "version": version, "digest": f"sha256:{version}"})
    await until(lambda: len(agent.loaded) > before, what="the answer to a load")
    return agent.loaded[-1]


def digest(folder: Path) -> str:
    """Of what a server of this draft holds."""
    _, tensors = checkpoint.read(folder)
    return weights.digest({**weights.joined(tensors, torch.float32), "d2t": tensors["d2t"]})


async def asked_until(stop: asyncio.Event, setting: Setting, ask: Ask) -> list[Answer]:
    """The same request again and again, so that one is running whenever something happens."""
    given: list[Answer] = []
    while not stop.is_set():
        given += await answers(setting, [ask])
    return given


def sums_of(steps: list[dict[str, Any]]) -> dict[int, tuple[int, int, int]]:
    """By version: steps, proposed and accepted tokens."""
    sums: dict[int, tuple[int, int, int]] = {}
    for step in steps:
        count, proposed, accepted = sums.get(step["version"], (0, 0, 0))
        sums[step["version"]] = (count + 1, proposed + len(step["drafts"]), accepted + step["accepted"])
    return sums
