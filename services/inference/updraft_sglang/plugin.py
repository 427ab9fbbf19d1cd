"""The entry point that SGLang calls in each of its processes: installs hooks, and connects the scheduler to the agent.

Without UPDRAFT_SGLANG_SOCKET and UPDRAFT_SGLANG_API_KEYS_FILE, nothing is hooked. SGLang is not patched on disk. One process
has the requests and the model of a rank, so it has both roles, with one connection to the agent for each: `scheduler`
(counters, ends of requests) and `worker` (rows, swaps). All tensor-parallel ranks do the same, so only rank 0 connects, in the
last stage of a pipeline, which has the states.
"""

import logging
import os
import secrets
import uuid
from collections.abc import Mapping
from functools import cache, partial
from importlib import metadata
from typing import Any

import torch

from updraft_sglang import names
from updraft_sglang.draft import SglangDraft
from updraft_sglang.drafting import DraftingHooks
from updraft_sglang.http_process import HttpProcess, misfit, refuse, unasked
from updraft_sglang.reloads import Reloads, UnprovedDraft
from updraft_sglang.requests import RequestHooks
from updraft_sglang.rows import RowHooks
from updraft_sglang.selection import Selection
from updraft_sglang.weights import answered, served, share_vocabulary
from updraft_tap import hooks, wire
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.channel import Channel
from updraft_tap.hello import Hello, answered_policy
from updraft_tap.hooks import Binding, Hook
from updraft_tap.http import certificates
from updraft_tap.settings import DoorSettings, Settings
from updraft_tap.swap import Swap
from updraft_tap.weights import RefusedError

log = logging.getLogger(__name__)

KNOWN_VERSION = "0.5.23"
PREFIX = "UPDRAFT_SGLANG_"

_KEYS = f"{PREFIX}API_KEYS_FILE"
_SERVER = f"{PREFIX}SERVER"
"""The variable with which processes of the same server recognise each other."""
_SECRET = f"{PREFIX}SECRET"
"""The variable with which they share the seal of their marks."""
APP = f"{PREFIX}HTTP_APP"
"""The variable that names SGLang's own application, for several HTTP processes."""
_APP_OF_SGLANG = f"{names.HTTP}:app"
_APP_OF_OURS = "updraft_sglang.worker_app:app"


def register() -> None:
    """Install the hooks of this process.

    After an error, the server runs without Updraft. But with a file of API keys, a server that does not require them must not
    start. Then this raises SystemExit, because SGLang only logs other exceptions of a plugin.
    """
    try:
        _register()
    except Exception as error:
        log.exception("Updraft cannot start")
        if os.environ.get(_KEYS):
            refuse(f"{type(error).__name__}: {error}")


def _register() -> None:
    settings = Settings.from_environment(os.environ, PREFIX)
    if settings is None and not os.environ.get(_KEYS):
        log.info("Updraft is inactive because %sSOCKET is not set", PREFIX)
        return
    _name_server()
    http = http_process()
    _name_application()
    http.found = found = hooks.install(http.bindings)
    certificates.follow()
    if http.needs_keys:
        refuse(misfit(found))
    if settings is not None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415  (only if active)

        for binding in Plugin(settings, found).bindings:
            HookRegistry.register(binding.target, binding.hook, HookType.AROUND)


def _name_server() -> None:
    """Set variables that child processes inherit."""
    os.environ.setdefault(_SERVER, uuid.uuid4().hex)
    os.environ.setdefault(_SECRET, secrets.token_hex())


def _name_application() -> None:
    """Let each of several HTTP processes import our application, which adds the middleware."""
    if os.environ.get(names.APP_PATH) != _APP_OF_OURS:
        os.environ[APP] = os.environ.get(names.APP_PATH, _APP_OF_SGLANG)
        os.environ[names.APP_PATH] = _APP_OF_OURS


@cache
def http_process() -> HttpProcess:
    """The hooks of this process if it is an HTTP process. Raises KeysError or ValueError if the settings are invalid."""
    door = DoorSettings.from_environment(os.environ, PREFIX)
    socket = os.environ.get(f"{PREFIX}SOCKET", "")
    return HttpProcess(door, os.environ[_SECRET], version=_sglang(), socket=socket)


class Plugin:
    """The hooks in the scheduler's process. `http`: those of the HTTP process, and why they are not in place."""

    def __init__(self, settings: Settings, http: Mapping[str, str]) -> None:
        self._http = http
        self._selection = Selection(os.environ.get(_SECRET, ""))
        self._hello = {role: _hello(role) for role in ("scheduler", "worker")}
        self.scheduler = self._channel(settings, "scheduler")
        self.worker = self._channel(settings, "worker")
        self._between = BetweenSteps(self._synchronize)
        self._requests = RequestHooks(channel=self.scheduler, selection=self._selection, served=served)
        self._rows = RowHooks(
            channel=self.worker,
            selection=self._selection,
            between=self._between,
            served=served,
            top_k=settings.top_k,
        )
        self._settings = settings
        self._drafting = DraftingHooks(
            served=served,
            guard=hooks.logged_guard(log, "cannot switch drafting"),
            tell=self.scheduler.reply if settings.drafting == "auto" else None,
        )
        self._reloads = Reloads()
        self._device: torch.device | None = None
        self._swap: Swap | None = None
        self._no_swap = "the worker is starting"
        self._of_requests = _of_requests(self._requests)
        self._of_rows = _of_rows(self._rows)
        self._of_load = Binding(target=names.UPDATE, hook=answered, parameters=("self", "named_tensors", "load_format"))
        self.bindings = (
            Binding(target=names.START, hook=self.start, parameters=("self",)),
            *self._of_requests,
            *self._of_rows,
            *self._reloads.bindings,
            self._of_load,
            *(self._drafting.bindings if settings.drafting != "always" else ()),
        )
        """All hooks to register."""

    def start(self, original: Hook, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND Scheduler.__init__: once its workers exist, share the draft's vocabulary, check the hooks and connect."""
        original(scheduler, *args, **kwargs)
        try:
            share_vocabulary(scheduler.draft_worker)
        except AttributeError as error:
            log.error("Updraft cannot exchange draft vocabularies (SGLang %s): %s", _sglang(), error)
        try:
            if not _is_sender():
                return
            if _of_several_ranks():
                self._reloads.watch(UnprovedDraft(served), self.worker.restate)
            self._start(scheduler)
        except Exception as error:  # noqa: BLE001  (it would crash the server)
            problem = f"the plugin could not start: {type(error).__name__}: {error}"
            self.scheduler.problem = self.worker.problem = self._no_swap = problem
        self.scheduler.start()
        self.worker.start()

    def _start(self, scheduler: Any) -> None:
        switch = {} if self._settings.drafting == "always" else {names.WORKER: self._drafting.problem}
        for problem in filter(None, switch.values()):
            log.warning("Updraft cannot turn drafting off: %s", problem)
        requests, rows = hooks.states(self._of_requests), hooks.states(self._of_rows)
        self._hello["scheduler"].learn(
            ranks=_ranks(),
            hooks={**self._http, **requests, **switch},
            unhooked=self._requests.guard.unhooked,
            unasked=unasked(self._http),
        )
        self.scheduler.problem = _misfit(requests) or _replicas()
        self._requests.is_active = not self.scheduler.problem
        reloads = hooks.states(self._reloads.bindings)
        self._hello["worker"].learn(ranks=_ranks(), hooks={**rows, **reloads}, unhooked=self._rows.guard.unhooked)
        self.worker.problem = self._no_swap = _misfit(rows) or _replicas() or _unsupported(scheduler.draft_worker)
        if not self.worker.problem:
            self._hello["worker"].learn(**_facts(scheduler.draft_worker))
            self._no_swap = _misfit(reloads) or self._prepare_swap(scheduler.draft_worker)

    def _prepare_swap(self, worker: Any) -> str:
        """Why this process cannot swap drafts; "" if it can."""
        if several := _of_several_ranks():
            return several
        try:
            draft = SglangDraft(worker.draft_worker.draft_runner.model, worker.target_worker.model_runner.model)
        except RefusedError as error:
            return str(error)
        self._device = draft.device
        self._swap = Swap(draft=draft, between=self._between, served=served, reply=self.worker.reply)
        self._reloads.watch(self._swap, self.worker.restate)
        return ""

    def _synchronize(self) -> None:
        """Name the device, because the thread of a swap has another current device than the scheduler's thread."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _channel(self, settings: Settings, role: str) -> Channel:
        return Channel(
            path=settings.socket,
            queue_bytes=settings.queue_bytes,
            hello=self._hello[role].facts,
            take=partial(self._take, role),
        )

    def _take(self, role: str, message: Mapping[str, Any]) -> None:
        channel = self.scheduler if role == "scheduler" else self.worker
        match message.get("kind"):
            case "answer":
                self._selection.forget()
                if role == "scheduler":
                    self._requests.forget()
                    self._drafting.forget()
            case "policy":
                self._selection.policy = answered_policy(message, channel)
            case "load" if self._swap is not None:
                self._swap.load(message)
            case "load":
                channel.reply({"kind": "loaded", "version": message.get("version"), "refusal": self._no_swap})


def _of_requests(body: RequestHooks) -> tuple[Binding, ...]:
    scheduler = names.SCHEDULER
    return (
        Binding(target=f"{scheduler}.handle_generate_request", hook=body.add, parameters=("self", "recv_req")),
        Binding(target=f"{scheduler}.process_batch_result", hook=body.step, parameters=("self", "batch", "result")),
        Binding(target=f"{scheduler}.continue_generation", hook=body.resume, parameters=("self", "recv_req")),
        Binding(target=f"{scheduler}.send_abort_output", hook=body.abort, parameters=("self", "abort_req", "req")),
        Binding(target=names.STREAM, hook=body.stream, parameters=("self", "reqs", "return_logprob", "skip_req")),
        Binding(target=names.JUDGE, hook=body.judge, parameters=("self", "result", "batch")),
    )


def _of_rows(body: RowHooks) -> tuple[Binding, ...]:
    return (
        Binding(target=names.FORWARD, hook=body.forward, parameters=("self", "batch")),
        Binding(
            target=names.VERIFY,
            hook=body.verify,
            parameters=("verify_input", "batch", "logits_output"),
            called_as=(names.VERIFY_AS_CALLED,),
        ),
        Binding(target=names.PREFILL, hook=body.prefill, parameters=("self", "logits_output", "forward_batch")),
    )


def _hello(role: str) -> Hello:
    return Hello(role, server=os.environ.get(_SERVER, ""), engine=names.ENGINE, version=_sglang(), served=served)


def _misfit(found: Mapping[str, str]) -> str:
    problem = misfit(found)
    return f"hooks do not fit SGLang {_sglang()} (tested with {KNOWN_VERSION}): {problem}" if problem else ""


def _unsupported(worker: Any) -> str:
    """Why no rows can be captured; "" if they can."""
    if worker is None:
        return "capture requires --speculative-algorithm EAGLE3"
    own = getattr(type(worker), "forward_batch_generation", None)
    if own is not hooks.resolved(names.FORWARD):
        return f"capture requires EAGLE3, but this server speculates with {type(worker).__name__}"
    if not worker.speculative_algorithm.is_eagle3():
        return "capture requires --speculative-algorithm EAGLE3, for its auxiliary hidden states"
    if worker.topk != 1:
        return f"capture requires --speculative-eagle-topk 1, but it is {worker.topk}"
    return ""


def _facts(worker: Any) -> dict[str, Any]:
    from sglang.srt.speculative.eagle_utils import get_draft_input_from_target_hidden_dim  # noqa: PLC0415  (SGLang's)

    config = worker.target_worker.model_runner.model_config
    return {
        "device": str(worker.target_worker.model_runner.device),
        "steps": int(worker.speculative_num_steps),
        "aux_size": int(get_draft_input_from_target_hidden_dim(worker.draft_worker.draft_runner)),
        "vocab_size": int(config.vocab_size),
        "dtype": wire.NAMES[config.dtype],
        "quantization": str(getattr(config, "quantization", None) or ""),
    }


def _sglang() -> str:
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _is_sender() -> bool:
    parallel = _parallel()
    is_first = parallel.tp_rank == 0 and (parallel.dp_rank or 0) == 0
    return bool(is_first and parallel.pp_rank == parallel.pp_size - 1)


def _replicas() -> str:
    parallel = _parallel()
    if parallel.attn_dp_size > 1:
        return "capture does not support data-parallel attention (--enable-dp-attention)"
    if parallel.dp_size > 1:
        return f"capture does not support {parallel.dp_size} replicas in one server (--dp-size): start one server per replica"
    return ""


def _of_several_ranks() -> str:
    size = _parallel().tp_size
    return f"the plugin swaps drafts of one rank of SGLang, but this server has {size} ranks" if size > 1 else ""


def _ranks() -> dict[str, int]:
    parallel = _parallel()
    return {"tensor": int(parallel.tp_size), "pipeline": int(parallel.pp_size), "data": int(parallel.dp_size)}


def _parallel() -> Any:
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415  (SGLang's)

    return get_parallel()
