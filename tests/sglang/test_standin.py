"""The stand-in for SGLang's kernels where its own drafting is not EAGLE: trees of NGRAM, and no drafts at all."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.sglang import models
from tests.sglang.conftest import CycleModels
from tests.sglang.server import Server

pytestmark = pytest.mark.lasts(60)


@pytest.mark.skipif(shutil.which("g++") is None, reason="SGLang compiles its NGRAM drafts with g++")
def test_ngram_finds_repetition_and_eight_texts_at_once_stay_what_they_are(cycle: CycleModels, tmp_path: Path) -> None:
    ngram = ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4"]
    with Server(cycle.target, tmp_path / "server.log", arguments=ngram) as server, ThreadPoolExecutor(8) as pool:

        def ask(prompt: str) -> tuple[list[int], float]:
            sampling = {"temperature": 0, "max_new_tokens": 120}
            answer = server.post("/generate", text=prompt, sampling_params=sampling)
            return answer["output_ids"], answer["meta_info"]["spec_accept_length"]

        ask("a")  # more than the whole cycle: what comes after each character is known now
        prompts = [f"{'long' * i}{chr(65 + i)}" for i in range(8)]
        for prompt, (output, accepted) in zip(prompts, pool.map(ask, prompts), strict=True):
            assert output == models.continuation(prompt, 120)
            assert accepted > 2
