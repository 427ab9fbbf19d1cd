"""The data path: pods with random states of full width, Redis, intake and replay, while batches are read."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from bench.width import standstill
from bench.width.engine import HANDED_OVER
from bench.width.processes import WatchedProcess
from bench.width.standstill import Second, Standstill
from bench.width.traffic import Width, lengths
from tests.support.ports import free_port
from tests.support.processes import scrape
from tests.support.redis_server import RedisServer
from tests.support.tiny_tokenizer import write_tokenizer

DRAIN_S = 60.0
"""For the queues, after the last request."""

CONTROL = "control"
"""The process of control.py, in `PathRun.longest`."""

_PROMPT = "a" * 64
_NO_LIMITS = httpx.Limits(max_connections=None)
_CAPTURED = "updraft_inference_captured_traces_total"
_DROPPED = "updraft_inference_capture_dropped_traces_total"
_EVICTED = "updraft_inference_evicted_stream_entries_total"
_ADMITTED = "updraft_trainer_samples_admitted_total"
_REFUSED = "updraft_trainer_samples_refused_total"
_STORED = "updraft_trainer_stored_tokens_total"
_CAPTURED_TOKENS = "updraft_inference_captured_tokens_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRun:
    """One run, with all counts since its start."""

    seconds: float
    requests: int
    tokens: int
    captured_tokens_per_s: float
    """Tokens with states that pods sent, prompts included, in the second half of the run: as many requests end as begin."""
    handed_over: int
    """Output tokens that the engines handed over with states: those of the requests that credits chose."""
    stored: float
    """Output tokens that replay stored, each with the target's prediction."""
    captured: float
    """Traces that pods sent, without those that they dropped."""
    dropped: dict[str, float]
    """By pods, by reason."""
    admitted: float
    refused: dict[str, float]
    """By the trainer, by reason. `no_payload`: credits did not choose the request."""
    read_mb_per_s: float
    read_mb_per_cpu_s: float
    """Per second of processor time of the thread that reads, which the others leave little of the machine to."""
    decoded_mb_per_s: float
    """Read, and decoded to bfloat16 in one batch."""
    batches: int
    trainer_bytes: int
    pod_bytes: int
    longest: dict[str, Standstill]
    cpu_s: dict[str, float]
    """Processor time per second that was watched: of the run, its last requests and their way to replay."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def lost(self) -> float:
        """Output tokens that were handed over and are not stored."""
        return self.handed_over - self.stored

    @property
    def lost_traces(self) -> dict[str, float]:
        """Those that were dropped or refused, by reason, but for those that credits did not choose."""
        return {reason: count for reason, count in (self.dropped | self.refused).items() if "no_payload" not in reason}


async def run(  # noqa: PLR0913 - the arguments of the bench
    folder: Path, width: Width, *, num_pods: int, seconds: float, shortest: int, longest: int, seed: int
) -> PathRun:
    """Send requests at the rate of `width` for some time; with `seconds` 0, a single one."""
    async with AsyncExitStack() as stack:
        processes = stack.enter_context(_Processes(folder, width, num_pods=num_pods, longest=longest))
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=120.0, limits=_NO_LIMITS))
        since_s, began_s = time.time(), time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(_send(client, processes.urls, width, seconds, lengths(shortest, longest, seed)))
            rate = tasks.create_task(_captured_tokens_per_s(processes, seconds))
        sent_s = time.perf_counter() - began_s
        await _drained(processes)
        return processes.figures(width, sending.result(), since_s, seconds or sent_s, rate.result())


async def _captured_tokens_per_s(processes: "_Processes", seconds: float) -> float:
    """In the second half of these seconds."""
    await asyncio.sleep(seconds / 2)
    before, began_s = await asyncio.to_thread(processes.captured_tokens), time.perf_counter()
    await asyncio.sleep(seconds / 2)
    captured = await asyncio.to_thread(processes.captured_tokens)
    return (captured - before) / (time.perf_counter() - began_s)


async def _send(
    client: httpx.AsyncClient, urls: list[str], width: Width, seconds: float, sizes: Iterator[int]
) -> list[int]:
    """Send each request when its tokens are generated, whether others have ended or not."""
    loop, sent = asyncio.get_running_loop(), []
    due_s = began_s = loop.time()
    async with asyncio.TaskGroup() as tasks:
        for url in itertools.cycle(urls):
            size = next(sizes)
            due_s += size / width.tokens_per_s
            if seconds:
                await asyncio.sleep(due_s - loop.time())
            sent.append(size)
            tasks.create_task(_complete(client, url, size))
            if due_s >= began_s + seconds:
                return sent
    raise AssertionError("there are pods")


async def _complete(client: httpx.AsyncClient, url: str, max_tokens: int) -> None:
    body = {"model": "tiny", "prompt": _PROMPT, "max_tokens": max_tokens, "ignore_eos": True}
    (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()


async def _drained(processes: "_Processes") -> None:
    """Wait until the trainer has settled nothing more for two seconds."""
    before, until_s = None, time.monotonic() + DRAIN_S
    while time.monotonic() < until_s:
        await asyncio.sleep(2.0)
        settled = await asyncio.to_thread(processes.settled)
        if settled == before:
            return
        before = settled


class _Processes:
    """Redis, a registry, a trainer without its learner, and pods."""

    def __init__(self, folder: Path, width: Width, *, num_pods: int, longest: int) -> None:
        self._folder = folder
        self._redis = RedisServer(folder)
        port, registry_metrics, self._trainer_metrics = free_port(), free_port(), free_port()
        shared = {"WIDTH": json.dumps(asdict(width)), "OMP_NUM_THREADS": "1"}
        registry = {
            "UPDRAFT_REGISTRY_DATA_DIR": str(folder / "registry"),
            "UPDRAFT_REGISTRY_PORT": str(port),
            "UPDRAFT_REGISTRY_METRICS_PORT": str(registry_metrics),
        }
        trainer = {
            "UPDRAFT_TRAINER_MODEL": str(folder),
            "UPDRAFT_TRAINER_DATA_DIR": str(folder / "trainer-data"),
            "UPDRAFT_TRAINER_REDIS_URL": self._redis.url,
            "UPDRAFT_TRAINER_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
            "UPDRAFT_TRAINER_METRICS_PORT": str(self._trainer_metrics),
            "UPDRAFT_TRAINER_NICENESS": "0",
        }
        self._registry = WatchedProcess("registry", folder / "registry-process", registry)
        self._trainer = WatchedProcess("trainer", folder / "trainer-process", trainer | shared)
        self._control = WatchedProcess("control", folder / "control-process", {})
        self._pods: list[WatchedProcess] = []
        self._ports = [free_port() for _ in range(num_pods)]
        for number, pod_port in enumerate(self._ports):
            pod = {
                "UPDRAFT_INFERENCE_MODEL": str(folder / "tiny"),
                "UPDRAFT_INFERENCE_PORT": str(pod_port),
                "UPDRAFT_INFERENCE_POD_NAME": f"pod-{number}",
                "UPDRAFT_INFERENCE_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
                "UPDRAFT_INFERENCE_REDIS_URL": self._redis.url,
                "UPDRAFT_INFERENCE_DATA_DIR": str(folder / f"pod-{number}"),
                "UPDRAFT_INFERENCE_MAX_CONTEXT": str(longest + len(_PROMPT)),
            }
            self._pods.append(WatchedProcess("pod", folder / f"pod-{number}-process", pod | shared))

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self._ports]

    def __enter__(self) -> "_Processes":
        write_tokenizer(self._folder / "tiny")
        try:
            self._redis.start()
            self._registry.start()
            self._registry.wait_for_log("Registry serves")
            for process in (self._control, self._trainer, *self._pods):
                process.start()
            for pod in self._pods:
                pod.wait_for_log("Ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self._pods, self._trainer, self._control, self._registry, self._redis):
            process.kill()

    def settled(self) -> float:
        """Entries that the trainer has stored or refused, and traces that pods have sent."""
        page = scrape(self._trainer_metrics)
        sent = sum(sum(_values(scrape(port), _CAPTURED).values()) for port in self._ports)
        return sent + sum(_values(page, _ADMITTED).values()) + sum(_values(page, _REFUSED).values())

    def captured_tokens(self) -> float:
        return sum(sum(_values(scrape(port), _CAPTURED_TOKENS).values()) for port in self._ports)

    def _handed_over(self) -> int:
        files = [self._folder / f"pod-{number}" / HANDED_OVER for number in range(len(self._pods))]
        return sum(int(line) for file in files for line in file.read_text().split())

    def figures(self, width: Width, sizes: list[int], since_s: float, seconds: float, rate: float) -> PathRun:
        trainer, pods = scrape(self._trainer_metrics), [scrape(port) for port in self._ports]
        dropped: dict[str, float] = {}
        for page in pods:
            for metric in (_DROPPED, _EVICTED):
                for labels, count in _values(page, metric).items():
                    reason = labels or "evicted entries"
                    dropped[reason] = dropped.get(reason, 0.0) + count
        lines = (self._folder / "trainer-data" / "reads").read_text().splitlines()
        reads = [json.loads(line) for line in lines]
        read_mb = width.row_bytes * sum(rows for rows, *_ in reads) / 1e6
        watched = {
            "trainer": [self._trainer.watched(since_s)],
            "registry": [self._registry.watched(since_s)],
            "pods": [pod.watched(since_s) for pod in self._pods],
            CONTROL: [self._control.watched(since_s)],
        }
        captured = sum(sum(_values(page, _CAPTURED).values()) for page in pods)
        return PathRun(
            seconds=seconds,
            requests=len(sizes),
            tokens=sum(sizes),
            captured_tokens_per_s=rate,
            handed_over=self._handed_over(),
            stored=sum(_values(trainer, _STORED).values()),
            captured=captured,
            dropped=dropped,
            admitted=sum(_values(trainer, _ADMITTED).values()),
            refused=_values(trainer, _REFUSED),
            read_mb_per_s=read_mb / max(1e-9, sum(wall_s for _, wall_s, *_ in reads)),
            read_mb_per_cpu_s=read_mb / max(1e-9, sum(cpu_s for _, _, cpu_s, _ in reads)),
            decoded_mb_per_s=read_mb / max(1e-9, sum(wall_s + decode_s for _, wall_s, _, decode_s in reads)),
            batches=len(reads),
            trainer_bytes=_most(watched["trainer"]),
            pod_bytes=_most(watched["pods"]),
            longest={
                name: standstill.most([second.longest for lines in processes for second in lines])
                for name, processes in watched.items()
            },
            cpu_s={
                name: sum((lines[-1].cpu_s - lines[0].cpu_s) / (lines[-1].at_s - lines[0].at_s) for lines in processes)
                for name, processes in watched.items()
            },
        )


def _most(processes: list[list[Second]]) -> int:
    return max(second.resident_bytes for lines in processes for second in lines)


def _values(page: dict[str, float], name: str) -> dict[str, float]:
    """The samples of a metric above 0, by their labels."""
    return {sample.removeprefix(name): value for sample, value in page.items() if sample.startswith(name) and value > 0}
