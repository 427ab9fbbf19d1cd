"""A pod beside a real SGLang, whose Redis and registry are killed under it, and drafts that it must not serve.

The cycle target says beforehand what each answer is, so a token that an outage cost would be seen.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format
from safetensors.torch import load_file, save_file
from tests.contract.engine_contract import asking, whole
from tests.sglang.attaching import Setting, attached, started
from tests.sglang.models import continuation, cycle_draft, write_version
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.publishing import pin
from tests.support.redis_server import RedisServer
from tests.support.registry import RegistryProcess
from tests.support.wait import until
from torch import Tensor

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft.trace.v1 import trace_pb2
from updraft_artifacts import transfer
from updraft_chassis import rpc, streams
from updraft_chassis.errors import Corrupt, InvalidInput, Unavailable, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_draft import checkpoint
from updraft_inference.engine import FinishedRequest
from updraft_inference.process import open_sglang
from updraft_inference.sglang_engine.server import SglangServer
from updraft_tap.channel import Channel

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(60)]

KEY = "updraft:{default:default:0}:samples:v1"
PROMPTS = ("hello", "good", "day", "sun")
TOKENS = 60
OTHER = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    with started(SGLANG_HEALTH_CHECK_TIMEOUT="1") as setting:
        (setting.folder / MODEL).symlink_to(setting.target)
        yield setting


@asynccontextmanager
async def pod(setting: Setting, data: Path, **values: Any) -> AsyncIterator[RunningPod]:
    """The agent in this loop, over the server."""
    async with running_pod(
        setting.folder,
        open_engine=partial(open_sglang, environ={}, stop=Stop()),
        data_dir=data,
        served_model_name=MODEL,
        engine="sglang",
        attach=setting.server.url,
        sglang_socket=setting.socket,
        sglang_admin_key_file=setting.key_file,
        **values,
    ) as running:
        yield running


async def streamed(pod: RunningPod, prompt: str, begun: asyncio.Event) -> str:
    """An answer as it comes; `begun` is set with the first token of any."""
    text = ""
    async for chunk in await pod.openai.completions.create(
        model=MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ):
        text += chunk.choices[0].text if chunk.choices else ""
        begun.set()
    return text


async def during(pod: RunningPod, trouble: Callable[[], None]) -> None:
    """Let the trouble come while answers stream, and see each of them whole."""
    begun = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(streamed(pod, prompt, begun)) for prompt in PROMPTS]
        await begun.wait()
        assert not any(answer.done() for answer in answers)
        trouble()
    assert [answer.result() for answer in answers] == [expected(prompt) for prompt in PROMPTS]


def expected(prompt: str) -> str:
    return bytes(continuation(prompt, TOKENS)).decode()


async def answered(pod: RunningPod, *, version: int | None = None) -> None:
    """One request more, right and by this draft."""
    answer = await pod.complete("hello", max_tokens=TOKENS, temperature=0, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == expected("hello")
    assert version in (None, answer.json()["usage"]["updraft"]["draft_version"])


async def traces(redis: RedisServer) -> list[trace_pb2.Trace]:
    async with streams.connect(redis.url) as client:
        rows: Any = await client.xrange(KEY)
        return [trace_pb2.Trace.FromString(fields[b"t"]) for _, fields in rows]


async def captured(pod: RunningPod) -> float:
    return await pod.metric('updraft_inference_captured_traces_total{kind="payload"}')


async def dropped(pod: RunningPod) -> float:
    """For want of Redis, or because it was not known yet that it is away."""
    reasons = ("redis_unavailable", "queue_full")
    name = 'updraft_inference_capture_dropped_traces_total{reason="%s"}'
    return sum([await pod.metric(name % reason) for reason in reasons])


async def test_a_redis_killed_while_answers_stream_costs_traces_that_are_counted_and_nothing_else(
    setting: Setting, tmp_path: Path, short_tmp_path: Path
) -> None:
    redis = RedisServer(short_tmp_path)
    settings = {"capture_queue_entries": 2, "capture_payload_fraction": 1.0, "capture_evaluation_fraction": 0.0}
    async with pod(setting, tmp_path, redis_url=redis.url, **settings) as running:
        with redis:
            await answered(running)
            await running.counts('updraft_inference_captured_traces_total{kind="payload"}', 1)
            await during(running, redis.kill)
            num_sent = 1 + len(PROMPTS)
            while await dropped(running) == 0:
                await answered(running)
                num_sent += 1
            before = await captured(running)

            redis.start()  # empty
            await answered(running)
            num_sent += 1

            async def is_accounted_for() -> bool:
                return await captured(running) + await dropped(running) == num_sent

            await until(is_accounted_for, what="an end of each trace: in Redis or counted")
            kept = await traces(redis)
            assert len(kept) == await captured(running) - before > 1, "what waited when Redis went was not lost"
            await answered(running)
            await running.counts('updraft_inference_captured_traces_total{kind="payload"}', before + len(kept) + 1)
            (*_, last) = await traces(redis)

    assert bytes(last.output_ids).decode() == expected("hello")
    assert sum(1 + step.accepted for step in last.steps) >= TOKENS - 1, "of SGLang's own verify steps"
    assert last.payload.aux_hidden.rows > 0


async def publish(setting: Setting, registry: RegistryProcess, quality: float, **claims: str) -> int:
    """A draft of the server's vocabulary; `claims` override what its manifest says."""
    network = cycle_draft(setting.target, quality=quality)
    folder = write_version(setting.target, setting.folder / "published", round(100 * quality), network)
    manifest = json_format.Parse((folder / transfer.MANIFEST).read_text(), pb.Manifest())
    for field, value in claims.items():
        setattr(manifest, field, value)
    async with rpc.channel(registry.address) as channel:
        stub = RegistryStub(channel)
        return (await transfer.upload(stub, manifest, folder / checkpoint.WEIGHTS)).version.version


async def serves(pod: RunningPod, version: int) -> bool:
    return await pod.metric("updraft_inference_draft_version") == version


async def is_connected(pod: RunningPod, *, expected: bool = True) -> bool:
    return bool(await pod.metric("updraft_inference_registry_connected")) is expected


async def test_a_registry_killed_within_a_swap_and_while_answers_stream_is_taken_up_again(
    setting: Setting, tmp_path: Path
) -> None:
    with RegistryProcess(tmp_path) as registry:
        async with pod(setting, tmp_path / "data", registry_address=registry.address) as running:
            await until(partial(is_connected, running), what="the connection")
            await publish(setting, registry, 1.0)
            swap = tmp_path / "data" / "sglang-swap"
            async with asyncio.timeout(60):
                while not swap.exists():  # noqa: ASYNC110 - the engine tells nobody, and a swap is short
                    await asyncio.sleep(0)
            registry.kill()
            assert swap.exists(), "it died within the swap"
            await until(partial(serves, running, 1), what="the end of the swap")
            await until(partial(is_connected, running, expected=False), what="the loss of the registry")
            await answered(running, version=1)

            await asyncio.to_thread(registry.start)
            await until(partial(is_connected, running), what="the connection, again")
            await during(running, registry.kill)
            await until(partial(is_connected, running, expected=False), what="the loss of the registry")
            await answered(running, version=1)

            await asyncio.to_thread(registry.start)
            await until(partial(is_connected, running), what="the connection, once more")
            await pin(registry.address, await publish(setting, registry, 0.5))
            await until(partial(serves, running, 2), what="the next draft")
            await answered(running, version=2)


async def test_a_draft_for_another_target_is_refused_with_a_sentence_and_the_server_serves_on(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RegistryProcess(tmp_path) as registry:
        async with pod(setting, tmp_path / "data", registry_address=registry.address) as running:
            await until(partial(is_connected, running), what="the connection")
            await publish(setting, registry, 1.0, target_fingerprint=OTHER)
            await until(lambda: told(caplog, f"but the drafts are for {OTHER}"), what="the registry's sentence")
            await answered(running, version=0)


async def test_a_draft_for_another_tokenizer_is_refused_by_the_pod_and_the_next_one_serves(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RegistryProcess(tmp_path) as registry:
        async with pod(setting, tmp_path / "data", registry_address=registry.address) as running:
            await until(partial(is_connected, running), what="the connection")
            await publish(setting, registry, 1.0, tokenizer_fingerprint=OTHER)
            await running.counts('updraft_inference_swaps_total{outcome="refused"}', 1)
            assert told(caplog, f"the draft was trained for the tokenizer {OTHER}, but this pod serves sha256:")
            await answered(running, version=0)
            await pin(registry.address, await publish(setting, registry, 0.5))
            await until(partial(serves, running, 2), what="a draft for this one")


class Overtaken(SglangServer):
    """Something happens to a draft's file between the agent's look at it and the server's, and is perhaps undone after that."""

    happen: Callable[[], object] = staticmethod(lambda: None)
    undo: Callable[[], object] = staticmethod(lambda: None)

    async def begin_update(self) -> None:
        await super().begin_update()
        self.happen()

    async def end_update(self) -> None:
        await super().end_update()
        self.undo()


def changed(change: Callable[[dict[str, Tensor]], None], path: Path) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors["fc.weight"][0, 0] = torch.inf


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()


def other_tokens(tensors: dict[str, Tensor]) -> None:
    tensors["d2t"][-1] += 1


@pytest.mark.parametrize(
    ("happen", "error"),
    [
        pytest.param(partial(changed, infinite), Corrupt("fc.weight holds values that are not finite"), id="infinite"),
        pytest.param(lambda path: os.truncate(path, 5000), Corrupt("is no whole safetensors file"), id="cut off"),
        pytest.param(partial(changed, narrow), InvalidInput("norm.weight"), id="another shape"),
        pytest.param(partial(changed, other_tokens), Corrupt("values in draft.hot_token_id"), id="another vocabulary"),
        pytest.param(
            lambda path: shutil.rmtree(path.parent),
            Unavailable("cannot read the draft in"),
            id="not there, not the draft's fault",
        ),
    ],
)
async def test_a_draft_that_becomes_unsound_before_the_server_reads_it_is_refused(
    setting: Setting, tmp_path: Path, happen: Callable[[Path], object], error: UpdraftError
) -> None:
    good, bad = setting.saved(1, 1.0), setting.saved(2, 0.5)
    weights = bad.folder / checkpoint.WEIGHTS
    async with (
        Overtaken(setting.server.url, admin_key=setting.admin) as server,
        attached(setting, [], server, hello_s=0.0) as engine,
    ):
        await engine.swap(good)
        server.happen = lambda: happen(weights)

        with pytest.raises(type(error), match=str(error)):
            await engine.swap(bad)

        assert (await engine.rehash()).tensors_digest == good.tensors_digest
        assert len((await whole(engine, asking("a")))[0]) == 12


async def test_a_draft_that_only_the_server_reads_otherwise_is_no_fault_of_the_draft(setting: Setting) -> None:
    good, whole_one = setting.saved(1, 1.0), setting.saved(2, 0.5)
    weights = whole_one.folder / checkpoint.WEIGHTS
    content = weights.read_bytes()
    async with (
        Overtaken(setting.server.url, admin_key=setting.admin) as server,
        attached(setting, [], server, hello_s=0.0) as engine,
    ):
        await engine.swap(good)
        server.happen, server.undo = partial(changed, narrow, weights), partial(weights.write_bytes, content)

        with pytest.raises(Unavailable, match=r"SGLang refuses /update_weights_from_tensor: .*norm\.weight has shape"):
            await engine.swap(whole_one)

        assert (await engine.rehash()).tensors_digest == good.tensors_digest
        server.happen = server.undo = lambda: None
        assert (await engine.swap(whole_one)).loaded.version == 2


async def test_a_failed_health_check_that_the_server_remembers_is_told_from_somebodys_pause(setting: Setting) -> None:
    draft, http = setting.saved(1, 1.0), setting.server.http
    async with (
        SglangServer(setting.server.url, admin_key=setting.admin) as somebody,
        attached(setting, [], hello_s=0.0) as engine,
    ):
        await somebody.pause()
        with pytest.raises(Unavailable, match="the SGLang server was paused by someone else"):
            await engine.swap(draft)
        assert (await asyncio.to_thread(http.get, "/health")).status_code == 503
        with pytest.raises(Unavailable, match="unhealthy and generated no token for 3 s"):
            await engine.swap(draft)
        await somebody.resume()

        assert (await asyncio.to_thread(http.get, "/ready")).status_code == 503
        assert (await engine.swap(draft)).loaded.version == 1
        assert len((await whole(engine, asking("a")))[0]) == 12
        assert (await asyncio.to_thread(http.get, "/health")).status_code == 200
        assert (await asyncio.to_thread(http.get, "/ready")).status_code == 200


async def test_a_second_server_on_the_socket_is_refused_with_a_sentence_and_the_first_one_is_captured(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[FinishedRequest] = []
    facts = {
        "tap": "0",
        "engine": {"name": "SGLang", "version": "0.5.23"},
        "pid": os.getpid(),
        "steps": 2,
        "aux_size": 8,
        "version": 0,
        "digest": "",
    }
    second = Channel(path=str(setting.socket), queue_bytes=1 << 20, hello=lambda: facts)
    async with attached(setting, heard) as engine:
        second.start()
        try:
            sentence = f"another SGLang server (process {setting.server.scheduler().pid}) is already connected"
            await until(lambda: any(sentence in record.getMessage() for record in caplog.records), what="the refusal")
            await whole(engine, asking("a"))
        finally:
            await asyncio.to_thread(second.stop)

        assert (engine.capture_problem, sum(engine.capture_losses.values())) == ("", 0)
    assert [end.uncaptured for end in heard] == [None]
    assert heard[0].steps


def told(caplog: pytest.LogCaptureFixture, sentence: str) -> bool:
    return any(sentence in str(getattr(record, "reason", "")) for record in caplog.records)
