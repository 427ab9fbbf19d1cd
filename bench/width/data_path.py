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
from bench.width.processes import WatchedProcess
from bench.width.standstill import Second
from bench.width.traffic import Width, lengths
from tests.support.ports import free_port
from tests.support.processes import scrape
from tests.support.redis_server import RedisServer
from tests.support.tiny_tokenizer import write_tokenizer

DRAIN_S = 60.0
"""For the queues, after the last request."""

_PROMPT = "a" * 64
_CAPTURED = "updraft_inference_captured_traces_total"
_DROPPED = "updraft_inference_capture_dropped_traces_total"
_ADMITTED = "updraft_trainer_samples_admitted_total"
_REFUSED = "updraft_trainer_samples_refused_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRun:
    """One run, with all counts since its start. `late_ms` includes the wait for a core, `held_ms` does not."""

    seconds: float
    requests: int
    tokens: int
    captured: float
    """Traces that pods stored, without those that they dropped."""
    dropped: dict[str, float]
    admitted: float
    refused: dict[str, float]
    lost: float
    """Traces that were sent, and neither stored nor refused a minute later: the stream's limit deleted them."""
    read_mb_per_s: float
    batches: int
    trainer_bytes: int
    pod_bytes: int
    held_ms: dict[str, float]
    late_ms: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def num_dropped(self) -> float:
        return sum(self.dropped.values()) + self.lost


async def run(  # noqa: PLR0913 - the arguments of the bench
    folder: Path, width: Width, *, num_pods: int, seconds: float, shortest: int, longest: int, seed: int
) -> PathRun:
    """Send requests at the rate of `width` for some time; with `seconds` 0, a single one."""
    async with AsyncExitStack() as stack:
        processes = stack.enter_context(_Processes(folder, width, num_pods=num_pods, longest=longest))
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=120.0))
        since_s, began_s = time.time(), time.perf_counter()
        sizes = await _send(client, processes.urls, width, seconds, lengths(shortest, longest, seed))
        sent_s = time.perf_counter() - began_s
        await _drained(processes)
        return processes.figures(width, sizes, since_s, max(seconds, sent_s))


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
        }
        self._registry = WatchedProcess("registry", folder / "registry-process", registry)
        self._trainer = WatchedProcess("trainer", folder / "trainer-process", trainer | shared)
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
            for process in (self._trainer, *self._pods):
                process.start()
            for pod in self._pods:
                pod.wait_for_log("Ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self._pods, self._trainer, self._registry, self._redis):
            process.kill()

    def settled(self) -> float:
        """Entries that the trainer has stored or refused, and traces that pods have sent."""
        page = scrape(self._trainer_metrics)
        sent = sum(sum(_values(scrape(port), _CAPTURED).values()) for port in self._ports)
        return sent + sum(_values(page, _ADMITTED).values()) + sum(_values(page, _REFUSED).values())

    def figures(self, width: Width, sizes: list[int], since_s: float, seconds: float) -> PathRun:
        trainer, pods = scrape(self._trainer_metrics), [scrape(port) for port in self._ports]
        dropped: dict[str, float] = {}
        for page in pods:
            for reason, count in _values(page, _DROPPED).items():
                dropped[reason] = dropped.get(reason, 0.0) + count
        lines = (self._folder / "trainer-data" / "reads").read_text().splitlines()
        reads = [json.loads(line) for line in lines]
        watched = {
            "trainer": self._trainer.watched(since_s),
            "registry": self._registry.watched(since_s),
            "pods": [second for pod in self._pods for second in pod.watched(since_s)],
        }
        captured = sum(sum(_values(page, _CAPTURED).values()) for page in pods)
        admitted, refused = sum(_values(trainer, _ADMITTED).values()), _values(trainer, _REFUSED)
        return PathRun(
            seconds=seconds,
            requests=len(sizes),
            tokens=sum(sizes),
            captured=captured,
            dropped=dropped,
            admitted=admitted,
            refused=refused,
            lost=max(0.0, captured - admitted - sum(refused.values())),
            read_mb_per_s=width.row_bytes * sum(rows for rows, _ in reads) / 1e6 / max(1e-9, sum(s for _, s in reads)),
            batches=len(reads),
            trainer_bytes=_most(watched["trainer"]),
            pod_bytes=_most(watched["pods"]),
            held_ms={name: max(second.held_ms for second in lines) for name, lines in watched.items()},
            late_ms={name: max(second.late_ms for second in lines) for name, lines in watched.items()},
        )


def _most(seconds: list[Second]) -> int:
    return max(second.resident_bytes for second in seconds)


def _values(page: dict[str, float], name: str) -> dict[str, float]:
    """The samples of a metric above 0, by their labels."""
    return {sample.removeprefix(name): value for sample, value in page.items() if sample.startswith(name) and value > 0}
