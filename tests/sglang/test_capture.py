"""What the plugin in a stock SGLang server sends, held against a `transformers` forward over the same tokens, in float32.

The test is the agent here: it listens, and reads the wire itself. Chunks of 16 tokens, a prefix cache, 16 requests at once.
"""

import asyncio
import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.sglang import build, swapping
from tests.sglang.models import cycle, cycle_draft, write_mixing_target
from tests.sglang.server import Server, eagle3
from tests.support import text_reference
from tests.support.tap_agent import Agent, Seen, listening
from tests.support.text_reference import Reference, check_step, read_target
from tests.support.tiny_target import DRAFT_VOCAB, VOCAB, make_draft, save_draft
from tests.support.wait import until

from updraft_draft import checkpoint
from updraft_inference.sidecar.hello import Hello
from updraft_inference.sidecar.sglang import checksums
from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import VLLM
from updraft_tap.weights import UNKNOWN

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(240)]

WIDTH = 4
WORDS = cycle()
VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1"}

ROLES = {"scheduler", "worker"}
EVERYTHING = {"payload": 1.0, "prompt_rows": 1000, "counterfactual_rows": 3}
KIND = replace(VLLM, engine="SGLang")

Setting = text_reference.Setting[Server]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tap_socket: Path) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("capture")
    target = write_mixing_target(folder / "target")
    for number, quality in ((0, 0.7), (7, 0.3)):
        save_draft(cycle_draft(target, quality=quality), folder / f"draft-{number}")
    server = Server(
        target,
        folder / "server.log",
        arguments=[
            *eagle3(folder / "draft-0", num_steps=WIDTH - 1),
            *("--chunked-prefill-size", "16"),
        ],
        plugins=[plugin_folder.write(folder / "plugin")],
        variables={
            "UPDRAFT_SGLANG_SOCKET": str(tap_socket),
            "UPDRAFT_SGLANG_TOP_K": "8",
            "UPDRAFT_SGLANG_QUEUE_BYTES": str(2 << 20),
        },
    )
    with server:
        yield Setting(server=server, folder=folder, socket=tap_socket, target=read_target(target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    rid: str
    prompt: list[int]
    tokens: int
    is_captured: bool = True
    sampling: dict[str, Any] = field(default_factory=dict)


async def answers(setting: Setting, asks: list[Ask]) -> dict[str, dict[str, Any]]:
    """All at once, 16 at a time."""
    slots = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=setting.server.url, timeout=300) as http:

        async def one(ask: Ask) -> dict[str, Any]:
            async with slots:
                response = await http.post("/generate", json=_body(ask))
                assert response.is_success, response.text
                answer: dict[str, Any] = response.json()
                return answer

        found = await asyncio.gather(*map(one, asks))
    return dict(zip([ask.rid for ask in asks], found, strict=True))


def _body(ask: Ask) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": ask.tokens, "ignore_eos": True, **ask.sampling}
    if not ask.is_captured:
        sampling["custom_params"] = {"updraft_capture": "off"}
    return {"rid": ask.rid, "input_ids": ask.prompt, "sampling_params": sampling}


def seen_of(agent: Agent, ask: Ask) -> Seen:
    """The plugin gives each request an id of its own, which begins with SGLang's."""
    return next((seen for own, seen in agent.seen.items() if own.startswith(f"{ask.rid}-")), Seen())


def mixed_asks(count: int, kind: str) -> list[Ask]:
    """Prompts of 1 to 120 tokens, many with a common beginning; every kind of sampling."""
    rng = random.Random(kind)
    stems = [rng.choices(WORDS, k=50) for _ in range(4)]
    asks = []
    for i in range(count):
        own = rng.choices(WORDS, k=rng.randrange(1, 21) if i % 8 else rng.randrange(70, 121))
        prompt = own if i % 8 == 0 else rng.choice(stems)[: rng.randrange(50)] + own
        sampling = rng.choice(({}, {}, {"temperature": 0.8}, {"presence_penalty": 0.7}, {"logit_bias": {"65": 2.0}}))
        asks.append(
            Ask(
                rid=f"{kind}-{i}",
                prompt=prompt,
                tokens=rng.randrange(1, 33),
                is_captured=rng.random() < 0.9,
                sampling=sampling,
            )
        )
    return asks


def check_request(setting: Setting, policy: dict[str, Any], ask: Ask, answer: dict[str, Any], seen: Seen) -> None:
    """Sums, positions and rows of one request that was not preempted."""
    output, meta, start = answer["output_ids"], answer["meta_info"], len(ask.prompt)
    steps = seen.steps
    assert len(steps) == meta.get("spec_verify_ct", 0)
    if steps:
        assert sum(step["accepted"] for step in steps) == meta["spec_num_correct_drafts"]
        assert sum(len(step["drafts"]) for step in steps) == meta["spec_num_proposed_drafts"]
        histogram = Counter(step["accepted"] for step in steps)
        assert [histogram[i] for i in range(WIDTH)] == _padded(meta["spec_correct_drafts_histogram"])

    text = ask.prompt + output[:1]
    for step in steps:
        assert step["position"] == len(text) - 1
        text += step["drafts"][: step["accepted"]]
        text += output[len(text) - start :][:1]
    assert text[: start + len(output)] == ask.prompt + output

    reference = Reference(setting.target, text)
    for step, rejected in zip(steps, seen.rejected, strict=True):
        check_step(setting.target, text, reference, step, rejected)
    assert sum(prefill["cached"] for prefill in seen.prefills) == meta["cached_tokens"]
    first = max(start - policy["prompt_rows"], meta["cached_tokens"])
    assert [position for position, _ in seen.rows] == list(range(first, _end(ask, steps)))
    for position, aux in seen.rows:
        reference.check(position, aux, None)
    taught_from = start - 1 if policy["prompt_rows"] else start
    assert [position for position, _ in seen.teachers] == list(range(taught_from, _end(ask, steps)))
    for position, teacher in seen.teachers:
        reference.check(position, None, teacher)


def _padded(histogram: list[int]) -> list[int]:
    return histogram + [0] * (WIDTH - len(histogram))


def _end(ask: Ask, steps: list[dict[str, Any]]) -> int:
    """The position behind the last row."""
    return steps[-1]["position"] + steps[-1]["accepted"] + 1 if steps else len(ask.prompt)


async def test_every_row_and_every_count_is_that_of_the_text(setting: Setting) -> None:
    seen, found = list[Seen](), dict[str, dict[str, Any]]()
    for prompt_rows, counterfactual_rows in ((0, 0), (5, 1), (1000, 3)):
        policy = {"payload": 1.0, "prompt_rows": prompt_rows, "counterfactual_rows": counterfactual_rows}
        asks = mixed_asks(60, f"mixed-{prompt_rows}")
        async with listening(setting.socket, policy, roles=ROLES) as agent:
            given = await answers(setting, asks)
            await agent.settle()

        assert agent.dropped == 0
        assert len(agent.finished) == len(asks)
        for ask in asks:
            if ask.is_captured:
                check_request(setting, policy, ask, given[ask.rid], seen_of(agent, ask))
            else:
                assert seen_of(agent, ask) == Seen()
        seen, found = seen + list(agent.seen.values()), found | given
    assert_all_kinds_were_there(seen, found)


def assert_all_kinds_were_there(all_seen: list[Seen], found: dict[str, dict[str, Any]]) -> None:
    """Else the test would be about less than it says."""
    steps = [step for seen in all_seen for step in seen.steps]
    assert {step["accepted"] for step in steps} == set(range(WIDTH))
    assert {step["counterfactual_rows"] for step in steps} == set(range(WIDTH))
    assert max(step["batch_size"] for step in steps) >= 8
    assert any(answer["meta_info"]["cached_tokens"] for answer in found.values())
    assert any(len(seen.prefills) > 2 for seen in all_seen)


async def test_rows_of_a_request_within_a_grammar_are_those_before_the_mask_and_it_says_so(setting: Setting) -> None:
    grammars = {"free": {}, "within": {"json_schema": json.dumps({"type": "string"})}}
    asks = [Ask(rid=rid, prompt=WORDS[:5], tokens=60, sampling=sampling) for rid, sampling in grammars.items()]
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent:
        given = await answers(setting, asks)
        await agent.settle()

    headers = {rid.partition("-")[0]: header for rid, (header, _) in agent.finished.items()}
    for ask in asks:
        check_request(setting, EVERYTHING, ask, given[ask.rid], seen_of(agent, ask))
    assert {rid: header["constrained"] for rid, header in headers.items()} == {"free": False, "within": True}
    free, within = (bytes(answer["output_ids"]).decode() for answer in given.values())
    assert free != within
    assert isinstance(json.loads(f'{within}"'), str), "the limit ends it within the string"
    (sums,) = headers["within"]["counters"]
    assert sum(sums["accepted"]) > 0


async def test_a_preempted_request_is_sent_again_at_its_positions(setting: Setting) -> None:
    prompt = random.Random(9).choices(WORDS, k=40)
    ask = Ask(rid="preempted", prompt=prompt, tokens=400)
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent, asyncio.TaskGroup() as group:
        running = group.create_task(answers(setting, [ask]))
        await until(lambda: len(seen_of(agent, ask).steps) > 20)
        async with httpx.AsyncClient(base_url=setting.server.url, timeout=60) as http:
            await http.post("/pause_generation", json={"mode": "retract"})
            await http.post("/flush_cache")
            await http.post("/continue_generation", json={})
        answer = (await running)[ask.rid]
        await agent.settle()
        seen, ((header, _),) = seen_of(agent, ask), agent.finished.values()

    assert answer["meta_info"]["num_retractions"] == header["preemptions"] == 1
    reference = Reference(setting.target, (text := prompt + answer["output_ids"]))
    assert max(prefill["position"] + prefill["rows"] for prefill in seen.prefills) > len(prompt) + 20
    assert {position for position, _ in seen.rows} >= set(range(len(text) - 1))
    for position, aux in seen.rows:
        if position < len(text):
            reference.check(position, aux, None)
    for position, teacher in seen.teachers:
        if position < len(text):
            reference.check(position, None, teacher)


async def test_a_reader_that_stands_still_costs_drops_and_no_request(setting: Setting) -> None:
    asks = [Ask(rid=f"slow-{i}", prompt=[WORDS[i]] * 20, tokens=150) for i in range(16)]
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent:
        agent.may_read.clear()
        stuck = await answers(setting, asks)
        agent.may_read.set()
        await agent.settle()
        after = Ask(rid="after", prompt=WORDS[:1], tokens=4)
        await answers(setting, [after])
        await agent.settle()
    alone = await answers(setting, [replace(ask, rid=f"alone-{ask.rid}") for ask in asks])

    assert agent.dropped > 0
    assert seen_of(agent, after).steps
    assert [a["output_ids"] for a in stuck.values()] == [a["output_ids"] for a in alone.values()]


async def swap(agent: Agent, folder: Path, version: int) -> dict[str, Any]:
    """The answer to a load."""
    before = len(agent.loaded)
    load = {"folder": str(folder), "version": version, "digest": f"sha256:{version}"}
    agent.send("worker", {"kind": "load", **load})
    await until(lambda: len(agent.loaded) > before, what="the answer to a load")
    return agent.loaded[-1]


async def test_another_vocabulary_is_exchanged_and_the_server_drafts_with_it(setting: Setting) -> None:
    target, other = setting.folder / "target", setting.folder / "other-vocabulary"
    token_ids = torch.tensor(sorted({*WORDS, *range(VOCAB - DRAFT_VOCAB + len(set(WORDS)), VOCAB)}))
    save_draft(cycle_draft(target, quality=0.7, token_ids=token_ids), other)
    asks = [Ask(rid=rid, prompt=WORDS[:3], tokens=100) for rid in ("before", "after")]
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent:
        assert (await swap(agent, setting.folder / "draft-0", 1))["refusal"] == ""
        before = await answers(setting, asks[:1])
        loaded = await swap(agent, other, 8)
        after = await answers(setting, asks[1:])
        (rank,) = setting.server.post("/weights_checker", action="checksum", selector="draft")["ranks"]
        config, tensors = checkpoint.load(other)
        wanted = checksums.expected_hashes(config, tensors, dtype=torch.float32, device="cpu", tp=(0, 1))

        assert (loaded["refusal"], loaded["served"]["version"]) == ("", 8)
        assert loaded["target"].startswith("sha256:"), "the target was compared"
        assert rank["checksums"].items() >= wanted.items()
        steps = [answer["meta_info"]["spec_verify_ct"] for answer in (before["before"], after["after"])]
        assert steps[0] == steps[1] < 50, "the same proposals, by other numbers"


async def test_a_draft_of_another_size_is_refused_and_the_one_before_serves_on(setting: Setting) -> None:
    other = setting.folder / "other-size"
    save_draft(make_draft(setting.folder / "target", token_ids=torch.arange(255)), other)
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent:
        before = setting.server.post("/weights_checker", action="checksum", selector="draft")
        refused = await swap(agent, other, 8)

    assert "draft_vocab_size is 255" in refused["refusal"]
    assert refused["needs_restart"]
    assert setting.server.post("/weights_checker", action="checksum", selector="draft") == before


async def test_a_draft_that_somebody_else_replaces_is_told_as_lost_and_one_that_survives_a_release_is_not(
    setting: Setting,
) -> None:
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent:
        assert (await swap(agent, setting.folder / "draft-0", 5))["refusal"] == ""
        hellos = len(agent.hellos)
        await asyncio.to_thread(setting.server.post, "/release_memory_occupation", tags=["weights"])
        refused = await swap(agent, setting.folder / "draft-7", 6)
        await asyncio.to_thread(setting.server.post, "/resume_memory_occupation", tags=["weights"])
        await until(lambda: len(agent.hellos) > hellos, what="another hello")
        survived = agent.hellos[-1]
        await asyncio.to_thread(swapping.replace, setting.server, setting.folder / "draft-7")
        await until(lambda: agent.hellos[-1]["digest"] == UNKNOWN, what="a hello that the draft is lost")

    assert "SGLang has released its weights" in refused["refusal"]
    assert (survived["role"], survived["version"], survived["digest"]) == ("worker", 5, "sha256:5")
    assert agent.hellos[-1]["version"] == 0


async def test_one_process_has_both_roles_of_one_server(setting: Setting) -> None:
    async with listening(setting.socket, EVERYTHING, roles=ROLES) as agent:
        hellos = {hello["role"]: Hello.of(hello, KIND) for hello in agent.hellos}
        facts = agent.hellos[-1]

    assert hellos["scheduler"].is_beside(hellos["worker"])
    assert hellos["scheduler"].pid == hellos["worker"].pid
    assert {hello.problem for hello in hellos.values()} == {""}
    assert facts["ranks"] == {"tensor": 1, "pipeline": 1, "data": 1}
    assert all(why == "" for hello in agent.hellos for why in hello["hooks"].values())


BINDING = """
import json
from updraft_sglang import plugin, roles
from updraft_tap import hooks
from updraft_tap.settings import Settings

ours = plugin.Plugin(Settings(socket="/nowhere"), {})
before = roles._misfit(hooks.states(ours.bindings))
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

for binding in ours.bindings:
    HookRegistry.register(binding.target, binding.hook, HookType.AROUND)
HookRegistry.apply_hooks()
print(json.dumps([before, list(hooks.problems(ours.bindings))]))
"""


def test_hooks_that_are_not_in_place_are_told_and_all_of_them_fit_this_sglang(tmp_path: Path) -> None:
    environment = {**os.environ, **VARIABLES, "PYTHONPATH": str(plugin_folder.write(tmp_path))}
    done = subprocess.run([build.python(), "-c", BINDING], env=environment, capture_output=True, text=True, check=True)

    before, after = json.loads(done.stdout.splitlines()[-1])

    assert before.startswith("hooks do not fit SGLang 0.5.23 (tested with 0.5.23): ")
    assert before.count("is not hooked") == 22
    assert after == []
