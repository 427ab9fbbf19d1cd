"""What `updraft up --engine sglang` runs, on this CPU, and a client of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import pytest
from tests.sglang import build
from tests.sglang.server import CPU_ARGUMENTS, CPU_VARIABLES
from tests.support.ports import preferred_ports_taken

from updraft_cli.local.plan import StackConfig
from updraft_cli.local.scrape import scrape
from updraft_cli.local.stack import Stack

_SETTINGS = {
    "UPDRAFT_INFERENCE_DTYPE": "float32",
    "UPDRAFT_INFERENCE_SGLANG_ARGS": " ".join(CPU_ARGUMENTS),
    "UPDRAFT_TRAINER_NICENESS": "0",
}


@contextmanager
def running(model: Path, data: Path, settings: Mapping[str, str]) -> Iterator[Stack]:
    """The whole stack for the length of the block; `settings` win over what a CPU needs."""
    config = StackConfig(
        model=model,
        data=data,
        port=0,
        registry_port=0,
        slots=16,
        trainer_threads=1,
        engine="sglang",
        sglang_python=build.python(),
        settings={**_SETTINGS, **settings},
    )
    with pytest.MonkeyPatch.context() as environment, preferred_ports_taken():
        # Whatever drafting costs with the stand-in kernels: every draft is used that the trainer has made.
        for name, value in {**CPU_VARIABLES, "UPDRAFT_SGLANG_DRAFTING": "trained"}.items():
            environment.setenv(name, value)
        with Stack(config) as stack:
            yield stack


@dataclass(frozen=True, slots=True)
class Answer:
    """A text, and by the server's own counters how many tokens a verify step gave."""

    text: str
    acceptance_length: float


class Client:
    """Greedy answers of the server itself, on its own port."""

    def __init__(self, stack: Stack) -> None:
        self._http = httpx.Client(base_url=stack.addresses.inference_url, timeout=300)
        self._metrics_url = stack.addresses.metrics_urls["inference"]

    def complete(self, prompt: str, *, max_tokens: int, ignore_eos: bool = True) -> Answer:
        """The text that follows."""
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": ignore_eos}
        answer = self._http.post("/generate", json={"text": prompt, "sampling_params": sampling}).raise_for_status()
        content = answer.json()
        meta = content["meta_info"]
        steps = max(1, meta["spec_verify_ct"])
        return Answer(text=content["text"], acceptance_length=1 + meta["spec_num_correct_drafts"] / steps)

    def chat(self, message: str, *, max_tokens: int) -> Answer:
        """The answer of SmolLM2 to a message."""
        prompt = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        return self.complete(prompt, max_tokens=max_tokens, ignore_eos=False)

    def metric(self, name: str) -> float:
        """A sum of the agent beside the server."""
        found = scrape(self._metrics_url)
        return (found.total(f"updraft_inference_{name}") if found else None) or 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
