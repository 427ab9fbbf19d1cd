"""What `updraft up --engine sglang` runs, on this CPU, and a client of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from tests.sglang import build
from tests.sglang.server import CPU_ARGUMENTS, CPU_VARIABLES

from updraft_cli.local.plan import StackConfig
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
    with pytest.MonkeyPatch.context() as environment:
        for name, value in CPU_VARIABLES.items():
            environment.setenv(name, value)
        with Stack(config) as stack:
            yield stack


class Client:
    """Greedy answers, with what the server's own counters say about the drafts of each."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)
        self._model = self._http.get("/v1/models").json()["data"][0]["id"]

    def complete(self, prompt: str, *, max_tokens: int) -> tuple[str, dict[str, float]]:
        """The text that follows, to its last token whatever it is; and its draft statistics."""
        answer = self._post("/v1/completions", prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
        return answer["choices"][0]["text"], answer["usage"]["updraft"]

    def chat(self, message: str, *, max_tokens: int) -> dict[str, float]:
        """The draft statistics of an answer."""
        messages = [{"role": "user", "content": message}]
        return dict(self._post("/v1/chat/completions", messages=messages, max_tokens=max_tokens)["usage"]["updraft"])

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        body |= {"model": self._model, "temperature": 0}
        return dict(self._http.post(path, json=body).raise_for_status().json())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
