"""The benchmark for GPUs runs on a CPU with tiny shapes, and with nothing but torch, numpy and safetensors."""

import json
import os
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
sys.path[:] = [one for one in sys.path if one == "" or "site-packages" in one or "/lib/python" in one]  # no editable install
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
"""What torch requires is allowed; an installed `updraft` is not found."""


def run(*options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", ALONE, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)


def test_it_measures_tiny_steps_on_a_cpu_with_torch_alone() -> None:
    done = run("--tiny", "--device", "cpu", "--steps", "1", "--no-compile")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    figures = json.loads(lines[-1])
    assert (figures["tokens"], figures["draft_vocab"], figures["compiles"]) == (48, 64, False)
    assert figures["samples_per_s"] > 0
    assert figures["tflops_per_s"] > 0
    assert figures["mfu"] is figures["peak_gb"] is None, "a CPU has neither"
    assert "samples/s" in lines[-2]


def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "torch sees no GPU" in sentence
    assert sentence.endswith("Here that is the option --device.")
