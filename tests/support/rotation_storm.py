"""Certificates, CAs and tokens that are renewed every few seconds under load: a registry, a torch pod, a trainer and Redis as
processes, clients of the pod, and what was seen of it all.

The operator's own code signs, and files change as kubelets change them. A registry validates tokens by the cluster's keys, and
ends a stream when its token expires.
"""

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from tests.support.clock import ManualClock
from tests.support.manifests import CONFIG
from tests.support.mounts import Mount
from tests.support.ports import free_port
from tests.support.processes import Process, ServerProcess, scrape, total
from tests.support.registry import RegistryProcess
from tests.support.service_accounts import ACCOUNTS, AUDIENCE, ISSUER, SERVING, TRAINER, SigningKey, write_key_set
from tests.support.trainer import FAST, Trainer
from tests.support.wait import LONG_S, until, wait_until
from tests.unit.operator.memory_cluster import MemoryCluster

from updraft_operator.manifests.tls.objects import CA, CERT, KEY
from updraft_operator.manifests.tls.terms import CERTIFICATES_PER_CA, CertificateOrder, Lives, OwnSecrets, Tls, TlsMode
from updraft_operator.watching.certificates import Certificates
from updraft_registry.identity.service_accounts import LEEWAY_S

NUM_CLIENTS = 4
_NAME = "localhost"
_LOOK_S = 0.1
_PASSWORD = "p" * 32


@dataclass(slots=True, kw_only=True)
class Seen:
    """Counts of a storm. `failed` must stay empty."""

    renewals: int = 0
    """Times that all certificates and tokens were replaced."""
    cas: int = 0
    """CAs that signed."""
    requests: int = 0
    """Answered in full; half of them on a new connection."""
    failed: list[str] = field(default_factory=list)
    streams_ended: int = 0
    """Times that the pod's stream to its registry was seen to be down."""
    down_s: float = 0.0
    """The longest of them, in seconds."""
    finished: int = 0
    """Requests of which a trace has to be there."""
    dropped: int = 0
    """Traces that the pod's queue counts as dropped."""
    read: int = 0
    """Traces that the trainer has read."""

    @property
    def lost(self) -> int:
        """Traces that nobody counts."""
        return self.finished - self.dropped - self.read


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often everything is renewed, and how long it is valid, in seconds."""

    renew_s: float = 10.0
    certificate_s: float = 15.0
    token_s: float = 15.0
    """How long a registry accepts a token. A stream ends after that, and goes on with the next one."""


class Issuer:
    """The operator's CA, and the files and tokens that kubelets would keep."""

    def __init__(self, folder: Path, pace: Pace) -> None:
        self.folder, self.pace = folder, pace
        self._key = SigningKey("of-the-cluster")
        self.key_set = write_key_set(folder / "jwks", self._key)
        self._clock = ManualClock()
        self._cluster = MemoryCluster()
        lives = Lives(ca_s=CERTIFICATES_PER_CA * pace.certificate_s, certificate_s=pace.certificate_s)
        self.certificates = Certificates(
            self._cluster,
            replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, lives=lives)),
            OwnSecrets(namespace=CONFIG.namespace, authority="updraft-ca"),
            self._clock,
            may_write=lambda: True,
            on_change=lambda: None,
        )
        self.servers = {part: Mount(folder / part) for part in ("registry", "redis", "port")}
        self.client, self.tokens = Mount(folder / "ca"), Mount(folder / "tokens")

    async def renew(self) -> None:
        """Replace everything."""
        self._clock.advance(time.time() - self._clock.now())
        await self.certificates.refresh()
        self.client.sync({CA: self.certificates.authorities})
        for part, mount in self.servers.items():
            signed = self.certificates.sign(CertificateOrder(secret=part, name=_NAME))
            mount.sync({entry: signed[entry] for entry in (CERT, KEY)})
        expires_s = self.pace.token_s - LEEWAY_S
        self.tokens.sync({name: self._key.token(account, expires_s=expires_s) for name, account in _ACCOUNTS.items()})

    @property
    def ca_file(self) -> Path:
        return self.client.folder / CA

    def files(self, part: str) -> tuple[Path, Path]:
        """Certificate and key."""
        folder = self.servers[part].folder
        return folder / CERT, folder / KEY

    @property
    def num_cas(self) -> int:
        """CAs until now."""
        found = {one for version in self.client.versions for one in version[CA].split("-----END CERTIFICATE-----")}
        return len({one.strip() for one in found} - {""})


_ACCOUNTS = {"serve": SERVING, "publish": TRAINER}


class TlsRedis(ServerProcess):
    """redis-server of this machine with TLS only. It reads its certificate when it is told to, as the chart's probe does."""

    def __init__(self, program: Path, issuer: Issuer) -> None:
        super().__init__()
        self._program, self._issuer, self.port = program, issuer, free_port()
        self._socket = issuer.folder / "tls.sock"
        self.url = f"rediss://:{_PASSWORD}@{_NAME}:{self.port}/0?ssl_ca_certs={issuer.ca_file}"

    def start(self) -> None:
        cert, key = self._issuer.files("redis")
        words = {"port": 0, "tls-port": self.port, "unixsocket": self._socket, "requirepass": _PASSWORD}
        words |= {"tls-cert-file": cert, "tls-key-file": key, "tls-auth-clients": "no", "save": "", "dir": cert.parent}
        options = (str(word) for name, value in words.items() for word in (f"--{name}", value))
        self._spawn([self._program, *options], stdout=subprocess.DEVNULL)
        wait_until(self.reload, what="Redis")

    def reload(self) -> bool:
        with suppress(OSError), Redis(unix_socket_path=str(self._socket), password=_PASSWORD) as client:
            return bool(client.config_set("tls-cert-file", str(self._issuer.files("redis")[0])))
        return False


class Pod(Process):
    """A torch pod whose port speaks TLS."""

    def __init__(self, folder: Path, issuer: Issuer, target: Path, redis_url: str, registry_port: int) -> None:
        self.port, self._issuer = free_port(), issuer
        cert, key = issuer.files("port")
        variables = {
            "MODEL": target,
            "PORT": self.port,
            "DATA_DIR": folder / "pod",
            "POD_NAME": "pod-0",
            "NAMESPACE": "a:b",
            "REDIS_URL": redis_url,
            "DTYPE": "float32",
            "NUM_THREADS": 1,
            "MAX_CONTEXT": 512,
            "NUM_SLOTS": 8,
            "REGISTRY_ADDRESS": f"{_NAME}:{registry_port}",
            "REGISTRY_CA_FILE": issuer.ca_file,
            "REGISTRY_TOKEN_FILE": issuer.tokens.folder / "serve",
            "TLS_CERT_FILE": cert,
            "TLS_KEY_FILE": key,
            "LOG_FORMAT": "text",
        }
        prefixed = {f"UPDRAFT_INFERENCE_{name}": str(value) for name, value in variables.items()}
        super().__init__("updraft_inference", prefixed, folder / "pod.log")

    def client(self) -> httpx.AsyncClient:
        """One that trusts what is trusted now."""
        trusted = ssl.create_default_context(cafile=self._issuer.ca_file)
        return httpx.AsyncClient(base_url=f"https://{_NAME}:{self.port}", verify=trusted, timeout=LONG_S)

    async def metrics(self, client: httpx.AsyncClient) -> dict[str, float]:
        lines = (await client.get("/metrics")).text.splitlines()
        values = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    issuer: Issuer
    registry: RegistryProcess
    pod: Pod
    trainer: Trainer


@asynccontextmanager
async def _running(
    folder: Path, target: Path, seen: Seen, pace: Pace, redis_program: Path | None, redis_url: str
) -> AsyncIterator[Stack]:
    """All processes, and renewals from the first one on."""
    issuer = Issuer(folder, pace)
    await issuer.renew()
    async with asyncio.TaskGroup() as tasks:
        redis = TlsRedis(redis_program, issuer) if redis_program is not None else None
        renewing = tasks.create_task(_renewing(issuer, redis, seen))
        with ExitStack() as processes:
            if redis is not None:
                await asyncio.to_thread(processes.enter_context, redis)
            url = redis.url if redis is not None else redis_url
            cert, key = issuer.files("registry")
            identity = {"issuer": ISSUER, "audience": AUDIENCE, "accounts": ACCOUNTS, "key_set": issuer.key_set}
            registry = RegistryProcess(folder, tls_cert_file=cert, tls_key_file=key, **identity)
            pod = Pod(folder, issuer, target, url, registry.port)
            trainer = Trainer(folder, target, url, registry.port, **_variables(issuer, registry))
            for process in (registry, pod, trainer):
                await asyncio.to_thread(processes.enter_context, process)
            yield Stack(issuer=issuer, registry=registry, pod=pod, trainer=trainer)
            renewing.cancel()


def _variables(issuer: Issuer, registry: RegistryProcess) -> dict[str, Any]:
    own = {
        "REGISTRY_ADDRESS": f"{_NAME}:{registry.port}",
        "REGISTRY_CA_FILE": str(issuer.ca_file),
        "REGISTRY_TOKEN_FILE": str(issuer.tokens.folder / "publish"),
        "NAMESPACE": "a:b",
    }
    return {name.removeprefix("UPDRAFT_TRAINER_"): value for name, value in FAST.items()} | own


async def storm(
    folder: Path, target: Path, pace: Pace, *, seconds: float, redis_program: Path | None = None, redis_url: str = ""
) -> Seen:
    """Renew everything under load for so long. `redis_program` is a redis-server with TLS; without one, traces go to
    `redis_url`. `folder` must have a short path, and `target` be a model for the pod's CPU."""
    seen = Seen()
    async with _running(folder, target, seen, pace, redis_program, redis_url) as stack:
        await until(lambda: _is_ready(stack.pod), what="the pod is ready")
        end = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_watching(stack, seen, end))
            for number in range(NUM_CLIENTS):
                tasks.create_task(_asking(stack, seen, end, number))
            await asyncio.sleep(seconds)
            end.set()
        seen.cas = stack.issuer.num_cas
        with suppress(TimeoutError):  # then some are lost
            await until(lambda: _is_read(stack, seen), what="all traces are read")
    return seen


async def _renewing(issuer: Issuer, redis: TlsRedis | None, seen: Seen) -> None:
    while True:
        await asyncio.sleep(issuer.pace.renew_s)
        await issuer.renew()
        seen.renewals += 1
        if redis is not None and redis.is_running and not await asyncio.to_thread(redis.reload):
            seen.failed.append("Redis did not read its certificate")


async def _asking(stack: Stack, seen: Seen, end: asyncio.Event, number: int) -> None:
    """One request after another: long streams on new connections, or short ones on a connection that is kept.

    The last one is finished: the pod counts one that is cut off before its first token, of which there is no trace.
    """
    is_kept = number % 2 == 0
    while not end.is_set():
        async with stack.pod.client() as client:
            for turn in range(200 if is_kept else 1):
                if end.is_set():
                    break
                await _ask(client, seen, f"client {number} asks for the {turn}th time", 16 if is_kept else 200)


async def _ask(client: httpx.AsyncClient, seen: Seen, prompt: str, num_tokens: int) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
    except httpx.HTTPError as error:
        seen.failed.append(f"{type(error).__name__}: {error}")
        return
    if answer.status_code == 200 and lines[-1] == "data: [DONE]":
        seen.requests += 1
    else:
        seen.failed.append(f"{answer.status_code}: {lines[-1:]}")


async def _watching(stack: Stack, seen: Seen, end: asyncio.Event) -> None:
    """Whether the pod's stream to its registry is connected, and for how long it was not."""
    down_since_s: float | None = None
    async with stack.pod.client() as client:
        while not end.is_set():
            is_up = (await stack.pod.metrics(client)).get("updraft_inference_registry_connected") == 1
            now_s = time.monotonic()
            if not is_up and down_since_s is None:
                down_since_s = now_s
                seen.streams_ended += 1
            if down_since_s is not None:
                seen.down_s = max(seen.down_s, now_s - down_since_s)
            down_since_s = None if is_up else down_since_s
            await asyncio.sleep(_LOOK_S)


async def _is_ready(pod: Pod) -> bool:
    assert pod.is_running, pod.log()[-3000:]
    with suppress(httpx.TransportError):
        async with pod.client() as client:
            is_served = (await client.get("/readyz")).status_code == 200
            return is_served and (await pod.metrics(client)).get("updraft_inference_registry_connected") == 1
    return False


async def _is_read(stack: Stack, seen: Seen) -> bool:
    """Whether the trainer has read a trace of each request that has ended."""
    async with stack.pod.client() as client:
        pod = await stack.pod.metrics(client)
    trainer = scrape(stack.trainer.metrics_port)
    seen.finished = int(total(pod, "updraft_inference_requests_total"))
    seen.dropped = int(total(pod, "updraft_inference_capture_dropped_traces_total"))
    seen.read = int(sum(total(trainer, f"updraft_trainer_samples_{how}_total") for how in ("admitted", "refused")))
    return seen.lost == 0
