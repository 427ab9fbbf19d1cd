"""The demo from its first process to its report. However it ends, the measurements so far become a report."""

import asyncio
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import httpx
from rich.console import Console

from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Exhausted, InvalidInput, UpdraftError
from updraft_cli import results
from updraft_cli.demo import charts, frozen, page
from updraft_cli.demo.chat import ChatServer
from updraft_cli.demo.plan import SETTINGS, Plan, Segment, SegmentName, stretch_s
from updraft_cli.demo.probe import Probe, ways
from updraft_cli.demo.progress import Progress
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import Report, Summary
from updraft_cli.demo.summary import bars, summarise
from updraft_cli.demo.traffic import Traffic
from updraft_cli.demo.watch import Watch
from updraft_cli.local.console import console as console_beside
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack
from updraft_cli.local.terminal import data_option

_SLOTS = 8
_THREADS = 1
"""One core each for serving and learning, on the smallest machine that the demo supports."""

_STOPPED = "it was stopped by hand."


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    plan: Plan
    model: Path
    model_name: str
    out: Path
    data: Path | None
    """Where the stack keeps its data; None: a temporary folder."""
    started_unix_s: float
    """Start of the set-up."""


def run(options: Options, console: Console) -> tuple[Report, Path]:
    """Run the demo; return the report and where its page is.

    Raises errors of the start. A later error is in the report.
    """
    _make_folder(options.out)
    recording = Recording(plan=options.plan, clock=SystemClock())
    progress = Progress(console, recording)
    with _data_folder(options.data) as data:
        config = StackConfig(
            data=data / "stack",
            model=options.model,
            model_name=options.model_name,
            port=0,
            registry_port=0,
            slots=_SLOTS,
            threads=_THREADS,
            trainer_threads=_THREADS,
            settings=SETTINGS,
        )
        console.print("Starting Redis, the registry, the trainer and inference:")
        stack = Stack(config, listener=progress.listen)
        try:
            consoles: list[str] = []

            def point(address: str) -> None:
                consoles.append(address)
                _point(console, data / "stack", address)

            tell = partial(console.print, style="dim")
            with stack, console_beside(stack.folder.path, stack.addresses.registry, point, tell):
                set_up_s = time.time() - options.started_unix_s
                recording.start()
                stopped_by = _measure(stack, recording, progress)
                recording.charts = charts.read(consoles)
                console.print("Stopping the processes ...", style="dim")
        except KeyboardInterrupt:  # a second one, or one during the start
            stack.kill()
            if not recording.parts:
                raise
            stopped_by = _STOPPED
    console.print("Writing the report ...", style="dim")
    summary = summarise(recording, set_up_s=set_up_s, total_s=time.time() - options.started_unix_s)
    report = make_report(recording, summary, model=options.model_name, stopped_by=stopped_by)
    return report, page.write(report, options.out)


def _point(console: Console, data: Path, address: str) -> None:
    """Print where the console is; its address is a password, which no log should hold."""
    where = f"at {address}" if console.is_terminal else f"with `updraft ui{data_option(data)}`"
    console.print(f"Watch it live {where}", soft_wrap=True)


def _measure(stack: Stack, recording: Recording, progress: Progress) -> str:
    """Run all segments; return the reason if it ended early."""
    try:
        asyncio.run(_Run(stack, recording, progress).main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _STOPPED
    except UpdraftError as error:
        return f"{error}."
    return ""


@dataclass(frozen=True, slots=True)
class _Run:
    """The part of the demo that happens in an event loop."""

    stack: Stack
    recording: Recording
    progress: Progress

    async def main(self) -> None:
        """Run all segments while watch and progress run in the background."""
        task = asyncio.current_task()
        assert task is not None
        # As Ctrl-C, which asyncio.run turns into a cancellation itself.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with httpx.AsyncClient(timeout=None, trust_env=False) as http:  # noqa: S113 - chat and watch set deadlines
            watch = Watch(http=http, addresses=self.stack.addresses, recording=self.recording)
            model = self.stack.config.model_name or ""
            serving = ChatServer(http=http, url=self.stack.addresses.inference_url, model=model)
            try:
                async with asyncio.TaskGroup() as background:
                    looking = [background.create_task(job) for job in (watch.run(), self.progress.run())]
                    failure = await self._segments(serving, watch)
                    for look in looking:
                        look.cancel()
            finally:
                with suppress(UpdraftError):
                    await watch.read_history()
        if failure is not None:
            raise failure

    async def _segments(self, serving: ChatServer, watch: Watch) -> UpdraftError | None:
        """Run the segments; an error ends them and is returned instead of raised into the task group."""
        try:
            async with AsyncExitStack() as resources:
                traffic = Traffic(serving, self.recording)
                probe = Probe(ways(serving, None), self.recording)
                for segment in self.recording.plan.segments:
                    self.recording.begin(segment.name, segment.domain)
                    if segment.name is SegmentName.SHIFTED:
                        await watch.look()
                        probe = Probe(ways(serving, await self._freeze(serving, resources)), self.recording)
                    await self._segment(segment, traffic, probe)
                    self.recording.end()
        except UpdraftError as error:
            return error
        self.recording.is_complete = True
        return None

    async def _segment(self, segment: Segment, traffic: Traffic, probe: Probe) -> None:
        recording = self.recording
        for point in range(segment.num_points):
            for_s = stretch_s(
                recording.plan, segment, point, now_s=recording.now_s, probe_request_s=recording.probe_request_s
            )
            if for_s:
                recording.doing = "live traffic"
                await traffic.flow(segment.domain, for_s)
            recording.doing = f"report point {len(recording.points) + 1} of {recording.plan.num_points}"
            await probe.measure(segment, point)

    async def _freeze(self, serving: ChatServer, resources: AsyncExitStack) -> ChatServer | None:
        """Start a process with the draft that serves now; None if no draft serves."""
        recording, stack = self.recording, self.stack
        recording.frozen_version = recording.served_version
        if not recording.frozen_version:
            return None
        recording.doing = f"starting a process that keeps draft {recording.frozen_version}"
        folder = stack.folder.path.parent / "frozen"
        draft = await frozen.pull(stack.addresses.registry, recording.frozen_version, folder)
        process = frozen.frozen_process(stack.child("inference").process, draft, folder / "data")
        return await resources.enter_async_context(
            frozen.running(process, logs=stack.folder.logs, listener=self.progress.listen, like=serving)
        )


def make_report(recording: Recording, summary: Summary, *, model: str, stopped_by: str) -> Report:
    """Return the report of what was recorded on this machine."""
    return Report(
        updraft_version=version("updraft"),
        commit=results.commit(),
        started=datetime.fromtimestamp(recording.start_unix_s, UTC),
        is_complete=recording.is_complete,
        stopped_by=stopped_by,
        machine=results.machine(),
        model=model,
        minutes=recording.plan.minutes,
        streams=recording.plan.streams,
        seed=recording.plan.seed,
        settings=dict(SETTINGS),
        frozen_version=recording.frozen_version,
        summary=summary,
        bars=bars(summary, recording.points, recording.swaps),
        parts=tuple(recording.parts),
        points=tuple(recording.points),
        requests=tuple(recording.requests),
        swaps=tuple(recording.swaps),
        estimates=tuple(recording.estimates),
        transitions=tuple(recording.transitions),
        charts=recording.charts,
    )


@contextmanager
def _data_folder(chosen: Path | None) -> Iterator[Path]:
    """Yield an empty folder: the chosen one, which is kept, or a temporary one."""
    if chosen is None:
        with tempfile.TemporaryDirectory(prefix="updraft-demo-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    _make_folder(chosen)
    if any(chosen.iterdir()):
        raise InvalidInput(f"{chosen} is not empty; the demo starts on day 0, so choose another folder with --data")
    yield chosen


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Exhausted(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
