"""The entry point that vLLM calls in each of its processes: hooks what starts there.

Without UPDRAFT_VLLM_SOCKET and UPDRAFT_VLLM_API_KEYS_FILE nothing is hooked. vLLM is not patched on disk: functions are
wrapped in the running processes. Two processes have a connection to the agent each: the engine's (`scheduler`: counters, ends
of requests) and the worker's (`worker`: rows, swaps); on a GPU both may be one process. The HTTP process has none. Of several
tensor-parallel ranks, the first one sends rows, and the engine's process leads the swaps of all (`updraft_vllm.lead`).
"""

import logging
import os
import sys
import uuid
from collections.abc import Mapping
from typing import Any

import torch

from updraft_tap import hooks, wire
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.channel import Channel
from updraft_tap.drafting.switch import Drafting
from updraft_tap.hello import Hello, answered_policy
from updraft_tap.hooks import Binding, Hook
from updraft_tap.http.keys import KeysError
from updraft_tap.ports import certificates, rendezvous
from updraft_tap.settings import DoorSettings, Settings
from updraft_tap.swap import Swap
from updraft_tap.weights import RefusedError, ServedVersion
from updraft_vllm import configuration, names, ranks, runners
from updraft_vllm.draft import VllmDraft
from updraft_vllm.drafting import ProposalHooks, StepHooks, fixed, is_untrained, or_end
from updraft_vllm.http_process import HttpProcess
from updraft_vllm.lead import EngineThread, Leader
from updraft_vllm.ranks import Rank
from updraft_vllm.reloads import Reloads
from updraft_vllm.requests import RequestHooks
from updraft_vllm.rows import RowHooks
from updraft_vllm.runners import Runner

log = logging.getLogger(__name__)

KNOWN_VERSION = "0.32.0"
PREFIX = "UPDRAFT_VLLM_"


_SERVER = f"{PREFIX}SERVER"
"""The variable by which the processes of a server know that they are of one."""


def register() -> None:
    """Hook what starts in this process.

    Raises nothing, because that would end the server; but with a file of API keys, a server that does not ask for them must not
    start, so then it raises what is wrong.
    """
    try:
        _register()
    except Exception as error:
        log.error("Updraft cannot start: %s: %s", type(error).__name__, error)
        if os.environ.get(f"{PREFIX}API_KEYS_FILE"):
            raise


def _register() -> None:
    settings, needs_keys = Settings.from_environment(os.environ, PREFIX), bool(os.environ.get(f"{PREFIX}API_KEYS_FILE"))
    if settings is None and not needs_keys:
        log.info("Updraft is inactive because %sSOCKET is not set", PREFIX)
        return
    os.environ.setdefault(_SERVER, uuid.uuid4().hex)  # processes that this one starts inherit it
    http = HttpProcess(DoorSettings.from_environment(os.environ, PREFIX), settings.socket if settings else "")
    http.found = found = hooks.install(http.bindings)
    certificates.follow()
    rendezvous.keep_local()
    if needs_keys:
        client = hooks.install((Binding(target=names.CLIENT, hook=_start_client, parameters=("self", "vllm_config")),))
        _refuse(_bypass() or _misfit({names.MIDDLEWARE: found[names.MIDDLEWARE], **client}))
    for target, problem in hooks.install(starts(settings, found) if settings else ()).items():
        if problem:
            log.error("Updraft cannot start with %s (vLLM %s): %s", target, configuration.version(), problem)


def _start_client(original: Hook, *args: Any, **kwargs: Any) -> None:
    """AROUND AsyncLLM.__init__. vLLM reads a configuration file after `register`, so only now is the frontend known."""
    _refuse(_bypass())
    original(*args, **kwargs)


def _refuse(problem: str) -> None:
    """Raises KeysError if there is a problem."""
    if problem:
        raise KeysError(f"API keys cannot be enforced: {problem}")


def _bypass() -> str:
    """Why clients would not pass the middleware; "" if they do."""
    if os.environ.get(names.RUST, "0") != "0":
        return f"with {names.RUST}, vLLM's frontend is not in Python; unset it"
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if names.GRPC in {*sys.modules, getattr(main, "name", "")} or "--grpc" in sys.argv:
        return "vLLM's gRPC server has no HTTP headers; leave out --grpc"
    return ""


def starts(settings: Settings, http: Mapping[str, str]) -> tuple[Binding, ...]:
    """The hooks where the scheduler and a worker start; `http` are those of the HTTP process, as they were found."""
    scheduler, worker = SchedulerPlugin(settings, http), WorkerPlugin(settings)
    return (
        Binding(target=f"{names.SCHEDULER}.__init__", hook=scheduler.start, parameters=("self", "vllm_config")),
        Binding(target=names.WORKER_STARTS, hook=worker.start, parameters=("self", "kv_cache_configs")),
    )


class SchedulerPlugin:
    """In the process of the engine."""

    def __init__(self, settings: Settings, http: Mapping[str, str]) -> None:
        self._settings = settings
        self._http = http
        self._hello = _hello("scheduler", ServedVersion())
        self._channel = Channel(
            path=settings.socket, queue_bytes=settings.queue_bytes, hello=self._hello.facts, take=self._take
        )
        self._hooks = RequestHooks(channel=self._channel)
        self._is_started = False
        self._drafting: Drafting | None = None
        self._leader: Leader | None = None
        self._no_leader = "the worker loads the drafts of this server"
        self.bindings = (
            Binding(target=f"{names.SCHEDULER}.add_request", hook=self._hooks.add, parameters=("self", "request")),
            Binding(
                target=f"{names.SCHEDULER}.update_from_output",
                hook=self._hooks.update,
                parameters=("self", "scheduler_output", "model_runner_output"),
            ),
            Binding(target=f"{names.SCHEDULER}._free_request", hook=self._hooks.free, parameters=("self", "request")),
            Binding(
                target=f"{names.SCHEDULER}.set_pause_state", hook=self._hooks.pause, parameters=("self", "pause_state")
            ),
        )

    def start(self, original: Hook, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND Scheduler.__init__."""
        original(scheduler, *args, **kwargs)
        if self._is_started:
            return
        self._is_started = True
        try:
            found, parallel = hooks.install(self.bindings), scheduler.vllm_config.parallel_config
            self._hello.learn(
                hooks={**self._http, **found, **self._switch(scheduler), **self._lead(scheduler.vllm_config)},
                ranks=configuration.ranks(parallel),
                unasked=_unasked(self._http, parallel),
            )
            self._channel.problem = _misfit(found) or configuration.replicas(parallel)
        except Exception as error:  # noqa: BLE001  (it would end the server)
            self._channel.problem = f"the plugin could not start: {type(error).__name__}: {error}"
        self._channel.start()

    def _lead(self, config: Any) -> dict[str, str]:
        """Lead the swaps of several ranks. The hooks for that, and why they are not in place."""
        problem = configuration.unsupported(config)  # an executor that was not tried is not called
        if problem or not configuration.has_several(config.parallel_config):
            self._no_leader = problem or self._no_leader
            return {}
        engine = EngineThread(may_skip=self._settings.drafting != "always" and is_untrained(config))
        found = hooks.install(engine.bindings)
        self._no_leader = _misfit(found)
        self._leader = None if self._no_leader else Leader(engine, self._channel.reply)
        return found

    def _switch(self, scheduler: Any) -> dict[str, str]:
        """Let the scheduler ask before each step whether it drafts. By its attribute, why it does not; "" if it does."""
        if self._settings.drafting == "always":
            return {}
        try:
            problem = fixed(scheduler) or self._limit(scheduler)
        except Exception as error:  # noqa: BLE001  (capture does not need it)
            problem = f"{type(error).__name__}: {error}"
        if problem:
            log.warning("Updraft cannot turn drafting off: %s", problem)
        return {f"{names.SCHEDULER}.{names.LENGTHS}": problem}

    def _limit(self, scheduler: Any) -> str:
        tell = self._channel.reply if self._settings.drafting == "auto" else None
        drafting = Drafting(is_untrained=is_untrained(scheduler.vllm_config), tell=tell)
        steps = StepHooks(drafting, hooks.logged_guard(log, "cannot switch drafting"))
        problem = _misfit(hooks.install(steps.bindings))
        if not problem:
            steps.limit(scheduler)
            self._drafting = drafting
        return problem

    def _take(self, message: Mapping[str, Any]) -> None:
        if message.get("kind") == "answer":
            self._hooks.forget()
            if self._drafting is not None:
                self._drafting.forget()
        elif message.get("kind") == "policy":
            self._hooks.policy = answered_policy(message, self._channel)
        elif message.get("kind") == "load":
            if self._leader is None:
                self._channel.reply({"kind": "loaded", "version": message.get("version"), "refusal": self._no_leader})
            else:
                self._leader.load(message)


class WorkerPlugin:
    """In the process of a worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._served = ServedVersion()
        self._hello = _hello("worker", self._served)
        self._channel = Channel(
            path=settings.socket, queue_bytes=settings.queue_bytes, hello=self._hello.facts, take=self._take
        )
        self._device = torch.device("cpu")
        self._between = BetweenSteps(self._synchronize)
        self._rows: RowHooks | None = None
        self._rank = Rank(self._synchronize)
        self._swap: Swap | None = None
        self._no_swap = "the worker is starting"
        self._is_started = self._is_warm = False
        self._is_first_rank = True
        self._has_several = False
        """It is one of several tensor-parallel ranks."""

    def start(self, original: Hook, wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND WorkerWrapperBase.initialize_from_config, after which the models are loaded.

        The agent is called later, when the warm-up is over: a swap would end the recording of a CUDA graph.
        """
        result = original(wrapper, *args, **kwargs)
        if not self._is_started:
            self._is_started = True
            try:
                self._start(wrapper.worker, wrapper.vllm_config)
            except Exception as error:  # noqa: BLE001  (it would end the server)
                self._channel.problem = self._no_swap = f"the plugin could not start: {type(error).__name__}: {error}"
                if self._is_first_rank:
                    self._channel.start()
            self._rank.swap, self._rank.no_swap, self._rank.changed = self._swap, self._no_swap, self._channel.restate
            setattr(wrapper.worker, ranks.ATTRIBUTE, self._rank)
        return result

    def warmed_up(self, original: Hook, worker: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND compile_or_warm_up_model of a worker, its last act before it serves."""
        result = original(worker, *args, **kwargs)
        if not self._is_warm and self._is_first_rank:
            self._is_warm = True
            self._channel.start()
        return result

    def bindings(self, kind: Runner, rows: RowHooks) -> tuple[Binding, ...]:
        """The hooks of a kind of runner."""
        base = names.FIRST_RUNNER if kind is runners.FIRST else names.SECOND_RUNNER
        return (
            Binding(target=f"{base}.execute_model", hook=rows.execute, parameters=("self", "scheduler_output")),
            Binding(target=f"{base}.sample_tokens", hook=rows.sample_tokens, parameters=("self", "grammar_output")),
            Binding(target=f"{base}.{kind.sample}", hook=rows.sample, parameters=kind.sample_parameters),
        )

    def row_hooks(self, kind: Runner) -> RowHooks:
        return RowHooks(
            channel=self._channel,
            between=self._between,
            served=self._served,
            runner=kind,
            top_k=self._settings.top_k,
        )

    def _start(self, worker: Any, config: Any) -> None:
        self._is_first_rank = worker.rank == 0  # it tells the agent for all ranks
        name = f"{type(worker).__module__}.{type(worker).__qualname__}"
        self._hook(worker.model_runner, config, name)
        warm_up = Binding(target=f"{name}.compile_or_warm_up_model", hook=self.warmed_up, parameters=("self",))
        unbound = _misfit(hooks.install((warm_up,)))
        if unbound:
            raise RefusedError(unbound)

    def _hook(self, runner: Any, config: Any, worker: str) -> None:
        kind, self._device = _kind(runner), torch.device(runner.device)
        self._rows = rows = self.row_hooks(kind)
        self._has_several = configuration.has_several(config.parallel_config)
        self._hello.learn(
            ranks=configuration.ranks(config.parallel_config),
            device=str(runner.device),
            loader="scheduler" if self._has_several else "worker",
        )
        problem = configuration.unsupported(config)
        if problem:
            self._channel.problem = self._no_swap = problem
            return
        found = hooks.install(self.bindings(kind, rows))
        if self._settings.drafting != "always" and is_untrained(config):
            guard = or_end if self._has_several else hooks.logged_guard(log, "cannot switch drafting")
            proposals = ProposalHooks(runner=kind, served=self._served, guard=guard)
            proposals.is_on = not self._has_several
            if problem := _misfit(hooks.install(proposals.bindings)):
                log.warning("Updraft cannot skip the untrained draft: %s", problem)
            else:
                self._rank.proposals = proposals
        self._hello.learn(hooks=found, unhooked=rows.guard.unhooked)
        model = kind.draft_model(runner)
        if kind is runners.SECOND:
            _wrap_logits(runner.model, rows.compute_logits)
        self._channel.problem = self._no_swap = _misfit(found)
        if self._no_swap:
            return
        self._hello.learn(
            steps=int(config.speculative_config.num_speculative_tokens),
            aux_size=int(model.model.fc_input_size),
            vocab_size=int(config.model_config.get_vocab_size()),
            dtype=wire.NAMES[config.model_config.dtype],
            quantization=str(getattr(config.model_config, "quantization", None) or ""),
        )
        try:
            is_compiled = not config.model_config.enforce_eager
            draft = VllmDraft(model, runner.model, dtype=config.model_config.dtype, is_compiled=is_compiled)
        except RefusedError as error:
            self._no_swap = str(error)
            return
        swap = Swap(
            draft=draft,
            between=self._between,
            served=self._served,
            reply=self._rank.answer if self._has_several else self._channel.reply,
            lockstep=self._rank if self._has_several else None,
        )
        reloads = hooks.install(Reloads(swap, self._channel.restate).bindings(worker))
        self._hello.learn(hooks={**found, **reloads})
        self._no_swap = _misfit(reloads)
        self._swap = None if self._no_swap else swap

    def _synchronize(self) -> None:
        """Wait for the device of this rank; a swap's thread would wait for the first one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _take(self, message: Mapping[str, Any]) -> None:
        if message.get("kind") == "answer" and self._rows is not None:
            self._rows.forget()
        elif message.get("kind") == "policy":
            policy = answered_policy(message, self._channel)
            if self._rows is not None:
                self._rows.policy = policy
        elif message.get("kind") == "load":
            refusal = self._no_swap or (_LED if self._has_several else "")
            if self._swap is None or refusal:
                self._channel.reply({"kind": "loaded", "version": message.get("version"), "refusal": refusal})
            else:
                self._swap.load(message)


_LED = "the engine's process loads the drafts of several ranks, but the agent asked a worker: update the agent"


def _hello(role: str, served: ServedVersion) -> Hello:
    server, version = os.environ.get(_SERVER, ""), configuration.version()
    return Hello(role, server=server, engine=names.ENGINE, version=version, served=served)


def _kind(runner: Any) -> Runner:
    of = {f"{one.__module__}.{one.__qualname__}" for one in type(runner).__mro__}
    if names.FIRST_RUNNER in of:
        return runners.FIRST
    if names.SECOND_RUNNER in of:
        return runners.SECOND
    raise ValueError(f"{type(runner).__name__} is none of the model runners of vLLM {KNOWN_VERSION}")


def _wrap_logits(model: Any, hook: Hook) -> None:
    original = model.compute_logits
    model.compute_logits = lambda *args, **kwargs: hook(original, *args, **kwargs)


def _misfit(found: Mapping[str, str]) -> str:
    unbound = [problem for problem in found.values() if problem]
    return (
        f"hooks do not fit vLLM {configuration.version()} (tested with {KNOWN_VERSION}): {'; '.join(unbound)}"
        if unbound
        else ""
    )


def _unasked(http: Mapping[str, str], parallel: Any) -> str:
    """Why no request can be asked whether it may be captured; only the client in use counts."""
    used = (names.MIDDLEWARE, names.SENDS[parallel.data_parallel_size > 1])
    misfit = _misfit({name: http.get(name, "") for name in used})
    return f"requests are counted but not captured: {misfit}" if misfit else ""
