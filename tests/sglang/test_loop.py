"""The whole loop on a stock SGLang server, as `updraft up --engine sglang` runs it.

A draft is learnt from traffic and swapped in; a bad one is compared by switchback and rolled back by itself.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from google.protobuf import json_format
from tests.sglang import models
from tests.sglang.server import START_S
from tests.sglang.up import Client, running
from tests.support.checkpoints import evaluation
from tests.support.registry import CALL_S
from tests.support.tiny_target import DRAFT_VOCAB, make_draft
from tests.support.wait import wait_until

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_artifacts import transfer
from updraft_chassis import rpc
from updraft_cli.__main__ import cli
from updraft_cli.local.stack import Stack
from updraft_draft import checkpoint

pytestmark = [pytest.mark.timeout(START_S + 900), pytest.mark.lasts(240)]

PROMPTS = 6
SLICE_S = 2
SETTINGS = {
    "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.3",
    "UPDRAFT_INFERENCE_DRAFT_VOCAB_SIZE": str(DRAFT_VOCAB),
    "UPDRAFT_TRAINER_DRAFT_VOCAB_SIZE": str(DRAFT_VOCAB),
    "UPDRAFT_TRAINER_LEARNING_RATE": "0.003",
    "UPDRAFT_TRAINER_ADAPTATION_RATE": "0.003",
    "UPDRAFT_TRAINER_EVALUATE_SECONDS": "2",
    "UPDRAFT_TRAINER_MAX_USES": "50",
}


class Traffic:
    """A few prompts, over and over."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._counter = count()
        self.texts: dict[int, set[str]] = {}

    def next(self) -> float:
        """Send the next prompt; the acceptance length of its answer."""
        number = next(self._counter) % PROMPTS
        answer = self._client.complete(f"prompt {number}", max_tokens=40)
        self.texts.setdefault(number, set()).add(answer.text)
        return answer.acceptance_length

    def serves(self, version: int) -> bool:
        """Whether the server holds this version, or a later one, after another request."""
        self.next()
        return self._client.metric("draft_version") >= version

    def acceptance_length(self) -> float:
        """The mean over all prompts, of the server's own counters."""
        return sum(self.next() for _ in range(PROMPTS)) / PROMPTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_random_target(tmp_path_factory.mktemp("model") / "tiny", seed=1)


@pytest.fixture(scope="module")
def stack(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(model, tmp_path_factory.mktemp("data"), SETTINGS) as stack:
        yield stack


@pytest.fixture(scope="module", autouse=True)
def untrained(stack: Stack) -> float:
    """The acceptance length before anything is learnt, whichever test comes first."""
    with stopped(stack.child("trainer").pid), Client(stack) as client:
        return Traffic(client).acceptance_length()


def test_a_draft_is_learnt_from_the_servers_traces_and_a_bad_one_is_rolled_back(
    stack: Stack, model: Path, untrained: float
) -> None:
    with Client(stack) as client:
        traffic = Traffic(client)
        assert untrained < 1.1, "the first draft knows nothing"

        wait_until(lambda: traffic.serves(1), timeout_s=400, what="a first draft that serves")
        assert traffic.acceptance_length() > untrained + 0.15

        with stopped(stack.child("trainer").pid):
            bad = _publish_what_only_claims_to_win(stack, model)
            wait_until(lambda: traffic.serves(bad), timeout_s=120, what="the candidate's turn")
            wait_until(lambda: _is_over(stack, traffic, bad), timeout_s=240, what="its end")
            assert _version(stack, bad).phase == pb.PHASE_ROLLED_BACK
        assert traffic.acceptance_length() > untrained + 0.15, "the draft before serves again"
        assert all(len(said) == 1 for said in traffic.texts.values()), "no draft changed a token"


def test_nothing_is_missing_in_the_server_of_the_stack(stack: Stack) -> None:
    url = stack.addresses.inference_url
    done = CliRunner(env={"UPDRAFT_API_KEY": None}).invoke(cli, ["attach", "--engine", "sglang", "--check", url])

    assert (done.exit_code, done.output.splitlines()) == (0, [f"SGLang 0.5.23 at {url}", "Nothing is missing."])


def test_redis_and_registry_that_crash_cost_no_answer_and_traces_come_again(stack: Stack) -> None:
    with Client(stack) as client, ThreadPoolExecutor(1) as operator:
        traffic = Traffic(client)
        for name in ("redis", "registry"):
            crash = operator.submit(stack.crash, name)
            while not crash.done():
                traffic.next()
            crash.result()
            traffic.acceptance_length()
        assert all(len(said) == 1 for said in traffic.texts.values())

        captured = client.metric("captured_traces_total")

        def is_captured() -> bool:
            traffic.next()
            return client.metric("captured_traces_total") > captured

        wait_until(is_captured, what="another captured trace")


class stopped:  # noqa: N801 - reads as a sentence
    """A process that stands still for the length of the block."""

    def __init__(self, pid: int | None) -> None:
        assert pid is not None
        self._pid = pid

    def __enter__(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGCONT)


def _publish_what_only_claims_to_win(stack: Stack, model: Path) -> int:
    """An untrained draft with an evaluation that is not true, under a policy that compares it on live traffic."""
    network = make_draft(model, seed=9, token_ids=models.draft_vocabulary(model))
    folder = models.write_version(model, model.parent / "bad", 1, network)
    manifest = json_format.Parse((folder / transfer.MANIFEST).read_text(), pb.Manifest())
    with grpc.insecure_channel(stack.addresses.registry) as channel:
        stub = RegistryStub(channel)
        stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=_by_switchback()), timeout=CALL_S)
        state = stub.List(pb.ListRequest(speculator="default"), timeout=CALL_S).speculators[0]
        manifest.evaluation.CopyFrom(evaluation(baseline=state.stable))
    return _upload(stack.addresses.registry, manifest, folder / checkpoint.WEIGHTS)


def _upload(address: str, manifest: pb.Manifest, weights: Path) -> int:
    import asyncio

    async def upload() -> int:
        async with rpc.channel(address) as channel:
            return (await transfer.upload(RegistryStub(channel), manifest, weights)).version.version

    return asyncio.run(upload())


def _by_switchback() -> pb.RolloutPolicy:
    return pb.RolloutPolicy(
        strategy=pb.STRATEGY_CANARY,
        steps=[pb.RolloutStep(pods_percent=100, hold_seconds=600)],
        analysis=pb.Analysis(
            interval_seconds=2 * SLICE_S,
            min_samples=20,
            comparison=pb.COMPARISON_SWITCHBACK,
            switchback_seconds=SLICE_S,
            max_acceptance_regression_percent=2,
            max_latency_regression_percent=100,
        ),
        auto_rollback=True,
        progress_deadline_seconds=900,
    )


def _is_over(stack: Stack, traffic: Traffic, version: int) -> bool:
    """The canary has an end; a request more for its evidence if not."""
    traffic.next()
    return _version(stack, version).phase not in {pb.PHASE_PENDING, pb.PHASE_CANARY}


def _version(stack: Stack, number: int) -> pb.Version:
    with grpc.insecure_channel(stack.addresses.registry) as channel:
        request = pb.GetRequest(speculator="default", version=number)
        return RegistryStub(channel).Get(request, timeout=CALL_S).version
