"""Whatever a client sends, a real process with a real model answers it, and serves the next one."""

import math
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.integration.inference.test_http_fuzz import bodies, check
from tests.support.ports import free_port
from tests.support.processes import Process, scrape
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.wait import LONG_S, wait_until

pytestmark = pytest.mark.lasts(60)

LEAST = 5e-324


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of it. At the end it still runs, and nothing runs in it."""
    folder, port = tmp_path_factory.mktemp("pod"), free_port()
    variables = {
        "MODEL": make_tiny_target(write_tokenizer(folder / "tiny")),
        "DATA_DIR": folder / "data",
        "PORT": port,
        "MAX_CONTEXT": 64,
        "DRAFTER": "hybrid",
        "NUM_THREADS": 1,
    }
    environ = {f"UPDRAFT_INFERENCE_{name}": str(value) for name, value in variables.items()}
    with (
        Process("updraft_inference", environ, folder / "log") as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LONG_S) as client,
    ):
        process.wait_for_log('"Ready"')
        yield client
        assert client.get("/healthz").status_code == 200, process.log()
        wait_until(lambda: scrape(port)["updraft_inference_running_requests"] == 0, what="free slots")
        assert "Exception in ASGI application" not in process.log()


extremes = st.fixed_dictionaries(
    {"temperature": st.sampled_from([LEAST, 0.001, 0.7, 2.0])},
    optional={
        "top_p": st.sampled_from([LEAST, 1e-45, 0.5, math.nextafter(1, 0)]),
        "top_k": st.sampled_from([1, 2**31 - 1]),
        "min_p": st.sampled_from([LEAST, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.01, 100.0]),
        "presence_penalty": st.sampled_from([-2, 2]),
        "frequency_penalty": st.sampled_from([-2, 2]),
        "logit_bias": st.sampled_from([-100, LEAST, 100]).map(lambda bias: {str(i): bias for i in range(0, 512, 3)}),
        "seed": st.sampled_from([-(2**63), 0, 2**63 - 1]),
        "logprobs": st.sampled_from([0, 20]),
        "n": st.integers(1, 3),
        "stream": st.booleans(),
        "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}]),
    },
)


@settings(max_examples=120, deadline=None)
@given(fields=extremes)
@example(fields={"temperature": 1.0, "top_p": 1e-300})
def test_extreme_sampling(pod: httpx.Client, fields: dict[str, object]) -> None:
    answer = pod.post("/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 12, **fields})
    assert answer.status_code == 200, answer.text
    check(answer)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@settings(max_examples=120, deadline=None)
@given(body=bodies)
def test_any_body_of_json(pod: httpx.Client, path: str, body: dict[str, object]) -> None:
    check(pod.post(path, json=body))
