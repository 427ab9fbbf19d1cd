"""The plugin changes no answer of SGLang, whatever a request asks for.

Two servers, one after the other: one without the plugin, whose answers are kept, and one with it, beside an agent that asks
for the rows of every request. Nobody trained the draft, so hardly a draft token is accepted.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.sglang.agent import beside
from tests.sglang.models import smollm2
from tests.sglang.server import Server, eagle3
from tests.support.answers import CHAT, COMMON, IN_SCHEMA, MUST_CALL, Bodies, said

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_inference.tap import initial_draft, plugin_folder

pytestmark = [pytest.mark.timeout(1500), pytest.mark.lasts(150)]

ARGUMENTS = (
    *("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
    *("--served-model-name", "target", "--context-length", "512"),
)
_AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}
"""A grammar applies from the first token, not after a thought."""
BODIES: Bodies = {
    **COMMON,
    "two choices": ("/v1/chat/completions", {**CHAT, "n": 2}),
    "min_p": ("/v1/chat/completions", {**CHAT, "min_p": 0.1}),
    "JSON schema": ("/v1/chat/completions", {**IN_SCHEMA, **_AT_ONCE}),
    "a tool that must be called": ("/v1/chat/completions", {**MUST_CALL, **_AT_ONCE}),
    "reasoning": (
        "/v1/chat/completions",
        {**CHAT, **_AT_ONCE, "max_tokens": 40, "regex": "<think>(France|Italy)</think>(Paris|Rome)"},
    ),
}

Answers = Mapping[str, tuple[int, Any]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[tuple[Answers, Answers]]:
    """The answers of SGLang to all bodies, without the plugin and with it."""
    folder, target = tmp_path_factory.mktemp("answers"), smollm2()
    draft = initial_draft.write(target, folder / "draft", ShapeChoice(draft_vocab_size=2048))
    arguments = [*eagle3(draft), *ARGUMENTS]
    with Server(target, folder / "plain.log", arguments=arguments) as server:
        plain = _asked(server)
    plugin, variables = plugin_folder.write(folder / "plugin"), {"UPDRAFT_SGLANG_SOCKET": str(tap_socket)}
    with Server(target, folder / "tapped.log", arguments=arguments, plugins=[plugin], variables=variables) as server:
        yield plain, asyncio.run(_captured(server, tap_socket))


async def _captured(server: Server, socket: Path) -> Answers:
    async with beside(socket) as agent:
        answers = await asyncio.to_thread(_asked, server)
        await agent.settle()
        assert agent.seen, "nothing was captured"
    return answers


def _asked(server: Server) -> Answers:
    bodies = BODIES.items()
    return {name: said(httpx.post(f"{server.url}{path}", json=body, timeout=300)) for name, (path, body) in bodies}


@pytest.mark.parametrize("name", BODIES)
def test_every_answer_is_exactly_that_without_the_plugin(both: tuple[Answers, Answers], name: str) -> None:
    plain, tapped = both
    assert tapped[name] == plain[name]


def test_the_answers_that_are_compared_are_those_of_every_feature(both: tuple[Answers, Answers]) -> None:
    """Else the test before would be about less than it says."""
    answers = {name: body for name, (status, body) in both[0].items() if status == 200}
    assert both[0].keys() - answers.keys() == {"nonsense", "an unknown path"}
    assert answers["a stream with tools"]["reason"] in ("stop", "length", "tool_calls")
    assert answers["log-probabilities"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(answers["two choices"]["choices"]) == len(answers["several prompts"]["choices"]) == 2
    assert json.loads(_message(answers["JSON schema"])["content"]).keys() == {"capital"}
    assert '"name":"weather"' in _message(answers["a tool that must be called"])["content"]
    assert (_message(answers["reasoning"])["reasoning_content"], _message(answers["reasoning"])["content"]) == (
        "France",
        "Paris",
    )


def _message(answer: Any) -> dict[str, Any]:
    return dict(answer["choices"][0]["message"])
