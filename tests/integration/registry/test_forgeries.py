"""Forged callers and forged evidence, over real gRPC: a registry believes a pod about itself only, and within limits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from tests.support.checkpoints import TARGET, draft, evaluation
from tests.support.registry import CALL_S, PodStream, Registry, client, publish, registry_stub, running, state
from tests.support.service_accounts import (
    ACCOUNTS,
    AUDIENCE,
    ISSUER,
    OPERATOR,
    SERVING,
    TRAINER,
    SigningKey,
    write_key_set,
)
from tests.support.sim_library import Library
from tests.support.sim_pods import Behaviour, Quality, SimPod, pods
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Forbidden, InvalidInput, Unauthenticated, UpdraftError
from updraft_registry.rollout.placement import lot

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

KEY = SigningKey("signing-key")
GOOD, CANDIDATE = 1, 2

POLICY = pb.RolloutPolicy(
    strategy=pb.STRATEGY_CANARY,
    steps=[pb.RolloutStep(pods_percent=10, hold_seconds=2), pb.RolloutStep(pods_percent=50, hold_seconds=2)],
    progress_deadline_seconds=40,
    analysis=pb.Analysis(interval_seconds=1, comparison=pb.COMPARISON_PODS),
)
"""A canary in a hurry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A registry that knows ServiceAccounts, and a folder for tokens."""

    registry: Registry
    folder: Path

    @asynccontextmanager
    async def channel(self, token: str) -> AsyncIterator[grpc.aio.Channel]:
        file = self.folder / f"token-{len(list(self.folder.glob('token-*')))}"
        file.write_text(token)
        async with rpc.channel(self.registry.address, Credentials(token_file=file)) as channel:
            yield channel


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    keys = write_key_set(folder / "jwks", KEY)
    settings = {"issuer": ISSUER, "audience": AUDIENCE, "accounts": ACCOUNTS, "key_set": str(keys)}
    async with running(folder, **settings) as registry:
        yield Cluster(registry=registry, folder=folder)


@pytest.mark.attack(
    boundary="tenants",
    attack="tokens stolen in another namespace: its serving pod's, its trainer's and its people's",
    outcome="UNAUTHENTICATED on each kind of call; nothing tells which speculators exist",
)
@pytest.mark.parametrize(
    "token",
    [
        pytest.param(KEY.token("other:qwen-serving", pod="pod-0"), id="the same names in another namespace"),
        pytest.param(KEY.token(SERVING, aud=["updraft-registry/other/qwen"]), id="for another registry"),
        pytest.param(KEY.token("other:default"), id="a default account"),
        pytest.param(KEY.token("updraft-system:default"), id="an account beside the operator's"),
    ],
)
async def test_a_token_stolen_in_another_namespace_opens_nothing(tmp_path: Path, token: str) -> None:
    async with cluster(tmp_path) as on, on.channel(token) as thief:
        stub, sentences = registry_stub(thief), set[str]()
        for speculator in ("default", "nobody"):
            calls = (
                stub.List(pb.ListRequest(speculator=speculator), timeout=CALL_S),
                stub.Get(pb.GetRequest(speculator=speculator, version=1), timeout=CALL_S),
                stub.Pin(pb.PinRequest(speculator=speculator, version=1), timeout=CALL_S),
            )
            for call in calls:
                with pytest.raises(Unauthenticated) as refused, rpc.errors():
                    await call
                sentences.add(str(refused.value).partition("requires")[2])
        with pytest.raises(Unauthenticated):
            await publish(stub, draft(1))
        stream = PodStream(thief)
        with pytest.raises(Unauthenticated):
            await reported(stream)
        assert not any("nobody" in sentence for sentence in sentences)
        async with on.channel(KEY.token(OPERATOR)) as operator:
            assert (await state(registry_stub(operator))).pods.connected == 0


async def reported(stream: PodStream) -> None:
    """A report that is answered."""
    await stream.report()
    await stream.receive()


@pytest.mark.attack(
    boundary="evidence",
    attack="a pod that reports for a speculator which is not its own",
    outcome="the other's pods, traffic and versions stay as they are",
)
async def test_reports_for_another_speculator_change_nothing_of_the_true_one(tmp_path: Path) -> None:
    async with cluster(tmp_path) as on, on.channel(KEY.token(OPERATOR)) as operator:
        await publish(registry_stub(operator), draft(1))
        before = await state(registry_stub(operator))
        async with on.channel(KEY.token(SERVING, pod="pod-0")) as channel:
            forged = PodStream(channel)
            forged.identity.speculator = "default-2"
            with pytest.raises(Forbidden, match="the token is for pods of default, but the report is for default-2"):
                await reported(forged)
        assert await state(registry_stub(operator)) == before


async def test_a_stream_stays_that_of_its_first_pod(tmp_path: Path) -> None:
    async with running(tmp_path) as registry, rpc.channel(registry.address) as channel:
        stream = PodStream(channel)
        await stream.report(versions=[counters(1, requests=10)])
        stream.identity.speculator = "default-2"
        await stream.report()
        with pytest.raises(InvalidInput, match="this stream belongs to pod"):
            await drained(stream)


@pytest.mark.attack(
    boundary="tenants",
    attack="a pod's token used to learn how another speculator hashes its tenants, to try names against hashes",
    outcome="FORBIDDEN; a token that is not bound to a speculator gets no salt at all",
)
async def test_a_pod_gets_the_salt_of_its_own_speculator_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("serve:a-token-for-any-pod\nserve@chat:the-token-of-a-chat-pod\noperate:the-token-of-a-person\n")
    async with running(tmp_path, tokens_file=tokens) as registry:
        on = Cluster(registry=registry, folder=tmp_path)
        for token, speculator, num_bytes in (
            ("the-token-of-a-chat-pod", "chat", 32),
            ("a-token-for-any-pod", "chat", 0),
            ("a-token-for-any-pod", "chat", 0),
            ("a-token-for-any-pod", "other", 0),
            ("the-token-of-a-person", "other", 32),
        ):
            async with on.channel(token) as channel:
                pod = PodStream(channel)
                pod.identity.speculator = speculator
                await pod.report()
                assert len((await pod.receive()).tenant_salt) == num_bytes, (token, speculator)
        async with on.channel("the-token-of-a-chat-pod") as channel:
            thief = PodStream(channel)
            thief.identity.speculator = "other"
            with pytest.raises(Forbidden, match="the token is for pods of chat, but the report is for other"):
                await reported(thief)
    warned = [vars(record).get("speculator") for record in caplog.records if "serve@SPECULATOR" in record.message]
    assert warned == ["chat", "other"], "once each"


@pytest.mark.attack(
    boundary="evidence",
    attack="a recorded report, sent again and again on the same stream and on new ones",
    outcome="it counts once: the registry keeps each pod's last report and adds nothing up",
)
async def test_a_replayed_report_counts_once(tmp_path: Path) -> None:
    once = counters(1, requests=100)
    async with (
        cluster(tmp_path) as on,
        on.channel(KEY.token(OPERATOR)) as operator,
        on.channel(KEY.token(SERVING, pod="pod-0")) as channel,
    ):
        await publish(registry_stub(operator), draft(1))
        for _ in range(3):
            stream = PodStream(channel)
            for _ in range(10):
                await stream.report(versions=[once])
            await stream.receive()
            traffic = (await state(registry_stub(operator))).traffic
            assert [(each.verify_steps, each.tokens) for each in traffic] == [(once.verify_steps, once.tokens)]
            stream.cancel()


@pytest.mark.attack(
    boundary="evidence",
    attack="a recorded report, sent by another pod with its own token",
    outcome="FORBIDDEN",
)
async def test_a_report_recorded_elsewhere_is_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path) as on, on.channel(KEY.token(SERVING, pod="pod-1")) as channel:
        replayed = PodStream(channel, "pod-0")
        with pytest.raises(Forbidden, match="the token belongs to pod pod-1"):
            await reported(replayed)


def counters(version: int, *, requests: int, steps: int = 40, tokens: int = 100) -> fleet_pb2.VersionCounters:
    """Of so many requests, each with these verify steps and tokens."""
    return fleet_pb2.VersionCounters(
        version=version, requests_served=requests, verify_steps=requests * steps, tokens=requests * tokens
    )


@pytest.mark.attack(
    boundary="evidence",
    attack="counters that no engine can have: more tokens than verify steps allow",
    outcome="the stream is ended with the reason, and nothing of the report counts",
)
async def test_more_tokens_than_verify_steps_allow_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as registry, client(registry.address) as stub:
        await publish(stub, draft(1))
        async with rpc.channel(registry.address) as channel:
            stream = PodStream(channel)
            await stream.report(versions=[counters(1, requests=1000, steps=1, tokens=1_000_000)])
            with pytest.raises(InvalidInput, match="1000000000 tokens in 1000 verify steps of version 1"):
                await drained(stream)
        assert not (await state(stub)).traffic


async def drained(stream: PodStream) -> None:
    while True:
        await stream.receive()


def behaviour(candidate: float) -> Behaviour:
    """Pods whose drafts have an acceptance length of 3.0, and that of the candidate."""
    return Behaviour(
        target=TARGET,
        report_s=0.3,
        requests_per_s=20.0,
        quality=lambda version: Quality(acceptance_length=candidate if version == CANDIDATE else 3.0),
    )


@asynccontextmanager
async def lying(address: str, claims: dict[int, int]) -> AsyncIterator[None]:
    """A pod that claims many requests of these versions, with so many tokens per verify step, in tenths.

    It drains, so no canary takes it.
    """
    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as tasks:
        liar = PodStream(channel, "zz-liar")

        async def lie() -> None:
            requests = 0
            while True:
                requests += 5000
                versions = [
                    counters(version, requests=requests, steps=100, tokens=10 * tenths)
                    for version, tenths in claims.items()
                ]
                loaded = (GOOD, draft(GOOD).manifest().tensors_digest)
                await liar.report(loaded=loaded, versions=versions, draining=True)
                await asyncio.sleep(0.3)

        task = tasks.create_task(lie())
        try:
            yield
        finally:
            task.cancel()
            liar.cancel()


async def ended(stub: "RegistryAsyncStub", fleet: list[SimPod], claims: dict[int, int], address: str) -> pb.Version:
    """Try a candidate while a pod outside its canary lies about it; how the candidate ended."""
    await publish(stub, draft(GOOD))
    await until(lambda: all(pod.loaded.version == GOOD for pod in fleet), what="all pods serve the good one")
    await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=POLICY), timeout=CALL_S)
    async with lying(address, claims) if claims else nullcontext():
        await publish(stub, draft(CANDIDATE), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=GOOD))

        async def is_over() -> bool:
            return not (await state(stub)).candidate

        await until(is_over, timeout_s=120, what="the canary is over")
    return (await stub.Get(pb.GetRequest(speculator="default", version=CANDIDATE), timeout=CALL_S)).version


@pytest.mark.attack(
    boundary="evidence",
    attack="a pod outside the canary that praises a bad candidate in its counters",
    outcome="only pods that were told to serve the candidate are heard about it: rolled back",
)
async def test_a_bad_draft_is_rolled_back_although_a_pod_outside_its_canary_praises_it(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as registry,
        client(registry.address) as stub,
        pods(registry.address, 16, behaviour(2.6)) as fleet,
    ):
        version = await ended(stub, fleet, {CANDIDATE: 50}, registry.address)
    assert version.phase == pb.PHASE_ROLLED_BACK
    assert version.reason.startswith("acceptance is significantly lower")


@pytest.mark.attack(
    boundary="evidence",
    attack="a pod outside the canary that defames a good candidate in its counters",
    outcome="only pods that were told to serve the candidate are heard about it: promoted",
)
async def test_a_good_draft_is_promoted_although_a_pod_outside_its_canary_defames_it(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as registry,
        client(registry.address) as stub,
        pods(registry.address, 16, behaviour(3.6)) as fleet,
    ):
        version = await ended(stub, fleet, {CANDIDATE: 11}, registry.address)
    assert version.phase == pb.PHASE_STABLE


@asynccontextmanager
async def pods_with_a_liar(address: str, honest: Behaviour, lies: Behaviour) -> AsyncIterator[list[SimPod]]:
    """16 pods, of which the one that the canary takes first lies."""
    names = sorted((f"pod-{i}" for i in range(16)), key=lambda name: lot(CANDIDATE, name))
    made = [SimPod(address, name, honest if n else lies, Library()) for n, name in enumerate(names)]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(pod.run()) for pod in made]
        yield made
        for task in running:
            task.cancel()


@pytest.mark.attack(
    boundary="evidence",
    attack="a pod inside the canary that praises a bad candidate: ten times the traffic, and all of it accepted",
    outcome="one pod of several decides nothing: rolled back",
)
async def test_a_bad_draft_is_rolled_back_although_a_pod_of_its_canary_praises_it(tmp_path: Path) -> None:
    praise = replace(behaviour(50.0), requests_per_s=200.0)
    async with (
        running(tmp_path) as registry,
        client(registry.address) as stub,
        pods_with_a_liar(registry.address, behaviour(2.6), praise) as fleet,
    ):
        version = await ended(stub, fleet, {}, registry.address)
        assert fleet[0].name in {pod.name for pod in fleet if any(one == CANDIDATE for one, _ in pod.served)}
    assert version.phase == pb.PHASE_ROLLED_BACK
    assert version.reason.startswith("acceptance is significantly lower")


@pytest.mark.attack(
    boundary="evidence",
    attack="a pod inside the canary that defames a good candidate: no draft accepted, slow, and every request an error",
    outcome="one pod of several decides nothing: promoted",
)
async def test_a_good_draft_is_promoted_although_a_pod_of_its_canary_defames_it(tmp_path: Path) -> None:
    bad = Quality(acceptance_length=1.0, latency_s=1.0, errors=1.0)
    defame = replace(behaviour(3.6), requests_per_s=200.0, quality=lambda version: bad if version == 2 else Quality())
    async with (
        running(tmp_path) as registry,
        client(registry.address) as stub,
        pods_with_a_liar(registry.address, behaviour(3.6), defame) as fleet,
    ):
        version = await ended(stub, fleet, {}, registry.address)
        assert fleet[0].name in {pod.name for pod in fleet if any(one == CANDIDATE for one, _ in pod.served)}
    assert version.phase == pb.PHASE_STABLE


@pytest.mark.attack(
    boundary="evidence",
    attack="a serving pod that publishes a draft of its own",
    outcome="FORBIDDEN: only trainers, imports and people may",
)
async def test_a_serving_pod_publishes_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as on, on.channel(KEY.token(SERVING, pod="pod-0")) as pod:
        with pytest.raises(Forbidden, match=r"role serve may not call Registry\.Publish"):
            await publish(registry_stub(pod), draft(1))


@pytest.mark.attack(
    boundary="evidence",
    attack="a trainer that promotes its own draft, or rejects another, past the gate",
    outcome="FORBIDDEN: it may publish and nothing else",
)
async def test_a_trainer_decides_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as on, on.channel(KEY.token(TRAINER)) as trainer:
        stub = registry_stub(trainer)
        await publish(stub, draft(1))
        for call in (
            stub.Promote(pb.PromoteRequest(speculator="default", version=1), timeout=CALL_S),
            stub.Reject(pb.RejectRequest(speculator="default", version=1), timeout=CALL_S),
            stub.Pin(pb.PinRequest(speculator="default", version=1), timeout=CALL_S),
            stub.SetPolicy(pb.SetPolicyRequest(speculator="default"), timeout=CALL_S),
        ):
            with pytest.raises(UpdraftError, match="role publish may not call"), rpc.errors():
                await call
