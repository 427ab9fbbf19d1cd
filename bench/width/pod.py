"""A pod around the synthetic engine: `python -m bench.width.pod`."""

import os

from bench.width.engine import open_engine

from updraft_chassis import lifecycle, logs, settings
from updraft_inference import composition
from updraft_inference.settings import InferenceSettings


async def serve_until(stop: lifecycle.Stop) -> None:
    """Serve as configured by the environment."""
    await composition.serve(settings.load(InferenceSettings, os.environ), stop, open_engine)


if __name__ == "__main__":
    logs.configure(process="pod", level="INFO", format="text")
    lifecycle.run("updraft-pod", serve_until)
