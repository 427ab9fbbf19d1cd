"""The benchmark for GPUs runs on a CPU with tiny shapes, and with nothing but torch, numpy and safetensors."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "bench" / "trainer" / "gpu.py"

ALONE = """
import runpy, sys
from importlib.metadata import packages_distributions
allowed = {"torch", "torchgen", "functorch", "numpy", "safetensors", "sympy", "mpmath", "typing_extensions", "packaging"}
allowed |= {"filelock", "networkx", "jinja2", "markupsafe", "fsspec", "triton", "setuptools", "pkg_resources"}
others = {one for one in packages_distributions() if not one.startswith(("updraft", "_"))} - allowed
sys.modules.update(dict.fromkeys(others))  # to import them raises
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
"""What torch requires is allowed; `updraft` may be installed, and is found in the checkout first."""


def test_it_measures_tiny_steps_on_a_cpu_with_torch_alone() -> None:
    options = ["--tiny", "--device", "cpu", "--steps", "1", "--no-compile"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    figures = json.loads(lines[-1])
    assert (figures["tokens"], figures["draft_vocab"], figures["compiles"]) == (48, 64, False)
    assert figures["samples_per_s"] > 0
    assert figures["tflops_per_s"] > 0
    assert figures["mfu"] is figures["peak_gb"] is None, "a CPU has neither"
    assert "samples/s" in lines[-2]
