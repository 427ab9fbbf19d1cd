"""The processes on this machine: those of `updraft up`, and what serving and training tell about themselves."""

from updraft_cli.backends.installation import Installation
from updraft_cli.local.data_folder import StackState
from updraft_cli.local.metrics import serving, training
from updraft_cli.local.scrape import scrape

INFERENCE_URL = "http://127.0.0.1:8000"
TRAINER_METRICS_URL = "http://127.0.0.1:9092/metrics"
"""Where `updraft up` starts them unless the ports are taken."""


def gather(state: StackState | None, inference_url: str | None) -> Installation:
    """Look at the processes of a stack; without one, at the default addresses. Speculators are not read here."""
    inference = scrape(_metrics_url(state, inference_url))
    trainer = scrape(state.metrics_urls["trainer"] if state else TRAINER_METRICS_URL)
    return Installation(
        processes=state.processes if state else (),
        speculators=None,
        serving=serving(inference) if inference and inference.has("updraft_inference_") else None,
        training=training(trainer) if trainer and trainer.has("updraft_trainer_") else None,
        speculator=state.speculator if state else "",
    )


def _metrics_url(state: StackState | None, inference_url: str | None) -> str:
    if state is not None and inference_url is None:
        return state.metrics_urls["inference"]
    return f"{inference_url or INFERENCE_URL}/metrics"
