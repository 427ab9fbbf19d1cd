"""Answers requests, and records each in a file of its own, so that an interrupted run goes on where it stopped."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from updraft_chassis.errors import UpdraftError
from updraft_chassis.progress import Progress, Report
from updraft_draft import recordings
from updraft_inference.agent.direct import answered, recorded
from updraft_inference.engine import Engine, FinishedRequest, GenerationRequest

NAME = "draft-train"
"""Stands for speculator and pod in the traces."""
STREAMS = 16
"""Requests at a time."""

Generate = Callable[[GenerationRequest], Awaitable[FinishedRequest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request to record under `name`. Making it may take requests to the engine itself."""

    name: str
    request: Callable[[Generate], Awaitable[GenerationRequest]]


class Recorder:
    """Records the jobs that a folder does not hold yet."""

    def __init__(self, engine: Engine, folder: Path, report: Report) -> None:
        self._engine = engine
        self._folder = folder
        self._report = report
        self._tokens = 0
        self._num_done = 0
        self._num_found = 0
        self._has_started = False

    async def run(self, jobs: Iterable[Job | None], total: int) -> None:
        """Record `total` jobs, of which None stands for one that is left out.

        Conflict if the folder is another model's, Exhausted if the disk is full. The first error stands for all.
        """
        recordings.prepare(self._folder, target_fingerprint=self._engine.info.target_fingerprint)
        missing = self._missing(jobs)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(STREAMS):
                    tasks.create_task(self._work(missing, total))
        except ExceptionGroup as errors:
            if not all(isinstance(error, UpdraftError) for error in errors.exceptions):
                raise  # a bug needs its traceback
            raise errors.exceptions[0] from None
        self._report(replace(self._progress(total), note=self._found()))

    def _missing(self, jobs: Iterable[Job | None]) -> Iterator[Job]:
        fingerprint = self._engine.info.target_fingerprint
        for job in jobs:
            if job and recordings.read(self._folder, job.name, target_fingerprint=fingerprint) is None:
                yield job
            else:
                self._num_done += 1
                self._num_found += job is not None

    async def _work(self, jobs: Iterator[Job], total: int) -> None:
        for job in jobs:
            if not self._has_started:  # what was done before does not count for the time that is left
                self._has_started = True
                self._report(self._progress(total))
            finished = await self._generate(await job.request(self._generate))
            recordings.write(self._folder, job.name, recorded(self._engine, finished, recorder=NAME))
            self._num_done += 1
            self._report(self._progress(total))

    async def _generate(self, request: GenerationRequest) -> FinishedRequest:
        finished = await answered(self._engine, request)
        self._tokens += len(finished.output_ids)
        return finished

    def _found(self) -> str:
        """Known at the end only, because jobs are made one by one, and some of the last may be recorded already."""
        return f"{self._num_found:,} requests were recorded already." if self._num_found else ""

    def _progress(self, total: int) -> Progress:
        return Progress(activity="recording", done=self._num_done, total=total, tokens=self._tokens)
