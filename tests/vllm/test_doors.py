"""What a sender says on vLLM's own port, its API keys, and that the plugin changes no answer. SmolLM2 in float32.

Two servers, one after the other: one without the plugin, whose answers are kept, and one with it. The test is the agent.
"""

import asyncio
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.answers import ASK, CHAT, COMMON, IN_SCHEMA, MUST_CALL, Bodies, said
from tests.support.tap_agent import Agent, listening
from tests.support.wait import until
from tests.vllm import build, drafts
from tests.vllm.server import LOOKAHEAD, Server, serving

from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_draft import checkpoint
from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import VLLM

if not build.is_built():
    pytest.skip("stock vLLM is not installed; run `make vllm-build`", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

ONE, OTHER, GATEWAY = "sk-one-0123456789", "sk-other-0123456789", "sk-gateway-0123456789"
EVERYTHING = {"payload": 1.0, "prompt_rows": 1000, "counterfactual_rows": LOOKAHEAD}
ROLES = {"scheduler", "worker"}
OPTIONS = (
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "granite"),
    *("--structured-outputs-config", '{"enable_in_reasoning": true}'),
)

ENDLESS = {**ASK, "prompt": "One, two,", "max_tokens": 480, "ignore_eos": True, "stream": True}
"""It ends at the limit of the context, long after the test has hung up."""

BODIES: Bodies = {
    **COMMON,
    # One token, because those after it may depend on a draft, and a seed was not seen to fix them.
    "two choices": ("/v1/chat/completions", {**CHAT, "n": 2, "temperature": 0.8, "seed": 7, "max_tokens": 1}),
    "min_p": ("/v1/chat/completions", {**CHAT, "min_p": 0.1, "temperature": 0.8, "seed": 7}),
    "JSON schema": ("/v1/chat/completions", IN_SCHEMA),
    "a tool": ("/v1/chat/completions", MUST_CALL),
    "reasoning": (
        "/v1/chat/completions",
        {
            **CHAT,
            "max_tokens": 40,
            "structured_outputs": {
                "regex": r"Here is my thought process: (France|Italy) has one\. Here is my response: (Paris|Rome)"
            },
        },
    ),
    "extra arguments": ("/v1/chat/completions", {**CHAT, "vllm_xargs": {"session_id": "7"}}),
}


Answers = Mapping[str, tuple[int, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    server: Server
    socket: Path
    plain: Answers
    """What the server without the plugin answered."""
    tapped: Answers
    """What the one with it answered while an agent took the rows of every request."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[Setting]:
    folder, model = tmp_path_factory.mktemp("doors"), model_folder(cache_folder(os.environ))
    checkpoint.save(drafts.new_learner(model, drafts.prompts(model)).network, folder / "draft")
    with serving(model, folder / "draft", folder / "plain", options=OPTIONS) as server:
        plain = _asked(server)
    (folder / "keys").write_text(f"# of the team\n{ONE}\nacme {OTHER}\ngate {GATEWAY} gateway\n")
    variables = {
        "PYTHONPATH": str(plugin_folder.write(folder / "plugin", VLLM)),
        "UPDRAFT_VLLM_SOCKET": str(tap_socket),
        "UPDRAFT_VLLM_API_KEYS_FILE": str(folder / "keys"),
        "UPDRAFT_VLLM_MAX_REQUESTS_PER_KEY": "2",
        "UPDRAFT_VLLM_TENANT_HEADER": "X-Updraft-Tenant",
    }
    with serving(model, folder / "draft", folder / "tapped", options=OPTIONS, variables=variables) as server:
        tapped = asyncio.run(_captured(server, tap_socket))
        yield Setting(server=server, socket=tap_socket, plain=plain, tapped=tapped)


async def _captured(server: Server, socket: Path) -> Answers:
    async with listening(socket, EVERYTHING, roles=ROLES) as agent:
        answers = await asyncio.to_thread(_asked, server)
        await agent.settle()
        assert agent.seen, "nothing was captured"
    return answers


def _asked(server: Server) -> Answers:
    with httpx.Client(base_url=server.url, headers=_headers(), timeout=300) as http:
        return {name: said(http.post(path, json=body)) for name, (path, body) in BODIES.items()}


def _status(setting: Setting, body: Mapping[str, Any]) -> int:
    return httpx.post(f"{setting.server.url}/v1/completions", json=body, headers=_headers(), timeout=300).status_code


def _headers(key: str = ONE, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **{f"X-Updraft-{name}": value for name, value in more.items()}}


def client(setting: Setting) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=setting.server.url, timeout=300)


async def ended(agent: Agent, count: int) -> list[dict[str, Any]]:
    """The ends of so many requests."""
    await until(lambda: len(agent.finished) >= count, what="the ends of the requests")
    await agent.settle()
    headers = [header for header, _ in agent.finished.values()]
    assert len(headers) == count
    return headers


@pytest.mark.parametrize("name", BODIES)
def test_every_answer_is_exactly_that_without_the_plugin(setting: Setting, name: str) -> None:
    assert setting.tapped[name] == setting.plain[name]


def test_the_answers_that_are_compared_are_those_of_every_feature(setting: Setting) -> None:
    """Else the test before would be about less than it says."""
    answers = {name: body for name, (status, body) in setting.plain.items() if status == 200}
    assert setting.plain.keys() - answers.keys() <= {"min_p", "nonsense", "an unknown path"}
    assert answers["log-probabilities"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert answers["a stream with tools"]["reason"] in ("stop", "length", "tool_calls")
    assert len(answers["two choices"]["choices"]) == len(answers["several prompts"]["choices"]) == 2
    assert answers["JSON schema"]["choices"][0]["message"]["content"].startswith("{")
    assert answers["reasoning"]["choices"][0]["message"]["reasoning"].strip().endswith("has one.")


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sk-wrong-0123456789"}, {"Authorization": ONE}])
def test_without_a_known_key_nothing_but_probes_is_answered(setting: Setting, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=setting.server.url, headers=headers, timeout=300) as http:
        for path, body in (("/v1/completions", ASK), ("/tokenize", {}), ("/invocations", ASK), ("/pause", {})):
            refused = http.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert http.get("/v1/models").status_code == 401
        assert [http.get(path).status_code for path in ("/health", "/metrics", "/version")] == [200] * 3


async def test_the_third_concurrent_request_of_a_key_is_refused_and_another_keys_is_not(setting: Setting) -> None:
    async with (
        client(setting) as http,
        http.stream("POST", "/v1/completions", json=ENDLESS, headers=_headers()) as first,
        http.stream("POST", "/v1/completions", json=ENDLESS, headers=_headers()) as second,
    ):
        assert (first.status_code, second.status_code) == (200, 200)
        await until(lambda: setting.server.num_running() == 2, what="two running requests")
        third = await http.post("/v1/completions", json={**ASK, "prompt": "One"}, headers=_headers())
        other = await http.post("/v1/completions", json={**ASK, "prompt": "One"}, headers=_headers(OTHER))
    assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert third.headers["retry-after"] == "1"
    assert other.status_code == 200

    await until(lambda: setting.server.num_running() == 0, what="the end of those that hung up")
    async with client(setting) as http:
        both = {**ASK, "prompt": "One", "n": 2, "temperature": 0.8}
        await until(
            lambda: _status(setting, both) == 200, what="both places"
        )  # the door hears of the end a little later
        answer = await http.post("/v1/completions", json={**ASK, "prompt": "One", "n": 3}, headers=_headers())
        assert answer.status_code == 400
        assert "n is 3, but an API key may have at most 2" in answer.json()["error"]["message"]


async def test_the_domain_arrives_with_every_choice_streamed_or_not_and_also_if_the_client_hangs_up(
    setting: Setting,
) -> None:
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, client(setting) as http:
        for kind, more in (
            ("plain", {}),
            ("choices", {"n": 2, "temperature": 0.8}),
            ("stream", {"stream": True, "n": 2, "temperature": 0.8}),
            ("prompts", {"prompt": ["One,", "Two,"]}),
        ):
            body = {**ASK, "prompt": "One, two,", **more}
            answer = await http.post("/v1/completions", json=body, headers=_headers(Domain=kind))
            assert answer.status_code == 200
        headers = _headers(OTHER, Domain="gone")
        async with http.stream("POST", "/v1/completions", json=ENDLESS, headers=headers) as stream:
            await anext(stream.aiter_lines())
        found = await ended(agent, 8)

    domains = sorted(header["domain"] for header in found)
    assert domains == ["choices", "choices", "gone", "plain", "prompts", "prompts", "stream", "stream"]
    for header in found:
        assert header["permitted"]
        assert (header["finish"] == "aborted") == (header["domain"] == "gone")
        assert header["sampling"] is not None


async def test_a_tenant_is_whose_key_it_is_or_whom_a_gateway_names(setting: Setting) -> None:
    body = {**ASK, "prompt": "One, two,"}
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, client(setting) as http:
        for domain, headers in (
            ("its key's", _headers(OTHER, Tenant="globex")),
            ("the gateway's", _headers(GATEWAY)),
            ("named", _headers(GATEWAY, Tenant="globex")),
        ):
            answer = await http.post("/v1/completions", json=body, headers={**headers, "X-Updraft-Domain": domain})
            assert answer.status_code == 200
        twice = [*_headers(GATEWAY, Tenant="globex").items(), ("X-Updraft-Tenant", "acme")]
        refused = await http.post("/v1/completions", json=body, headers=twice)
        found = await ended(agent, 3)

    tenants = {header["domain"]: header["tenant"] for header in found}
    names = {"its key's": "acme", "the gateway's": "gate", "named": "globex"}
    assert tenants == {domain: hashlib.sha256(name.encode()).hexdigest() for domain, name in names.items()}
    assert refused.status_code == 400


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 0.8}, {"stream": True}])
async def test_of_who_opts_out_counters_are_left_and_nothing_else(setting: Setting, more: dict[str, Any]) -> None:
    body = {**ASK, "prompt": "One, two, three,", **more}
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, client(setting) as http:
        for headers, extra in (
            (_headers(Capture="off"), {}),
            (_headers(Capture="off"), {"updraft_capture": "on"}),
            (_headers(), {"updraft_capture": "off"}),
        ):
            answer = await http.post("/v1/completions", json={**body, "vllm_xargs": extra}, headers=headers)
            assert answer.status_code == 200
        found = await ended(agent, 3 * more.get("n", 1))
        tensors = [tensors for _, tensors in agent.finished.values()]

    assert not any(header["permitted"] for header in found)
    assert [header["sampling"] for header in found] == [None] * len(found)
    assert tensors == [{}] * len(found)
    assert agent.seen == {}
    assert sum(one["steps"] for header in found for one in header["counters"]) > 0


async def test_a_header_that_cannot_be_meant_is_refused_and_a_strange_domain_is_cut(setting: Setting) -> None:
    body = {**ASK, "prompt": "One, two,"}
    strange = b"\xff\tsql" + b"x" * 1000  # a server of HTTP lets no other control character in
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, client(setting) as http:
        misspelt = await http.post("/v1/completions", json=body, headers=_headers(Capture="of"))
        raw = [(b"authorization", f"Bearer {ONE}".encode()), (b"x-updraft-domain", strange)]
        answer = await http.post("/v1/completions", json=body, headers=raw)
        (header,) = await ended(agent, 1)

    assert misspelt.status_code == 400
    assert "expected on, off, no-train or no-retain, got 'of'" in misspelt.json()["error"]["message"]
    assert answer.status_code == 200
    assert header["domain"] == "\ufffd?sql" + "x" * 59
