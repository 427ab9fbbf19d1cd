"""The whole loop in its own processes: traffic is captured, learnt from, published, gated, swapped in, and helps."""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import httpx
import pytest
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.trainer import FAST
from tests.support.wait import wait_until

from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack

SETTINGS = {
    "UPDRAFT_INFERENCE_DTYPE": "float32",
    "UPDRAFT_INFERENCE_MAX_CONTEXT": "256",
    "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.3",
    **FAST,
}


pytestmark = [pytest.mark.timeout(600), pytest.mark.lasts(60)]


class Client:
    """Greedy completions of a few prompts, over and over: traffic that a draft can learn by heart."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=60)
        self.close = self._http.close
        self._model = self._http.get("/v1/models").json()["data"][0]["id"]
        self._counter = count()

    def complete(self, prompt: str, **updraft: str | int) -> tuple[str, dict[str, float]]:
        """The text, and the draft statistics of its usage."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": 40,
            "temperature": 0,
            "ignore_eos": True,
            "updraft": updraft,
        }
        answer = self._http.post("/v1/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["text"]), dict(answer["usage"]["updraft"])

    def serves(self, version: int) -> bool:
        """Send one more request for the model's drafts; were they by `version` or a later one?

        Left to itself the engine may well draft nothing: a step of so small a model costs little more than a draft's.
        """
        _, usage = self.complete(f"prompt {next(self._counter) % 6}", drafter="eagle3", lookahead=3)
        return usage["draft_version"] >= version


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(make_tiny_target(tmp_path_factory.mktemp("model") / "tiny", seed=1))


@pytest.fixture(scope="module")
def stack(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    config = StackConfig(
        model=model,
        data=tmp_path_factory.mktemp("data"),
        port=0,
        registry_port=0,
        threads=1,
        trainer_threads=1,
        settings=SETTINGS,
    )
    with Stack(config) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    client = Client(stack.addresses.inference_url)
    yield client
    client.close()


def test_a_draft_is_learnt_from_traffic_and_serves_without_changing_a_token(client: Client) -> None:
    before = [client.complete(f"prompt {n}")[0] for n in range(6)]
    wait_until(lambda: client.serves(1), timeout_s=240, what="a first draft that serves")
    after = [client.complete(f"prompt {n}", drafter="eagle3", lookahead=3) for n in range(6)]
    assert [text for text, _ in after] == before
    assert sum(usage["acceptance_length"] for _, usage in after) / 6 > 1.15, "as the gate was told"


def test_a_killed_trainer_goes_on_where_it_saved(stack: Stack, client: Client) -> None:
    wait_until(lambda: client.serves(1), timeout_s=240, what="a first draft that serves")
    wait_until(lambda: _logged(stack, "Saved") > 0, timeout_s=120, what="a saved step")
    saved = _logged(stack, "Saved")
    stack.crash("trainer")
    assert client.serves(1), "serving does not notice"
    wait_until(lambda: _logged(stack, "Resumed") >= saved, timeout_s=120, what="training that goes on from there")


def test_pods_keep_serving_the_last_good_draft_while_everything_else_dies(stack: Stack, client: Client) -> None:
    wait_until(lambda: client.serves(1), timeout_s=240, what="a first draft that serves")
    for name in ("redis", "registry", "trainer"):
        stack.crash(name)
        assert client.serves(1)


def _logged(stack: Stack, event: str) -> int:
    """The optimizer step of the trainer's last line about `event`; 0 without one."""
    steps = re.findall(rf"{event} .*step=(\d+)", stack.child("trainer").log_path.read_text())
    return int(steps[-1]) if steps else 0
