"""A swap that an engine does not end, as one whose ranks wait for each other: the registry hears of it. It may still end."""

import logging
from functools import partial
from pathlib import Path

import pytest
from tests.support.swapping import ACK, PENDING, Pod, running
from tests.support.wait import until

from updraft.fleet.v1 import fleet_pb2
from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import Corrupt, Unavailable, UpdraftError
from updraft_draft import tensors
from updraft_inference.agent.capture import Capture, Sink
from updraft_inference.agent.report import PodState
from updraft_inference.agent.selection import CaptureRates
from updraft_inference.agent.trace import Origin


@pytest.fixture
async def pod(tmp_path: Path) -> Pod:
    one = Pod(tmp_path)
    one.swapper.retry_s = one.swapper.late.after_s = 0.01
    return one


def reported(pod: Pod) -> fleet_pb2.PodReport:
    """What the registry hears of a pod that captures."""
    origin = Origin(speculator="s", pod="p", engine="fake/1", target_fingerprint="sha256:t", tokenizer_fingerprint="")
    sink = Sink(
        stream=Nowhere(), origin=origin, encode=partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_FP32)
    )
    capture = Capture(CaptureRates(), sink, max_entries=1, max_bytes=1, metrics=pod.metrics, clock=pod.clock)
    return PodState(
        origin=origin,
        engine=pod.engine,
        swapper=pod.swapper,
        capture=capture,
        is_draining=lambda: False,
        clock=pod.clock,
    ).report()


class Nowhere:
    """A stream that nothing is written to."""

    async def append(self, trace_id: bytes, entry: bytes) -> int:
        raise AssertionError


async def begun(pod: Pod, number: int, *, at_least: bool = False) -> None:
    await until(lambda: pod.engine.num_begun == number or (at_least and pod.engine.num_begun > number), what="a swap")


async def late(pod: Pod, seconds: float) -> None:
    """Let this time pass, and wait until the swap is said to be so late."""
    pod.clock.advance(seconds)
    after = f"after {seconds:.0f} s"
    await until(lambda: after in pod.swapper.late.reason, what=after)


async def test_a_swap_that_does_not_end_is_reported_with_its_age_and_a_remedy_until_it_ends(
    pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(pod):
        await pod.answered(pod.serve(1))
        pod.engine.may_swap.clear()
        nonce = pod.serve(2)
        await begun(pod, 2)
        assert pod.swapper.late.reason == ""
        changes = pod.changes
        await late(pod, 120)

        said = pod.swapper.status
        assert (said.nonce, said.outcome, said.version) == (nonce, PENDING, 2)
        assert said.reason == (
            "the swap to version 2 has not ended after 120 s: if the server also finishes no requests, it hangs and needs a"
            " restart"
        )
        assert pod.changes > changes
        assert reported(pod).status == said
        assert reported(pod).capture.problem == said.reason, "`updraft status` shows it"
        assert [record.levelno for record in caplog.records if record.message == "A swap does not end"] == [
            logging.ERROR
        ]

        pod.engine.may_swap.set()
        assert (await pod.answered(nonce)).outcome == ACK
        assert (reported(pod).capture.problem, pod.swapper.status.reason) == ("", "")
        assert pod.engine.loaded.version == 2


@pytest.mark.parametrize("end", [Unavailable("it does not answer"), Corrupt("it holds something else")])
async def test_a_swap_is_late_until_it_succeeds_or_the_draft_is_refused(pod: Pod, end: UpdraftError) -> None:
    async with running(pod):
        pod.engine.may_swap.clear()
        pod.serve(2)
        await begun(pod, 1)
        await late(pod, 120)
        pod.engine.swap_refusal = end
        pod.engine.may_swap.set()
        if isinstance(end, Unavailable):
            await begun(pod, 3, at_least=True)
            assert "the swap to version 2" in pod.swapper.status.reason, (
                "its own deadline is no answer, nor is a quick one"
            )
            pod.engine.swap_refusal = None
        await until(lambda: pod.swapper.late.reason == "", what="the end")


async def test_a_server_that_went_away_is_late_no_more(pod: Pod) -> None:
    async with running(pod):
        pod.engine.may_swap.clear()
        pod.serve(2)
        await begun(pod, 1)
        await late(pod, 120)
        pod.engine.device, pod.engine.swap_refusal = "", Unavailable("the server went away")
        pod.engine.may_swap.set()
        await until(lambda: "went away" in pod.swapper.status.reason, what="its end")
        assert pod.swapper.late.reason == ""


async def test_a_server_that_the_agent_restarts_for_a_draft_is_not_late(pod: Pod) -> None:
    async with running(pod):
        pod.engine.may_swap.clear()
        pod.serve(2)
        pod.engine.device = ""  # it is not connected
        await begun(pod, 1)
        pod.clock.advance(600)
        looked = pod.swapper.late._timer
        await until(lambda: pod.swapper.late._timer is not looked, what="another look")
        assert pod.swapper.late.reason == ""

        pod.engine.device = "cpu"
        await late(pod, 120)
