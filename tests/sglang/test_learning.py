"""A draft that Updraft trains from the traffic of SGLang's own port helps SGLang itself, on a real model and real requests."""

import itertools
import logging
import statistics
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from tests.sglang import models
from tests.sglang.server import START_S
from tests.sglang.up import Client, running
from tests.support.wait import wait_until

from updraft_cli.local.stack import Stack
from updraft_cli.prompts import domain_prompts, num_prompts

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.timeout(START_S + 1200), pytest.mark.lasts(600)]

DOMAIN = "json"
STREAMS = 8
MAX_TOKENS = 64
ASKED_FOR = 0.3
WITHIN_S = 900
SETTINGS = {
    "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.25",
    "UPDRAFT_TRAINER_EVALUATE_SECONDS": "10",
    "UPDRAFT_TRAINER_MIN_SAMPLES": "6",
    "UPDRAFT_TRAINER_MAX_USES": "16",
    "UPDRAFT_REGISTRY_GATE_MIN_SAMPLES": "6",
}


def test_a_draft_learnt_from_its_traces_raises_sglangs_acceptance_length_on_requests_that_it_never_saw(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with (
        running(models.smollm2(), tmp_path_factory.mktemp("data"), SETTINGS) as stack,
        Client(stack) as client,
    ):
        untrained = acceptance_length(client)
        with traffic(stack):
            wait_until(
                lambda: acceptance_length(client) >= untrained + ASKED_FOR,
                timeout_s=WITHIN_S,
                what=f"an acceptance length of {untrained:.2f} + {ASKED_FOR}",
            )
        assert client.metric("draft_version") >= 1


def acceptance_length(client: Client) -> float:
    """The mean over held-out requests, of the server's own counters."""
    prompts = domain_prompts(DOMAIN, STREAMS, held_out=True)
    with ThreadPoolExecutor(STREAMS) as streams:
        answers = streams.map(lambda prompt: client.chat(prompt, max_tokens=MAX_TOKENS), prompts)
        length = statistics.mean(answer.acceptance_length for answer in answers)
    logger.info("Acceptance length of held-out requests: %.2f", length)
    return length


@contextmanager
def traffic(stack: Stack) -> Iterator[None]:
    """Requests of the same domain, none of them held out, from eight streams at once for the length of the block."""
    prompts = itertools.cycle(domain_prompts(DOMAIN, num_prompts(DOMAIN)))
    is_over, lock = threading.Event(), threading.Lock()

    def stream() -> None:
        with Client(stack) as client:
            while not is_over.is_set():
                with lock:
                    prompt = next(prompts)
                client.chat(prompt, max_tokens=MAX_TOKENS)

    with ThreadPoolExecutor(STREAMS) as streams:
        running = [streams.submit(stream) for _ in range(STREAMS)]
        try:
            yield
        finally:
            is_over.set()
    for one in running:
        one.result()
