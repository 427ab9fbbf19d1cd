"""The environment of the package `speculators` in the cache, on top of this checkout's, whose torch it shares."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from updraft_cli.local.folders import cache_folder

VERSION = "0.9.0"

_ALONE = (f"speculators=={VERSION}", f"hs-connectors=={VERSION}")
"""Without what they require: torchvision and torchaudio, which training does not use, would replace torch."""

_REQUIRED = ("transformers==5.19.0", "datasets==4.8.5", "loguru==0.7.3", "openai>=2", "aiohttp")


def python() -> Path:
    """The environment's interpreter; it is installed first if it is not there (0.5 GB, a minute)."""
    folder = cache_folder(os.environ) / f"speculators-{VERSION}-{sys.version_info.major}.{sys.version_info.minor}"
    interpreter, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "checkout.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        pip = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", *_ALONE], check=True)
        subprocess.run([*pip, *_REQUIRED], check=True)
        ready.touch()
    return interpreter
