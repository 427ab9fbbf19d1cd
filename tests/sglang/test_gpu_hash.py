"""The adapter's numpy hash of what a GPU holds, against SGLang's own kernel."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tests.sglang import build

from updraft_inference.sidecar.sglang import checksums

pytestmark = pytest.mark.lasts(50)


def test_the_hash_of_a_gpu_is_that_of_sglangs_kernel() -> None:
    """The kernel runs in Triton's interpreter, in SGLang's environment."""
    sizes = [1, 5, 63, 4 * 8192, 20_001, 4 * 8192 * 3 + 7]
    done = subprocess.run(
        [str(build.python()), str(Path(__file__).with_name("gpu_hash.py")), *map(str, sizes)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    theirs = json.loads(done.stdout.splitlines()[-1])

    assert theirs == {str(n): f"{checksums.gpu_hash(numbers(n)):016x}" for n in sizes}


def numbers(count: int) -> torch.Tensor:
    """As in gpu_hash.py."""
    return ((torch.arange(count, dtype=torch.int64) * 2654435761) % 251).to(torch.uint8)
