"""Starts a server on the clients' port, runs the agent beside it, and stops after it.

The server stops first, after its running requests, so that the agent still captures them. If the server exits by itself, this
process exits too, and its supervisor restarts both.
"""

import asyncio
import shlex
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import httpx

from updraft_chassis.errors import Conflict, InvalidInput, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_chassis.ports import is_free
from updraft_chassis.settings import variable
from updraft_inference.launch import admin_key, interpreter, sglang_arguments, vllm_arguments
from updraft_inference.launch.sglang_arguments import SglangOptions
from updraft_inference.launch.started_server import Plan, StartedServer, started
from updraft_inference.launch.vllm_arguments import VllmOptions
from updraft_inference.settings import InferenceSettings
from updraft_inference.sidecar import composition
from updraft_inference.tap.server_kind import SGLANG, VLLM, ServerKind

_HEALTH_S = 2.0


async def serve(settings: InferenceSettings, environ: Mapping[str, str], stop: Stop) -> None:
    """Run both until `stop`. Raises UpdraftError if the server does not start, or exits by itself."""
    plan = await _plan(settings, lambda: stop.requested)
    if plan.kind is SGLANG:
        settings = await asyncio.to_thread(attached, settings)
    async with started(plan, environ) as server:
        beside = settings.model_copy(update={"initial_draft": server.draft})
        may_restart = settings.vllm_restarts if plan.kind is VLLM else settings.sglang_restarts
        restart = server.restart if may_restart else None
        ended = Stop()
        async with asyncio.TaskGroup() as tasks:
            serving = composition.serve(beside, ended, restart=restart, is_starting=lambda: server.is_starting)
            agent = tasks.create_task(serving)
            failure = await _attend(server, stop)
            await server.stop()
            ended.request()
            await agent
    if failure is not None:
        raise failure


async def _attend(server: StartedServer, stop: Stop) -> UpdraftError | None:
    """Wait until `stop` is requested; else return why the server ended by itself."""
    try:
        await server.ready()
        await server.ended(stop)
    except UpdraftError as error:
        return None if stop.requested else error
    return None


async def _plan(settings: InferenceSettings, is_stopped: Callable[[], bool]) -> Plan:
    kind = VLLM if settings.engine == "vllm" else SGLANG
    python = settings.server_python
    assert python is not None
    found = await interpreter.installed(kind, python)
    if not is_free(settings.port):
        raise Conflict(f"port {settings.port} is taken; choose another with {variable(InferenceSettings, 'port')}")
    arguments = _vllm(settings, is_for_cpu=found.is_for_cpu) if kind is VLLM else _sglang(settings)
    arguments(Path())  # so that invalid arguments are refused before anything is written
    return Plan(
        kind=kind,
        python=python,
        model=settings.model,
        folder=settings.data_dir / settings.engine,
        shape=settings.shape,
        socket=settings.socket_path,
        arguments=arguments,
        is_up=health(f"{_url(settings)}{kind.health}"),
        is_stopped=is_stopped,
        drain_s=settings.drain_seconds,
    )


def _vllm(settings: InferenceSettings, *, is_for_cpu: bool) -> Callable[[Path], list[str]]:
    options = vllm_options(settings, is_for_cpu=is_for_cpu)
    return lambda draft: vllm_arguments.serving(options, draft)


def _sglang(settings: InferenceSettings) -> Callable[[Path], list[str]]:
    options = sglang_options(settings)
    return lambda draft: sglang_arguments.serving(options, draft)


def sglang_options(settings: InferenceSettings) -> SglangOptions:
    """How SGLang serves by these settings. Raises InvalidInput if the extra arguments are not valid shell syntax."""
    chosen = settings.model_fields_set
    return SglangOptions(
        model=settings.model.resolve(),
        name=settings.model_name,
        host=settings.host,
        port=settings.port,
        dtype=settings.dtype,
        num_steps=settings.lookahead,
        num_slots=settings.num_slots if "num_slots" in chosen else None,
        max_context=settings.max_context if "max_context" in chosen else None,
        config=admin_key_file(settings),
        extra=[*_tls(settings), *_extra(settings.sglang_args, SGLANG)],
    )


def admin_key_file(settings: InferenceSettings) -> Path | None:
    """The file from which SGLang reads its admin key. None if the extra arguments have a key, or their own `--config`, because
    SGLang reads only one. Raises InvalidInput for arguments with which no agent could work."""
    words = _extra(settings.sglang_args, SGLANG)
    names = {word.partition("=")[0] for word in words}
    if any(word.startswith("--config=") for word in words):
        raise InvalidInput("SGLang ignores --config=FILE; write --config FILE")
    if "--api-key" in names:
        raise InvalidInput(
            "with --api-key, SGLang refuses the agent and the probes; set UPDRAFT_SGLANG_API_KEYS_FILE instead"
        )
    if names & {"--admin-api-key", "--config"}:
        return None
    if settings.sglang_admin_key.get_secret_value():
        return _chosen_key_file(settings)
    return (settings.sglang_admin_key_file or settings.data_dir / settings.engine / "admin-key.yaml").resolve()


def _chosen_key_file(settings: InferenceSettings) -> Path:
    """The file for a key that a setting chose. It is another one than that of the random key, which stays as it was."""
    return (settings.data_dir / settings.engine / "chosen-admin-key.yaml").resolve()


def attached(settings: InferenceSettings) -> InferenceSettings:
    """The settings of the agent beside SGLang: the server's URL, and its admin key, whose file is written if there is none.
    The file of a key that is not chosen any more is removed.

    Raises InvalidInput if the file is not valid."""
    update: dict[str, object] = {"attach": _url(settings)}
    if (file := admin_key_file(settings)) != _chosen_key_file(settings):
        admin_key.remove(_chosen_key_file(settings))
    if file is not None:
        admin_key.write(file, settings.sglang_admin_key.get_secret_value())
        admin_key.read(file)
        update["sglang_admin_key_file"] = file
    return settings.model_copy(update=update)


def vllm_options(settings: InferenceSettings, *, is_for_cpu: bool) -> VllmOptions:
    """How vLLM serves by these settings. Raises InvalidInput if the extra arguments are not valid shell syntax."""
    chosen = settings.model_fields_set
    return VllmOptions(
        model=settings.model.resolve(),
        name=settings.model_name,
        host=settings.host,
        port=settings.port,
        dtype=settings.dtype,
        num_steps=settings.lookahead,
        num_seqs=settings.num_slots if "num_slots" in chosen else None,
        max_context=settings.max_context if "max_context" in chosen else None,
        is_eager=is_for_cpu,
        drain_s=settings.drain_seconds,
        extra=[*_tls(settings), *_extra(settings.vllm_args, VLLM)],
    )


def _tls(settings: InferenceSettings) -> list[str]:
    """Both servers have the same options. Updraft's plugin in them reads the files again when they change."""
    if settings.tls is None:
        return []
    files = {"--ssl-certfile": settings.tls.cert_file, "--ssl-keyfile": settings.tls.key_file}
    return [word for option, file in files.items() for word in (option, str(file.resolve()))]


def _extra(text: str, kind: ServerKind) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidInput(f"{kind.setting('ARGS')} is not valid shell syntax: {error}") from error


def _url(settings: InferenceSettings) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - compared, not bound
    return f"{'http' if settings.tls is None else 'https'}://{host}:{settings.port}"


def health(url: str) -> Callable[[], Awaitable[bool]]:
    """Whether this address answers with success."""

    async def is_up() -> bool:
        try:
            # It is on this machine, and no certificate names it so.
            async with httpx.AsyncClient(timeout=_HEALTH_S, trust_env=False, verify=False) as client:  # noqa: S501
                return (await client.get(url)).is_success
        except httpx.HTTPError:
            return False

    return is_up
