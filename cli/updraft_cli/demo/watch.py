"""The served version, the trainer's estimate and the registry's decisions, read from the processes during the run.

A process that does not answer is read again a second later, because a demo of uninterrupted serving must not stop for that.
"""

import asyncio
from dataclasses import dataclass

import httpx

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.backends import registry_client as registry
from updraft_cli.backends.wire import phase
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import Estimate, Transition
from updraft_cli.local.plan import SPECULATOR, Addresses
from updraft_cli.local.scrape import Scrape, parse

_EVERY_S = 1.0
_HISTORY_LIMIT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    http: httpx.AsyncClient
    addresses: Addresses
    recording: Recording

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_EVERY_S)

    async def look(self) -> None:
        urls = self.addresses.metrics_urls
        if (inference := await self._scrape(urls["inference"])) is not None:
            note_serving(self.recording, inference)
        if (trainer := await self._scrape(urls["trainer"])) is not None:
            note_training(self.recording, trainer)

    async def read_history(self) -> None:
        """Record all decisions of the registry since the start of the run."""
        async with registry.connected(self.addresses.registry) as stub:
            request = pb.HistoryRequest(speculator=SPECULATOR, limit=_HISTORY_LIMIT)
            answer = await stub.History(request, timeout=registry.TIMEOUT_S)
        newest_first = [transition(entry, self.recording.start_unix_s) for entry in answer.transitions]
        self.recording.transitions = newest_first[::-1]

    async def _scrape(self, url: str) -> Scrape | None:
        try:
            response = await self.http.get(url, timeout=_EVERY_S)
        except httpx.HTTPError:
            return None
        return parse(response.text) if response.is_success else None


def note_serving(recording: Recording, metrics: Scrape) -> None:
    prefix = "updraft_inference"
    recording.note_served(int(metrics.total(f"{prefix}_draft_version") or 0))
    if num_pauses := metrics.total(f"{prefix}_swap_pause_seconds_count"):
        recording.swap_pause_mean_s = (metrics.total(f"{prefix}_swap_pause_seconds_sum") or 0.0) / num_pauses


def note_training(recording: Recording, metrics: Scrape) -> None:
    prefix = "updraft_trainer"
    steps = int(metrics.total(f"{prefix}_optimizer_steps_total") or 0)
    loss = metrics.total(f"{prefix}_loss") if steps else None
    recording.optimizer_steps = steps
    lengths = metrics.by(f"{prefix}_acceptance_length_tokens", "role")
    gains = metrics.by(f"{prefix}_gain_ratio", "bound")
    if {"candidate", "baseline"} <= lengths.keys() and {"mean", "low", "high"} <= gains.keys():
        recording.note_estimate(
            Estimate(
                at_s=recording.now_s,
                optimizer_steps=steps,
                loss=loss,
                candidate_length=round(lengths["candidate"], 4),
                baseline_length=round(lengths["baseline"], 4),
                gain_percent=round(100 * gains["mean"], 2),
                gain_low_percent=round(100 * gains["low"], 2),
                gain_high_percent=round(100 * gains["high"], 2),
            )
        )


def transition(entry: pb.Transition, start_unix_s: float) -> Transition:
    """Return a registry's decision, timed from the start of the run."""
    return Transition(
        at_s=round(entry.unix_ms / 1000 - start_unix_s, 3),
        version=entry.version,
        phase=phase(entry.to_phase),
        reason=entry.reason,
        actor=entry.actor,
    )
