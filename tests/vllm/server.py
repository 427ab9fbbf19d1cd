"""Stock vLLM as a process of its own: started on a model and a draft, asked for greedy tokens, ended with all its children.

It runs in float32, where greedy tokens do not depend on how many are verified at once, and eagerly, which starts faster.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.support.ports import free_port
from tests.support.processes import process_group
from tests.support.wait import wait_until
from tests.vllm import build

START_S = 600.0
"""Half a minute on two cores of one's own; many times that beside other tests, and once more right after the install."""
LOOKAHEAD = 3

_ANSWER_S = 180.0
_MODEL = "target"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """vLLM's own counters of speculation, summed since its start."""

    steps: float
    accepted: float

    @property
    def acceptance_length(self) -> float:
        """Tokens a verify step: those accepted, and the one that the target adds. Steps without drafts are not counted."""
        return 1 + self.accepted / max(1, self.steps)

    def since(self, earlier: "Drafted") -> "Drafted":
        """What came after `earlier`."""
        return Drafted(steps=self.steps - earlier.steps, accepted=self.accepted - earlier.accepted)


def greedy_body(prompt_ids: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """A completion that only its limit ends, and that says its tokens."""
    return {
        "model": _MODEL,
        "prompt": list(prompt_ids),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


class Server:
    """A vLLM that answers at `url`."""

    def __init__(self, url: str, log: Path, pid: int) -> None:
        self.url = url
        self.pid = pid
        """The main process."""
        self._http = httpx.Client(base_url=url, timeout=_ANSWER_S)
        self._log = log

    @property
    def log(self) -> str:
        """Everything that it said so far."""
        return self._log.read_text(errors="replace")

    @property
    def is_ready(self) -> bool:
        try:
            return self._http.get("/health").is_success
        except httpx.TransportError:
            return False

    def greedy(self, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The tokens that it picks after a prompt, past any end token."""
        (choice,) = self.post("/v1/completions", greedy_body(prompt_ids, num_tokens))["choices"]
        return [int(token) for token in choice["token_ids"]]

    def drafted(self) -> Drafted:
        """The counters now."""
        return Drafted(
            steps=self._counter("vllm:spec_decode_num_drafts_total"),
            accepted=self._counter("vllm:spec_decode_num_accepted_tokens_total"),
        )

    def num_running(self) -> int:
        """Requests in its batch now."""
        return int(self._counter("vllm:num_requests_running"))

    def post(self, path: str, body: object = None) -> Any:
        """The JSON that it answers."""
        answer = self._http.post(path, json=body)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text}\n{self.log[-3000:]}"
        return answer.json()

    def close(self) -> None:
        self._http.close()

    def _counter(self, name: str) -> float:
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self._http.get("/metrics").text, re.MULTILINE)
        assert found, f"vLLM shows no {name}"
        return sum(map(float, found))


@contextmanager
def serving(
    model: Path, draft: Path, folder: Path, *, options: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server of `model` with an EAGLE-3 draft, and a log in the new `folder`; nothing of it runs when the block ends.

    Every step drafts, unless `variables` say otherwise."""
    folder.mkdir()
    port, log = free_port(), folder / "vllm.log"
    speculation = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": LOOKAHEAD}
    command = [
        *(str(build.python()), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", _MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"),
        *("--speculative-config", json.dumps(speculation)),
        *options,
    ]
    environment = {**cpu_environment(), "UPDRAFT_VLLM_DRAFTING": "always", **(variables or {})}
    with (
        process_group(command, log, environment=environment) as process,
        closing(Server(f"http://127.0.0.1:{port}", log, process.pid)) as server,
    ):
        wait_until(lambda: server.is_ready or process.poll() is not None, timeout_s=START_S, what="vLLM is ready")
        assert process.poll() is None, f"vLLM ended with status {process.returncode}:\n{server.log[-5000:]}"
        yield server


def cpu_environment() -> dict[str, str]:
    """Nothing of ours or of Python's from the test's own environment; no network, no GPU, one thread."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("UPDRAFT_", "PYTHON"))}
    return inherited | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
