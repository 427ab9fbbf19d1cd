"""GPUs of this machine, and what a server on them is started with."""

import os
import re
from pathlib import Path

from tests.sglang.server import Device

PYTHON_VARIABLE = "TEST_SGLANG_PYTHON"
"""Names the interpreter of an environment with SGLang for the GPUs; the tests' own has it for a CPU."""

GPU = Device(
    python=lambda: Path(os.environ[PYTHON_VARIABLE]),
    arguments=("--mem-fraction-static", "0.4", "--log-level-http", "warning"),
    variables={"HF_HUB_OFFLINE": "1"},
)


def num_gpus() -> int:
    """By the kernel's device files; torch of the tests is built without CUDA."""
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").iterdir())
